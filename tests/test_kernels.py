"""The kernels against a float64 loop over tokens that shares nothing with them."""

import logging
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_jd import kernels
from vllm_jd.kernels import ModulePools, cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
MIN_EXPONENT = {torch.float32: -126, torch.bfloat16: -126, torch.float16: -14}

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_compiler)])
def backend(request, monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", request.param)
    return request.param


@pytest.fixture
def cpu_kernel(monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", "cpu")


@pytest.fixture
def fresh_library():
    """Forget which kernel was loaded, before and after."""
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    pools: ModulePools
    x: torch.Tensor
    y: torch.Tensor
    token_slots: torch.Tensor

    def run(self, tokens=None):
        """Result for all tokens, or for those given, in a call of their own."""
        take = slice(None) if tokens is None else tokens
        y, x, slots = self.y[take].clone(), self.x[take], self.token_slots[: len(self.x)][take]
        kernels.add_adapters(y, x, self.pools, slots)
        return y


def make_case(
    seed=0,
    n_tokens=20,
    d_in=33,
    d_out=(20, 7),
    ranks=(3, 8),
    depth=1,
    slots=6,
    clusters=3,
    dtype=torch.float32,
    layout="mixed",
    strided=False,
):
    """Slots with random ranks, shared and private bases, some identity cores, some unused rows."""
    g = torch.Generator().manual_seed(seed)

    def randint(low, high):
        return int(torch.randint(low, high, (), generator=g))

    def randn(rows, columns):
        """A matrix of which each row is followed by memory that is not its own."""
        extra = 5 if strided else 0
        full = torch.full((rows, columns + extra), float("nan"), dtype=dtype)
        full[:, :columns] = torch.randn(rows, columns, generator=g).to(dtype)
        return full[:, :columns]

    max_rank = ranks[1]
    core_length = len(d_out) * depth * max_rank**2
    rows = torch.zeros(slots, len(d_out), depth, 5, dtype=torch.int32)
    shared = [[randint(*ranks_range(ranks)) for _ in range(clusters)] for _ in d_out]
    for slot in range(slots):
        for s in range(len(d_out)):
            for k in range(depth):
                place = randint(0, clusters + 1)
                if place == clusters:  # private rows, overlapping the shared ones or not
                    rank = randint(*ranks_range(ranks))
                    starts = [randint(0, clusters * max_rank + 1) for _ in range(2)]
                else:
                    rank, starts = shared[s][place], [place * max_rank] * 2
                if randint(0, 4) == 0 and (k > 0 or slot > 0):
                    rank = 0
                core_slot = randint(-1, slots)
                offset = (s * depth + k) * max_rank**2
                rows[slot, s, k] = torch.tensor([*starts, rank, core_slot, offset])
    pool_rows = (clusters + 1) * max_rank
    pools = ModulePools(
        v=randn(pool_rows, d_in) / d_in**0.5,
        u=[randn(pool_rows, width) / max_rank**0.5 for width in d_out],
        cores=randn(slots, core_length) / max_rank**0.5,
        rows=rows,
    )
    if layout == "equal":
        token_slots = torch.zeros(n_tokens)
    elif layout == "distinct":
        token_slots = torch.arange(n_tokens) % slots
    elif layout == "runs":
        lengths = torch.randint(1, 12, (n_tokens,), generator=g)
        picks = torch.randint(-1, slots, (n_tokens,), generator=g)
        token_slots = picks.repeat_interleave(lengths)[:n_tokens]
    else:
        token_slots = torch.randint(-1, slots, (n_tokens,), generator=g)
    padding = torch.full((3,), slots + 100)  # longer than x: never read
    token_slots = torch.cat([token_slots, padding]).int()
    return Case(pools, randn(n_tokens, d_in), randn(n_tokens, sum(d_out)), token_slots)


def ranks_range(ranks):
    return ranks[0], ranks[1] + 1


def oracle(case):
    """(result, sum of the magnitudes that it was summed from), float64, one token at a time."""
    pools = case.pools
    result, magnitude = case.y.double(), case.y.double().abs()
    for t in range(len(case.x)):
        slot = int(case.token_slots[t])
        if slot < 0:
            continue
        x = case.x[t].double()
        column = 0
        for s, u in enumerate(pools.u):
            part = slice(column, column + u.shape[1])
            column += u.shape[1]
            for v_start, u_start, rank, core_slot, offset in pools.rows[slot, s].tolist():
                if rank == 0:
                    continue
                v_part = pools.v[v_start : v_start + rank].double()
                u_part = u[u_start : u_start + rank].double()
                core = torch.eye(rank, dtype=torch.float64)
                if core_slot >= 0:
                    core = pools.cores[core_slot, offset : offset + rank**2].double()
                    core = core.view(rank, rank)
                result[t, part] += u_part.T @ (core @ (v_part @ x))
                magnitude[t, part] += u_part.abs().T @ (core.abs() @ (v_part.abs() @ x.abs()))
    return result, magnitude


def assert_close(y, case):
    """float32 sums and then one rounding to y's type: half a unit in the last place."""
    result, magnitude = oracle(case)
    bits, lowest = MANTISSA_BITS[y.dtype], MIN_EXPONENT[y.dtype]
    largest = torch.maximum(result.abs(), y.double().abs()).clamp(min=2.0**lowest)
    unit = 2.0 ** (torch.floor(torch.log2(largest)) - bits)
    error = (y.double() - result).abs()
    assert (error <= 0.5 * unit + 2e-6 * magnitude).all(), float((error / unit).max())
    without = case.token_slots[: len(case.x)] < 0
    assert torch.equal(y[without], case.y[without])


cases = st.builds(
    make_case,
    seed=st.integers(0, 2**20),
    n_tokens=st.integers(0, 70),
    d_in=st.sampled_from([1, 7, 16, 31, 64, 100, 200]),
    d_out=st.lists(st.sampled_from([1, 13, 16, 48, 100, 300]), min_size=1, max_size=3),
    ranks=st.sampled_from([(1, 1), (1, 3), (4, 4), (13, 13), (16, 16), (1, 40)]),
    depth=st.integers(1, 3),
    slots=st.sampled_from([1, 5, 70]),
    clusters=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["equal", "distinct", "runs", "mixed"]),
    strided=st.booleans(),
)
property_test = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@property_test
@given(case=cases)
def test_any_shape(backend, case):
    assert_close(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 7, 45])
def test_typical_layer(backend, dtype, n_tokens):
    shape = {"d_in": 576, "d_out": (576, 192, 192), "ranks": (16, 16), "slots": 40, "clusters": 25}
    case = make_case(n_tokens=n_tokens, dtype=dtype, layout="distinct", **shape)
    assert_close(case.run(), case)


def test_float64_reference(monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", "reference")
    case = make_case(dtype=torch.float64, depth=2)
    assert torch.allclose(case.run(), oracle(case)[0], rtol=1e-12, atol=1e-12)


def test_only_rows_in_place_change(backend):
    """Columns of y and rows of the buffer beside those of the call stay as they were."""
    case = make_case(n_tokens=9, d_out=(13, 5), layout="equal")
    buffer = torch.full((12, 40), 3.25)
    buffer[2:11, 7:25] = case.y
    kernels.add_adapters(buffer[2:11, 7:25], case.x, case.pools, case.token_slots)
    assert_close(buffer[2:11, 7:25], case)
    buffer[2:11, 7:25] = 3.25
    assert (buffer == 3.25).all()


def test_one_basis_with_many_of_the_other(backend):
    """HydraOpt's shape: one shared V, a U for each cluster."""
    case = make_case(n_tokens=40, ranks=(8, 8), slots=12, clusters=3)
    case.pools.rows[..., 0] = 0
    case.pools.rows[..., 3] = -1
    assert_close(case.run(), case)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_same_bits_with_any_number_of_threads(cpu_kernel, two_threads, dtype, depth):
    case = make_case(
        n_tokens=300, d_in=576, d_out=(576, 192), ranks=(1, 16), depth=depth, dtype=dtype, slots=20
    )
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert_close(results[0], case)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["mixed", "runs", "equal"])
def test_same_bits_alone_and_in_any_batch(cpu_kernel, dtype, layout):
    case = make_case(
        n_tokens=67, d_in=200, d_out=(300, 33), ranks=(1, 20), depth=2, dtype=dtype, layout=layout
    )
    together = case.run()
    for t in range(67):
        assert torch.equal(case.run([t])[0], together[t])
    order = torch.randperm(67)
    assert torch.equal(case.run(order), together[order])


def test_changes_in_place_are_seen(backend):
    case = make_case(depth=2)
    case.run()
    case.pools.rows[1] = case.pools.rows[0]
    case.pools.cores.mul_(-2)
    case.pools.v[3:9].neg_()
    case.pools.u[0][4:].zero_()
    case.token_slots[:5] = 1
    assert_close(case.run(), case)


@pytest.mark.parametrize(
    ("field", "value"), [(0, 33), (0, -1), (1, 33), (1, -1), (3, 6), (4, 10**6), (4, -1)]
)
def test_index_out_of_range(backend, field, value):
    case = make_case(ranks=(8, 8), layout="equal")  # pools of 32 rows, 6 core slots
    case.pools.rows[0, 0, 0] = torch.tensor([0, 0, 8, 0, 0])
    case.pools.rows[0, 0, 0, field] = value
    before = case.y.clone()
    with pytest.raises(IndexError):
        kernels.add_adapters(case.y, case.x, case.pools, case.token_slots)
    assert torch.equal(case.y, before)


def test_slot_out_of_range(backend):
    case = make_case()
    case.token_slots[4] = 6
    with pytest.raises(IndexError, match="6"):
        case.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(20, 32)}, r"x must be \[n_tokens, 33\]"),
        ({"y": torch.zeros(19, 27)}, r"y must be \[20, 27\]"),
        ({"y": torch.zeros(20, 28)}, r"y must be \[20, 27\]"),
        ({"x": torch.zeros(20, 33, dtype=torch.float16)}, "float16"),
        ({"token_slots": torch.zeros(20, dtype=torch.int64)}, "int32"),
        ({"token_slots": torch.zeros(19, dtype=torch.int32)}, "19 entries for 20 tokens"),
    ],
)
def test_call_that_does_not_fit(backend, change, message):
    case = make_case()
    arguments = {"y": case.y, "x": case.x, "token_slots": case.token_slots} | change
    with pytest.raises(ValueError, match=message):
        kernels.add_adapters(arguments["y"], arguments["x"], case.pools, arguments["token_slots"])


@needs_compiler
def test_cpu_kernel_refuses_what_it_cannot_do(cpu_kernel):
    with pytest.raises(ValueError, match="float64"):
        make_case(dtype=torch.float64).run()
    case = make_case()
    case.x = case.x.T.contiguous().T
    with pytest.raises(ValueError, match="contiguous"):
        case.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": []}, "u needs one tensor for each slice"),
        ({"v": torch.zeros(4)}, "v must have 2 dimensions"),
        ({"v": torch.zeros(4, 6).T}, "v must be contiguous"),
        ({"cores": torch.zeros(2, 9, dtype=torch.float16)}, "cores is torch.float16"),
        ({"rows": torch.zeros(3, 2, 1, 5, dtype=torch.int32)}, "1 slices"),
        ({"rows": torch.zeros(3, 1, 1, 4, dtype=torch.int32)}, "rows must be"),
        ({"rows": torch.zeros(3, 1, 1, 5)}, "rows must be int32"),
    ],
)
def test_pools_that_do_not_fit(change, message):
    fields = {
        "v": torch.zeros(4, 6),
        "u": [torch.zeros(4, 8)],
        "cores": torch.zeros(2, 9),
        "rows": torch.zeros(3, 1, 1, 5, dtype=torch.int32),
    }
    ModulePools(**fields)
    with pytest.raises(ValueError, match=message):
        ModulePools(**fields | change)


def test_choice_of_backend(monkeypatch):
    monkeypatch.delenv("VLLM_JD_KERNEL", raising=False)
    assert kernels.backend_name("cpu") in ("cpu", "reference")
    with pytest.raises(NotImplementedError, match="Triton"):
        kernels.backend_name(torch.device("cuda", 0))
    monkeypatch.setenv("VLLM_JD_KERNEL", "reference")
    assert kernels.backend_name("cuda") == "reference"
    monkeypatch.setenv("VLLM_JD_KERNEL", "tritn")
    with pytest.raises(ValueError, match="known: reference, cpu"):
        kernels.backend_name("cpu")
    monkeypatch.setenv("VLLM_JD_KERNEL", "cpu")
    with pytest.raises(ValueError, match="cuda"):
        kernels.backend_name("cuda")


def write_compiler(path, body):
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo fake 1.0; exit; }}\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("fault", ["no compiler", "wrong CXX", "compiler fails", "no cache folder"])
def test_falls_back_with_one_warning(monkeypatch, tmp_path, caplog, fresh_library, fault):
    monkeypatch.delenv("VLLM_JD_KERNEL", raising=False)
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    if fault == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = "apt-get install g++"
    elif fault == "wrong CXX":
        monkeypatch.setenv("CXX", "g++-1")
        expected = "CXX=g++-1 was not found"
    elif fault == "compiler fails":
        compiler = write_compiler(tmp_path / "c++", "echo no such flag >&2; exit 1")
        monkeypatch.setenv("CXX", compiler)
        expected = "no such flag"
    else:
        monkeypatch.setenv("CXX", write_compiler(tmp_path / "c++", ""))
        (tmp_path / "cache").write_text("a file")
        expected = "VLLM_JD_CACHE"
    case = make_case()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(case.run(), case)
    assert kernels.backend_name("cpu") == "reference"
    assert len(caplog.records) == 1 and expected in caplog.text
    monkeypatch.setenv("VLLM_JD_KERNEL", "cpu")
    with pytest.raises(RuntimeError, match="could not be built"):
        case.run()


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    """Each sees a whole library, and one stays, though both write slowly."""
    write = f'out=$(eval echo \\${{$#}}); head -c 9999 "{cpu.build()}" > "$out"; sleep 1'
    write += f'; cat "{cpu.build()}" > "$out"'
    compiler = write_compiler(tmp_path / "slow-c++", write)
    environment = os.environ | {"CXX": compiler, "VLLM_JD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "from vllm_jd.kernels import cpu; print(cpu.isa())"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == [cpu.isa()] * 2
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instruction sets")
def test_other_instruction_sets(monkeypatch):
    """What the kernel is on older machines, as far as this one can run it."""
    sets = {"x86-64": "portable", "x86-64-v3": "avx2", "x86-64-v4": "avx512"}
    needs = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}
    features = cpu._cpu_features().split()
    sets = {name: isa for name, isa in sets.items() if needs[name] in features}

    def build(name):
        flags = ["-O0", *(f for f in cpu.FLAGS if f not in ("-O3", "-march=native"))]
        return cpu.build((*flags, f"-march={name}"))

    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(build, sets))
    for path, isa in zip(paths, sets.values(), strict=True):
        library = cpu._load(path)
        monkeypatch.setattr(cpu, "_library", lambda library=library: library)
        assert cpu.isa() == isa
        for dtype in DTYPES:
            for seed in range(4):
                case = make_case(
                    seed, n_tokens=45, d_in=100, d_out=(300, 33), depth=2, dtype=dtype, strided=True
                )
                together = case.run()
                assert_close(together, case)
                assert torch.equal(case.run([7])[0], together[7])
