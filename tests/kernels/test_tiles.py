"""Which tokens the tiles take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.kernels import tiles


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(-1, 60), min_size=1, max_size=400),
    adapters=st.integers(1, 5),
    spare=st.integers(0, 3),
    as_planned=st.booleans(),
)
def test_every_adapted_token_has_one_place(groups, adapters, spare, as_planned):
    groups = np.array(groups)
    n, tile = len(groups), tiles.tile_of(len(groups))
    slots = np.where(groups < 0, -1, groups * adapters + np.arange(n) % adapters)
    room = tiles.places(n) if as_planned else (-(-n // tile) + spare) * tile
    order = tiles.pack(tiles.keys_of(groups, slots), room, tile)
    assert order.dtype == np.int32 and len(order) == room
    assert sorted(order[order >= 0]) == np.nonzero(groups >= 0)[0].tolist()
    used = order[order >= 0]
    for values in (groups[used], slots[used]):
        runs = 1 + np.count_nonzero(values[1:] != values[:-1]) if len(values) else 0
        assert runs == len({*values.tolist()}), "a group, or a slot, stands in two places"
    distinct = len({*groups[groups >= 0].tolist()})
    if as_planned and n <= tiles.SMALL_TOKENS and distinct <= tiles.SPARE_TILES:
        for one in order.reshape(-1, tile):
            assert len({*groups[one[one >= 0]].tolist()}) <= 1


def test_the_largest_groups_have_tiles_of_their_own_where_there_is_no_room_for_all():
    groups = np.repeat([7, 3, 5, 9], [1, 20, 2, 30])
    order = tiles.pack(tiles.keys_of(groups, np.arange(len(groups))), 80, 16)
    found = [sorted({*groups[one[one >= 0]].tolist()}) for one in order.reshape(-1, 16)]
    assert found == [[3], [3], [9], [9], [5, 7]]


def test_more_tokens_never_have_fewer_places():
    """A step of n tokens may run in a graph of any larger number."""
    sizes = [tiles.places(n) for n in range(1, 3000)]
    assert sizes == sorted(sizes)
    assert all(size >= n and size % tiles.tile_of(n) == 0 for n, size in enumerate(sizes, 1))
    assert [tiles.places(n) for n in (1, 2, 64, 256, 257, 4096)] == [16, 32, 576, 768, 768, 4096]


@pytest.mark.parametrize("groups", [[], [-1, -1]])
def test_without_adapters_all_places_are_empty(groups):
    groups = np.array(groups, dtype=np.int64)
    assert (tiles.pack(tiles.keys_of(groups, groups), 32, 16) == -1).all()
