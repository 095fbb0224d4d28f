"""JD-Full and JD-Diag with clusters, as methods of the registry."""

from functools import partial

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd_diag import jd_diag
from vllm_jd.compressor.methods.jd_full import jd_full
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.run.clustering import BasesFit, fit_clusters
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL

_OPTIONS = ("rank", "clusters", "cluster_scope", "iterations", "solver", "seed")
_EXTRAS = ("rank_allocation", "residual_rank", "mean_rank")


def fit_jd_full(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> Shared:
    """See `vllm_jd.compressor.methods.jd_full`."""
    fit = partial(
        jd_full, iterations=settings.iterations, solver=settings.solver, seed=settings.seed
    )
    return _fit(factors, assignment, settings, start, fit, CORE_FULL)


def fit_jd_diag(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> Shared:
    """See `vllm_jd.compressor.methods.jd_diag`; the clusters are found with JD-Full."""
    fit = partial(jd_diag, iterations=settings.iterations, seed=settings.seed)
    return _fit(factors, assignment, settings, start, fit, CORE_DIAGONAL)


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    start: Start | None,
    fit: BasesFit,
    core: int,
) -> Shared:
    bases = fit_clusters(factors, assignment, settings.clusters, settings.rank, fit, start)
    return Shared(
        u=torch.stack([u.T for u, _ in bases]),
        v=torch.stack([v.T for _, v in bases]),
        assignment=assignment,
        core=core,
    )


JD_FULL = Method(
    "jd-full",
    "shared orthonormal bases and a full r × r core for each adapter",
    fit_jd_full,
    options=(*_OPTIONS, *_EXTRAS),
    normalise=True,
)
JD_DIAG = Method(
    "jd-diag",
    "shared bases and a diagonal core for each adapter: r numbers instead of r²",
    fit_jd_diag,
    options=(*_OPTIONS, *_EXTRAS),
    normalise=True,
)
