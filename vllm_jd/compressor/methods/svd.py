"""SVD: every adapter alone, its best approximation of rank r (Eckart and Young 1936)."""

from dataclasses import dataclass

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.methods.options import Options, option


@dataclass(frozen=True)
class SvdOptions(Options):
    """A rank."""

    rank: int = option(16, "Rank of each adapter.", least=1)


def truncated(factors: ModuleFactors, rank: int) -> ModuleFactors:
    """The best approximation of each adapter by one of rank `rank`: its truncated SVD.

    D = BA is never formed. With the Grams BBᵀ = QΛQᵀ and Λ^½Qᵀ(AAᵀ)QΛ^½ = WΘWᵀ (rows as in
    `ModuleFactors`), the left singular vectors are the rows of WᵀΛ^-½QᵀB and WᵀΛ^½QᵀA are the
    right ones times the singular values √Θ.

    Returns:
        Factors of rank min(rank, the adapter's own), singular values descending; b's rows have
        norm 1. Adapters of norm 0 stay 0.
    """
    width = int(factors.ranks.max()) if len(factors) else 0
    if width == 0:
        return factors
    a, b = factors.per_adapter(factors.a).double(), factors.per_adapter(factors.b).double()
    values, q = torch.linalg.eigh(b @ b.mT)
    values = values.clamp_min(0)
    # Directions that are rounding noise of the Gram have no left singular vector to speak of.
    usable = values > 1e-14 * values[:, -1:]
    root = torch.where(usable, values, 0.0).sqrt()
    inverse = torch.where(usable, 1 / root.clamp_min(1e-300), 0.0)
    right = (q * root[:, None, :]).mT @ a
    w = torch.linalg.eigh(right @ right.mT).eigenvectors.flip(2)[:, :, :rank]
    new_b = w.mT @ ((q * inverse[:, None, :]).mT @ b)
    new_a = w.mT @ right
    ranks = factors.ranks.clamp_max(rank)
    keep = torch.arange(w.shape[2], device=ranks.device) < ranks[:, None]
    return ModuleFactors(new_a[keep].float(), new_b[keep].float(), ranks)


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: SvdOptions,
    start: Start | None,
    seed: int,
) -> ModuleFactors:
    return truncated(factors, options.rank)


SVD = Method(
    "svd",
    "each adapter alone, its best approximation of rank r",
    "Eckart and Young (1936)",
    _fit,
    SvdOptions,
    experts=True,
)
