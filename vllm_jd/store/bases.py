"""One module's basis vectors and the table of the clusters that use them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_jd.row import CORE_DIAGONAL, CORE_FULL


class Codes(NamedTuple):
    """Vectors in 8 bits: entry c of row i is steps[i, c // 32] · codes[i, c], rounded to the
    store's dtype. `codes` int8 `[n, width]`, `steps` bfloat16 `[n, ⌈width / 32⌉]`."""

    codes: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True)
class Bases:
    """What the adapters of one module choose from.

    `u` `[u_rows, d_out]`, `v` `[v_rows, d_in]` and `scales` `[scale_rows, d_out]` are pools of
    vectors. Line c of `clusters`, int32 `[p, 5]` (`STORED_FIELDS`), is one product

        Δy = scale ∘ (U[u_start : u_start + rank]ᵀ · Σ · V[v_start : v_start + rank] · x)

    where Σ is the adapter's core: none (`core_kind` 0), rank × rank, row-major (1), or a diagonal
    (2); and scale is `scales[scale_row]`, or 1 where `scale_row` is −1. An adapter that is kept
    as it was is a cluster of one. An adapter adds up the products of its rows; at most one of
    those has a core.
    """

    u: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor
    clusters: torch.Tensor

    def factors(self, cluster: int, core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B `[d_out, rank]`, A `[rank, d_in]`) of one cluster's product, float32.

        `core` is the adapter's core of this module, flat; not looked at where there is none.
        """
        v_start, u_start, rank, kind, scale_row = self.clusters[cluster].tolist()
        b = self.u[u_start : u_start + rank].float().T
        if kind == CORE_FULL:
            b = b @ core[: rank * rank].float().view(rank, rank)
        elif kind == CORE_DIAGONAL:
            b = b * core[:rank].float()
        if scale_row >= 0:
            b = b * self.scales[scale_row].float()[:, None]
        return b, self.v[v_start : v_start + rank].float()
