"""Packed bases: of bfloat16 the bits of the same rows, of 8 bits the numbers of their codes."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.packing import pack
from tests.kernels.test_kernels import (
    CORE_KIND,
    RANK,
    SCALE_ROW,
    U_START,
    V_START,
    Case,
    any_case,
    assert_close,
    decoded,
    make_case,
    oracle,
    property_test,
)
from vllm_jd import kernels
from vllm_jd.kernels import PACKED, Int8Rows, ModulePools, cpu, reference
from vllm_jd.kernels.cpu.layout import MAX_INT8_RANK, UNIT
from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.cpu.packed import can_pack, pack_vectors, packed_units
from vllm_jd.row import CORE_FULL, CORE_NONE, ROW_FIELDS, Row
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
    assert_product_of_numbers(packed(coded).run(), coded, numbers)


def assert_product_of_numbers(y, coded, numbers):
    result, magnitude = oracle(numbers)
    largest = torch.maximum(result.abs(), y.double().abs()) + 2.0**-126
    unit = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    allowed = 0.5 * unit + 4e-6 * magnitude + rounding(numbers, coded)
    assert ((y.double() - result).abs() <= allowed).all()
    without = coded.token_slots[: len(coded.x)] < 0
    assert torch.equal(y[without], coded.y[without])


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


def test_packed_rows_behind_others_of_one_slot_are_refused():
    case = packed(make_case(depth=2, ranks=(8, 8), layout="equal", dtype=DTYPE))
    rows = case.pools.rows
    rows[0, 0, :, RANK] = 8
    rows[0, 0, 1, :RANK] = rows[1:, 0, :, :RANK][rows[1:, 0, :, RANK] > 0][0]
    rows[0, 0, 0, :RANK] = 0
    with pytest.raises(IndexError, match="packed rows behind others"):
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


def make_clusters(seed, d_in, d_out, ranks, clusters, n_tokens):
    """Adapter a of cluster a % clusters, all of whose bases are rows: each slice's bases begin at
    cluster · rank in U, and at the same, behind those of the slices before, in V."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    slots = 2 * clusters
    rows = torch.zeros(slots, len(d_out), 1, len(ROW_FIELDS), dtype=torch.int32)
    for slot in range(slots):
        for s, rank in enumerate(ranks):
            first = slot % clusters * rank
            v_start = clusters * sum(ranks[:s]) + first
            kind = int(torch.randint(0, 3, (), generator=g))
            row = Row(v_start, first, rank, kind, core_slot=slot, core_offset=s * max(ranks) ** 2)
            rows[slot, s, 0] = torch.tensor(row)
    size = max(*ranks, 1)
    pools = ModulePools(
        v=(randn(clusters * sum(ranks), d_in) / d_in**0.5).to(DTYPE),
        u=[
            (randn(clusters * rank, width) / size**0.5).to(DTYPE)
            for rank, width in zip(ranks, d_out, strict=True)
        ],
        cores=(randn(slots, len(d_out) * size**2) / size**0.5).to(DTYPE),
        rows=rows,
    )
    x, y = randn(n_tokens, d_in).to(DTYPE), randn(n_tokens, sum(d_out)).to(DTYPE)
    return Case(pools, x, y, torch.full((n_tokens,), -1, dtype=torch.int32))


def cluster_of(case, c, ranks):
    """V and U of each slice of one of its clusters."""

    def part(rows, first, rank):
        if isinstance(rows, Int8Rows):
            return Int8Rows(rows.codes[first : first + rank], rows.steps[first : first + rank])
        return rows[first : first + rank]

    pools, rows = case.pools, case.pools.rows[c, :, 0].tolist()
    v, u = (pools.v, pools.u) if pools.v_int8 is None else (pools.v_int8, pools.u_int8)
    return (
        [part(v, row[V_START], rank) for row, rank in zip(rows, ranks, strict=True)],
        [part(u[s], rows[s][U_START], rank) for s, rank in enumerate(ranks)],
    )


def cluster_bytes(ranks, d_in, widths, codes):
    """Bytes of one packed cluster of a layer, V and U of slice after slice."""
    return UNIT * sum(
        packed_units("v", rank, d_in, in_8_bits=codes)
        + packed_units("u", rank, width, in_8_bits=codes)
        for rank, width in zip(ranks, widths, strict=True)
    )


def pack_cluster(v, u):
    """The packed cluster, uint8, and where in it V and U of each slice begin, in units."""
    parts, places = [], torch.zeros(len(v), 2, dtype=torch.int32)
    for s, sides in enumerate(zip(v, u, strict=True)):
        for i, (side, rows) in enumerate(zip("vu", sides, strict=True)):
            places[s, i] = sum(map(len, parts)) // UNIT
            if len(rows):
                parts.append(pack_vectors(side, rows, len(rows))[0])
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts]), places


@property_test
@given(
    seed=st.integers(0, 2**20),
    n_tokens=st.integers(1, 40),
    d_in=st.sampled_from([1, 31, 64, 100, 200]),
    shape=st.lists(
        st.tuples(
            st.sampled_from([1, 13, 48, 64, 100, 300]), st.sampled_from([0, 1, 7, 8, 16, 21])
        ),
        min_size=1,
        max_size=3,
    ),
    codes=st.booleans(),
)
def test_clusters_may_be_written_over_others(seed, n_tokens, d_in, shape, codes):
    """Six clusters take turns in three places: each row that names a place gets what lies there."""
    g = torch.Generator().manual_seed(seed)
    widths, ranks = zip(*shape, strict=True)
    whole = make_clusters(seed, d_in, widths, ranks, clusters=6, n_tokens=n_tokens)
    coded, numbers = in_8_bits(whole) if codes else (whole, None)
    size = cluster_bytes(ranks, d_in, widths, codes)
    gaps = torch.randint(0, 3, (3,), generator=g) * UNIT
    begins = (torch.arange(3) * size + gaps.cumsum(0)).tolist()
    memory = large_pages(begins[-1] + size)
    memory[:] = 0xFF  # NaN: nobody reads what nobody wrote
    pools = dataclasses.replace(
        whole.pools,
        v=whole.pools.v[:0],
        u=[rows[:0] for rows in whole.pools.u],
        rows=torch.zeros_like(whole.pools.rows),
        packed=memory if codes else memory.view(DTYPE),
    )
    for _ in range(4):
        # One to three of the places get another cluster; which adapters have tokens, too.
        resident = torch.randperm(6, generator=g)[:3].tolist()
        for c, begin in zip(resident, begins, strict=True):
            bases, places = pack_cluster(*cluster_of(coded, c, ranks))
            assert bases.nbytes == size
            memory[begin : begin + size] = bases
            for slot in (c, c + 6):
                pools.rows[slot] = whole.pools.rows[slot]
                pools.rows[slot, :, 0, :RANK] = PACKED + begin // UNIT + places
        taken = torch.randint(-1, 6, (n_tokens,), generator=g)
        slots = torch.tensor([c + half for half in (0, 6) for c in resident] + [-1])[taken].int()
        y = Case(pools, whole.x, whole.y, slots).run()
        expected = dataclasses.replace(whole, token_slots=slots)
        if codes:
            coded, numbers = (
                dataclasses.replace(each, token_slots=slots) for each in (coded, numbers)
            )
            assert_product_of_numbers(y, coded, numbers)
        else:
            assert torch.equal(y, expected.run())
            assert_close(y, expected)


@pytest.mark.parametrize("codes", [False, True])
def test_all_clusters_of_a_layer_lie_one_after_the_other(codes):
    widths, ranks = (100, 33, 64), (13, 0, 16)
    case = make_clusters(0, 70, widths, ranks, clusters=5, n_tokens=1)
    case = in_8_bits(case)[0] if codes else case
    v, u = case.pools.v_int8 or case.pools.v, case.pools.u_int8 or case.pools.u
    tables = [case.pools.rows[:5, s, 0, : RANK + 1] for s in range(3)]
    bases, starts = pack([v] * 3, u, tables)
    size = cluster_bytes(ranks, 70, widths, codes)
    assert bases.nbytes == 5 * size
    for c in range(5):
        alone, places = pack_cluster(*cluster_of(case, c, ranks))
        part = bases.view(torch.uint8)[c * size : (c + 1) * size]
        assert torch.equal(alone, part)
        for s in (0, 2):
            assert torch.equal(starts[s][c], PACKED + c * size // UNIT + places[s])


@pytest.mark.parametrize("width", [192, 200])
@pytest.mark.parametrize("as_codes", [False, True])
def test_rows_that_are_packed_may_come_before_others(as_codes, width):
    """As in a blend of an adapter of the store with an upload: y is rounded between the two."""
    case = make_case(
        n_tokens=40, d_in=96, d_out=(width, 64), depth=4, dtype=DTYPE, ranks=(3, 8), scaled=(False,)
    )
    if as_codes:
        case, _ = in_8_bits(case)
    both = packed(case)
    n = 2
    rows = both.pools.rows.clone()
    rows[:, :, n:] = case.pools.rows[:, :, n:]
    mixed = dataclasses.replace(
        both.pools, rows=rows, v=case.pools.v, u=case.pools.u, v_int8=case.pools.v_int8,
        u_int8=case.pools.u_int8,
    )  # fmt: skip
    found = Case(mixed, *fields(case)).run()

    def only(pools, some):
        part = pools.rows.clone()
        part[:, :, [k for k in range(4) if k not in some]] = 0
        return dataclasses.replace(pools, rows=part)

    first = Case(only(both.pools, range(n)), *fields(case)).run()
    then = Case(only(case.pools, range(n, 4)), case.x, first, case.token_slots).run()
    assert torch.equal(found, then)
