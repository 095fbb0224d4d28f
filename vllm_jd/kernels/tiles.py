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
SPARE_TILES = 32
"""Tiles besides those that the tokens would fill: so many clusters surely get tiles of their own
(25 are what the paper has for 1,024 adapters). An empty one costs its launch alone."""


def tile_of(n_tokens: int) -> int:
    """Tokens of a tile of a batch of n_tokens."""
    return TILE if n_tokens <= SMALL_TOKENS else LARGE_TILE


def places(n_tokens: int) -> int:
    """Length of the order of a batch of n_tokens: a multiple of the tile."""
    tile = tile_of(n_tokens)
    return tile * min(n_tokens, -(-n_tokens // tile) + SPARE_TILES)


def pack(keys: np.ndarray, n_places: int, tile: int) -> np.ndarray:
    """The token of each place, -1 where there is none.

    Args:
        keys: int64 [tokens], equal for tokens that read the same bases; negative: a token without
            adapter, which gets no place.
        n_places: a multiple of `tile`, at least as many as there are tokens with adapters.
        tile: places of a tile.

    Returns:
        int32 [n_places]. Tokens of one key lie side by side, in their order, from the beginning of
        a tile on. Where there is no room for that, the smallest groups share tiles.
    """
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys, 0, sorter=order) :].astype(np.int32)
    made = np.full(n_places, -1, dtype=np.int32)
    if not len(order):
        return made
    _, sizes = np.unique(keys[order], return_counts=True)
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
