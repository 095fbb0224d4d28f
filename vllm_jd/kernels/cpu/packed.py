"""Bases in the order in which the CPU kernel reads them, in large pages of memory.

A decoding step has few tokens for each cluster, so that reading the bases is what it pays for. Rows
that are read side by side get about half of the memory's bandwidth: the processor's prefetching
follows one stream that goes on, not 16 short ones. So all bases of one cluster lie one after the
other, V and U of slice after slice, and in them the numbers as the arithmetic takes them: bfloat16,
or a quantised store's 8 bits, of which there are half as many bytes to read.
"""

from collections.abc import Sequence

import torch

from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.pools import PACKED, Int8Rows
from vllm_jd.row import BLOCK, RANK

MAX_INT8_RANK = 512  # kMaxRank of cpu_kernel.cpp

_GROUP = 8  # rows of V side by side: kGroup of cpu_kernel.cpp
_BLOCK = 32  # columns of these
_LANES = 16  # rows of V in 8 bits, and steps, side by side: kLanes
_SIDE = 64  # columns of U that lie together: kSide
_UNIT = 64  # bytes


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the CPU kernel of this machine takes packed bases."""
    return dtype == torch.bfloat16 and cpu.isa() == "avx512_bf16"


def pack(
    v: Sequence[torch.Tensor | Int8Rows],
    u: Sequence[torch.Tensor | Int8Rows],
    clusters: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pack the bases of one layer.

    Args:
        v: for each slice its rows of V, bfloat16 `[v_rows, d_in]`, or all of them in 8 bits.
        u: for each slice its rows of U, `[u_rows, d_out]`, in the same form as V.
        clusters: for each slice, int `[clusters, 3]`: v_start, u_start (rows of these) and rank;
            in 8 bits of at most `MAX_INT8_RANK`.

    Returns:
        The packed bases, bfloat16 `[n]` or, in 8 bits, uint8 `[n]`, and for each slice int32
        `[clusters, 2]`: the v_start and u_start by which rows name them. Clusters that share a
        basis share it packed.
    """
    in_8_bits = any(isinstance(rows, Int8Rows) for rows in v)
    form_v, form_u = (_int8_v, _int8_u) if in_8_bits else (_packed_v, _packed_u)
    found: dict[tuple[int, int, int, int], torch.Tensor] = {}
    for s, (v_rows, u_rows, table) in enumerate(zip(v, u, clusters, strict=True)):
        for side, rows, form in ((0, v_rows, form_v), (1, u_rows, form_u)):
            for rank in table[table[:, RANK] > 0][:, RANK].unique().tolist():
                starts = table[table[:, RANK] == rank][:, side].unique()
                packed = form(*_chosen(rows, starts[:, None] + torch.arange(rank)))
                found |= {
                    (s, side, start, rank): part
                    for start, part in zip(starts.tolist(), packed, strict=True)
                }
    places: dict[tuple[int, int, int, int], int] = {}
    parts: list[torch.Tensor] = []
    end = 0
    tables = [table.tolist() for table in clusters]
    starts = [[(0, 0)] * len(table) for table in tables]
    for c in range(max(map(len, tables), default=0)):
        for s, table in enumerate(tables):
            if c >= len(table) or table[c][2] == 0:
                continue
            *first, rank = table[c]
            keys = [(s, side, first[side], rank) for side in (0, 1)]
            for key in keys:
                if key not in places:
                    places[key] = PACKED + end // _UNIT
                    parts.append(found[key])
                    end += found[key].nbytes
            starts[s][c] = (places[keys[0]], places[keys[1]])
    packed = large_pages(end).view(torch.uint8 if in_8_bits else torch.bfloat16)
    torch.cat(parts or [packed[:0].clone()], out=packed)
    return packed, [torch.tensor(lines, dtype=torch.int32).view(-1, 2) for lines in starts]


def _chosen(rows: torch.Tensor | Int8Rows, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows `index` `[n, rank]`: `[n, rank, width]`, or codes and steps of these shapes."""
    if isinstance(rows, Int8Rows):
        return rows.codes[index], rows.steps[index]
    return (rows[index],)


def _packed_v(bases: torch.Tensor) -> torch.Tensor:
    """`[n, rank, width]` as `[n, numbers]`: eight rows after eight, of these 32 columns of all rows
    after 32."""
    blocks = -(-bases.shape[2] // _BLOCK)
    bases = torch.nn.functional.pad(bases, (0, blocks * _BLOCK - bases.shape[2]))
    groups = bases.unflatten(2, (blocks, _BLOCK)).split(_GROUP, dim=1)
    return torch.cat([group.transpose(1, 2).flatten(1) for group in groups], dim=1)


def _packed_u(bases: torch.Tensor) -> torch.Tensor:
    """`[n, rank, width]` as `[n, numbers]`: 64 columns of all rows after 64."""
    sides = -(-bases.shape[2] // _SIDE)
    bases = torch.nn.functional.pad(bases, (0, sides * _SIDE - bases.shape[2]))
    return bases.unflatten(2, (sides, _SIDE)).transpose(1, 2).flatten(1)


def _int8_v(codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Codes `[n, rank, width]` and steps `[n, rank, blocks]` as uint8 `[n, bytes]`: 16 rows after
    16, of these block after block: the rows' steps, then 2 columns of all rows after 2."""
    (n, rank, _), blocks = codes.shape, steps.shape[2]
    groups = -(-rank // _LANES)
    codes = _padded(codes, groups * _LANES, blocks * BLOCK)
    codes = codes.view(n, groups, _LANES, blocks, BLOCK // 2, 2).permute(0, 1, 3, 4, 2, 5)
    steps = _padded(steps, groups * _LANES, blocks)
    steps = steps.view(n, groups, _LANES, blocks).transpose(2, 3).contiguous()
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
    steps = _padded(steps, -(-rank // _LANES) * _LANES, blocks).transpose(1, 2).contiguous()
    powers = torch.ldexp(torch.ones(n, blocks), exponents)
    powers = _whole_units(powers.view(torch.uint8))
    codes = codes.reshape(n, blocks, -1).view(torch.uint8)
    parts = torch.cat([steps.view(torch.uint8), codes], dim=2).flatten(1)
    return _whole_units(torch.cat([powers, parts], dim=1))


def _padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[2], 0, rows - x.shape[1]))


def _whole_units(packed: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % _UNIT))


def pack_vectors(side: str, vectors: torch.Tensor | Int8Rows, index: torch.Tensor) -> torch.Tensor:
    """Bases of one rank, packed each for itself, to be placed wherever there is room.

    Args:
        side: `v` or `u`.
        vectors: rows `[n, width]`, of bfloat16 or in 8 bits.
        index: int64 `[bases, rank]`, the rows of each.

    Returns:
        bfloat16 or uint8 `[bases, n]`, each of as many units as `packed_units` says.
    """
    in_8_bits = isinstance(vectors, Int8Rows)
    form = {"v": _int8_v, "u": _int8_u} if in_8_bits else {"v": _packed_v, "u": _packed_u}
    chosen = _chosen(vectors, index)
    if not in_8_bits:
        chosen = (chosen[0].to(torch.bfloat16),)
    return form[side](*chosen).contiguous()


def packed_units(side: str, rank: int, width: int, *, in_8_bits: bool) -> int:
    """How many units of 64 bytes a basis takes packed; never less for a higher rank."""
    if in_8_bits:
        blocks, lanes = -(-width // BLOCK), -(-rank // _LANES) * _LANES
        if side == "v":
            size = lanes * blocks * (2 + BLOCK)
            return -(-size // _UNIT)
        powers = -(-4 * blocks // _UNIT)
        return powers + -(-blocks * (2 * lanes + -(-rank // 2) * 2 * BLOCK) // _UNIT)
    columns = _BLOCK if side == "v" else _SIDE
    return rank * -(-width // columns) * columns * 2 // _UNIT
