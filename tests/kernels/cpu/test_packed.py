"""Packed bases: of bfloat16 the bits of the same rows, of 8 bits the numbers of their codes."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_kernels import (
    CORE_KIND,
    RANK,
    SCALE_ROW,
    U_START,
    V_START,
    Case,
    any_case,
    decoded,
    make_case,
    oracle,
    property_test,
)
from vllm_jd import kernels
from vllm_jd.kernels import PACKED, Int8Rows, cpu, reference
from vllm_jd.kernels.cpu.packed import MAX_INT8_RANK, can_pack, pack
from vllm_jd.row import CORE_FULL, CORE_NONE
from vllm_jd.store.quantise import quantise

DTYPE = torch.bfloat16

pytestmark = pytest.mark.skipif(
    not can_pack(DTYPE), reason="packed bases are for processors that have AVX512-BF16"
)


def packed(case):
    """The same case with all bases packed: in 8 bits if they all are."""
    pools = case.pools
    v, u = pools.v_int8 or pools.v, pools.u_int8 or pools.u
    rows = pools.rows.clone()
    tables = [rows[:, s].flatten(0, 1)[:, : RANK + 1] for s in range(len(u))]
    bases, starts = pack([v] * len(u), u, tables)
    for s, places in enumerate(starts):
        rows[:, s, :, :RANK] = places.view(*rows[:, s, :, :RANK].shape)
    pools = dataclasses.replace(pools, rows=rows, packed=bases, v_int8=None, u_int8=None)
    return Case(pools, *fields(case))


def fields(case):
    return case.x, case.y, case.token_slots


def in_8_bits(case):
    """The same case with all bases in 8 bits, beside the numbers that these are, in float64."""
    pools = decoded(case).pools
    v, *u = (Int8Rows(*quantise(rows, "int8")) for rows in (pools.v, *pools.u))
    coded = dataclasses.replace(
        pools, v=pools.v[:0], u=[rows[:0] for rows in pools.u], v_int8=v, u_int8=u
    )
    numbers = dataclasses.replace(
        pools,
        v=v.decode(torch.float64),
        u=[rows.decode(torch.float64) for rows in u],
        cores=pools.cores.double(),
        scales=None if pools.scales is None else [rows.double() for rows in pools.scales],
    )
    return Case(coded, *fields(case)), Case(numbers, *fields(case))


def rounding(case, coded):
    """What rounding to 16 bits may add to a result: float64, like y."""
    numbers, bound = case.pools, torch.zeros(case.y.shape, dtype=torch.float64)
    for t in range(len(case.x)):
        slot = int(case.token_slots[t])
        if slot < 0:
            continue
        x, column = case.x[t].double(), 0
        blocks = torch.nn.functional.pad(x.abs(), (0, -len(x) % 32)).view(-1, 32)
        # half of a step, and the largest number of a block is at least 2^14 of them
        x_error = blocks.amax(dim=1).repeat_interleave(32)[: len(x)] * 2.0**-15
        for s, u in enumerate(numbers.u):
            part = slice(column, column + u.shape[1])
            column += u.shape[1]
            for row in numbers.rows[slot, s].tolist():
                v_start, u_start, rank, kind, scale_row, core_slot, offset = row
                if rank == 0:
                    continue
                v, size = (
                    numbers.v[v_start : v_start + rank],
                    rank**2 if kind == CORE_FULL else rank,
                )
                core = torch.eye(rank, dtype=torch.float64)
                if kind != CORE_NONE:
                    core = numbers.cores[core_slot, offset : offset + size]
                    core = core.view(rank, rank) if kind == CORE_FULL else core.diag()
                error = core.abs() @ (v.abs() @ x_error)
                largest = float((core @ (v @ x)).abs().max() + error.max())
                rows = coded.pools.u_int8[s]
                steps = rows.steps[u_start : u_start + rank].double().amax(dim=0)
                steps = steps.repeat_interleave(32)[: u.shape[1]]
                codes = rows.codes[u_start : u_start + rank].double().abs().sum(dim=0)
                added = u[u_start : u_start + rank].abs().T @ error
                added += codes * steps * largest * 2.0**-13
                scale = 1.0 if scale_row < 0 else numbers.scales[s][scale_row].abs()
                bound[t, part] += scale * added
    return bound


def assert_numbers_of_codes(case):
    """Packed in 8 bits: the product of the codes' numbers, but for what rounding may add."""
    coded, numbers = in_8_bits(case)
    y = packed(coded).run().double()
    result, magnitude = oracle(numbers)
    unit = 2.0 ** (torch.floor(torch.log2(torch.maximum(result.abs(), y.abs()) + 2.0**-126)) - 7)
    allowed = 0.5 * unit + 4e-6 * magnitude + rounding(numbers, coded)
    assert ((y - result).abs() <= allowed).all()
    without = case.token_slots[: len(case.x)] < 0
    assert torch.equal(y[without].to(DTYPE), case.y[without])


@property_test
@given(case=st.builds(make_case, **any_case | {"dtype": st.just(DTYPE)}))
def test_packed_bases_give_the_bits_of_their_rows(case):
    case = decoded(case)
    same = packed(case)
    assert torch.equal(same.run(), case.run())


@property_test
@given(case=st.builds(make_case, **any_case | {"dtype": st.just(DTYPE)}))
def test_packed_in_8_bits_they_give_the_numbers_of_their_codes(case):
    assert_numbers_of_codes(case)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 9, 70])
@pytest.mark.parametrize("rank", [1, 7, 8, 13, 64])
def test_a_layers_typical_shapes(rank, n_tokens):
    shape = {"d_in": 576, "d_out": (576, 192, 192), "ranks": (rank, rank)}
    case = make_case(n_tokens=n_tokens, dtype=DTYPE, **shape)
    same = packed(case)
    assert (same.pools.rows[..., RANK] > 0).any()
    assert torch.equal(same.run(), case.run())
    assert_numbers_of_codes(case)


def test_in_8_bits_sums_of_whole_numbers_are_exact():
    """Integers that 16 bits hold beside each other: nothing is rounded, down to the last one."""
    g = torch.Generator().manual_seed(0)
    case = make_case(n_tokens=9, d_in=70, d_out=(100, 33), ranks=(13, 13), dtype=DTYPE)
    pools = decoded(case).pools

    def whole(rows, levels):
        codes = torch.randint(-levels, levels + 1, rows.shape, generator=g).to(torch.int8)
        return Int8Rows(codes, torch.full((len(codes), -(-codes.shape[1] // 32)), 0.5).to(DTYPE))

    v, u = whole(pools.v, 2), [whole(rows, 1) for rows in pools.u]
    pools = dataclasses.replace(
        pools, v=pools.v[:0], u=[rows[:0] for rows in pools.u], v_int8=v, u_int8=u
    )
    pools.rows[..., CORE_KIND] = CORE_NONE
    pools.rows[..., SCALE_ROW] = -1
    # Few of x, of which the largest and the least are 10 bits apart.
    x = torch.zeros_like(case.x)
    x[:, 3], x[:, 5], x[:, 40], x[:, 69] = 2.0**10, 1.0, 3.0, -1.0
    case = Case(
        packed(Case(pools, *fields(case))).pools, x, torch.zeros_like(case.y), *fields(case)[2:]
    )
    numbers = dataclasses.replace(
        pools,
        v=v.decode(torch.float64),
        u=[rows.decode(torch.float64) for rows in u],
        v_int8=None,
        u_int8=None,
        cores=pools.cores.double(),
        scales=None,
    )
    result, _ = oracle(Case(numbers, x, case.y, case.token_slots))
    assert torch.equal(case.run(), result.to(DTYPE))
    assert result.any()


def test_in_8_bits_one_large_number_costs_its_neighbours_little():
    """x of which one is 2^7 times the others: they are kept to the last bit."""
    case = make_case(n_tokens=5, d_in=64, d_out=(64,), ranks=(8, 8), layout="distinct", dtype=DTYPE)
    coded, numbers = in_8_bits(case)
    for each in (coded, numbers):
        each.x[:] = each.x.sign() * (1 + each.x.abs().frac()).to(DTYPE)
        each.y[:] = 0
    coded.x[:, 7] = numbers.x[:, 7] = 128.0
    coded.pools.v_int8.codes[:, 7] = 0
    numbers.pools.v[:, 7] = 0
    result, magnitude = oracle(numbers)
    y = packed(coded).run().double()
    bound = 2.0**-8 * result.abs() + 2.0**-9 * magnitude
    assert ((y - result).abs() <= bound).all() and (magnitude > 0).any()


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_in_8_bits_what_is_not_finite_stays_so(number):
    case = make_case(n_tokens=3, ranks=(8, 8), layout="equal", dtype=DTYPE)
    case.pools.rows[0, :, 0, RANK] = 8
    coded, _ = in_8_bits(case)
    coded.x[1, 0] = number
    y = packed(coded).run()
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_in_8_bits_a_rank_is_limited():
    rank = MAX_INT8_RANK + 1
    case = make_case(
        n_tokens=3, d_in=4, d_out=(4,), ranks=(rank, rank), layout="equal", dtype=DTYPE
    )
    with pytest.raises(IndexError, match=f"which goes to {MAX_INT8_RANK}"):
        packed(in_8_bits(case)[0]).run()


@pytest.mark.parametrize("codes", [False, True])
def test_tokens_give_the_same_bits_alone(codes):
    case = make_case(n_tokens=40, d_in=100, d_out=(300, 33), dtype=DTYPE, depth=2)
    case = packed(in_8_bits(case)[0] if codes else case)
    together = case.run()
    for t in range(40):
        assert torch.equal(case.run([t])[0], together[t])


def test_clusters_that_share_a_basis_share_it_packed():
    v, u = torch.randn(8, 64).to(DTYPE), torch.randn(24, 64).to(DTYPE)
    table = torch.tensor([[0, 0, 8], [0, 8, 8], [0, 16, 8], [0, 0, 8], [0, 0, 0]])
    bases, (starts,) = pack([v], [u], [table])
    assert bases.shape == (4 * 8 * 64,)
    assert starts[:, 0].tolist() == [PACKED] * 4 + [0]
    assert starts[:, 1].tolist() == [PACKED + 16 * i for i in (1, 2, 3, 1)] + [0]


@pytest.mark.parametrize("field", [V_START, U_START])
@pytest.mark.parametrize("start", [PACKED - 1, 2**31 - 1, "end", 0])
def test_a_place_outside_the_packed_memory_is_refused(field, start):
    case = packed(make_case(ranks=(8, 8), layout="equal", dtype=DTYPE))
    case.pools.rows[0, 0, 0, RANK] = 8
    end = PACKED + case.pools.packed.nbytes // 64
    case.pools.rows[0, 0, 0, field] = end - 1 if start == "end" else start
    before = case.y.clone()
    with pytest.raises(IndexError, match="packed"):
        kernels.add_adapters(case.y, case.x, case.pools, case.token_slots)
    assert torch.equal(case.y, before)


def test_packed_and_other_rows_of_one_slot_are_refused():
    case = packed(make_case(depth=2, ranks=(8, 8), layout="equal", dtype=DTYPE))
    rows = case.pools.rows
    rows[0, 0, 0, RANK] = rows[0, 0, 1, RANK] = 8
    rows[0, 0, 1, :RANK] = 0
    with pytest.raises(IndexError, match="packed and others"):
        kernels.add_adapters(case.y, case.x, case.pools, case.token_slots)


def test_the_reference_does_not_take_them():
    case = packed(make_case(layout="equal", dtype=DTYPE))
    with pytest.raises(IndexError, match="V rows"):
        reference.add_adapters(case.y, case.x, case.pools, case.token_slots)


def test_packed_bases_that_do_not_fit():
    pools = packed(make_case(dtype=DTYPE)).pools
    with pytest.raises(ValueError, match="multiple of 64"):
        dataclasses.replace(pools, packed=pools.packed[1:])
    with pytest.raises(ValueError, match=r"got torch\.int16"):
        dataclasses.replace(pools, packed=pools.packed.view(torch.int16))


def test_only_where_the_kernel_takes_them(monkeypatch):
    assert not can_pack(torch.float16)
    monkeypatch.setattr(cpu, "isa", lambda: "avx2")
    assert not can_pack(DTYPE)
