"""Methods that leave every adapter factors of its own: none, and SVD."""

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import CORE_DIAGONAL


def keep(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> ModuleFactors | Shared:
    """The factors themselves.

    Of VeRA adapters the vectors themselves: bases that all share, and for each adapter a diagonal
    core λ_d and a scale λ_b.

    Raises:
        AdapterError: VeRA adapters with a residual beside them.
    """
    vera = factors.vera
    if vera is None:
        return factors
    if settings.residual_rank:
        raise AdapterError(
            [
                f"--residual-rank is {settings.residual_rank}, but --method none keeps VeRA "
                "adapters as they are, which leaves no residual; leave it out"
            ]
        )
    present = factors.ranks > 0
    return Shared(
        u=vera.projection_b.T[None].contiguous(),
        v=vera.projection_a[None],
        assignment=torch.where(present, present.cumsum(0) - 1, -1),
        core=CORE_DIAGONAL,
        scales=vera.lambda_b[present],
        cores=vera.lambda_d,
    )


def fit_svd(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> ModuleFactors:
    """See `truncated`."""
    return truncated(factors, settings.rank)


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


NONE = Method("none", "every adapter as it is, uncompressed", keep)
SVD = Method(
    "svd",
    "each adapter alone, its best approximation of rank r",
    fit_svd,
    options=("rank", "rank_allocation"),
)
