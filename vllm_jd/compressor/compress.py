"""Compress a collection into a new generation of a store, module by module, resumably."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file

from vllm_jd import __version__
from vllm_jd.compressor.adapters import Collection
from vllm_jd.compressor.clustering import assign_adapters, assign_in_module, fit_clusters
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.factors import ModuleFactors
from vllm_jd.compressor.methods.jd_full import cores
from vllm_jd.compressor.parallel import parallel_map
from vllm_jd.store import (
    BaseModelInfo,
    CoreShard,
    GenerationWriter,
    ModuleInfo,
    Store,
    writing,
)
from vllm_jd.store.files import fsync
from vllm_jd.store.reader import BASES

_WORK = ".compress"
_SAMPLE_BYTES = 1 << 30  # factors held at once while adapters are assigned to clusters
_SHARD_BYTES = 256 << 20

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, done, total)."""


@dataclass(frozen=True)
class Settings:
    """How to compress. Field names are those of the command line."""

    method: str = "jd-full"
    rank: int = 16
    clusters: int = 1
    cluster_scope: str = "adapter"
    iterations: int = 10
    solver: str = "alternating"
    seed: int = 0
    dtype: str = "bfloat16"

    def recorded(self) -> dict[str, Any]:
        """As the manifest has them: all but the method, which has a field of its own."""
        return {key: value for key, value in asdict(self).items() if key != "method"}


def compress(
    collection: Collection,
    out: Path,
    settings: Settings,
    *,
    base_model: BaseModelInfo | None = None,
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
        on_progress: see `Progress`.

    Returns:
        The new generation, verified.

    Raises:
        StoreError: `out` is something else, or another process writes it.
        AdapterError: an adapter's file changed meanwhile, or its numbers exceed the dtype.
    """
    base_model = base_model or BaseModelInfo(name=collection.base_model)
    settings = replace(settings, clusters=min(settings.clusters, len(collection.names)))
    with writing(out):
        work = _open_work(out / _WORK, collection, settings)
        assignment = _assignment(work, collection, settings, on_progress)
        modules = list(collection.shapes)

        def compress_one(job: tuple[int, str]) -> None:
            part = work / f"module-{job[0]:05d}.safetensors"
            if not part.exists():
                factors = collection.factors(job[1])
                tensors = _compress_module(factors, assignment, settings)
                _check_range(tensors, job[1], collection.names, settings.dtype)
                _save(part, tensors)

        on_progress("compressing modules", 0, len(modules))
        for i, _ in enumerate(parallel_map(compress_one, enumerate(modules))):
            on_progress("compressing modules", i + 1, len(modules))
        on_progress("writing the store", 0, 1)
        store = _publish(out, work, collection, settings, base_model)
        shutil.rmtree(out / _WORK)
        on_progress("writing the store", 1, 1)
    return store


def _open_work(folder: Path, collection: Collection, settings: Settings) -> Path:
    """The folder of finished parts of exactly this job; parts of any other job are dropped."""
    job = {
        "version": __version__,
        "settings": asdict(settings),
        "names": collection.names,
        "sources": collection.source_sha256,
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    work = folder / key
    if folder.exists():
        for other in folder.iterdir():
            if other != work:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
    work.mkdir(parents=True, exist_ok=True)
    return work


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a part whole or not at all, so that a kill leaves no half of it."""
    temporary = file.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    fsync(temporary)
    temporary.replace(file)


def _assignment(
    work: Path,
    collection: Collection,
    settings: Settings,
    on_progress: Progress,
) -> torch.Tensor:
    """The cluster of each adapter, int64 `[n]`."""
    file = work / "assignment.safetensors"
    if file.exists():
        return load_file(file)["assignment"]
    if settings.clusters == 1:
        return torch.zeros(len(collection.names), dtype=torch.int64)
    modules = _sample_modules(collection)

    samples = []
    for i, module in enumerate(modules):
        on_progress("reading adapters", i, len(modules))
        samples.append(collection.factors(module).normalised()[0])
    on_progress("reading adapters", len(modules), len(modules))
    assignment = assign_adapters(
        samples,
        settings.clusters,
        settings.rank,
        solver=settings.solver,
        seed=settings.seed,
        on_progress=lambda done, total: on_progress("clustering adapters", done, total),
    )
    _save(file, {"assignment": assignment})
    return assignment


def _sample_modules(collection: Collection) -> list[str]:
    """Evenly spaced modules whose factors fit into `_SAMPLE_BYTES`; all of them if they do."""
    modules = list(collection.shapes)
    share = _SAMPLE_BYTES / max(collection.factor_bytes, 1)
    count = min(len(modules), max(1, int(share * len(modules))))
    # Midpoints of equal stretches: with one module it is the middle of the network (§6.5).
    return [modules[int((i + 0.5) * len(modules) / count)] for i in range(count)]


def _compress_module(
    raw: ModuleFactors, assignment: torch.Tensor, settings: Settings
) -> dict[str, torch.Tensor]:
    """Bases, cores and errors of one module, rounded to the store's dtype."""
    factors, norms = raw.normalised()
    common = {"solver": settings.solver, "seed": settings.seed}
    if settings.cluster_scope == "module" and settings.clusters > 1:
        assignment = assign_in_module(
            factors, assignment, settings.clusters, settings.rank, **common
        )
    bases = fit_clusters(
        factors,
        assignment,
        settings.clusters,
        settings.rank,
        iterations=settings.iterations,
        **common,
    )
    dtype = getattr(torch, settings.dtype)
    rank, n = settings.rank, len(factors)
    core = torch.zeros(n, rank, rank, dtype=dtype)
    error = torch.zeros(n, dtype=torch.float64)
    stored_u, stored_v = [], []
    for cluster, (u, v) in enumerate(bases):
        u, v = u.to(dtype), v.to(dtype)
        stored_u.append(u.T)
        stored_v.append(v.T)
        members = (assignment == cluster).nonzero()[:, 0]
        own = factors.subset(members)
        if own.a.shape[0] == 0:
            continue
        exact = cores(own, u.float(), v.float())
        if dtype is not torch.float32:
            # Rounding costs U and V their orthonormality: the best core for the rounded bases
            # is (UᵀU)⁻¹ UᵀBAV (VᵀV)⁻¹.
            exact = _gram_inverse(u) @ exact @ _gram_inverse(v)
        scaled = (exact * norms[members, None, None].float()).to(dtype)
        core[members] = scaled
        error[members] = _errors(own, norms[members], u.float(), v.float(), scaled.double())
    absent = factors.ranks == 0
    return {
        "U": torch.stack(stored_u),
        "V": torch.stack(stored_v),
        "core": core,
        "error": error.float(),
        "norm": norms.float(),
        "rank": factors.ranks.to(torch.int32),
        "cluster": torch.where(absent, -1, assignment).to(torch.int32),
    }


def _check_range(
    tensors: dict[str, torch.Tensor], module: str, names: list[str], dtype: str
) -> None:
    """Raise AdapterError where an adapter's cores leave the range of the store's dtype."""
    finite = tensors["core"].isfinite().all(dim=(1, 2)) & tensors["norm"].isfinite()
    faults = [
        f"{names[row]}: {module}: too large for {dtype} (norm {float(tensors['norm'][row]):.3g}); "
        "choose a wider --dtype"
        for row in (~finite).nonzero()[:, 0].tolist()
    ]
    if faults:
        raise AdapterError(faults)


def _gram_inverse(basis: torch.Tensor) -> torch.Tensor:
    basis = basis.double()
    return torch.linalg.pinv(basis.T @ basis, hermitian=True).float()


def _errors(
    factors: ModuleFactors,
    norms: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    stored: torch.Tensor,
) -> torch.Tensor:
    """‖BA − UΣVᵀ‖²_F / ‖BA‖²_F of what is stored, float64 `[n]`; 0 for an adapter of norm 0."""
    core = stored / norms.clamp_min(1e-300)[:, None, None]
    u, v = u.double(), v.double()
    p = factors.per_adapter(_exact_product(factors.b, u))
    w = factors.per_adapter(_exact_product(factors.a, v))
    inner = ((p.mT @ w) * core).sum((1, 2))
    gram_u, gram_v = u.T @ u, v.T @ v
    own = ((gram_u @ core @ gram_v) * core).sum((1, 2))
    total = factors.squared_norms()
    error = (total - 2 * inner + own).clamp_min(0) / total.clamp_min(1e-300)
    return torch.where(norms > 0, error, 0.0)


def _exact_product(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """rows · basis in float64, without a float64 copy of all rows at once."""
    return torch.cat([part.double() @ basis for part in rows.split(4096)])


def _publish(
    out: Path,
    work: Path,
    collection: Collection,
    settings: Settings,
    base_model: BaseModelInfo,
) -> Store:
    """Assemble the modules' parts into a generation; at most one shard of cores in memory."""
    n, rank = len(collection.names), settings.rank
    parts = sorted(work.glob("module-*.safetensors"))
    writer = GenerationWriter(out)
    infos, bases = [], {}
    columns: dict[str, list[torch.Tensor]] = {"cluster": [], "rank": [], "norm": [], "error": []}
    for i, ((module, (d_in, d_out)), part) in enumerate(
        zip(collection.shapes.items(), parts, strict=True)
    ):
        with safe_open(part, framework="pt") as tensors:
            for side in "UV":
                bases[f"{module}.{side}"] = tensors.get_tensor(side)
            for key, column in columns.items():
                column.append(tensors.get_tensor(key))
        infos.append(
            ModuleInfo(
                name=module,
                d_in=d_in,
                d_out=d_out,
                rank=rank,
                clusters=settings.clusters,
                core_offset=i * rank * rank,
            )
        )
    writer.write_tensors(BASES, bases)
    del bases
    table = {key: torch.stack(column, dim=1) for key, column in columns.items()}
    writer.write_table(
        collection.names,
        **table,
        source_sha256=collection.source_sha256,
        source_bytes=collection.source_bytes,
    )
    core_row = len(infos) * rank * rank
    dtype = getattr(torch, settings.dtype)
    rows = max(1, min(n, _SHARD_BYTES // (core_row * dtype.itemsize)))
    shards = []
    for first in range(0, n, rows):
        last = min(first + rows, n)
        block = torch.empty(last - first, len(infos), rank * rank, dtype=dtype)
        for i, part in enumerate(parts):
            with safe_open(part, framework="pt") as tensors:
                block[:, i] = tensors.get_slice("core")[first:last].flatten(1)
        file = f"cores-{len(shards):05d}.safetensors"
        writer.write_tensors(file, {"cores": block.flatten(1)})
        shards.append(CoreShard(file=file, first=first, rows=last - first))
    return writer.publish(
        base_model=base_model,
        dtype=settings.dtype,
        method=settings.method,
        settings=settings.recorded(),
        adapters=n,
        modules=infos,
        core_row=core_row,
        core_shards=shards,
    )
