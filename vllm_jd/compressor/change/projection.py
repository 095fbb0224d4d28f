"""What a store can make of adapters that were not there when its bases were fitted.

The bases stay as they are. A new adapter is given the cluster whose bases lose least of it, and
the best core for these (`best_cores`). Where clusters have no cores (HydraOpt, merges) nothing is
fitted: it is given the nearest of the store's matrices. Where adapters share nothing (`svd`,
`none`) it is compressed alone.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from vllm_jd.compressor.algebra.approximation import (
    Shared,
    all_bases,
    best_cores,
    inverse,
    relative_errors,
)
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.methods.registry import find_method
from vllm_jd.compressor.read.adapters import Collection
from vllm_jd.compressor.run.compress import Progress
from vllm_jd.compressor.run.experts import (
    adapter_norms,
    entries,
    folded,
    of_entries,
    with_experts,
)
from vllm_jd.compressor.run.memory import modules_at_once
from vllm_jd.compressor.run.module import (
    Rounding,
    compress_module,
    range_faults,
)
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL
from vllm_jd.store import ModuleInfo, Store
from vllm_jd.store.part import Matrix, ModulePart

_BLOCK = 256  # adapters whose cores for all clusters are held at once


def project(
    store: Store,
    collection: Collection,
    *,
    max_adapter_error: float | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> list[ModulePart]:
    """Compress adapters with the bases that a store has.

    Where the store's clusters are those of whole adapters, one cluster is chosen for all modules
    of an adapter: the one with the least relative squared error in the sum over them; else one
    for each module.

    Args:
        store: the store; it must have every module of the collection.
        collection: the adapters.
        max_adapter_error: an adapter with a larger mean relative squared error over its modules
            is kept uncompressed.
        on_progress: see `Progress`.

    Returns:
        For each module of the store what `vllm_jd.store.rewrite.Additions` needs. `exact_error` is
        the error with cores before they are quantised, on the stored bases.

    Raises:
        AdapterError: an adapter's numbers exceed the store's dtype.
    """
    job = _Job(store, collection)
    each = partial(parallel_map, at_once=modules_at_once(collection))
    modules = [info.name for info in store.manifest.modules]
    chosen = torch.zeros(len(collection.names), dtype=torch.int64)
    settings = job.settings
    clustered = find_method(settings.method).clustered
    if clustered and any(i.rank and i.shared > 1 for i in job.infos):
        lost = torch.zeros((), dtype=torch.float64)
        for i, found in enumerate(each(job.lost, modules)):
            on_progress("choosing clusters", i + 1, len(modules))
            if found is not None:
                lost = lost + found
        chosen = lost.argmin(dim=1) if lost.ndim else chosen
        job = replace(job, chosen=chosen)
    parts = []
    for i, part in enumerate(each(job.project, modules)):
        parts.append(part)
        on_progress("projecting adapters", i + 1, len(modules))
    far = _too_far(parts, max_adapter_error) if settings.method != "none" else []
    if len(far):
        kept = each(partial(job.keep, adapters=far), modules)
        for i, extra in enumerate(kept):
            on_progress("keeping adapters uncompressed", i + 1, len(modules))
            parts[i] = parts[i].without_private(far).with_kept(extra, far)
    faults = [
        fault
        for module, part in zip(modules, parts, strict=True)
        for fault in range_faults(part, module, collection.names, settings.float_dtype)
    ]
    if faults:
        raise AdapterError(faults)
    return parts


@dataclass(frozen=True)
class _Job:
    """What projecting onto one module needs beside its name."""

    store: Store
    collection: Collection
    chosen: torch.Tensor | None = None
    """int64 `[n]`, one cluster for all modules of an adapter."""

    @property
    def settings(self) -> Settings:
        manifest = self.store.manifest
        return Settings.from_recorded(manifest.method, manifest.settings)

    @property
    def infos(self) -> list:
        return self.store.manifest.modules

    def info(self, module: str) -> ModuleInfo:
        """What the store says of it."""
        return self.infos[self.store.module_index(module)]

    def factors(self, module: str) -> ModuleFactors:
        """The new adapters' factors, of experts those of all entries (`…run.experts`); of rank 0
        if no one has the module, and where they lack the last experts."""
        info, n = self.info(module), len(self.collection.names)
        if module not in self.collection.shapes:
            return ModuleFactors.stack([None] * (n * info.each), info.d_in, info.d_out)
        found = self.collection.factors(module)
        return with_experts(found, n, info.each) if info.experts else found

    def clusters(self, chosen: torch.Tensor, module: str) -> torch.Tensor:
        """The clusters of a module's entries, by those of adapters: int64."""
        return of_entries(chosen, self.settings, self.info(module).experts)[0]

    def lost(self, module: str) -> torch.Tensor | None:
        """The relative squared error that each cluster's bases leave: float64 `[n, k]`, or None
        where there is no choice."""
        shared, _ = self.bases(module)
        if shared is None or shared.clusters < 2:
            return None
        return self.lost_by(module, self.factors(module), shared)

    def lost_by(self, module: str, factors: ModuleFactors, shared: Shared) -> torch.Tensor:
        """See `lost`."""
        experts = self.info(module).experts
        norms = adapter_norms(factors, experts)
        if experts and self.settings.experts == "separate":
            # Each expert's entries choose among its own bases.
            found = torch.zeros(len(factors) // experts, shared.clusters // experts).double()
            for expert in range(experts):
                some = slice(expert, None, experts)
                own = replace(shared, u=shared.u[some], v=shared.v[some])
                entry = torch.arange(len(factors))[some]
                found += _lost(factors.subset(entry), own, norms[some])
            return found
        lost = _lost(factors, shared, norms)
        return lost.unflatten(0, (-1, experts)).sum(dim=1) if experts else lost

    def bases(self, module: str) -> tuple[Shared | None, torch.Tensor]:
        """The bases that adapters share, as they are stored and without members, and their rows,
        int32 `[clusters, 5]`; of experts the clusters are those of entries."""
        info = self.info(module)
        table = self.store.rows(module)[: info.shared]
        if info.experts:
            table = table[:, 0] if self.settings.experts == "joint" else table.flatten(0, 1)
        if info.shared == 0:
            return None, table
        v_start, u_start, rank, kind, scale_row = table.long().unbind(1)
        u = self.store.vectors(module, "U", 0, int((u_start + rank).max())).float()
        v = self.store.vectors(module, "V", 0, int((v_start + rank).max())).float()
        scales = None
        if bool((scale_row >= 0).any()):
            scales = self.store.vectors(module, "scales", 0, int(scale_row.max()) + 1).float()
            scales = torch.cat([scales, torch.ones(1, info.d_out)])[scale_row]  # −1: the ones
        offsets = torch.arange(info.rank)
        shared = Shared(
            u=u[u_start[:, None] + offsets],
            v=v[v_start[:, None] + offsets],
            assignment=torch.empty(0, dtype=torch.int64),
            core=int(kind[0]),
            scales=scales,
        )
        return shared, table

    def project(self, module: str) -> ModulePart:
        """One module of all new adapters, as `Additions` takes it."""
        settings = self.settings
        shared, table = self.bases(module)
        experts = self.info(module).experts
        raw = self.factors(module)
        if shared is None:
            nobody = torch.zeros(len(self.collection.names), dtype=torch.int64)
            return compress_module(raw, nobody, settings, experts=experts)
        norms = raw.squared_norms().clamp_min(0).sqrt()
        chosen = self.chosen
        if chosen is None:
            chosen = self.lost_by(module, raw, shared).argmin(dim=1)
        assignment = torch.where(raw.ranks > 0, self.clusters(chosen, module), -1)
        shared = replace(shared, assignment=assignment)
        cores = best_cores(raw, shared)
        core_size = self.info(module).expert_core

        def rounded(rounding: Rounding) -> ModulePart:
            """The adapters with the core in this type."""
            padded = raw.a.new_zeros(len(raw), core_size)
            padded[:, : shared.core_size] = cores
            written, stored = rounding.store(padded)
            stored = stored[:, : shared.core_size]
            made = ModulePart(
                u=_nothing(rounding, raw.d_out),
                v=_nothing(rounding, raw.d_in),
                scales=_nothing(rounding, raw.d_out),
                rows=table,
                cores=written,
                chosen=assignment[:, None].to(torch.int32),
                rank=raw.ranks.to(torch.int32),
                norm=norms.float(),
                error=relative_errors(raw, norms, shared, stored).float(),
                shared=len(table),
                shared_rank=shared.rank,
                core_size=core_size,
            )
            return folded(made, experts, joint=settings.experts == "joint") if experts else made

        rounding = Rounding.of(settings)
        found = rounded(rounding)
        if rounding.quantised:
            found = replace(found, exact_error=rounded(Rounding("float32", None)).error)
        return found

    def keep(self, module: str, adapters: torch.Tensor) -> ModulePart:
        """Some adapters (their indices) as they are."""
        experts = self.info(module).experts
        factors = self.factors(module).subset(entries(adapters, experts))
        settings = Settings(method="none", store_dtype=self.settings.store_dtype)
        nobody = torch.zeros(len(adapters), dtype=torch.int64)
        return compress_module(factors, nobody, settings, experts=experts)


def _lost(factors: ModuleFactors, shared: Shared, norms: torch.Tensor) -> torch.Tensor:
    """The least ‖BA − U_cΣV_cᵀ‖² / ‖BA‖² of each adapter and cluster, up to what is the same for
    all clusters: float64 `[n, k]`. `norms` are ‖BA‖."""
    norms = norms.square()
    u, v = all_bases(shared)
    gram_u, gram_v = ((wide := x.double()) @ wide.mT for x in (u, v))
    if shared.core == CORE_FULL:
        inverse_u, inverse_v = inverse(gram_u), inverse(gram_v)
    elif shared.core == CORE_DIAGONAL:
        undo = inverse(gram_u * gram_v)
    wide_u, wide_v = (x.flatten(0, 1).T for x in (u, v))
    k, r = shared.clusters, shared.rank
    gains = []
    for some in torch.arange(len(factors)).split(_BLOCK):
        own = factors.subset(some)
        if own.a.shape[0] == 0:
            gains.append(norms.new_zeros(len(some), k))
            continue
        p = own.per_adapter(own.b @ wide_u).double().unflatten(2, (k, r)).transpose(1, 2)
        w = own.per_adapter(own.a @ wide_v).double().unflatten(2, (k, r)).transpose(1, 2)
        if shared.core == CORE_FULL:
            inner = p.mT @ w
            gains.append(((inverse_u @ inner @ inverse_v) * inner).sum((2, 3)))
        elif shared.core == CORE_DIAGONAL:
            inner = (p * w).sum(2)[:, :, None]
            gains.append(((inner @ undo) * inner).sum((2, 3)))
        else:
            gains.append(2 * (p * w).sum((2, 3)) - (gram_u * gram_v).sum((1, 2)))
    gain = torch.cat(gains)
    return torch.where(norms[:, None] > 0, -gain / norms[:, None].clamp_min(1e-300), 0.0)


def _nothing(rounding: Rounding, width: int) -> Matrix:
    return rounding.store(torch.zeros(0, width))[0]


def _too_far(parts: list[ModulePart], limit: float | None) -> torch.Tensor:
    """Indices of the adapters whose mean error over their modules is above `limit`."""
    if limit is None:
        return torch.empty(0, dtype=torch.int64)
    error = torch.stack([part.error.double() for part in parts], dim=1)
    count = torch.stack([part.rank > 0 for part in parts], dim=1).sum(1)
    return (error.sum(1) / count.clamp_min(1) > limit).nonzero()[:, 0]
