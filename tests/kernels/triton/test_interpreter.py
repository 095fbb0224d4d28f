"""The tests of `interpreted/`, each file in a process in which Triton interprets its kernels.

Triton decides at its own import whether it compiles or interprets, so that both cannot happen in
one process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("check_products.py", "not slow"),
        ("check_traffic.py", "not slow"),
        ("check_quantised_cores.py", "not slow"),
        ("check_long_rows.py", "not slow"),
        ("check_experts.py", "not slow"),
        ("check_embedding.py", "not slow"),
        pytest.param("check_products.py", "slow", marks=pytest.mark.slow),
        pytest.param("check_quantised_cores.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(name, marker):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    command.append(str(FOLDER / name))
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_hastened_it_computes_the_same():
    """Bit by bit, in every variant; what it leaves out are checks that it has off. After a launch
    Triton's language is what it was."""
    code = """
import torch
from triton import language
from benchmarks.gpu_steps.interpreter import hasten
from tests.kernels.test_kernels import make_case
from tests.kernels.triton.interpreted.cases import VARIANTS, run

torch.set_num_threads(1)
before = dict(vars(language))
found = []
for _ in range(2):
    for config, _ in VARIANTS.values():
        case = make_case(n_tokens=3, d_in=33, d_out=(40,), ranks=(3, 13), dtype=torch.bfloat16)
        found.append(run(case, config))
        assert not torch.equal(found[-1], case.y)
        assert vars(language) == before
    hasten()
half = len(found) // 2
assert all(map(torch.equal, found[:half], found[half:]))
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same\n", done.stderr


def test_not_without_the_interpreter():
    """On CPU tensors, in a process that has Triton compile: a clear error, and y as it was."""
    code = """
import torch
from tests.kernels.test_kernels import make_case
from vllm_jd.kernels.triton import backend
case = make_case(dtype=torch.bfloat16)
before = case.y.clone()
try:
    backend.add_adapters(case.y, case.x, case.pools, case.token_slots)
except ValueError as error:
    print(error)
assert torch.equal(case.y, before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
    )
    assert "TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_the_package_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import vllm_jd.kernels
import vllm_jd.kernels.triton.plan
import vllm_jd.kernels.triton.backend
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parents[3])
