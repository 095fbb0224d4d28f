"""The Triton kernels. What they compute together, and which are launched: `backend`, `plan`.

Three stages: shrink z = V x, mix h = core z, expand y += scale ∘ Uᵀ h. Two variants of the base
stages: `*_rows`, where a program serves one token, in float32 without tensor cores; `*_tiles`,
where it serves BLOCK_M tokens and loops over the distinct bases among them, with tensor cores. A
token's sums run in an order that the launch plan fixes: there are no atomic operations.

Basis vectors, cores and x enter a tensor core as they are (16 bits), sums are float32. z and h are
float32; where one enters a tensor core it is split into two 16-bit numbers whose sum is z or h to
some 2^-17 of it (bfloat16; 2^-22 for float16).

The interpreter (TRITON_INTERPRET=1) keeps bfloat16 as bit patterns: it multiplies the patterns in
tl.dot and cuts off instead of rounding. `_dot` and `_round` are what is done about that.
"""

# ruff: noqa: ANN001, ANN201, ANN202, SIM102 (the types are the compiler's, and so is what `if` does)

import triton
import triton.language as tl

from vllm_jd import row
from vllm_jd.kernels.triton import plan

# Triton decides at its own import: a variable that was set later must not count.
INTERPRET = tl.constexpr(not isinstance(tl.sum, triton.JITFunction))

V_START = tl.constexpr(row.V_START)
U_START = tl.constexpr(row.U_START)
RANK = tl.constexpr(row.RANK)
CORE_SLOT = tl.constexpr(row.CORE_SLOT)
CORE_OFFSET = tl.constexpr(row.CORE_OFFSET)
CORE_KIND = tl.constexpr(row.CORE_KIND)
SCALE_ROW = tl.constexpr(row.SCALE_ROW)
ROW = tl.constexpr(len(row.ROW_FIELDS))
FULL = tl.constexpr(row.CORE_FULL)
DIAGONAL = tl.constexpr(row.CORE_DIAGONAL)

# Table of slices, int64 [n_slices, SLICE]: what `backend` writes of each.
U_POINTER = tl.constexpr(0)
U_STRIDE = tl.constexpr(1)
WIDTH = tl.constexpr(2)
FIRST_COLUMN = tl.constexpr(3)
SCALES_POINTER = tl.constexpr(4)
SCALES_STRIDE = tl.constexpr(5)
CODES_POINTER = tl.constexpr(6)
STEPS_POINTER = tl.constexpr(7)
U_INT8 = tl.constexpr(8)
SLICE = tl.constexpr(9)

COUNTS = [
    "n_tokens", "n_places", "n_rows", "n_slices", "n_slots", "splits", "n_int8",
    "blocks_0", "blocks_1",
]  # fmt: skip
"""Arguments whose values Triton does not compile in: a batch of another size needs no compiling."""

STEP_COLUMNS = tl.constexpr(row.BLOCK)
MAX_SPLITS = tl.constexpr(plan.MAX_SPLITS)


@triton.jit
def _round(value, dtype: tl.constexpr):
    """float32 to dtype, to the nearest, ties to even."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True)
            odd = (bits >> 16) & 1
            rounded = ((bits + odd + 0x7FFF) >> 16).to(tl.uint16)
            nan = tl.full(value.shape, 0x7FC0, tl.uint16)
            return tl.where(value == value, rounded, nan).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def _dot(a, b, acc):
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _dot_split(value, b, dtype: tl.constexpr):
    """value · b for value [M, R] float32, b [R, N] of dtype: in two parts of dtype."""
    if dtype == tl.float16:
        # A power of two for each row keeps both parts within the range of float16.
        largest = tl.max(tl.abs(value), axis=1)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        value = value * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    high = _round(value, dtype)
    low = _round(value - high.to(tl.float32), dtype)
    acc = tl.zeros((value.shape[0], b.shape[1]), tl.float32)
    acc = _dot(high, b, _dot(low, b, acc))
    if dtype == tl.float16:
        acc = acc * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
    return acc


@triton.jit
def _basis(
    floats,
    stride,
    codes,
    steps,
    n_int8,
    width,
    start,
    r,
    rank,
    first,
    BLOCK_C: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Columns first … first + BLOCK_C of the vectors start + r: [BLOCK_R, BLOCK_C], 0 outside.

    r: [BLOCK_R], those < rank are there. first: a multiple of STEP_COLUMNS.
    """
    c = first + tl.arange(0, BLOCK_C)
    inside = (r < rank)[:, None] & (c < width)[None, :]
    if IS_INT8:
        row = (start + r).to(tl.int64)
        code = tl.load(codes + row[:, None] * width + c[None, :], mask=inside, other=0)
        blocks = tl.cdiv(width, STEP_COLUMNS)
        b = first // STEP_COLUMNS + tl.arange(0, BLOCK_C // STEP_COLUMNS)
        step = tl.load(
            steps + row[:, None] * blocks + b[None, :],
            mask=(r < rank)[:, None] & (b < blocks)[None, :],
            other=0.0,
        ).to(tl.float32)
        wide: tl.constexpr = (r.shape[0], BLOCK_C // STEP_COLUMNS, STEP_COLUMNS)
        step = tl.reshape(tl.broadcast_to(step[:, :, None], wide), (r.shape[0], BLOCK_C))
        return _round(code.to(tl.float32) * step, floats.dtype.element_ty)
    row = (start - n_int8 + r).to(tl.int64)
    return tl.load(floats + row[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _either_basis(
    floats,
    stride,
    codes,
    steps,
    n_int8,
    width,
    start,
    r,
    rank,
    first,
    BLOCK_C: tl.constexpr,
    HAS_INT8: tl.constexpr,
):
    """`_basis`, in 8 bits where the row that begins at `start` is."""
    if HAS_INT8:
        if start < n_int8:
            tile = _basis(
                floats, stride, codes, steps, n_int8, width, start, r, rank, first, BLOCK_C, True
            )
        else:
            tile = _basis(
                floats, stride, codes, steps, n_int8, width, start, r, rank, first, BLOCK_C, False
            )
    else:
        tile = _basis(floats, stride, codes, steps, 0, width, start, r, rank, first, BLOCK_C, False)
    return tile


@triton.jit
def _core(
    cores, core_steps, core_stride, step_stride, slot, place, mask,
    other: tl.constexpr, dtype: tl.constexpr, CORE_BITS: tl.constexpr,
):  # fmt: skip
    """Entries `place` of row `slot` (int64) of the cores, of dtype; `other` where not mask.

    core_steps: looked at with CORE_BITS only; cores are codes of so many bits then, not numbers
    (CORE_BITS 0). `slot` may be a scalar, or have the dimensions of `place`.
    """
    if CORE_BITS == 0:
        return tl.load(cores + slot * core_stride + place, mask=mask, other=other)
    # Neighbours read the same step, and in 4 bits the same byte: one reading serves a warp.
    step = tl.load(core_steps + slot * step_stride + (place >> 5), mask=mask, other=0.0)
    if CORE_BITS == 8:
        code = tl.load(cores + slot * core_stride + place, mask=mask, other=0).to(tl.float32)
    else:
        pair = tl.load(cores + slot * core_stride + (place >> 1), mask=mask, other=0)
        code = (((pair.to(tl.int32) >> ((place & 1) * 4)) & 15) - 8).to(tl.float32)
    number = code * step.to(tl.float32)
    if other != 0:
        number = tl.where(mask, number, other)
    return _round(number, dtype)


@triton.jit
def _slice_of_block(block, blocks_0, blocks_1, table, n_slices, BLOCK_N: tl.constexpr):
    """(slice, its first column in this block): blocks of columns are counted through all slices.
    How many the first two slices have is told, so that nothing is waited for."""
    beyond = block >= blocks_0
    block -= tl.where(beyond, blocks_0, 0)
    beyond_1 = beyond & (block >= blocks_1)
    block -= tl.where(beyond_1, blocks_1, 0)
    s = tl.where(beyond, 1, 0) + tl.where(beyond_1, 1, 0)
    for i in range(2, n_slices - 1):
        blocks = tl.cdiv(tl.load(table + i * SLICE + WIDTH).to(tl.int32), BLOCK_N)
        beyond = (s == i) & (block >= blocks)
        block -= tl.where(beyond, blocks, 0)
        s += tl.where(beyond, 1, 0)
    return s, block * BLOCK_N


@triton.jit
def _of_first(value, index, first):
    """value [BLOCK_M] at index first, as a scalar."""
    return tl.sum(tl.where(index == first, value, 0), axis=0)


@triton.jit
def _first_of(todo, index, BLOCK_M: tl.constexpr):
    """Where the first token that is not done stands in its tile; BLOCK_M: all are done."""
    return tl.min(tl.where(todo, index, BLOCK_M), axis=0)


@triton.jit
def _its_basis(starts, rank, todo, index, first):
    """(start, rank) of the basis of the token at `first`, and which tokens share it."""
    start = _of_first(starts, index, first)
    its_rank = _of_first(rank, index, first)
    return start, its_rank, todo & (starts == start) & (rank == its_rank)


# ---------------------------------------------------------------- shrink: z = V x


@triton.jit
def _dot_rows(
    x, v, v_stride, codes, steps, n_int8, d_in, start, r, rank, begin, end,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R]: the vectors' products with x over the columns begin … end."""
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for first in range(begin, end, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        x_part = tl.load(x + c, mask=c < d_in, other=0.0).to(tl.float32)
        v_part = _basis(
            v, v_stride, codes, steps, n_int8, d_in, start, r, rank, first, BLOCK_K, IS_INT8
        )
        acc += v_part.to(tl.float32) * x_part[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _first_row(
    rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth,
):  # fmt: skip
    """Where the first row of slice s of a slot (int64; or of each of many) stands."""
    return tl.where(
        slot < n_slots,
        rows + slot * slot_stride + s * depth * ROW,
        long_rows + (slot - n_slots) * long_stride + s * long_depth * ROW,
    )


@triton.jit
def _product_row(
    x, v, v_stride, codes, steps, n_int8, d_in, start, r, rank, begin, end,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INT8: tl.constexpr,
):  # fmt: skip
    """`_dot_rows`, in 8 bits where the row that begins at `start` is."""
    if HAS_INT8:
        if start < n_int8:
            found = _dot_rows(
                x, v, v_stride, codes, steps, n_int8, d_in, start, r, rank, begin, end,
                BLOCK_R, BLOCK_K, True,
            )  # fmt: skip
        else:
            found = _dot_rows(
                x, v, v_stride, codes, steps, n_int8, d_in, start, r, rank, begin, end,
                BLOCK_R, BLOCK_K, False,
            )  # fmt: skip
    else:
        found = _dot_rows(
            x, v, v_stride, codes, steps, 0, d_in, start, r, rank, begin, end,
            BLOCK_R, BLOCK_K, False,
        )  # fmt: skip
    return found


@triton.jit
def _shrink_row(
    z, x, mine, v, codes, steps, t, row, chunk, split,
    n_tokens, n_rows, chunks, d_in, split_width, x_stride, v_stride, n_int8,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INT8: tl.constexpr,
):  # fmt: skip
    """z[split, t, row] of the row that stands at mine."""
    rank = tl.load(mine + RANK)
    start = tl.load(mine + V_START)
    width = chunks * BLOCK_R
    if (chunk * BLOCK_R < rank) & (rank <= width):
        r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        begin = split * split_width
        end = tl.minimum(begin + split_width, d_in)
        found = _product_row(
            x + t.to(tl.int64) * x_stride, v, v_stride, codes, steps, n_int8, d_in,
            start, r, rank, begin, end, BLOCK_R, BLOCK_K, HAS_INT8,
        )  # fmt: skip
        place = ((split.to(tl.int64) * n_tokens + t) * n_rows + row) * width
        tl.store(z + place + r, found, mask=r < rank)


@triton.jit
def _shrink_input(
    z, x, slots, rows, long_rows, v, codes, steps, i, row, k, chunk, split,
    n_tokens, n_rows, chunks, d_in, split_width, x_stride, slot_stride, v_stride, n_int8,
    n_slots, depth, long_depth, long_stride,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INT8: tl.constexpr, LONG: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """z[split, t, row] of row k of a slice, of the FAN tokens t of input i; made once for
    neighbours that share V."""
    s = row // depth
    at = s * long_depth + k if LONG else row
    width = chunks * BLOCK_R
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = split * split_width
    end = tl.minimum(begin + split_width, d_in)
    x += i.to(tl.int64) * x_stride
    found = tl.zeros((BLOCK_R,), tl.float32)
    its_start = i * 0 - 1
    its_rank = i * 0
    for j in range(FAN):
        t = i * FAN + j
        slot = tl.load(slots + t).to(tl.int64)
        mine = rows + slot * slot_stride + row * ROW
        there = slot >= 0
        if LONG:
            first = _first_row(
                rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth
            )
            mine = first + k * ROW
            there = there & (k < tl.where(slot < n_slots, depth, long_depth))
        rank = tl.load(mine + RANK, mask=there, other=0)
        if (chunk * BLOCK_R < rank) & (rank <= width):
            start = tl.load(mine + V_START)
            if (start != its_start) | (rank != its_rank):
                found = _product_row(
                    x, v, v_stride, codes, steps, n_int8, d_in,
                    start, r, rank, begin, end, BLOCK_R, BLOCK_K, HAS_INT8,
                )  # fmt: skip
                its_start = start
                its_rank = rank
            place = ((split.to(tl.int64) * n_tokens + t) * n_rows + at) * width
            tl.store(z + place + r, found, mask=r < rank)


@triton.jit(do_not_specialize=COUNTS)
def shrink_rows(
    z, x, slots, rows, long_rows, v, codes, steps,
    n_tokens, n_rows, chunks, d_in, split_width, x_stride, slot_stride, v_stride, n_int8,
    n_slots, depth, long_depth, long_stride,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INT8: tl.constexpr, LONG: tl.constexpr,
    FAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """z[part, t, row] = V · x[t // FAN] over the columns of a part of d_in.

    Grid: (n_tokens / FAN, n_slices * depth * chunks, splits): a program serves the tokens of one
    input. With LONG, slots from n_slots on have long_depth rows for a slice: the program of row k
    sees to k, k + depth, k + 2 depth, … of them.

    Args:
        z: float32 [splits, n_tokens, n_rows, chunks * BLOCK_R]; entries beyond a rank stay as
            they are, and so does all of a token without an adapter. n_rows: n_slices times the
            most rows that a slot may have.
        x: [n_tokens / FAN, d_in], rows x_stride apart.
        slots: int32 [>= n_tokens].
        rows: int32 [n_slots, n_slices * depth, ROW], slots slot_stride apart.
        long_rows: int32 [long slots, n_slices * long_depth, ROW], slots long_stride apart; read
            only with LONG.
        v, codes, steps: `ModulePools.v` and `.v_int8`, which has n_int8 rows.
    """
    t = tl.program_id(0)
    row = tl.program_id(1) // chunks
    chunk = tl.program_id(1) % chunks
    split = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if FAN > 1:
        for k in range(row % depth, long_depth if LONG else depth, depth):
            _shrink_input(
                z, x, slots, rows, long_rows, v, codes, steps, t, row, k, chunk, split,
                n_tokens, n_rows, chunks, d_in, split_width, x_stride, slot_stride, v_stride,
                n_int8, n_slots, depth, long_depth, long_stride,
                BLOCK_R, BLOCK_K, HAS_INT8, LONG, FAN,
            )  # fmt: skip
    else:
        slot = tl.load(slots + t).to(tl.int64)
        if slot < 0:
            return
        if LONG:
            s = row // depth
            first = _first_row(
                rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth
            )
            for k in range(row % depth, tl.where(slot < n_slots, depth, long_depth), depth):
                _shrink_row(
                    z, x, first + k * ROW, v, codes, steps, t, s * long_depth + k, chunk, split,
                    n_tokens, n_rows, chunks, d_in, split_width, x_stride, v_stride, n_int8,
                    BLOCK_R, BLOCK_K, HAS_INT8,
                )  # fmt: skip
        else:
            _shrink_row(
                z, x, rows + slot * slot_stride + row * ROW, v, codes, steps, t, row, chunk, split,
                n_tokens, n_rows, chunks, d_in, split_width, x_stride, v_stride, n_int8,
                BLOCK_R, BLOCK_K, HAS_INT8,
            )  # fmt: skip


@triton.jit
def _dot_tiles(
    x, offsets, mine, v, v_stride, codes, steps, n_int8, d_in, start, r, rank, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_R]: the products of the tokens that are `mine` with the vectors."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(begin, end, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        inside = mine[:, None] & (c < d_in)[None, :]
        x_part = tl.load(x + offsets[:, None] + c[None, :], mask=inside, other=0.0)
        v_part = _basis(
            v, v_stride, codes, steps, n_int8, d_in, start, r, rank, first, BLOCK_K, IS_INT8
        )
        acc = _dot(x_part, tl.trans(v_part), acc)
    return acc


@triton.jit
def _tokens_of_tile(tile, order, slots, n_places, HAS_ORDER: tl.constexpr, BLOCK_M: tl.constexpr):
    """(tokens [BLOCK_M], their slots, -1 where there is none)."""
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = place
    there = place < n_places
    if HAS_ORDER:
        tokens = tl.load(order + place, mask=there, other=-1)
        there = tokens >= 0
    slot = tl.load(slots + tokens, mask=there, other=-1)
    return tokens.to(tl.int64), slot


@triton.jit
def _mix_tiles(
    z, mine, cores, core_steps, core_stride, step_stride, rank, r, index,
    dtype: tl.constexpr, BLOCK_M: tl.constexpr, CORE_BITS: tl.constexpr,
):  # fmt: skip
    """h = core z for a tile: z [BLOCK_M, BLOCK_R] float32; mine: pointers to the tokens' rows.

    A full core is read once for all tokens of the tile that share it, a diagonal for each token.
    """
    used = rank > 0
    kind = tl.load(mine + CORE_KIND, mask=used, other=0)
    cored = used & (kind != 0)
    core_slot = tl.load(mine + CORE_SLOT, mask=cored, other=0)
    offset = tl.load(mine + CORE_OFFSET, mask=cored, other=0)
    diagonal = kind == DIAGONAL
    factor = _core(
        cores, core_steps, core_stride, step_stride,
        core_slot.to(tl.int64)[:, None], offset[:, None] + r[None, :],
        (used & diagonal)[:, None] & (r[None, :] < rank[:, None]), 1.0, dtype, CORE_BITS,
    )  # fmt: skip
    h = z * factor.to(tl.float32)
    todo = used & (kind == FULL)
    first = _first_of(todo, index, BLOCK_M)
    while first < BLOCK_M:
        its_slot = _of_first(core_slot, index, first)
        its_offset = _of_first(offset, index, first)
        its_rank = _of_first(rank, index, first)
        shared = todo & (core_slot == its_slot) & (offset == its_offset) & (rank == its_rank)
        transposed = _core(
            cores, core_steps, core_stride, step_stride,
            its_slot.to(tl.int64), its_offset + r[:, None] + r[None, :] * its_rank,
            (r < its_rank)[:, None] & (r < its_rank)[None, :], 0.0, dtype, CORE_BITS,
        )  # fmt: skip
        mixed = _dot_split(z, transposed, dtype)
        h = tl.where(shared[:, None], mixed, h)
        todo = todo & (shared == 0)
        first = _first_of(todo, index, BLOCK_M)
    return h


@triton.jit
def _product_tile(
    found, x, offsets, starts, rank, todo, index, v, v_stride, codes, steps, n_int8, d_in,
    r, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, HAS_INT8: tl.constexpr,
):  # fmt: skip
    """`found` [BLOCK_M, BLOCK_R], where `todo` the products of x with each token's own vectors."""
    first = _first_of(todo, index, BLOCK_M)
    while first < BLOCK_M:
        start, its_rank, shared = _its_basis(starts, rank, todo, index, first)
        if HAS_INT8:
            if start < n_int8:
                product = _dot_tiles(
                    x, offsets, shared, v, v_stride, codes, steps, n_int8, d_in,
                    start, r, its_rank, begin, end, BLOCK_M, BLOCK_R, BLOCK_K, True,
                )  # fmt: skip
            else:
                product = _dot_tiles(
                    x, offsets, shared, v, v_stride, codes, steps, n_int8, d_in,
                    start, r, its_rank, begin, end, BLOCK_M, BLOCK_R, BLOCK_K, False,
                )  # fmt: skip
        else:
            product = _dot_tiles(
                x, offsets, shared, v, v_stride, codes, steps, 0, d_in,
                start, r, its_rank, begin, end, BLOCK_M, BLOCK_R, BLOCK_K, False,
            )  # fmt: skip
        # Selected, not multiplied by 0: what another basis holds never reaches a token.
        found = tl.where(shared[:, None], product, found)
        todo = todo & (shared == 0)
        first = _first_of(todo, index, BLOCK_M)
    return found


@triton.jit
def _shrink_tile(
    z, x, mine, v, codes, steps, cores, core_steps, tokens, there, row, chunk, split, index,
    n_tokens, n_rows, chunks, d_in, split_width,
    x_stride, v_stride, core_stride, step_stride, n_int8,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INT8: tl.constexpr, FUSE_MIX: tl.constexpr, CORE_BITS: tl.constexpr,
):  # fmt: skip
    """z[split, tokens, row] of the rows that stand at mine, of the tokens that have them."""
    width = chunks * BLOCK_R
    rank = tl.load(mine + RANK, mask=there, other=0)
    starts = tl.load(mine + V_START, mask=there, other=0)
    rank = tl.where(rank > width, 0, rank)
    todo = rank > chunk * BLOCK_R
    if _first_of(todo, index, BLOCK_M) < BLOCK_M:
        r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        begin = split * split_width
        end = tl.minimum(begin + split_width, d_in)
        found = _product_tile(
            tl.zeros((BLOCK_M, BLOCK_R), tl.float32), x, tokens * x_stride, starts, rank, todo,
            index, v, v_stride, codes, steps, n_int8, d_in, r, begin, end,
            BLOCK_M, BLOCK_R, BLOCK_K, HAS_INT8,
        )  # fmt: skip
        if FUSE_MIX:
            found = _mix_tiles(
                found, mine, cores, core_steps, core_stride, step_stride, rank, r, index,
                x.dtype.element_ty, BLOCK_M, CORE_BITS,
            )  # fmt: skip
        place = ((split.to(tl.int64) * n_tokens + tokens) * n_rows + row) * width
        tl.store(z + place[:, None] + r[None, :], found, mask=r[None, :] < rank[:, None])


@triton.jit
def _shrink_inputs(
    z, x, slots, rows, long_rows, v, codes, steps, cores, core_steps, inputs, inside,
    row, k, chunk, split, index,
    n_tokens, n_rows, chunks, d_in, split_width,
    x_stride, slot_stride, v_stride, core_stride, step_stride, n_int8,
    n_slots, depth, long_depth, long_stride,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INT8: tl.constexpr, FUSE_MIX: tl.constexpr, CORE_BITS: tl.constexpr, LONG: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """`_shrink_input` for a tile of inputs, those that are `inside`."""
    s = row // depth
    at = s * long_depth + k if LONG else row
    width = chunks * BLOCK_R
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = split * split_width
    end = tl.minimum(begin + split_width, d_in)
    found = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    its_starts = tl.full((BLOCK_M,), -1, tl.int32)
    its_ranks = tl.zeros((BLOCK_M,), tl.int32)
    for j in range(FAN):
        tokens = inputs * FAN + j
        slot = tl.load(slots + tokens, mask=inside, other=-1).to(tl.int64)
        mine = rows + slot * slot_stride + row * ROW
        there = slot >= 0
        if LONG:
            first = _first_row(
                rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth
            )
            mine = first + k * ROW
            there = there & (k < tl.where(slot < n_slots, depth, long_depth))
        rank = tl.load(mine + RANK, mask=there, other=0)
        rank = tl.where(rank > width, 0, rank)
        used = rank > chunk * BLOCK_R
        starts = tl.load(mine + V_START, mask=used, other=0)
        todo = used & ((starts != its_starts) | (rank != its_ranks))
        found = _product_tile(
            found, x, inputs * x_stride, starts, rank, todo, index,
            v, v_stride, codes, steps, n_int8, d_in, r, begin, end,
            BLOCK_M, BLOCK_R, BLOCK_K, HAS_INT8,
        )  # fmt: skip
        its_starts = tl.where(todo, starts, its_starts)
        its_ranks = tl.where(todo, rank, its_ranks)
        value = found
        if FUSE_MIX:
            value = _mix_tiles(
                found, mine, cores, core_steps, core_stride, step_stride, rank, r, index,
                x.dtype.element_ty, BLOCK_M, CORE_BITS,
            )  # fmt: skip
        place = ((split.to(tl.int64) * n_tokens + tokens) * n_rows + at) * width
        tl.store(z + place[:, None] + r[None, :], value, mask=r[None, :] < rank[:, None])


@triton.jit(do_not_specialize=COUNTS)
def shrink_tiles(
    z, x, slots, order, rows, long_rows, v, codes, steps, cores, core_steps,
    n_tokens, n_places, n_rows, chunks, d_in, split_width,
    x_stride, slot_stride, v_stride, core_stride, step_stride, n_int8,
    n_slots, depth, long_depth, long_stride,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INT8: tl.constexpr, HAS_ORDER: tl.constexpr, FUSE_MIX: tl.constexpr,
    CORE_BITS: tl.constexpr, LONG: tl.constexpr, FAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `shrink_rows`, for tiles of inputs; with FUSE_MIX z becomes h, the cores applied.

    Grid: (n_slices * depth * chunks, tiles, splits); FUSE_MIX: one chunk, one split.

    Args:
        order: int32 [n_places], the token of each place, -1 for none, those of one input side by
            side; read only with HAS_ORDER. Without it n_places is n_tokens.
        cores, core_steps: of `ModulePools`, rows core_stride and step_stride apart; numbers, or
            codes of CORE_BITS bits with their steps.
    """
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    split = tl.program_id(2)
    index = tl.arange(0, BLOCK_M)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if FAN > 1:
        place = (tl.program_id(1) * BLOCK_M + index) * FAN
        there = place < n_places
        inputs = place // FAN
        if HAS_ORDER:
            token = tl.load(order + place, mask=there, other=-1)
            there = token >= 0
            inputs = tl.where(there, token, 0) // FAN
        for k in range(row % depth, long_depth if LONG else depth, depth):
            _shrink_inputs(
                z, x, slots, rows, long_rows, v, codes, steps, cores, core_steps,
                inputs.to(tl.int64), there, row, k, chunk, split, index,
                n_tokens, n_rows, chunks, d_in, split_width,
                x_stride, slot_stride, v_stride, core_stride, step_stride, n_int8,
                n_slots, depth, long_depth, long_stride,
                BLOCK_M, BLOCK_R, BLOCK_K, HAS_INT8, FUSE_MIX, CORE_BITS, LONG, FAN,
            )  # fmt: skip
    else:
        tokens, slot = _tokens_of_tile(tl.program_id(1), order, slots, n_places, HAS_ORDER, BLOCK_M)
        if LONG:
            s = row // depth
            first = _first_row(
                rows, long_rows, slot.to(tl.int64), s, n_slots, slot_stride, long_stride, depth,
                long_depth,
            )  # fmt: skip
            own = tl.where(slot < 0, 0, tl.where(slot < n_slots, depth, long_depth))
            for k in range(row % depth, tl.max(own, axis=0), depth):
                _shrink_tile(
                    z, x, first + k * ROW, v, codes, steps, cores, core_steps, tokens, k < own,
                    s * long_depth + k, chunk, split, index,
                    n_tokens, n_rows, chunks, d_in, split_width,
                    x_stride, v_stride, core_stride, step_stride, n_int8,
                    BLOCK_M, BLOCK_R, BLOCK_K, HAS_INT8, FUSE_MIX, CORE_BITS,
                )  # fmt: skip
        else:
            mine = rows + slot.to(tl.int64) * slot_stride + row * ROW
            _shrink_tile(
                z, x, mine, v, codes, steps, cores, core_steps, tokens, slot >= 0,
                row, chunk, split, index,
                n_tokens, n_rows, chunks, d_in, split_width,
                x_stride, v_stride, core_stride, step_stride, n_int8,
                BLOCK_M, BLOCK_R, BLOCK_K, HAS_INT8, FUSE_MIX, CORE_BITS,
            )  # fmt: skip


# ---------------------------------------------------------------- mix: h = core z


@triton.jit
def _sum_splits(z, split_stride, splits, r, rank):
    """[BLOCK_R]: the parts of one token's z, summed in a fixed order."""
    part = tl.arange(0, MAX_SPLITS)
    inside = (part < splits)[:, None] & (r < rank)[None, :]
    parts = tl.load(z + part[:, None] * split_stride + r[None, :], mask=inside, other=0.0)
    return tl.sum(parts, axis=0)


@triton.jit
def _core_of(
    mine, cores, core_steps, core_stride, step_stride, rank, r,
    dtype: tl.constexpr, CORE_BITS: tl.constexpr,
):  # fmt: skip
    """(kind, full core [BLOCK_R, BLOCK_R], diagonal [BLOCK_R]) of the row at mine, of a rank up to
    BLOCK_R: what it has not is 0, or 1 for the diagonal."""
    kind = tl.load(mine + CORE_KIND)
    core_slot = tl.load(mine + CORE_SLOT).to(tl.int64)
    offset = tl.load(mine + CORE_OFFSET)
    own = r < tl.where(kind == FULL, rank, 0)
    full = _core(
        cores, core_steps, core_stride, step_stride,
        core_slot, offset + r[:, None] * rank + r[None, :], own[:, None] & own[None, :], 0.0,
        dtype, CORE_BITS,
    ).to(tl.float32)  # fmt: skip
    diagonal = _core(
        cores, core_steps, core_stride, step_stride,
        core_slot, offset + r, r < tl.where(kind == DIAGONAL, rank, 0), 1.0, dtype, CORE_BITS,
    ).to(tl.float32)  # fmt: skip
    return kind, full, diagonal


@triton.jit
def _mixed(kind, full, diagonal, z):
    """[BLOCK_R]: core · z, of what `_core_of` read."""
    return tl.where(kind == FULL, tl.sum(full * z[None, :], axis=1), diagonal * z)


@triton.jit
def _mix_chunk(
    z, split_stride, splits, mine, cores, core_steps, core_stride, step_stride, rank, chunk,
    dtype: tl.constexpr, BLOCK_R: tl.constexpr, CORE_BITS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R]: entries chunk * BLOCK_R on of core · z, of any rank; z: of one token and row."""
    i = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    kind = tl.load(mine + CORE_KIND)
    h = tl.zeros((BLOCK_R,), tl.float32)
    if kind == FULL:
        core_slot = tl.load(mine + CORE_SLOT).to(tl.int64)
        offset = tl.load(mine + CORE_OFFSET)
        for first in range(0, rank, BLOCK_R):
            j = first + tl.arange(0, BLOCK_R)
            z_part = _sum_splits(z, split_stride, splits, j, rank)
            inside = (i < rank)[:, None] & (j < rank)[None, :]
            tile = _core(
                cores, core_steps, core_stride, step_stride,
                core_slot, offset + i[:, None] * rank + j[None, :], inside, 0.0, dtype, CORE_BITS,
            )  # fmt: skip
            h += tl.sum(tile.to(tl.float32) * z_part[None, :], axis=1)
    else:
        h = _sum_splits(z, split_stride, splits, i, rank)
        if kind == DIAGONAL:
            core_slot = tl.load(mine + CORE_SLOT).to(tl.int64)
            offset = tl.load(mine + CORE_OFFSET)
            h *= _core(
                cores, core_steps, core_stride, step_stride,
                core_slot, offset + i, i < rank, 0.0, dtype, CORE_BITS,
            ).to(tl.float32)  # fmt: skip
    return h


@triton.jit
def _mix_row(
    h, z, mine, cores, core_steps, t, row, chunk,
    n_rows, chunks, splits, split_stride, core_stride, step_stride,
    dtype: tl.constexpr, BLOCK_R: tl.constexpr, CORE_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[t, row] of the row that stands at mine."""
    rank = tl.load(mine + RANK)
    width = chunks * BLOCK_R
    place = (t.to(tl.int64) * n_rows + row) * width
    i = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    if chunks == 1:
        # All but z may be read before the kernel before is done (`expand_rows` says why).
        rank = tl.where(rank > width, 0, rank)
        kind, full, diagonal = _core_of(
            mine, cores, core_steps, core_stride, step_stride, rank, i, dtype, CORE_BITS
        )
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        mixed = _mixed(kind, full, diagonal, _sum_splits(z + place, split_stride, splits, i, rank))
        tl.store(h + place + i, mixed, mask=i < rank)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if (chunk * BLOCK_R < rank) & (rank <= width):
            mixed = _mix_chunk(
                z + place, split_stride, splits, mine, cores, core_steps, core_stride, step_stride,
                rank, chunk, dtype, BLOCK_R, CORE_BITS,
            )  # fmt: skip
            tl.store(h + place + i, mixed, mask=i < rank)


@triton.jit(do_not_specialize=COUNTS)
def mix_rows(
    h, z, x, slots, rows, long_rows, cores, core_steps,
    n_rows, chunks, splits, split_stride, slot_stride, core_stride, step_stride,
    n_slots, depth, long_depth, long_stride,
    BLOCK_R: tl.constexpr, CORE_BITS: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[t, row] = core · z[t, row], z summed over its parts.

    Grid: (n_tokens, n_slices * depth, chunks). h: float32 [n_tokens, n_rows, chunks * BLOCK_R];
    parts of z lie split_stride apart; x is not read, its type is that of decoded cores; the rest
    as in `shrink_rows` and `shrink_tiles`.
    """
    t = tl.program_id(0)
    row = tl.program_id(1)
    chunk = tl.program_id(2)
    slot = tl.load(slots + t).to(tl.int64)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    if LONG:
        s = row // depth
        first = _first_row(
            rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth
        )
        for k in range(row % depth, tl.where(slot < n_slots, depth, long_depth), depth):
            _mix_row(
                h, z, first + k * ROW, cores, core_steps, t, s * long_depth + k, chunk,
                n_rows, chunks, splits, split_stride, core_stride, step_stride,
                x.dtype.element_ty, BLOCK_R, CORE_BITS, PDL,
            )  # fmt: skip
    else:
        _mix_row(
            h, z, rows + slot * slot_stride + row * ROW, cores, core_steps, t, row, chunk,
            n_rows, chunks, splits, split_stride, core_stride, step_stride,
            x.dtype.element_ty, BLOCK_R, CORE_BITS, PDL,
        )  # fmt: skip


# ---------------------------------------------------------------- expand: y += scale ∘ Uᵀ h


@triton.jit(do_not_specialize=COUNTS)
def expand_rows(
    y, h, slots, rows, long_rows, table, cores, core_steps,
    blocks_0, blocks_1, n_rows, n_slices, chunks, splits,
    y_stride, split_stride, slot_stride, core_stride, step_stride,
    n_slots, depth, long_depth, long_stride,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INT8: tl.constexpr,
    HAS_SCALES: tl.constexpr, FUSE_MIX: tl.constexpr, CORE_BITS: tl.constexpr,
    ALIGNED: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[t, slice] += Σ_k scale ∘ (Uᵀ · h[t, slice, k]); with FUSE_MIX h is z, and core · z taken.

    Grid: (n_tokens, blocks of BLOCK_N columns in all slices).

    Args:
        y: [n_tokens, sum of widths], rows y_stride apart.
        h: float32 [n_tokens, n_rows, chunks * BLOCK_R], or z, with FUSE_MIX.
        table: int64 [n_slices, SLICE]. blocks_0, blocks_1: blocks of its first two slices.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    t = tl.program_id(0)
    slot = tl.load(slots + t).to(tl.int64)
    s, first = _slice_of_block(tl.program_id(1), blocks_0, blocks_1, table, n_slices, BLOCK_N)
    table += s * SLICE
    u, u_stride, codes, steps, n_int8, width, column = _slice_fields(table, dtype, ALIGNED)
    if HAS_SCALES:
        scales, scales_stride = _scales_fields(table, dtype, ALIGNED)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    # With PDL this program may have begun before the kernel before it is done. That one waited for
    # all others, so that only what it writes, z or h, is not to be read before `gdc_wait`.
    c = first + tl.arange(0, BLOCK_N)
    y += t.to(tl.int64) * y_stride + column + c
    before = tl.load(y, mask=c < width, other=0.0).to(tl.float32)
    scratch = chunks * BLOCK_R
    acc = tl.zeros((BLOCK_N,), tl.float32)
    end = 0  # of the columns that change: none, where no row is in use
    if LONG:
        own = tl.where(slot < n_slots, depth, long_depth)
        row = s * long_depth
        mine = _first_row(
            rows, long_rows, slot, s, n_slots, slot_stride, long_stride, depth, long_depth
        )
    else:
        own = depth
        row = s * depth
        mine = rows + slot * slot_stride + row * ROW
    for _ in range(own):
        rank = tl.load(mine + RANK)
        start = tl.load(mine + U_START)
        if rank > 0:
            end = width
            place = (t.to(tl.int64) * n_rows + row) * scratch
            product = tl.zeros((BLOCK_N,), tl.float32)
            last = tl.minimum(rank, scratch)
            if chunks == 1:  # one round: no loop is left
                last = BLOCK_R
            for r0 in range(0, last, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                tile = _either_basis(
                    u, u_stride, codes, steps, n_int8, width, start, r, rank, first, BLOCK_N,
                    HAS_INT8,
                )  # fmt: skip
                if FUSE_MIX:
                    kind, full, diagonal = _core_of(
                        mine, cores, core_steps, core_stride, step_stride, rank, r, dtype,
                        CORE_BITS,
                    )  # fmt: skip
                    if PDL:
                        tl.extra.cuda.gdc_wait()
                    z = _sum_splits(h + place, split_stride, splits, r, rank)
                    mixed = _mixed(kind, full, diagonal, z)
                else:
                    if PDL:
                        tl.extra.cuda.gdc_wait()
                    mixed = tl.load(h + place + r, mask=r < rank, other=0.0)
                product += tl.sum(tile.to(tl.float32) * mixed[:, None], axis=0)
            if HAS_SCALES:
                scale_row = tl.load(mine + SCALE_ROW)
                inside = c < tl.where(scale_row >= 0, width, 0)
                product *= tl.load(
                    scales + scale_row * scales_stride + c, mask=inside, other=1.0
                ).to(tl.float32)
            acc += tl.where(rank > scratch, float("nan"), product)
        row += 1
        mine += ROW
    if PDL:  # all programs, also of tokens whose rows are all empty
        tl.extra.cuda.gdc_wait()
    tl.store(y, _round(before + acc, dtype), mask=c < end)


@triton.jit
def _slice_fields(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """(u, its stride, codes, steps, rows of those, width, first column) of the slice at table."""
    pointer = tl.load(table + U_POINTER)
    stride = tl.load(table + U_STRIDE)
    width = tl.load(table + WIDTH).to(tl.int32)
    column = tl.load(table + FIRST_COLUMN)
    codes = tl.load(table + CODES_POINTER)
    u = pointer.to(tl.pointer_type(dtype))
    codes = codes.to(tl.pointer_type(tl.int8))
    steps = tl.load(table + STEPS_POINTER).to(tl.pointer_type(tl.bfloat16))
    n_int8 = tl.load(table + U_INT8).to(tl.int32)
    if ALIGNED:  # what Triton finds out of arguments, but not of a table
        u = tl.multiple_of(u, 16)
        stride = tl.multiple_of(stride, 16)
        width = tl.multiple_of(width, 16)
        column = tl.multiple_of(column, 16)
        codes = tl.multiple_of(codes, 16)
    return u, stride, codes, steps, n_int8, width, column


@triton.jit
def _scales_fields(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """(scales, their stride) of the slice at table."""
    pointer = tl.load(table + SCALES_POINTER)
    stride = tl.load(table + SCALES_STRIDE)
    scales = pointer.to(tl.pointer_type(dtype))
    if ALIGNED:
        scales = tl.multiple_of(scales, 16)
        stride = tl.multiple_of(stride, 16)
    return scales, stride


@triton.jit(do_not_specialize=COUNTS)
def expand_tiles(
    y, h, slots, order, rows, long_rows, table,
    n_places, blocks_0, blocks_1, n_rows, n_slices, chunks, y_stride, slot_stride,
    n_slots, depth, long_depth, long_stride,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_INT8: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_SCALES: tl.constexpr,
    ALIGNED: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `expand_rows`, for tiles of tokens. Grid: (blocks of columns in all slices, tiles)."""
    dtype: tl.constexpr = y.dtype.element_ty
    index = tl.arange(0, BLOCK_M)
    tokens, slot = _tokens_of_tile(tl.program_id(1), order, slots, n_places, HAS_ORDER, BLOCK_M)
    s, first_column = _slice_of_block(
        tl.program_id(0), blocks_0, blocks_1, table, n_slices, BLOCK_N
    )
    table += s * SLICE
    u, u_stride, codes, steps, n_int8, width, column = _slice_fields(table, dtype, ALIGNED)
    if HAS_SCALES:
        scales, scales_stride = _scales_fields(table, dtype, ALIGNED)
    if tl.max(slot, axis=0) < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    # Before `gdc_wait`, as in `expand_rows`: all but z or h.
    c = first_column + tl.arange(0, BLOCK_N)
    y += tokens[:, None] * y_stride + column + c[None, :]
    EARLY: tl.constexpr = BLOCK_M == 16  # larger tiles need the registers
    if EARLY:
        before = tl.load(y, mask=(slot >= 0)[:, None] & (c < width)[None, :], other=0.0)
    scratch = chunks * BLOCK_R
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    any_rank = tl.zeros((BLOCK_M,), tl.int32)
    if LONG:
        each = tl.where(slot < 0, 0, tl.where(slot < n_slots, depth, long_depth))
        own = tl.max(each, axis=0)
        row = s * long_depth
        mine = _first_row(
            rows, long_rows, slot.to(tl.int64), s, n_slots, slot_stride, long_stride, depth,
            long_depth,
        )  # fmt: skip
    else:
        own = depth
        row = s * depth
        mine = rows + slot.to(tl.int64) * slot_stride + row * ROW
    for k in range(own):
        there = slot >= 0
        if LONG:
            there = k < each
        rank = tl.load(mine + RANK, mask=there, other=0)
        starts = tl.load(mine + U_START, mask=there, other=0)
        any_rank = tl.maximum(any_rank, rank)
        rank = tl.where(rank > scratch, 0, rank)
        todo = rank > 0
        place = (tokens * n_rows + row) * scratch
        first = _first_of(todo, index, BLOCK_M)
        while first < BLOCK_M:
            start, its_rank, shared = _its_basis(starts, rank, todo, index, first)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            last = its_rank
            if chunks == 1:
                last = BLOCK_R
            for r0 in tl.range(0, last, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                tile = _either_basis(
                    u, u_stride, codes, steps, n_int8, width, start, r, its_rank, first_column,
                    BLOCK_N, HAS_INT8,
                )  # fmt: skip
                if PDL:
                    tl.extra.cuda.gdc_wait()
                inside = shared[:, None] & (r < its_rank)[None, :]
                part = tl.load(h + place[:, None] + r[None, :], mask=inside, other=0.0)
                product += _dot_split(part, tile, dtype)
            if HAS_SCALES:
                scale_row = tl.load(mine + SCALE_ROW, mask=shared, other=-1)
                place_of_scales = (scale_row * scales_stride)[:, None] + c[None, :]
                inside = (scale_row >= 0)[:, None] & (c < width)[None, :]
                product *= tl.load(scales + place_of_scales, mask=inside, other=1.0).to(tl.float32)
            acc += tl.where(shared[:, None], product, 0.0)
            todo = todo & (shared == 0)
            first = _first_of(todo, index, BLOCK_M)
        row += 1
        mine += ROW
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.where((any_rank > scratch)[:, None], float("nan"), acc)
    inside = (any_rank > 0)[:, None] & (c < width)[None, :]
    if not EARLY:
        before = tl.load(y, mask=inside, other=0.0)
    tl.store(y, _round(before.to(tl.float32) + acc, dtype), mask=inside)
