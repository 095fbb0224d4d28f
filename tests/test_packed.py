"""Packed bases against the same bases as rows: the same bits, whatever the shape."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_kernels import (
    RANK,
    U_START,
    V_START,
    Case,
    any_case,
    decoded,
    make_case,
    property_test,
)
from vllm_jd import kernels
from vllm_jd.kernels import PACKED, cpu, reference
from vllm_jd.kernels.packed import can_pack, pack

DTYPE = torch.bfloat16

pytestmark = pytest.mark.skipif(
    not can_pack(DTYPE), reason="packed bases are for processors that have AVX512-BF16"
)


def packed(case):
    """The same case with all bases packed."""
    pools = decoded(case).pools
    rows = pools.rows.clone()
    tables = [rows[:, s].flatten(0, 1)[:, : RANK + 1] for s in range(len(pools.u))]
    bases, starts = pack([pools.v] * len(pools.u), pools.u, tables)
    for s, places in enumerate(starts):
        rows[:, s, :, :RANK] = places.view(*rows[:, s, :, :RANK].shape)
    return Case(dataclasses.replace(pools, rows=rows, packed=bases), *fields(case))


def fields(case):
    return case.x, case.y, case.token_slots


@property_test
@given(case=st.builds(make_case, **any_case | {"dtype": st.just(DTYPE)}))
def test_packed_bases_give_the_bits_of_their_rows(case):
    same = packed(case)
    assert torch.equal(same.run(), case.run())


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 9, 70])
@pytest.mark.parametrize("rank", [1, 7, 8, 13, 64])
def test_a_layers_typical_shapes(rank, n_tokens):
    shape = {"d_in": 576, "d_out": (576, 192, 192), "ranks": (rank, rank)}
    case = make_case(n_tokens=n_tokens, dtype=DTYPE, **shape)
    same = packed(case)
    assert (same.pools.rows[..., RANK] > 0).any()
    assert torch.equal(same.run(), case.run())


def test_tokens_give_the_same_bits_alone():
    case = packed(make_case(n_tokens=40, d_in=100, d_out=(300, 33), dtype=DTYPE))
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
