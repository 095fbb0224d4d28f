"""LayerPools with slots, as the worker's manager makes them."""

import torch

from vllm_jd.plugin.worker.layer import LayerPools
from vllm_jd.plugin.worker.slots import Slots


def layer_pools(
    store, layer, slices, step, *, max_loras, max_rank, count=None, dtype=torch.float32, **options
):
    """(LayerPools of one layer, its Slots), `count` of them (all of the store's)."""
    like = {"dtype": dtype, "device": torch.device("cpu")}
    room = {"max_loras": max_loras}
    pools = LayerPools(
        slices[0].name,
        layer,
        slices,
        store,
        max_rank=max_rank,
        step=step,
        **room,
        **like,
        **options,
    )
    slots = Slots(store, pools.columns, pools.lines, count=count or len(store), **room, **like)
    pools.attach(slots.cores, slots.rows, slots.core_steps)
    return pools, slots
