"""V · x of an embedding on GPUs (`vllm_jd.kernels.embedding`): a column of V for each token.

One program a token, which goes through the rows of its slot. It reads rank numbers of each, one
from each vector: these lie far apart, so that each is a sector of 32 bytes. In return V lies in
the pools as that of every layer, and is paged and uploaded as such.
"""

import torch

from vllm_jd.kernels.embedding import check_look_up
from vllm_jd.kernels.pools import ModulePools


def look_up(
    z: torch.Tensor, ids: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor
) -> None:
    """See `vllm_jd.kernels.embedding.look_up`. No host synchronisation, and a grid that depends on
    the number of tokens alone: it may be recorded in a CUDA graph."""
    width = check_look_up(z, ids, pools, token_slots)
    z.zero_()
    if not len(ids):
        return
    from vllm_jd.kernels.triton.embedding_kernel import look_up_kernel

    rows, long, coded = pools.rows, pools.long_rows, pools.v_int8
    n_coded = 0 if coded is None else len(coded)
    look_up_kernel[(len(ids),)](
        z,
        ids,
        token_slots,
        rows,
        rows if long is None else long,
        pools.v,
        coded.codes if n_coded else pools.v,
        coded.steps if n_coded else pools.v,
        z.stride(0),
        ids.stride(0),
        rows.shape[0],
        rows.stride(0),
        0 if long is None else long.stride(0),
        rows.shape[2],
        pools.depth,
        pools.v.stride(0),
        n_coded,
        coded.codes.stride(0) if n_coded else 0,
        coded.steps.stride(0) if n_coded else 0,
        pools.d_in,
        width,
        CODED=bool(n_coded),
        WIDTH=max(16, 1 << (width - 1).bit_length()),
        num_warps=1,
    )
