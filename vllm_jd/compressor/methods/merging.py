"""Methods that give groups of adapters one and the same: merges, and HydraOpt."""

from functools import partial

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors, VeraFactors
from vllm_jd.compressor.methods.hydraopt import hydraopt, hydraopt_vera
from vllm_jd.compressor.methods.merges import MergeMethod, merge
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import CORE_NONE


def fit_merge(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    start: Start | None,
    *,
    name: MergeMethod,
) -> Shared:
    """See `vllm_jd.compressor.methods.merges`."""
    n = len(factors)
    weight = settings.merge_weight
    if weight is None:
        weight = default_weight(name, n)
    a, b = merge(
        factors,
        name,
        scales=factors.scales,
        weights=torch.full((n,), weight),
        density=settings.density,
        majority_sign=settings.majority_sign,
        seed=settings.seed,
    )
    everyone = torch.zeros(n, dtype=torch.int64, device=factors.a.device)
    return Shared(u=b[None], v=a[None], assignment=everyone, core=CORE_NONE)


def default_weight(name: MergeMethod, n: int) -> float:
    """PEFT's weight of each of `n` adapters with which merging equal ones gives that one back.

    PEFT puts √weight on A and on B: a sum of n takes 1/n², an average (TIES) takes 1.
    """
    return 1.0 if name in ("ties", "dare-ties") else 1 / n**2


def fit_hydraopt(
    factors: ModuleFactors, assignment: torch.Tensor, settings: Settings, start: Start | None
) -> Shared:
    """See `vllm_jd.compressor.methods.hydraopt`. VeRA adapters keep their own rank."""
    if factors.vera is not None:
        return _fit_hydraopt_vera(factors, factors.vera, settings)
    fit = hydraopt(
        factors,
        min(settings.matrices, len(factors)),
        rank=settings.rank,
        temperature=settings.temperature,
        distance=settings.distance,
        steps=settings.steps,
        seed=settings.seed,
    )
    return Shared(u=fit.b, v=fit.a[None], assignment=fit.assignment, core=CORE_NONE)


def _fit_hydraopt_vera(factors: ModuleFactors, vera: VeraFactors, settings: Settings) -> Shared:
    """One d for all, which goes into V, and M scales."""
    present = (factors.ranks > 0).nonzero()[:, 0]
    fit = hydraopt_vera(
        vera.lambda_d[present],
        vera.lambda_b[present],
        vera.projection_a,
        vera.projection_b,
        min(settings.matrices, len(present)),
        temperature=settings.temperature,
        distance=settings.distance,
        steps=settings.steps,
        seed=settings.seed,
    )
    assignment = torch.full_like(factors.ranks, -1)
    assignment[present] = fit.assignment.to(present.device)
    return Shared(
        u=vera.projection_b.T[None].contiguous(),
        v=(fit.d[:, None] * vera.projection_a)[None],
        assignment=assignment,
        core=CORE_NONE,
        scales=fit.b,
    )


def _merge(name: MergeMethod, summary: str, *options: str) -> Method:
    options = ("merge_weight", *options)
    return Method(name, summary, partial(fit_merge, name=name), options=options)


TIES = _merge("ties", "one adapter for all: TIES-merging", "density", "majority_sign")
TASK_ARITHMETIC = _merge("task-arithmetic", "one adapter for all: the weighted sum of A and of B")
DARE = _merge(
    "dare", "one adapter for all: random drop and rescale, then the sum", "density", "seed"
)
DARE_TIES = _merge(
    "dare-ties", "one adapter for all: DARE, then TIES", "density", "majority_sign", "seed"
)
HYDRAOPT = Method(
    "hydraopt",
    "one A for all adapters and M matrices B, each adapter keeping one of these",
    fit_hydraopt,
    options=("rank", "matrices", "temperature", "distance", "steps", "seed"),
)
