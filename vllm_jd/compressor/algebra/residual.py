"""Cores that leave a private residual of low rank as much as it can take."""

from dataclasses import replace

import torch

from vllm_jd.compressor.algebra.approximation import Shared, best_cores
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.row import CORE_FULL

_ROUNDS = 50
_BLOCK = 32  # adapters at once


def cores_beside_residual(left: ModuleFactors, seen: Shared, rank: int) -> torch.Tensor:
    """The cores, where a residual of rank `rank` takes its part of what they leave.

    With the bases fixed, ‖D − UΣVᵀ − XYᵀ‖² has many minima that taking Σ and XYᵀ in turn may end
    in. So it is done from two sides, the core first and the residual first, and often.

    Args:
        left: the adapters D, less what else stands for them.
        seen: the bases.
        rank: of the residual XYᵀ; 0: `best_cores`.

    Returns:
        float32 `[n, core_size]`.
    """
    if rank == 0:
        return best_cores(left, seen)
    private = [
        _residual(left.subset(some), replace(seen, assignment=seen.assignment[some]), rank)
        for some in torch.arange(len(left), device=left.ranks.device).split(_BLOCK)
    ]
    a, b = (torch.cat(side).flatten(0, 1) for side in zip(*private, strict=True))
    ranks = torch.full((len(left),), rank, device=left.ranks.device)
    return best_cores(left.minus(ModuleFactors(a, b, ranks)), seen)


def all_bases(shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """U `[k, r, d_out]`, scaled, and V `[k, r, d_in]` of all clusters."""
    u = shared.u if shared.scales is None else shared.u * shared.scales[:, None]
    return u, shared.v


def inverse(gram: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of Grams `[…, r, r]`, as `best_cores` has it."""
    return torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)


def _residual(left: ModuleFactors, seen: Shared, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A `[n, rank, d_in]`, B `[n, rank, d_out]`) of the private parts that suit the best cores.

    Worked out in coordinates of each adapter's own space and that of its cluster's bases.
    """
    r, cluster = seen.rank, seen.assignment.clamp_min(0)
    u, v = (x[cluster].mT for x in all_bases(seen))
    q_b, r_b = torch.linalg.qr(torch.cat([u, left.per_adapter(left.b).mT], dim=2))
    q_a, r_a = torch.linalg.qr(torch.cat([v, left.per_adapter(left.a).mT], dim=2))
    r_b, r_a = r_b.double(), r_a.double()
    u, v = r_b[:, :, :r], r_a[:, :, :r]
    whole = r_b[:, :, r:] @ r_a[:, :, r:].mT
    if seen.core == CORE_FULL:
        to_u, to_v = u @ torch.linalg.pinv(u), v @ torch.linalg.pinv(v)
    else:
        undo = inverse((u.mT @ u) * (v.mT @ v))

    def without_core(residual: torch.Tensor | float) -> torch.Tensor:
        """What the core that suits a residual leaves of the adapters."""
        rest = whole - residual
        if seen.core == CORE_FULL:
            return whole - to_u @ rest @ to_v
        diagonal = ((u.mT @ rest) * v.mT).sum(2)[:, None] @ undo
        return whole - (u * diagonal) @ v.mT

    q = min(rank, whole.shape[1], whole.shape[2])
    best = None
    for first in (without_core(0.0), whole):
        x = torch.linalg.svd(first)[0][:, :, :q]
        y = first.mT @ x
        for _ in range(_ROUNDS):
            rest = without_core(x @ y.mT)
            x = torch.linalg.qr(rest @ y)[0]
            y = rest.mT @ x
        lost = (without_core(x @ y.mT) - x @ y.mT).square().sum((1, 2), keepdim=True)
        if best is not None:
            better = best[0] <= lost
            lost, x, y = (
                torch.where(better, old, new) for old, new in zip(best, (lost, x, y), strict=True)
            )
        best = (lost, x, y)
    _, x, y = best
    pad = (0, 0, 0, rank - q)
    a, b = ((basis @ side.float()).mT for basis, side in ((q_a, y), (q_b, x)))
    return torch.nn.functional.pad(a, pad), torch.nn.functional.pad(b, pad)
