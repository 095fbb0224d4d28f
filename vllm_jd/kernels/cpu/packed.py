"""Bases in the order in which the CPU kernel reads them, in large pages of memory.

A decoding step has few tokens for each cluster, so that reading the bases is what it pays for. Rows
that are read side by side get about half of the memory's bandwidth: the processor's prefetching
follows one stream that goes on, not 16 short ones. So all bases of one cluster lie one after the
other, V and U of slice after slice, and in them the numbers as the arithmetic takes them: bfloat16,
or a quantised store's 8 bits, of which there are half as many bytes to read.

`pack` makes the packed memory of a layer from all its clusters. A part of it may be written anew
with another cluster (`pack_cluster`) of no more bytes (`cluster_bytes`): rows that name it by its
place have the other bases from the next call on.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.cpu.layout import GROUP, LANES, MAX_INT8_RANK, SIDE, UNIT, V_COLUMNS
from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.pools import PACKED, Int8Rows
from vllm_jd.row import BLOCK, RANK

_Numbers = tuple[torch.Tensor, ...]
"""Bases `[n, rank, width]`, or codes and steps of such."""


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
        basis share it packed: it lies where the first of them does.
    """
    in_8_bits = any(isinstance(rows, Int8Rows) for rows in v)
    tables = [table[:, : RANK + 1].tolist() for table in clusters]
    starts = [[(0, 0)] * len(table) for table in tables]
    places: dict[tuple[int, int, int, int], int] = {}
    # Clusters by the ranks of what is new in them: where that begins, and its first rows.
    alike: dict[tuple[tuple[int, int], ...], list[tuple[int, list[tuple[int, int]]]]] = {}
    end = 0
    for c in range(max(map(len, tables), default=0)):
        begin = end
        ranks, firsts = [], []
        for s, table in enumerate(tables):
            *first, rank = table[c] if c < len(table) else (0, 0, 0)
            keys = [(s, side, first[side], rank) for side in (0, 1)]
            new = [rank > 0 and key not in places for key in keys]
            for side, rows in enumerate((v[s], u[s])):
                if new[side]:
                    places[keys[side]] = PACKED + end // UNIT
                    end += _SIZES[side](rank, rows.shape[1], in_8_bits)
            if rank > 0:
                starts[s][c] = (places[keys[0]], places[keys[1]])
            ranks.append((rank * new[0], rank * new[1]))
            firsts.append((first[0], first[1]))
        alike.setdefault(tuple(ranks), []).append((begin, firsts))
    packed = large_pages(end)
    for ranks, members in alike.items():
        chosen = [
            tuple(
                _chosen(rows, torch.tensor([firsts[s][side] for _, firsts in members]), rank)
                for side, (rows, rank) in enumerate(zip((v[s], u[s]), ranks[s], strict=True))
            )
            for s in range(len(tables))
        ]
        parts, _ = _packed(chosen, in_8_bits)
        for (begin, _), part in zip(members, parts, strict=True):
            packed[begin : begin + len(part)] = part
    packed = packed.view(torch.uint8 if in_8_bits else torch.bfloat16)
    return packed, [torch.tensor(each, dtype=torch.int32).view(-1, 2) for each in starts]


def cluster_bytes(ranks: Sequence[int], d_in: int, widths: Sequence[int], in_8_bits: bool) -> int:
    """Bytes of one packed cluster of a layer, a multiple of `layout.UNIT`.

    Args:
        ranks: of each slice; 0 where the cluster has no bases for it.
        d_in: width of the layer's input.
        widths: d_out of each slice.
        in_8_bits: whether the bases are in 8 bits, or else bfloat16.
    """
    return sum(
        _v_bytes(rank, d_in, in_8_bits) + _u_bytes(rank, width, in_8_bits)
        for rank, width in zip(ranks, widths, strict=True)
    )


def pack_cluster(
    v: Sequence[torch.Tensor | Int8Rows], u: Sequence[torch.Tensor | Int8Rows]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the bases of one cluster of a layer, to be copied into the packed memory of its pools.

    Args:
        v: for each slice its V, bfloat16 `[rank, d_in]`, or all of them in 8 bits, then of a rank
            of at most `MAX_INT8_RANK`; of rank 0 where the cluster has no bases for the slice.
        u: for each slice its U, `[rank, d_out]`, in the same form as V.

    Returns:
        The packed cluster, bfloat16 `[n]` or, in 8 bits, uint8 `[n]`, of `cluster_bytes` bytes,
        and int32 `[slices, 2]`: where in it V and U of each slice begin, in units of
        `layout.UNIT` bytes. Copied to a byte b of `ModulePools.packed`, a multiple of that unit,
        rows name a basis by `PACKED` + b // UNIT + its place here.

    Raises:
        ValueError: the forms, types or ranks of V and U do not fit each other.
    """
    in_8_bits = any(isinstance(rows, Int8Rows) for rows in v)
    for s, (v_rows, u_rows) in enumerate(zip(v, u, strict=True)):
        for name, rows in (("V", v_rows), ("U", u_rows)):
            coded = isinstance(rows, Int8Rows)
            if coded != in_8_bits or not (coded or rows.dtype == torch.bfloat16):
                found = "in 8 bits" if coded else rows.dtype
                expected = "in 8 bits, as others are" if in_8_bits else torch.bfloat16
                raise ValueError(f"{name} of slice {s} is {found}, expected {expected}")
        if len(v_rows) != len(u_rows):
            raise ValueError(f"slice {s}: V has rank {len(v_rows)}, but U {len(u_rows)}")
        if in_8_bits and len(v_rows) > MAX_INT8_RANK:
            raise ValueError(
                f"slice {s}: rank {len(v_rows)} in 8 bits, which goes to {MAX_INT8_RANK}"
            )
    first = torch.zeros(1, dtype=torch.long)
    chosen = [
        (_chosen(v_rows, first, len(v_rows)), _chosen(u_rows, first, len(u_rows)))
        for v_rows, u_rows in zip(v, u, strict=True)
    ]
    (packed,), places = _packed(chosen, in_8_bits)
    return packed.view(torch.uint8 if in_8_bits else torch.bfloat16), places


def pack_vectors(side: str, vectors: torch.Tensor | Int8Rows, index: Any) -> torch.Tensor:
    """Bases of one rank, packed each for itself, to be placed wherever there is room.

    Args:
        side: `v` or `u`.
        vectors: rows `[n, width]`, numbers or in 8 bits.
        index: int64 `[bases, rank]`, the rows of each, or whatever else picks numbers of that
            shape.

    Returns:
        uint8 `[bases, bytes]`, each of as many units as `packed_units` says.
    """
    if isinstance(vectors, Int8Rows):
        form = {"v": _int8_v, "u": _int8_u}[side]
        return form(vectors.codes[index], vectors.steps[index]).contiguous()
    form = {"v": _bfloat16_v, "u": _bfloat16_u}[side]
    return form(vectors[index].to(torch.bfloat16)).contiguous()


def packed_units(side: str, rank: int, width: int, *, in_8_bits: bool) -> int:
    """How many units of `layout.UNIT` bytes a basis of V (`v`) or U takes packed; never less for a
    higher rank."""
    return {"v": _v_bytes, "u": _u_bytes}[side](rank, width, in_8_bits) // UNIT


def _chosen(rows: torch.Tensor | Int8Rows, first: torch.Tensor, rank: int) -> _Numbers:
    """`rank` rows from each of `first` `[n]` on."""
    index = first[:, None] + torch.arange(rank)
    if isinstance(rows, Int8Rows):
        return rows.codes[index], rows.steps[index]
    return (rows[index],)


# --- n clusters at once ---


def _packed(
    slices: list[tuple[_Numbers, _Numbers]], in_8_bits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack V and U of each slice, of n clusters that have the same ranks.

    Returns:
        uint8 `[n, bytes]`, and int32 `[slices, 2]`: where each begins, in units, or 0 of rank 0.
    """
    forms = (_int8_v, _int8_u) if in_8_bits else (_bfloat16_v, _bfloat16_u)
    parts, places = [], torch.zeros(len(slices), 2, dtype=torch.int32)
    end = 0
    for s, sides in enumerate(slices):
        for side, (form, numbers) in enumerate(zip(forms, sides, strict=True)):
            if numbers[0].shape[1] == 0:
                continue
            places[s, side] = end // UNIT
            parts.append(form(*numbers))
            end += parts[-1].shape[1]
    n = len(slices[0][0][0]) if slices else 0
    return torch.cat(parts or [torch.empty(n, 0, dtype=torch.uint8)], dim=1), places


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


_SIZES = (_v_bytes, _u_bytes)


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
