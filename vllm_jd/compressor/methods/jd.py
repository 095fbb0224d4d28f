"""JD-Full and JD-Diag with clusters, as methods of the registry."""

import torch

from vllm_jd.compressor.approximation import Shared
from vllm_jd.compressor.clustering import fit_clusters
from vllm_jd.compressor.factors import ModuleFactors
from vllm_jd.compressor.method import Method, Start
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import CORE_FULL

_OPTIONS = ("rank", "clusters", "cluster_scope", "iterations", "seed")
_EXTRAS = ("rank_allocation", "residual_rank", "mean_rank")


def fit_jd_full(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> Shared:
    """See `vllm_jd.compressor.methods.jd_full`."""
    bases = fit_clusters(
        factors,
        assignment,
        settings.clusters,
        settings.rank,
        iterations=settings.iterations,
        solver=settings.solver,
        seed=settings.seed,
        start=start,
    )
    return Shared(
        u=torch.stack([u.T for u, _ in bases]),
        v=torch.stack([v.T for _, v in bases]),
        assignment=assignment,
        core=CORE_FULL,
    )


JD_FULL = Method(
    "jd-full",
    "shared orthonormal bases and a full r × r core for each adapter",
    fit_jd_full,
    options=(*_OPTIONS, "solver", *_EXTRAS),
    normalise=True,
)
