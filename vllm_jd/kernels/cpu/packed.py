"""Bases in the order in which the CPU kernel reads them, in large pages of memory.

A decoding step has few tokens for each cluster, so that reading the bases is what it pays for. Rows
that are read side by side get about half of the memory's bandwidth: the processor's prefetching
follows one stream that goes on, not 16 short ones. So all bases of one cluster lie one after the
other, V and U of slice after slice, and in them the numbers as the arithmetic takes them: bfloat16,
or a quantised store's 8 bits, of which there are half as many bytes to read.

A part of the packed memory may be written anew with another basis (`pack_vectors`) of no more units
(`packed_units`): rows that name it by its place have the other vectors from the next call on.
"""

import torch

from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.cpu.layout import GROUP, LANES, SIDE, UNIT, V_COLUMNS
from vllm_jd.kernels.pools import Int8Rows
from vllm_jd.row import BLOCK


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the CPU kernel of this machine takes packed bases."""
    return dtype == torch.bfloat16 and cpu.isa() == "avx512_bf16"


def pack_vectors(side: str, vectors: torch.Tensor | Int8Rows, rank: int) -> torch.Tensor:
    """Bases of one rank, packed each for itself, to be placed wherever there is room.

    Args:
        side: `v` or `u`.
        vectors: rows `[bases · rank, width]`, basis after basis, numbers or in 8 bits.
        rank: of each basis, 1 or more.

    Returns:
        uint8 `[bases, bytes]`, each of as many units as `packed_units` says.
    """
    if isinstance(vectors, Int8Rows):
        form = {"v": _int8_v, "u": _int8_u}[side]
        numbers = vectors.codes.unflatten(0, (-1, rank)), vectors.steps.unflatten(0, (-1, rank))
        return form(*numbers).contiguous()
    form = {"v": _bfloat16_v, "u": _bfloat16_u}[side]
    return form(vectors.to(torch.bfloat16).unflatten(0, (-1, rank))).contiguous()


def packed_units(side: str, rank: int, width: int, *, in_8_bits: bool) -> int:
    """How many units of `layout.UNIT` bytes a basis of V (`v`) or U takes packed; never less for a
    higher rank."""
    return {"v": _v_bytes, "u": _u_bytes}[side](rank, width, in_8_bits) // UNIT


def _v_bytes(rank: int, width: int, in_8_bits: bool) -> int:
    if in_8_bits:
        return _units(-(-rank // LANES) * LANES * -(-width // BLOCK) * (BLOCK + 2))
    return rank * -(-width // V_COLUMNS) * V_COLUMNS * 2


def _u_bytes(rank: int, width: int, in_8_bits: bool) -> int:
    if rank == 0:
        return 0
    if in_8_bits:
        blocks = -(-width // BLOCK)
        block = -(-rank // LANES) * LANES * 2 + -(-rank // 2) * 2 * BLOCK
        return _units(_units(blocks * 4) + blocks * block)
    return rank * -(-width // SIDE) * SIDE * 2


def _units(size: int) -> int:
    return -(-size // UNIT) * UNIT


def _bfloat16_v(bases: torch.Tensor) -> torch.Tensor:
    """`[n, rank, width]` as uint8 `[n, bytes]`: eight rows after eight, of these 32 columns of all
    rows after 32."""
    bases = _whole(bases, V_COLUMNS)
    blocks = bases.shape[2] // V_COLUMNS
    if bases.shape[1] % GROUP == 0:  # at once, for those that are paged in
        groups = bases.unflatten(1, (-1, GROUP)).unflatten(3, (blocks, V_COLUMNS))
        return groups.transpose(2, 3).flatten(1).view(torch.uint8)
    groups = bases.unflatten(2, (blocks, V_COLUMNS)).split(GROUP, dim=1)
    packed = torch.cat([group.transpose(1, 2).flatten(1) for group in groups], dim=1)
    return packed.view(torch.uint8)


def _bfloat16_u(bases: torch.Tensor) -> torch.Tensor:
    """The same of U: 64 columns of all rows after 64."""
    bases = _whole(bases, SIDE)
    packed = bases.unflatten(2, (-1, SIDE)).transpose(1, 2).flatten(1)
    return packed.contiguous().view(torch.uint8)


def _int8_v(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Codes `[n, rank, width]` and steps `[n, rank, blocks]` as uint8 `[n, bytes]`: 16 rows after
    16, of these block after block: the rows' steps, then 2 columns of all rows after 2."""
    (n, rank, _), blocks = codes.shape, steps.shape[2]
    groups = -(-rank // LANES)
    codes = _padded(codes, groups * LANES, blocks * BLOCK)
    codes = codes.view(n, groups, LANES, blocks, BLOCK // 2, 2).permute(0, 1, 3, 4, 2, 5)
    steps = _padded(steps, groups * LANES, blocks)
    steps = steps.view(n, groups, LANES, blocks).transpose(2, 3).contiguous()
    codes = codes.reshape(n, groups, blocks, -1).view(torch.uint8)
    return _whole_units(torch.cat([steps.view(torch.uint8), codes], dim=3).flatten(1))


def _int8_u(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The same of U: a power of two (float32) for each block, then block after block: all rows'
    steps over that power, less than 2, and 2 rows after 2, of these one half of the block's
    columns and then the other."""
    (n, rank, _), blocks = codes.shape, steps.shape[2]
    pairs = -(-rank // 2)
    codes = _padded(codes, pairs * 2, blocks * BLOCK)
    codes = codes.view(n, pairs, 2, blocks, 2, BLOCK // 2).permute(0, 3, 1, 4, 5, 2)
    exponents = torch.frexp(steps.float().amax(dim=1)).exponent - 1
    steps = torch.ldexp(steps.float(), -exponents[:, None]).bfloat16()
    steps = _padded(steps, -(-rank // LANES) * LANES, blocks).transpose(1, 2).contiguous()
    powers = torch.ldexp(torch.ones(n, blocks), exponents)
    powers = _whole_units(powers.view(torch.uint8))
    codes = codes.reshape(n, blocks, -1).view(torch.uint8)
    parts = torch.cat([steps.view(torch.uint8), codes], dim=2).flatten(1)
    return _whole_units(torch.cat([powers, parts], dim=1))


def _whole(x: torch.Tensor, columns: int) -> torch.Tensor:
    left = -x.shape[2] % columns
    return torch.nn.functional.pad(x, (0, left)) if left else x


def _padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[2], 0, rows - x.shape[1]))


def _whole_units(packed: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % UNIT))
