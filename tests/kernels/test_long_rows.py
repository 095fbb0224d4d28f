"""Slots of more rows than the others have: the same result as if all had room for as many."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_kernels import (
    CORE_SLOT,
    DTYPES,
    RANK,
    Case,
    assert_close,
    backend,  # noqa: F401 - a fixture
    make_case,
)


def split(case, plain, depth=1):
    """(the case with room for as many rows in all slots, the same with long rows): the first
    `plain` slots have `depth` rows of it."""
    rows = case.pools.rows.clone()
    rows[:plain, :, depth:] = 0
    rows[:plain, :, depth:, CORE_SLOT] = 10**6  # what is not looked at
    whole = Case(replace(case.pools, rows=rows), case.x, case.y, case.token_slots)
    parts = replace(
        case.pools,
        rows=rows[:plain, :, :depth].contiguous(),
        long_rows=rows[plain:].contiguous(),
    )
    return whole, Case(parts, case.x, case.y, case.token_slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("plain", "depth"), [(3, 1), (5, 2), (0, 1), (6, 4)])
def test_they_add_up(backend, plain, depth, int8, dtype):  # noqa: F811
    for seed, layout in enumerate(("mixed", "equal", "runs")):
        case = make_case(seed, n_tokens=40, depth=4, dtype=dtype, int8=int8, layout=layout)
        whole, parts = split(case, plain, depth)
        found = parts.run()
        assert_close(found, whole)
        assert torch.equal(found, whole.run()), "the order of sums depends on the room"


def test_who_has_none_gets_the_same_bits(backend):  # noqa: F811
    """Whether others in the batch have many rows or not."""
    case = make_case(n_tokens=40, depth=4)
    _, parts = split(case, 3)
    slots = parts.token_slots[:40]
    plain = (slots < 3).nonzero().flatten()
    assert 5 < len(plain) < 35
    assert torch.equal(parts.run()[plain], parts.run(plain))


def test_a_row_there_is_out_of_range(backend):  # noqa: F811
    case = make_case(depth=3)
    _, parts = split(case, 3)
    used = (parts.pools.long_rows[..., RANK] > 0).nonzero()[-1].tolist()
    parts.pools.long_rows[used[0], used[1], used[2], 0] = 10**6
    parts.token_slots[:20] = 3 + used[0]
    with pytest.raises(IndexError, match="V rows"):
        parts.run()
    parts.token_slots[:20] = 6
    with pytest.raises(IndexError, match="6"):
        parts.run()


@pytest.mark.parametrize(
    ("long_rows", "match"),
    [
        (torch.zeros(2, 1, 3, 7, dtype=torch.int32), "slices"),
        (torch.zeros(2, 2, 3, 7), "int32"),
        (torch.zeros(2, 2, 1, 7, dtype=torch.int32), "at least the 3 rows"),
        (torch.zeros(2, 2, 7, 3, dtype=torch.int32).transpose(2, 3), "contiguous"),
    ],
)
def test_those_that_do_not_fit_are_refused(long_rows, match):
    pools = make_case(depth=3).pools
    with pytest.raises(ValueError, match=match):
        replace(pools, long_rows=long_rows)


def test_slots_are_counted_on():
    pools = split(make_case(depth=3), 2)[1].pools
    assert (pools.rows.shape[0], pools.slots, pools.depth) == (2, 6, 3)
