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
    long_depth,
    v_stride,
    n_coded,
    codes_stride,
    steps_stride,
    vocabulary,
    width,
    CODED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """z[t, k · width + j] = V[v_start + j, ids[t]] for j < rank; the rest of z stays as it is.

    Grid: (tokens,). A slot has `depth` rows, those from slot `n_slots` on, of `long_rows`, have
    `long_depth`.
    """
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + t).to(tl.int64)
    token = tl.load(ids + t * ids_stride).to(tl.int64)
    is_long = slot >= n_slots
    its = tl.where(is_long, long_rows + (slot - n_slots) * long_stride, rows + slot * rows_stride)
    here = (slot >= 0) & (token >= 0) & (token < vocabulary)
    j = tl.arange(0, WIDTH)
    for k in range(0, tl.where(here, tl.where(is_long, long_depth, depth), 0)):
        start = tl.load(its + k * FIELDS + V_START).to(tl.int64)
        rank = tl.load(its + k * FIELDS + RANK)
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
        tl.store(z + t * z_stride + k * width + j, found, mask=mine)
