"""Configurations that reach every variant with small shapes, and a run through them."""

from dataclasses import replace

import torch

from tests.kernels.test_kernels import assert_close
from vllm_jd.kernels.triton import backend
from vllm_jd.kernels.triton.plan import DEFAULT

MANY = 10**9
SMALL = replace(DEFAULT, row_elements=1024, tile_k=(32, 32), tile_n=(32, 32))
ROWS = replace(SMALL, row_tokens=MANY)
TILES_16 = replace(SMALL, row_tokens=0, small_tile_tokens=MANY)
TILES_64 = replace(SMALL, row_tokens=0, small_tile_tokens=0)
SHRINK_ROWS, EXPAND_ROWS = ("shrink_rows", False), ("expand_rows", False)
SHRINK_TILES, EXPAND_TILES = ("shrink_tiles", False), ("expand_tiles", False)
MIX = ("mix_rows", False)

# name → (configuration, kernels with whether they apply the cores)
VARIANTS = {
    "rows, cores in expand": (ROWS, [SHRINK_ROWS, ("expand_rows", True)]),
    "rows, cores apart": (replace(ROWS, fuse_bytes=0), [SHRINK_ROWS, MIX, EXPAND_ROWS]),
    "tiles of 16, cores in shrink": (
        replace(TILES_16, programs=(1, 1)),
        [("shrink_tiles", True), EXPAND_TILES],
    ),
    "tiles of 16, cores apart": (
        replace(TILES_16, programs=(MANY, MANY)),
        [SHRINK_TILES, MIX, EXPAND_TILES],
    ),
    "tiles of 64, cores in shrink": (
        replace(TILES_64, programs=(1, 1)),
        [("shrink_tiles", True), EXPAND_TILES],
    ),
    "tiles of 64, cores apart": (
        replace(TILES_64, programs=(MANY, MANY)),
        [SHRINK_TILES, MIX, EXPAND_TILES],
    ),
}
TILES = [name for name in VARIANTS if name.startswith("tiles")]
MARGIN = 3
"""Columns of memory beside y's and x's that are not theirs."""


def kernels_of(plan):
    return [(one.kernel, bool(one.constants.get("FUSE_MIX", False))) for one in plan.launches]


def beside(matrix):
    """The same numbers in a wider buffer: (buffer, view of the numbers)."""
    buffer = torch.full((matrix.shape[0], matrix.shape[1] + 2 * MARGIN), 3.25, dtype=matrix.dtype)
    view = buffer[:, MARGIN:-MARGIN]
    view.copy_(matrix)
    return buffer, view


def run(case, config=DEFAULT, order=None, tokens=None):
    """What y becomes, for all tokens or some; x and y are parts of wider buffers."""
    take = slice(None) if tokens is None else tokens
    buffer, y = beside(case.y[take])
    # Where more than one, all tokens are taken.
    fan = len(case.y) // len(case.x) if len(case.x) else 1
    _, x = beside(case.x[take])
    slots = case.token_slots if tokens is None else case.token_slots[: len(case.y)][take]
    if case.pools.handles.get("config") != config:
        backend.prepare(case.pools, config=config)
        case.pools.handles["config"] = config
    backend.add_adapters(y, x, case.pools, slots, order, fan)
    y = y.clone()
    buffer[:, MARGIN:-MARGIN] = 3.25
    assert (buffer == 3.25).all()
    return y


def check(case, config=DEFAULT, order=None):
    assert_close(run(case, config, order), case)


def shuffled(n_tokens, seed=0):
    """An order that has nothing to do with the tokens' clusters, with places that are empty."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.full((n_tokens + 5,), -1)
    places = torch.randperm(len(order), generator=generator)[:n_tokens]
    order[places] = torch.arange(n_tokens)
    return order.int()
