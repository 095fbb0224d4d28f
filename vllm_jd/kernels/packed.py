"""Bases in the order in which the CPU kernel reads them, in large pages of memory.

A decoding step has few tokens for each cluster, so that reading the bases is what it pays for. Rows
that are read side by side get about half of the memory's bandwidth: the processor's prefetching
follows one stream that goes on, not 16 short ones. So all bases of one cluster lie one after the
other, V and U of slice after slice, and in them the numbers as the arithmetic takes them.
"""

import mmap
from collections.abc import Sequence

import torch

from vllm_jd.kernels import cpu
from vllm_jd.kernels.pools import PACKED

_GROUP = 8  # rows of V side by side: kGroup of cpu_kernel.cpp
_BLOCK = 32  # columns of these
_SIDE = 64  # columns of U that lie together: kSide
_UNIT = 64  # bytes
_CHUNK = 64 << 20
_LARGE_PAGE = 2 << 20


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the CPU kernel of this machine takes packed bases."""
    return dtype == torch.bfloat16 and cpu.isa() == "avx512_bf16"


def pack(
    v: Sequence[torch.Tensor], u: Sequence[torch.Tensor], clusters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pack the bases of one layer.

    Args:
        v: for each slice its rows of V, bfloat16 `[v_rows, d_in]`.
        u: for each slice its rows of U, bfloat16 `[u_rows, d_out]`.
        clusters: for each slice, int `[clusters, 3]`: v_start, u_start (rows of these) and rank.

    Returns:
        The packed bases, bfloat16 `[n]`, and for each slice int32 `[clusters, 2]`: the v_start and
        u_start by which rows name them. Clusters that share a basis share it packed.
    """
    found: dict[tuple[int, int, int, int], torch.Tensor] = {}
    for s, (v_rows, u_rows, table) in enumerate(zip(v, u, clusters, strict=True)):
        for side, rows, form in ((0, v_rows, _packed_v), (1, u_rows, _packed_u)):
            for rank in table[table[:, 2] > 0][:, 2].unique().tolist():
                starts = table[table[:, 2] == rank][:, side].unique()
                packed = form(rows[starts[:, None] + torch.arange(rank)])
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
    packed = _memory(end).view(torch.bfloat16)
    torch.cat(parts or [packed[:0].clone()], out=packed)
    return packed, [torch.tensor(lines, dtype=torch.int32).view(-1, 2) for lines in starts]


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


_chunk: torch.Tensor | None = None  # what is left of memory in large pages


def _memory(size: int) -> torch.Tensor:
    """uint8 `[size]`, its address a multiple of 64, in large pages where the system has them.

    Layers are smaller than such a page, so that they share. What nobody takes is never touched,
    and so is not there.
    """
    global _chunk
    units = -(-size // _UNIT) * _UNIT
    if _chunk is None or len(_chunk) < units:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no large pages
        whole = mmap.mmap(-1, max(_CHUNK, units) + _LARGE_PAGE, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            whole.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(whole, dtype=torch.uint8)
        _chunk = memory[-memory.data_ptr() % _LARGE_PAGE :]
    taken, _chunk = _chunk[:size], _chunk[units:]
    return taken
