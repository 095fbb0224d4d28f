"""Experts (MoE): what an adapter has of each of them is compressed as an adapter of its own.

Of a module of E experts, adapter i's expert e is *entry* i · E + e of `ModuleFactors`. A cluster is
one of adapters. With `joint` all entries of its adapters share one pair of bases, with `separate`
those of each expert have a pair of their own: as many clusters of entries as there are experts.
What comes out of that is folded: a row of the table is then one for each expert, and norms, errors
and cores are those of all experts together.
"""

from dataclasses import replace
from typing import Any

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import SettingsError
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.read.adapters import Collection, experts_in
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import SCALE_ROW
from vllm_jd.store.part import Matrix, ModulePart

_LOOKED_AT = 2  # experts of a module by which clusters are judged


def check_experts(collection: Collection, settings: Settings) -> None:
    """Refuse what cannot be done with a collection's experts.

    Raises:
        SettingsError: it says what that is, and what can be done.
    """
    modules = experts_in(collection)
    if not modules:
        return
    what = f"these adapters adapt experts ({next(iter(modules))})"
    method = METHODS[settings.method]
    if not method.experts:
        able = ", ".join(other.name for other in METHODS.values() if other.experts)
        raise SettingsError(f"{what}, which {method.name} does not do; expected one of {able}")


def entries(adapters: torch.Tensor, experts: int) -> torch.Tensor:
    """The entries of some adapters (int64 `[n]`); these themselves in a plain module (0)."""
    if not experts:
        return adapters
    each = torch.arange(experts, device=adapters.device)
    return (adapters[:, None] * experts + each).flatten()


def with_experts(factors: ModuleFactors, adapters: int, experts: int) -> ModuleFactors:
    """The entries of so many adapters, of which some or all lack the last of `experts`."""
    ranks = factors.ranks.view(adapters, -1)
    missing = (0, experts - ranks.shape[1])
    scales = factors.scales
    if scales is not None:
        scales = torch.nn.functional.pad(scales.view(adapters, -1), missing, value=1.0).flatten()
    ranks = torch.nn.functional.pad(ranks, missing).flatten()
    return ModuleFactors(factors.a, factors.b, ranks, scales)


def of_entries(
    assignment: torch.Tensor, settings: Settings, experts: int
) -> tuple[torch.Tensor, Settings]:
    """The clusters of a module's entries, int64 `[n · experts]`, and settings with their number."""
    if not experts:
        return assignment, settings
    if settings.experts == "joint":
        return assignment.repeat_interleave(experts), settings
    count = settings.clusters * experts
    return entries(assignment, experts), settings.adapted(clusters=count)


def adapter_norms(factors: ModuleFactors, experts: int) -> torch.Tensor:
    """‖BA‖_F of each entry's adapter, over all its experts: float64, one for each entry."""
    squares = factors.squared_norms().clamp_min(0)
    if experts:
        squares = squares.view(-1, experts).sum(1).repeat_interleave(experts)
    return squares.sqrt()


def normalised(factors: ModuleFactors, experts: int) -> ModuleFactors:
    """Every adapter at norm 1 (Compress then Serve, §6.1) over all its experts, which keep their
    sizes to each other: errors are those of all of them together."""
    norms = adapter_norms(factors, experts)
    return factors.scaled(torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0))


def looked_at(factors: ModuleFactors, experts: int) -> list[ModuleFactors]:
    """What clusters are judged by: the factors, or those of the experts that are adapted most."""
    if not experts:
        return [factors]
    adapters = torch.arange(len(factors) // experts)
    size = factors.squared_norms().view(-1, experts).sum(0)
    most = size.topk(min(_LOOKED_AT, experts)).indices.sort().values.tolist()
    return [factors.subset(adapters * experts + expert) for expert in most]


def folded(part: ModulePart, experts: int, *, joint: bool) -> ModulePart:
    """The part of a module of experts, of adapters; `part` is that of their entries.

    Its rows are those of clusters of entries, with `joint` one a cluster, else one for each of its
    experts; or each is one entry's own.
    """
    chosen = part.chosen.view(-1, experts)
    if part.shared:
        rows = part.rows
        rows = rows[:, None].repeat(1, experts, 1) if joint else rows.unflatten(0, (-1, experts))
        shared, last = len(rows), chosen.amax(dim=1)
        chosen = last if joint else torch.where(last >= 0, last // experts, -1)
    else:
        nothing = torch.zeros(1, part.rows.shape[1], dtype=torch.int32)
        nothing[:, SCALE_ROW] = -1
        owners = (chosen >= 0).any(dim=1)
        rows = torch.cat([part.rows, nothing])[chosen[owners].long()]  # −1: the last
        shared, chosen = 0, torch.where(owners, owners.cumsum(0) - 1, -1)
    squares = part.norm.double().square().view(-1, experts)
    total = squares.sum(dim=1)

    def mean(errors: torch.Tensor | None) -> Any:
        if errors is None:
            return None
        lost = (errors.double().view(-1, experts) * squares).sum(dim=1)
        return torch.where(total > 0, lost / total.clamp_min(1e-300), lost).float()

    return replace(
        part,
        rows=rows,
        cores=_joined(part.cores, experts),
        chosen=chosen[:, None].to(torch.int32),
        rank=part.rank.view(-1, experts).sum(dim=1).to(torch.int32),
        norm=total.sqrt().float(),
        error=mean(part.error),
        exact_error=mean(part.exact_error),
        shared=shared,
        core_size=part.core_size * experts,
    )


def _joined(cores: Matrix, experts: int) -> Matrix:
    """An adapter's cores of all experts as one."""
    count = len(cores) // experts

    def joined(side: torch.Tensor) -> torch.Tensor:
        return side.reshape(count, experts * side.shape[1])

    return Matrix(joined(cores.data), None if cores.steps is None else joined(cores.steps))
