"""The bases of one layer, packed for the CPU kernel all at once: for benchmarks and tests. A server
packs each into its own slot (`vllm_jd.plugin.worker.bases`)."""

from collections.abc import Sequence

import torch

from vllm_jd.kernels import PACKED, Int8Rows
from vllm_jd.kernels.cpu.layout import UNIT
from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.cpu.packed import pack_vectors
from vllm_jd.row import RANK


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
            in 8 bits of at most `layout.MAX_INT8_RANK`.

    Returns:
        The packed bases, bfloat16 `[n]` or, in 8 bits, uint8 `[n]`, and for each slice int32
        `[clusters, 2]`: the v_start and u_start by which rows name them. Clusters that share a
        basis share it packed: it lies where the first of them does.
    """
    in_8_bits = any(isinstance(rows, Int8Rows) for rows in v)
    tables = [table[:, : RANK + 1].tolist() for table in clusters]
    starts = [[(0, 0)] * len(table) for table in tables]
    places: dict[tuple[int, str, int, int], int] = {}
    bases: list[torch.Tensor] = []
    end = 0
    for c in range(max(map(len, tables), default=0)):
        for s, table in enumerate(tables):
            v_start, u_start, rank = table[c] if c < len(table) else (0, 0, 0)
            if not rank:
                continue
            found = []
            for side, first, rows in (("v", v_start, v[s]), ("u", u_start, u[s])):
                key = s, side, first, rank
                if key not in places:
                    places[key] = PACKED + end // UNIT
                    bases.append(pack_vectors(side, _part(rows, first, rank), rank)[0])
                    end += len(bases[-1])
                found.append(places[key])
            starts[s][c] = found[0], found[1]
    packed = large_pages(end)
    if bases:
        torch.cat(bases, out=packed)
    packed = packed.view(torch.uint8 if in_8_bits else torch.bfloat16)
    return packed, [torch.tensor(each, dtype=torch.int32).view(-1, 2) for each in starts]


def _part(rows: torch.Tensor | Int8Rows, first: int, rank: int) -> torch.Tensor | Int8Rows:
    if isinstance(rows, Int8Rows):
        return Int8Rows(rows.codes[first : first + rank], rows.steps[first : first + rank])
    return rows[first : first + rank]
