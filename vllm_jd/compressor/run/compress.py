"""Compress a collection into a new generation of a store, module by module, resumably."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_jd import __version__
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.methods.method import Start
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.read.adapters import (
    Collection,
    base_names_of,
    experts_in,
    experts_of,
)
from vllm_jd.compressor.run.clustering import as_judged, assign_adapters
from vllm_jd.compressor.run.experts import check_experts, entries, looked_at, of_entries
from vllm_jd.compressor.run.memory import modules_at_once
from vllm_jd.compressor.run.module import compress_module, range_faults
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.run.publish import Kept, publish
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import BaseModelInfo, Store, writing
from vllm_jd.store.part import ModulePart, save_tensors

_WORK = ".compress"
_SAMPLE_BYTES = 1 << 30  # factors held at once while adapters are assigned to clusters

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, done, total)."""

ModuleMap = Callable[[Callable[[str], ModulePart], Iterable[str]], Iterator[Any]]
"""`map` over modules: the results in order."""


def compress(
    collection: Collection,
    out: Path,
    settings: Settings,
    *,
    base_model: BaseModelInfo | None = None,
    warm: Store | None = None,
    device: str = "cpu",
    module_map: ModuleMap = parallel_map,
    accept: Callable[[float, int], None] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Store:
    """Write a new generation of the store at `out` and make it the live one.

    Finished modules are kept in `out/.compress`: the same call after a stop goes on from there.
    Until the end, a store that was there before stays as it was.

    Args:
        collection: the adapters.
        out: the store's folder; made if it is not there.
        settings: method and its parameters.
        base_model: what is known of the base model; default: the name the adapters give.
        warm: a store to start the clusters and bases from.
        device: where to compute, as torch names it.
        module_map: how to spread the modules; by default several at once, as many as there are
            threads and memory for.
        accept: called with the mean error and the bytes before the generation is published; what
            it raises keeps that from happening.
        on_progress: see `Progress`.

    Returns:
        The new generation, verified.

    Raises:
        StoreError: `out` is something else, or another process writes it.
        AdapterError: an adapter's file changed meanwhile, or its numbers exceed the dtype.
        SettingsError: what cannot be done with experts.
    """
    check_experts(collection, settings)
    if module_map is parallel_map:
        module_map = partial(parallel_map, at_once=modules_at_once(collection))
    base_model = base_model or BaseModelInfo(name=collection.base_model)
    base_model = base_model.called(base_names_of(collection))
    settings = settings.adapted(clusters=min(settings.clusters, len(collection.names)))
    with writing(out):
        work = _open_work(out / _WORK, collection, settings, warm)
        assignment = _assignment(work, collection, settings, warm, on_progress)
        _load_solvers(device)
        job = _Job(collection, settings, assignment, warm, device)
        modules = list(collection.shapes)
        parts = {module: work / f"module-{i:05d}.safetensors" for i, module in enumerate(modules)}
        missing = [module for module in modules if not parts[module].exists()]
        on_progress("compressing modules", len(modules) - len(missing), len(modules))
        for module, part in zip(missing, module_map(job.compress, missing), strict=True):
            if faults := range_faults(part, module, collection.names, settings.float_dtype):
                raise AdapterError(faults)
            part.save(parts[module])
            on_progress("compressing modules", modules.index(module) + 1, len(modules))
        kept = _keep_uncompressed(work, job, parts, module_map, on_progress)
        if accept is not None:
            accept(*_outcome(list(parts.values()), kept))
        on_progress("writing the store", 0, 1)
        store = publish(out, collection, settings, base_model, list(parts.values()), kept)
        shutil.rmtree(out / _WORK)
        on_progress("writing the store", 1, 1)
    return store


def _load_solvers(device: str) -> None:
    """torch loads a GPU's solvers at their first call, and fails where that comes from two threads
    at once ("lazy wrapper should be called at most once")."""
    if torch.device(device).type == "cuda":
        torch.linalg.eigh(torch.eye(1, device=device))


@dataclass(frozen=True)
class _Job:
    """What compressing one module needs beside its name."""

    collection: Collection
    settings: Settings
    assignment: torch.Tensor
    warm: Store | None
    device: str

    def compress(self, module: str) -> ModulePart:
        """See `compress_module`."""
        # Modules must not drop the same entries (DARE).
        seed = self.settings.seed + list(self.collection.shapes).index(module)
        settings = replace(self.settings, seed=seed)
        factors = self.collection.factors(module).to(self.device)
        assignment = self.assignment.to(self.device)
        experts = experts_of(self.collection, module)
        start = self.start(module, settings)
        return compress_module(factors, assignment, settings, start=start, experts=experts)

    def start(self, module: str, settings: Settings) -> Start | None:
        """The bases of the warm start, if they are of the same rank and number."""
        experts = experts_of(self.collection, module)
        return None if self.warm is None else _start_from(self.warm, module, settings, experts)

    def keep(self, module: str, adapters: torch.Tensor) -> ModulePart:
        """Some adapters (their indices) as they are."""
        experts = experts_of(self.collection, module)
        factors = self.collection.factors(module).subset(entries(adapters, experts))
        settings = Settings(method="none", store_dtype=self.settings.store_dtype)
        assignment = self.assignment[adapters]
        return compress_module(factors, assignment, settings, experts=experts)


def _outcome(parts: list[Path], kept: Kept | None) -> tuple[float, int]:
    """(mean error over adapters and modules, bytes) of what is about to be published."""
    total, count, size = 0.0, 0, 0
    extra = [None] * len(parts) if kept is None else kept.parts
    for file, uncompressed in zip(parts, extra, strict=True):
        part = ModulePart.load(file)
        size += file.stat().st_size
        error = part.error.double()
        if uncompressed is not None and kept is not None:
            size += uncompressed.stat().st_size
            error[kept.adapters] = ModulePart.load(uncompressed).error.double()
        total += float(error[part.rank > 0].sum())
        count += int((part.rank > 0).sum())
    return total / max(count, 1), size


def _open_work(
    folder: Path,
    collection: Collection,
    settings: Settings,
    warm: Store | None,
) -> Path:
    """The folder of finished parts of exactly this job; parts of any other job are dropped."""
    job = {
        "version": __version__,
        "settings": asdict(settings),
        "names": collection.names,
        "sources": collection.source_sha256,
        "experts": dict(experts_in(collection)),
        "warm": None if warm is None else [str(warm.path.resolve()), warm.generation],
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    work = folder / key
    if folder.exists():
        for other in folder.iterdir():
            if other != work:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    work.mkdir(parents=True, exist_ok=True)
    return work


def _start_from(store: Store, module: str, settings: Settings, experts: int) -> Start | None:
    """The bases of a store's module, if they are of the same rank and number."""
    info = {info.name: info for info in store.manifest.modules}.get(module)
    same = store.manifest.method == settings.method and METHODS[settings.method].clustered
    if not same or info is None or info.rank != settings.rank or info.shared != settings.clusters:
        return None
    _, of_clusters = of_entries(torch.empty(0, dtype=torch.int64), settings, experts)
    count = of_clusters.clusters
    if info.experts != experts or (
        experts and store.manifest.settings.get("experts") != settings.experts
    ):
        return None
    vectors = (store.vectors(module, pool, 0, count * info.rank) for pool in ("U", "V"))
    sides = (each.float().split(info.rank) for each in vectors)
    return [(u.T, v.T) for u, v in zip(*sides, strict=True)]


def _assignment(
    work: Path,
    collection: Collection,
    settings: Settings,
    warm: Store | None,
    on_progress: Progress,
) -> torch.Tensor:
    """The cluster of each adapter, int64 `[n]`."""
    file = work / "assignment.safetensors"
    if file.exists():
        return load_file(file)["assignment"]
    if settings.clusters == 1 or not METHODS[settings.method].clustered:
        return torch.zeros(len(collection.names), dtype=torch.int64)
    modules = sample_modules(collection, _SAMPLE_BYTES)

    def sample(module: str) -> list[ModuleFactors]:
        factors = collection.factors(module)
        chosen = looked_at(factors, experts_of(collection, module))
        return [as_judged(own.normalised()[0]) for own in chosen]

    samples: list[ModuleFactors] = []
    on_progress("reading adapters", 0, len(modules))
    for done, found in enumerate(parallel_map(sample, modules)):
        samples += found
        on_progress("reading adapters", done + 1, len(modules))
    on_progress("clustering adapters", 0, 1)  # its start takes a while before it tells
    assignment = assign_adapters(
        samples,
        settings.clusters,
        settings.rank,
        seed=settings.seed,
        start=None if warm is None else _clusters_in(warm, collection, settings),
        on_progress=lambda done, total: on_progress("clustering adapters", done, total),
    )
    save_tensors({"assignment": assignment}, file)
    return assignment


def _clusters_in(store: Store, collection: Collection, settings: Settings) -> torch.Tensor | None:
    """The cluster that each adapter has in a store: int64 `[n]`, −1 where it has none there; None
    if the store has another number of clusters."""
    recorded = store.manifest.settings
    if recorded.get("clusters") != settings.clusters:
        return None
    # Behind the clusters are rows that are one adapter's own.
    first = store.chosen[:, :, 0].long()
    first = torch.where(first < settings.clusters, first, -1)
    votes = torch.stack([(first == c).sum(dim=1) for c in range(settings.clusters)], dim=1)
    most, cluster = votes.max(dim=1)
    cluster = torch.where(most > 0, cluster, -1)
    at = torch.tensor([store.index(name) if name in store else -1 for name in collection.names])
    return torch.where(at >= 0, cluster[at], -1)


def sample_modules(collection: Collection, most_bytes: int) -> list[str]:
    """Evenly spaced modules whose factors fit into `most_bytes`; all of them if they do."""
    modules = list(collection.shapes)
    share = most_bytes / max(collection.factor_bytes, 1)
    count = min(len(modules), max(1, int(share * len(modules))))
    # Midpoints of equal stretches: with one module it is the middle of the network (§6.5).
    return [modules[int((i + 0.5) * len(modules) / count)] for i in range(count)]


def _keep_uncompressed(
    work: Path,
    job: _Job,
    parts: dict[str, Path],
    module_map: ModuleMap,
    on_progress: Progress,
) -> Kept | None:
    """Store those adapters as they are that the method would hurt too much."""
    limit = job.settings.max_adapter_error
    if limit is None or job.settings.method == "none":
        return None
    error = torch.zeros(len(job.collection.names), dtype=torch.float64)
    count = torch.zeros_like(error)
    for file in parts.values():
        part = ModulePart.load(file, cores=slice(0, 0))
        error += part.error.double()
        count += part.rank > 0
    adapters = (error / count.clamp_min(1) > limit).nonzero()[:, 0]
    if len(adapters) == 0:
        return None
    kept = {
        module: work / file.name.replace("module", "uncompressed") for module, file in parts.items()
    }
    missing = [module for module in parts if not kept[module].exists()]
    results = module_map(partial(job.keep, adapters=adapters), missing)
    names = [job.collection.names[i] for i in adapters.tolist()]
    for i, (module, part) in enumerate(zip(missing, results, strict=True)):
        on_progress("keeping adapters uncompressed", i, len(missing))
        if faults := range_faults(part, module, names, job.settings.float_dtype):
            raise AdapterError(faults)
        part.save(kept[module])
    on_progress("keeping adapters uncompressed", len(missing), len(missing))
    return Kept(adapters, list(kept.values()))
