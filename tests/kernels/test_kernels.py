"""The kernels against a float64 loop over tokens that shares nothing with them."""

import importlib.util
import os
import shutil
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import VeraConfig, get_peft_model

from vllm_jd import kernels
from vllm_jd.kernels import Int8Rows, ModulePools
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_NONE, ROW_FIELDS, Row

KINDS = {"none": CORE_NONE, "full": CORE_FULL, "diagonal": CORE_DIAGONAL}
V_START, U_START, RANK, CORE_KIND, SCALE_ROW, CORE_SLOT, CORE_OFFSET = range(len(ROW_FIELDS))
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
    kinds=tuple(KINDS.values()),
    scaled=(True, False),
    int8=False,
):
    """Slots with random ranks, shared and private bases, cores of any of `kinds`, unused rows.

    `scaled`: whether a row may have a scale, or may have none. `int8`: whether the shared bases
    are kept in 8 bits.
    """
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
    rows = torch.zeros(slots, len(d_out), depth, len(ROW_FIELDS), dtype=torch.int32)
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
                kind = kinds[randint(0, len(kinds))]
                core = [randint(0, slots), (s * depth + k) * max_rank**2]
                if kind == CORE_NONE:
                    core = [-7, 10**9]  # not looked at
                scale_row = randint(0, slots) if scaled[randint(0, len(scaled))] else -1
                rows[slot, s, k] = torch.tensor([*starts, rank, kind, scale_row, *core])
    in_8_bits = clusters * max_rank if int8 else 0
    for f in (V_START, U_START):
        across = (rows[..., f] < in_8_bits) & (rows[..., f] + rows[..., RANK] > in_8_bits)
        rows[..., f][across] = in_8_bits

    def codes(width, size):
        """As 8 bits hold them: steps of many magnitudes, one of them 0."""
        code = torch.randint(-127, 128, (in_8_bits, width), generator=g).to(torch.int8)
        steps = torch.randint(-3, 4, (in_8_bits, -(-width // 32)), generator=g)
        steps = torch.where(steps == 3, 0, torch.exp2(steps) * size / 127)
        return Int8Rows(code, steps.to(torch.bfloat16))

    pool_rows = (clusters + 1) * max_rank - in_8_bits
    pools = ModulePools(
        v=randn(pool_rows, d_in) / d_in**0.5,
        u=[randn(pool_rows, width) / max_rank**0.5 for width in d_out],
        v_int8=codes(d_in, d_in**-0.5) if int8 else None,
        u_int8=[codes(width, max_rank**-0.5) for width in d_out] if int8 else None,
        cores=randn(slots, core_length) / max_rank**0.5,
        rows=rows,
        scales=[randn(slots, width) for width in d_out] if any(scaled) else None,
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


def decoded(case):
    """The same case with all bases as numbers of the pools' type."""
    pools = case.pools
    if pools.v_int8 is None:
        return case
    floats = ModulePools(
        v=torch.cat([pools.v_int8.decode(pools.dtype), pools.v]),
        u=[
            torch.cat([a.decode(pools.dtype), b])
            for a, b in zip(pools.u_int8, pools.u, strict=True)
        ],
        cores=pools.cores,
        rows=pools.rows,
        scales=pools.scales,
    )
    return Case(floats, case.x, case.y, case.token_slots)


def oracle(case):
    """(result, sum of the magnitudes that it was summed from), float64, one token at a time."""
    case = decoded(case)
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
            for row in pools.rows[slot, s].tolist():
                v_start, u_start, rank, kind, scale_row, core_slot, offset = row
                if rank == 0:
                    continue
                v_part = pools.v[v_start : v_start + rank].double()
                u_part = u[u_start : u_start + rank].double()
                core = torch.eye(rank, dtype=torch.float64)
                if kind == CORE_FULL:
                    core = pools.cores[core_slot, offset : offset + rank**2].double()
                    core = core.view(rank, rank)
                elif kind == CORE_DIAGONAL:
                    core = pools.cores[core_slot, offset : offset + rank].double().diag()
                scale = torch.ones(u.shape[1], dtype=torch.float64)
                if scale_row >= 0:
                    scale = pools.scales[s][scale_row].double()
                result[t, part] += scale * (u_part.T @ (core @ (v_part @ x)))
                sizes = u_part.abs().T @ (core.abs() @ (v_part.abs() @ x.abs()))
                magnitude[t, part] += scale.abs() * sizes
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


any_case = {
    "seed": st.integers(0, 2**20),
    "n_tokens": st.integers(0, 70),
    "d_in": st.sampled_from([1, 7, 16, 31, 64, 100, 200]),
    "d_out": st.lists(st.sampled_from([1, 13, 16, 48, 100, 300]), min_size=1, max_size=3),
    "ranks": st.sampled_from([(1, 1), (1, 3), (4, 4), (13, 13), (16, 16), (1, 40)]),
    "depth": st.integers(1, 3),
    "slots": st.sampled_from([1, 5, 70]),
    "clusters": st.integers(1, 4),
    "dtype": st.sampled_from(DTYPES),
    "layout": st.sampled_from(["equal", "distinct", "runs", "mixed"]),
    "strided": st.booleans(),
    "scaled": st.sampled_from([(False,), (True, False)]),
    "int8": st.booleans(),
}
cases = st.builds(make_case, **any_case)
scaled_cases = st.builds(
    make_case, **any_case | {"depth": st.just(1), "scaled": st.just((True, False))}
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


# Of the kernel alone: what the reference's matmuls give depends on where their operands lie, too.
@needs_compiler
@property_test
@given(case=st.builds(make_case, **any_case | {"int8": st.just(True)}))
def test_8_bits_give_the_bits_of_their_numbers(cpu_kernel, case):
    assert torch.equal(case.run(), decoded(case).run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 7, 45])
def test_typical_layer(backend, dtype, n_tokens):
    shape = {"d_in": 576, "d_out": (576, 192, 192), "ranks": (16, 16), "slots": 40, "clusters": 25}
    case = make_case(n_tokens=n_tokens, dtype=dtype, layout="distinct", **shape)
    assert_close(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_core_with_and_without_scale(backend, kind, scaled, depth, dtype):
    case = make_case(
        n_tokens=25,
        d_in=70,
        d_out=(150, 33),
        ranks=(1, 21),
        depth=depth,
        dtype=dtype,
        kinds=(KINDS[kind],),
        scaled=(scaled,),
    )
    assert_close(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_all_kinds_on_the_same_bases(backend, dtype):
    """Tokens that share one reading of a basis, with a full, a diagonal or no core, and scales."""
    case = make_case(n_tokens=24, ranks=(8, 8), slots=6, layout="distinct", dtype=dtype)
    case.pools.rows[..., V_START : RANK + 1] = torch.tensor([2, 5, 8])
    case.pools.rows[..., CORE_SLOT] = torch.arange(6)[:, None, None]
    case.pools.rows[..., CORE_OFFSET] = 0
    case.pools.rows[..., CORE_KIND] = torch.arange(6)[:, None, None] % 3
    case.pools.rows[..., SCALE_ROW] = torch.tensor([0, 1, 2, -1, -1, -1])[:, None, None]
    assert_close(case.run(), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rank"), [("diagonal", 256), ("full", 256), ("diagonal", 1024)])
def test_high_ranks(backend, kind, rank, dtype):
    """VeRA's bases: high ranks that all adapters share, with a rank that is not a round number."""
    case = make_case(
        n_tokens=7,
        d_in=40,
        d_out=(70,),
        ranks=(rank - 3, rank),
        slots=3,
        clusters=1,
        dtype=dtype,
        kinds=(KINDS[kind],),
    )
    assert_close(case.run(), case)


def test_a_full_core_of_rank_1024(backend):
    case = make_case(
        n_tokens=20,
        d_in=20,
        d_out=(9,),
        ranks=(1024, 1024),
        slots=2,
        clusters=1,
        kinds=(CORE_FULL,),
    )
    assert_close(case.run(), case)


def test_vera_as_peft_computes_it(backend):
    """Against PEFT's own layer: shared A and B, lambda_d as the core, lambda_b as the scale."""
    config = VeraConfig(r=24, target_modules=["layer"], init_weights=False, d_initial=0.5)
    base = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(30, 50)))
    vera = get_peft_model(base, config).base_model.model.layer
    torch.nn.init.normal_(vera.vera_lambda_b["default"])
    torch.nn.init.normal_(vera.vera_lambda_d["default"])
    pools = ModulePools(
        v=vera.vera_A["default"].clone(),
        u=[vera.vera_B["default"].T.contiguous()],
        cores=vera.vera_lambda_d["default"].detach()[None],
        rows=torch.tensor([[[Row(0, 0, 24, CORE_DIAGONAL, 0, 0, 0)]]], dtype=torch.int32),
        scales=[vera.vera_lambda_b["default"].detach()[None]],
    )
    x = torch.randn(6, 30)
    y = vera.base_layer(x).detach()
    kernels.add_adapters(y, x, pools, torch.zeros(6, dtype=torch.int32))
    with torch.no_grad():
        torch.testing.assert_close(y, vera(x), rtol=1e-5, atol=1e-5)
        assert (y - vera.base_layer(x)).abs().max() > 0.1


@property_test
@given(case=scaled_cases)
def test_ones_change_no_bit_and_a_scale_of_zeros_leaves_y(backend, case):
    pools = case.pools
    pools.rows[..., CORE_KIND] = CORE_NONE
    scale_rows = pools.rows[..., SCALE_ROW].clone()
    pools.rows[..., SCALE_ROW] = -1
    plain = case.run()
    pools.rows[..., CORE_SLOT], pools.rows[..., CORE_OFFSET] = 0, 0
    pools.rows[..., CORE_KIND] = CORE_DIAGONAL
    pools.rows[..., SCALE_ROW] = scale_rows
    pools.cores[0] = 1
    for scales in pools.scales:
        scales.fill_(1)
    assert torch.equal(case.run(), plain)
    pools.rows[..., SCALE_ROW] = 0
    for scales in pools.scales:
        scales.zero_()
    assert torch.equal(case.run(), case.y)


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
    case.pools.rows[..., V_START] = 0
    case.pools.rows[..., CORE_KIND] = CORE_NONE
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


@pytest.mark.parametrize("field", ["v_start", "u_start"])
def test_a_basis_must_not_reach_across_the_end_of_8_bits(backend, field):
    case = make_case(ranks=(8, 8), layout="equal", int8=True)  # 24 rows in 8 bits, 8 others
    case.pools.rows[0, :, 0, : RANK + 1] = torch.tensor([16, 24, 8])
    assert_close(case.run(), case)
    case.pools.rows[0, -1, 0, ROW_FIELDS.index(field)] = 17
    before = case.y.clone()
    with pytest.raises(IndexError, match=r"17\.\.25.*reach across the end of 8 bits, 24"):
        kernels.add_adapters(case.y, case.x, case.pools, case.token_slots)
    assert torch.equal(case.y, before)


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
    case.pools.scales[1].mul_(3)
    case.token_slots[:5] = 1
    assert_close(case.run(), case)


@pytest.mark.parametrize("last_slice", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"v_start": 25},
        {"v_start": -1},
        {"u_start": 25},
        {"u_start": -1},
        {"core_slot": 6},
        {"core_slot": -1},
        {"core_offset": 65},
        {"core_offset": -1},
        {"core_kind": CORE_DIAGONAL, "core_slot": 6},
        {"core_kind": CORE_DIAGONAL, "core_slot": -1},
        {"core_kind": CORE_DIAGONAL, "core_offset": 121},
        {"core_kind": CORE_DIAGONAL, "core_offset": -1},
        {"core_kind": 3},
        {"core_kind": -1},
        {"scale_row": 6},
        {"scale_row": -2},
    ],
    ids=str,
)
def test_index_out_of_range(backend, change, last_slice):
    # Pools of 32 rows, 6 core slots of 128 entries, 6 scale rows.
    case = make_case(ranks=(8, 8), layout="equal")
    rows = case.pools.rows
    fields = dict(zip(ROW_FIELDS, [24, 24, 8, CORE_FULL, 5, 5, 64], strict=True))
    rows[0, :, 0] = torch.tensor(list(fields.values()))
    assert_close(case.run(), case)
    rows[0, :, 0, CORE_KIND], rows[0, :, 0, CORE_OFFSET] = CORE_DIAGONAL, 120
    assert_close(case.run(), case)
    rows[0, :, 0] = torch.tensor(list(fields.values()))
    rows[0, -1 if last_slice else 0, 0] = torch.tensor(list((fields | change).values()))
    before = case.y.clone()
    with pytest.raises(IndexError):
        kernels.add_adapters(case.y, case.x, case.pools, case.token_slots)
    assert torch.equal(case.y, before)
    rows[0, :, 0, RANK] = 0  # an unused row, whatever else it says
    assert torch.equal(case.run(), before)


def test_scale_row_without_scales(backend):
    case = make_case(scaled=(False,), layout="equal")
    assert case.pools.scales is None
    case.pools.rows[0, 0, 0, SCALE_ROW] = 0
    with pytest.raises(IndexError, match="scale row"):
        case.run()


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


def int8_rows(n, width):
    steps = torch.zeros(n, -(-width // 32), dtype=torch.bfloat16)
    return Int8Rows(torch.zeros(n, width, dtype=torch.int8), steps)


@pytest.mark.parametrize(
    ("codes", "steps", "message"),
    [
        (torch.zeros(2, 33), torch.zeros(2, 2), "codes must be torch.int8"),
        (torch.zeros(2, 33, dtype=torch.int8), torch.zeros(2, 2), "steps must be torch.bfloat16"),
        (
            torch.zeros(2, 33, dtype=torch.int8),
            torch.zeros(2, 1, dtype=torch.bfloat16),
            r"steps must be \[2, 2\] for codes of \[2, 33\], got \[2, 1\]",
        ),
        (
            torch.zeros(33, 2, dtype=torch.int8).T,
            torch.zeros(2, 2, dtype=torch.bfloat16),
            "codes must be contiguous",
        ),
    ],
)
def test_rows_in_8_bits_that_do_not_fit(codes, steps, message):
    with pytest.raises(ValueError, match=message):
        Int8Rows(codes, steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": []}, "u needs one tensor for each slice"),
        ({"v": torch.zeros(4)}, "v must have 2 dimensions"),
        ({"v": torch.zeros(4, 6).T}, "v must be contiguous"),
        ({"cores": torch.zeros(2, 9, dtype=torch.float16)}, "cores is torch.float16"),
        ({"rows": torch.zeros(3, 2, 1, 7, dtype=torch.int32)}, "1 slices"),
        ({"rows": torch.zeros(3, 1, 1, 5, dtype=torch.int32)}, "rows must be"),
        ({"rows": torch.zeros(3, 1, 1, 7)}, "rows must be int32"),
        ({"scales": []}, "0 tensors for 1 slices"),
        ({"scales": [torch.zeros(8)]}, r"scales\[0\] must have 2 dimensions"),
        ({"scales": [torch.zeros(3, 7)]}, r"scales\[0\] must be \[scale_rows, 8\]"),
        ({"scales": [torch.zeros(3, 8, dtype=torch.bfloat16)]}, r"scales\[0\] is torch.bfloat16"),
        ({"v_int8": int8_rows(2, 7)}, "int8 rows of v are 7 wide, the others 6"),
        ({"u_int8": []}, "u_int8 has 0 entries for 1 slices"),
        ({"u_int8": [int8_rows(2, 9)]}, r"int8 rows of u\[0\] are 9 wide, the others 8"),
    ],
)
def test_pools_that_do_not_fit(change, message):
    fields = {
        "v": torch.zeros(4, 6),
        "u": [torch.zeros(4, 8)],
        "cores": torch.zeros(2, 9),
        "rows": torch.zeros(3, 1, 1, 7, dtype=torch.int32),
    }
    ModulePools(**fields)
    ModulePools(**fields, scales=[torch.zeros(0, 8)])
    with pytest.raises(ValueError, match=message):
        ModulePools(**fields | change)


def test_choice_of_backend(monkeypatch):
    monkeypatch.delenv("VLLM_JD_KERNEL", raising=False)
    assert kernels.backend_name("cpu") in ("cpu", "reference")
    if importlib.util.find_spec("triton"):
        assert kernels.backend_name(torch.device("cuda", 0)) == "triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        kernels.backend_name(torch.device("cuda", 0))
    with pytest.raises(NotImplementedError, match="no kernel for xpu tensors"):
        kernels.backend_name("xpu")
    monkeypatch.setenv("VLLM_JD_KERNEL", "reference")
    assert kernels.backend_name("cuda") == "reference"
    monkeypatch.setenv("VLLM_JD_KERNEL", "tritn")
    with pytest.raises(ValueError, match="known: reference, cpu, triton"):
        kernels.backend_name("cpu")
    monkeypatch.setenv("VLLM_JD_KERNEL", "triton")
    assert kernels.backend_name("cuda") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.backend_name("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend_name("cpu") == "triton"
    with pytest.raises(ValueError, match="xpu"):
        kernels.backend_name("xpu")
    monkeypatch.setenv("VLLM_JD_KERNEL", "cpu")
    with pytest.raises(ValueError, match="cuda"):
        kernels.backend_name("cuda")
