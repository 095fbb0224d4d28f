"""What JD-Full and JD-Diag share: their options, and one fit for each cluster of adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.options import Options, option

REFERENCE = "Compress then Serve (Brüel Gabrielsson et al., 2025)"

Bases = list[tuple[torch.Tensor, torch.Tensor]]
"""(U `[d_out, r]`, V `[d_in, r]`) of each cluster."""
BasesFit = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(factors, rank, start=(U, V) or None) → (U `[d_out, rank]`, V `[d_in, rank]`), e.g. `jd_full`."""


@dataclass(frozen=True)
class JdOptions(Options):
    """Of both."""

    rank: int = option(16, "Rank of the bases.", least=1)
    clusters: int = option(1, "Groups of adapters; each has bases of its own.", least=1)
    iterations: int = option(10, "Most updates of the bases.", least=1)
    experts: Literal["separate", "joint"] = option(
        "separate", "MoE: bases for each expert, or bases that all experts of a layer share."
    )


def fit_shared(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: JdOptions,
    start: Bases | None,
    fit: BasesFit,
    core: int,
) -> Shared:
    """The bases that `fit` finds for every cluster, for cores of the kind `core`."""
    bases = fit_clusters(factors, assignment, options.clusters, options.rank, fit, start)
    return shared_bases(bases, assignment, core)


def shared_bases(bases: Bases, assignment: torch.Tensor, core: int) -> Shared:
    """The bases of every cluster, for cores of the kind `core`."""
    return Shared(
        u=torch.stack([u.T for u, _ in bases]),
        v=torch.stack([v.T for _, v in bases]),
        assignment=assignment,
        core=core,
    )


def no_bases(factors: ModuleFactors, clusters: int, rank: int) -> Bases:
    """Bases of zeros, as a cluster without a factor in a module has."""
    zeros = (factors.a.new_zeros(width, rank).float() for width in (factors.d_out, factors.d_in))
    return [(*zeros,)] * clusters


def fit_clusters(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    clusters: int,
    rank: int,
    fit: BasesFit,
    start: Bases | None = None,
) -> Bases:
    """The bases of every cluster of one module (A.3, step 1).

    `assignment` is int64 `[n]`, `fit` finds the bases of one cluster. A cluster without a factor
    here gets bases of zeros.
    """
    bases = no_bases(factors, clusters, rank)
    for cluster in range(clusters):
        members = factors.subset((assignment == cluster).nonzero()[:, 0])
        if members.a.shape[0]:
            usable = start is not None and bool(start[cluster][0].any())
            bases[cluster] = fit(members, rank, start=start[cluster] if usable else None)
    return bases
