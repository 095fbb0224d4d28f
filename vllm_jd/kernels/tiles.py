"""Which tokens the tiles of a step's kernels take: those of one cluster, as far as there is room.

A tile of tokens goes through its clusters one after the other. So each cluster gets tiles of its
own, the last one of which may have empty places, as experts get theirs in vLLM
(`moe_align_block_size`). How many tiles there are depends on the number of tokens alone, as a CUDA
graph needs it.
"""

import numpy as np

TILE = 16
"""Tokens of a tile, of a batch of up to `SMALL_TOKENS`."""
LARGE_TILE = 64
SMALL_TOKENS = 256
SLOT_BITS = 32
SPARE_TILES = 32
"""Small tiles besides those that the tokens would fill: so many clusters surely get tiles of their
own (25 are what the paper has for 1,024 adapters). Large batches have none: with 16 prompts on an
H200, empty places cost more than a second cluster in a tile (57 µs against 54, q, k, v of
Mistral-7B, 2,048 tokens; one trial)."""


def tile_of(n_tokens: int) -> int:
    """Tokens of a tile of a batch of n_tokens."""
    return TILE if n_tokens <= SMALL_TOKENS else LARGE_TILE


def places(n_tokens: int) -> int:
    """Length of the order of a batch of n_tokens: a multiple of the tile. Never less for more
    tokens, so that what was packed for a step fits where a graph of a larger one is replayed."""
    small = min(n_tokens, SMALL_TOKENS)
    found = TILE * min(small, -(-small // TILE) + SPARE_TILES)
    return max(found, -(-n_tokens // LARGE_TILE) * LARGE_TILE if n_tokens > SMALL_TOKENS else 0)


def keys_of(groups: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """int64 keys for `pack`: of tokens of these groups (what reads the same bases, < 2^31) and
    slots; negative slots give negative keys."""
    return np.where(slots < 0, -1, groups.astype(np.int64) << SLOT_BITS | slots)


def pack(keys: np.ndarray, n_places: int, tile: int) -> np.ndarray:
    """The token of each place, -1 where there is none.

    Args:
        keys: int64 [tokens], of `keys_of`; negative: a token without adapter, which gets no place.
        n_places: a multiple of `tile`, at least as many as there are tokens with adapters.
        tile: places of a tile.

    Returns:
        int32 [n_places]. Tokens of one group lie side by side, those of one slot too, from the
        beginning of a tile on. Where there is no room for that, the smallest groups share tiles.
    """
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys, 0, sorter=order) :].astype(np.int32)
    made = np.full(n_places, -1, dtype=np.int32)
    if not len(order):
        return made
    _, sizes = np.unique(keys[order] >> SLOT_BITS, return_counts=True)
    own = -(-sizes // tile) * tile
    room = n_places
    if own.sum() > room:
        # Largest first; those that then remain lie side by side.
        largest = np.argsort(-sizes, kind="stable")
        rest = len(order) - np.cumsum(sizes[largest])
        fits = np.cumsum(own[largest]) + rest <= room
        own[largest[~fits]] = sizes[largest[~fits]]
        # Those with tiles of their own first: all of these begin at the beginning of one.
        shared = np.zeros(len(sizes), dtype=bool)
        shared[largest[~fits]] = True
        by = np.argsort(np.repeat(shared, sizes), kind="stable")
        order = order[by]
        groups = np.argsort(shared, kind="stable")
        sizes, own = sizes[groups], own[groups]
    begin = np.cumsum(own) - own
    inside = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    made[np.repeat(begin, sizes) + inside] = order
    return made
