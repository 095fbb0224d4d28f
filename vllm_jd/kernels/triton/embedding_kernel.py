"""The Triton kernel of `vllm_jd.kernels.triton.embedding`, which needs Triton to be imported."""

# ruff: noqa: ANN001, ANN201 (the types are the compiler's)

import triton
import triton.language as tl

from vllm_jd import row
from vllm_jd.kernels.triton.kernels import _round

V_START = tl.constexpr(row.V_START)
RANK = tl.constexpr(row.RANK)
FIELDS = tl.constexpr(len(row.ROW_FIELDS))
BLOCK = tl.constexpr(row.BLOCK)


@triton.jit
def look_up_kernel(
    z,
    ids,
    token_slots,
    rows,
    long_rows,
    v,
    codes,
    steps,
    z_stride,
    ids_stride,
    n_slots,
    rows_stride,
    long_stride,
    depth,
    v_stride,
    n_coded,
    codes_stride,
    steps_stride,
    vocabulary,
    width,
    CODED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """z[t, k · width + j] = V[v_start + j, ids[t]] for j < rank, and 0 beyond it.

    Grid: (tokens, rows that a slot may have). `depth` is how many a slot of `rows` has; those of
    `long_rows`, from slot `n_slots` on, have as many as the grid.
    """
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    slot = tl.load(token_slots + t).to(tl.int64)
    token = tl.load(ids + t * ids_stride).to(tl.int64)
    is_long = slot >= n_slots
    here = (slot >= 0) & (token >= 0) & (token < vocabulary) & (is_long | (k < depth))
    its = tl.where(is_long, long_rows + (slot - n_slots) * long_stride, rows + slot * rows_stride)
    start = tl.load(its + k * FIELDS + V_START, mask=here, other=0).to(tl.int64)
    rank = tl.load(its + k * FIELDS + RANK, mask=here, other=0)
    j = tl.arange(0, WIDTH)
    index = start + j
    mine = j < rank
    plain = mine & (index >= n_coded)
    found = tl.load(v + (index - n_coded) * v_stride + token, mask=plain, other=0.0)
    if CODED:
        coded = mine & (index < n_coded)
        code = tl.load(codes + index * codes_stride + token, mask=coded, other=0)
        step = tl.load(steps + index * steps_stride + token // BLOCK, mask=coded, other=0.0)
        decoded = _round(code.to(tl.float32) * step.to(tl.float32), found.dtype)
        found = tl.where(coded, decoded, found)
    tl.store(z + t * z_stride + k * width + j, found, mask=j < width)
