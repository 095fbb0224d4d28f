"""The numbers behind a report: from a store alone, and from the adapters that went into it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_jd.compressor.algebra.bounds import Bounds, bounds, spectrum
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.adapters import Collection
from vllm_jd.compressor.report.summary import uncompressed_adapters
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.row import CORE_FULL, CORE_KIND, RANK, SCALE_ROW, U_START, V_START
from vllm_jd.store import ModuleInfo, Store
from vllm_jd.store.quantise import code_width, scale_width

_READ_BYTES = 16 << 30  # of factors, as float32, for spectra
_OPERATIONS = 4e12  # for bounds: about two minutes on two cores

_MAP_ADAPTERS = 1000
_MAP_MODULES = 8
_MAP_BYTES = 512 << 20  # of bases
_MAP_WIDTH = 64


@dataclass(frozen=True)
class ModuleBounds:
    """Bounds on any JD of some of a module's adapters, beside what the store reached.

    Attributes:
        bounds: of `adapters` adapters, with the store's clusters and rank.
        reached: mean relative squared error of the same adapters in the store.
        adapters: how many they are: all that share bases, or evenly spaced ones of them. Of some
            of the adapters `error_at_most` says nothing about a JD of all.
        whole: whether they are all.
    """

    bounds: Bounds
    reached: float
    adapters: int
    whole: bool


@dataclass(frozen=True)
class ReportData:
    """What only the source adapters can tell of a store. Both dicts may lack modules.

    Attributes:
        spectra: module → float32 `[max rank]`, see `vllm_jd.compressor.algebra.bounds.spectrum`.
        bounds: module → bounds; only of modules in which adapters share bases.
    """

    spectra: dict[str, torch.Tensor]
    bounds: dict[str, ModuleBounds]


def collect(
    collection: Collection,
    store: Store,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ReportData:
    """Spectra and bounds of a store's modules, in bounded time.

    Of a large collection, only some layers are looked at, evenly spaced and of every kind of
    module. Bounds, which cost more, may be of fewer modules, and of some of the adapters.

    Args:
        collection: the adapters that the store was made of.
        store: the store.
        on_progress: called with (what is going on, modules done, modules).

    Raises:
        AdapterError: the collection is not what the store was made of.
    """
    _check_same(collection, store)
    infos = {info.name: info for info in store.manifest.modules}
    each = collection.factor_bytes / max(len(infos), 1)
    chosen = _spread(list(infos), lambda module: each, _READ_BYTES)
    order = torch.tensor([store.index(name) for name in collection.names])
    jobs = _bounds_jobs(store, chosen, order)

    def measure(module: str) -> tuple[torch.Tensor, ModuleBounds | None]:
        factors = collection.factors(module)
        values = spectrum(factors, max(1, int(factors.ranks.max())))
        if module not in jobs:
            return values, None
        job = jobs[module]
        info = infos[module]
        found = bounds(factors.subset(job.adapters), job.assignment, info.shared, info.rank)
        return values, ModuleBounds(found, job.reached, len(job.adapters), job.whole)

    spectra, found_bounds = {}, {}
    on_progress("measuring adapters", 0, len(chosen))
    for i, (values, found) in enumerate(parallel_map(measure, chosen)):
        spectra[chosen[i]] = values
        if found is not None:
            found_bounds[chosen[i]] = found
        on_progress("measuring adapters", i + 1, len(chosen))
    return ReportData(spectra, found_bounds)


def _check_same(collection: Collection, store: Store) -> None:
    """Raise AdapterError where the store was made of other adapters."""
    faults = []
    sources = dict(zip(collection.names, collection.source_sha256, strict=True))
    for name, digest in zip(store.names, store.source_sha256.numpy(), strict=True):
        found = sources.pop(name, None)
        if found is None:
            faults.append(f"{name}: in the store {store.path}, not among the adapters given")
        elif found != digest.tobytes().hex():
            faults.append(f"{name}: changed since the store {store.path} was made of it")
    faults += [f"{name}: not in the store {store.path}" for name in sources]
    if set(collection.shapes) != {info.name for info in store.manifest.modules}:
        faults.append(f"{store.path}: its modules are not those of the adapters given")
    if faults:
        more = [f"… and {len(faults) - 10:,} more"] if len(faults) > 10 else []
        raise AdapterError(faults[:10] + more)


@dataclass(frozen=True)
class _BoundsJob:
    adapters: torch.Tensor
    """int64, ascending: their indices in the collection."""
    assignment: torch.Tensor
    reached: float
    whole: bool


def _bounds_jobs(store: Store, modules: list[str], order: torch.Tensor) -> dict[str, _BoundsJob]:
    """For which modules and adapters to compute bounds.

    `order`: index of an adapter in the collection → in the store.
    """
    shared = torch.from_numpy(shared_clusters(store))[order]
    shared[uncompressed_adapters(store)[order]] = -1
    ranks, errors = store.rank[order], store.error[order].double()
    columns = {module: store.module_index(module) for module in modules}
    # Of experts no bound is known: their bases are fitted to all of them at once.
    modules = [m for m in modules if not store.manifest.modules[columns[m]].experts]
    members = {module: (shared[:, c] >= 0).nonzero()[:, 0] for module, c in columns.items()}

    def cost(module: str, step: int = 1) -> float:
        column, some = columns[module], members[module][::step]
        info = store.manifest.modules[column]
        return _operations(shared[some, column], ranks[some, column], info)

    jobs = {}
    chosen = _spread([m for m in modules if len(members[m])], cost, _OPERATIONS)
    all_fit = sum(map(cost, chosen)) <= _OPERATIONS
    for module in chosen:
        step = 1
        while not all_fit and cost(module, step) > _OPERATIONS / len(chosen):
            step *= 2
            if step > len(members[module]):
                break
        some, column = members[module][::step], columns[module]
        reached = float(errors[some, column].mean())
        jobs[module] = _BoundsJob(some, shared[some, column], reached, step == 1)
    return jobs


def _operations(cluster: torch.Tensor, ranks: torch.Tensor, info: ModuleInfo) -> float:
    """Roughly what `bounds` costs, in multiplications of a matrix product."""
    rows = torch.bincount(cluster, ranks.double(), minlength=info.shared).numpy()
    n = torch.bincount(cluster, minlength=info.shared).double().numpy()
    smaller = [np.minimum(rows, d) for d in (info.d_in, info.d_out)]
    eigen = 10 * (smaller[0] ** 3 + smaller[1] ** 3 + np.minimum(*smaller) ** 3)
    grams = rows * (smaller[0] * info.d_in + smaller[1] * info.d_out)
    inner = np.where(n > info.rank**2, rows**2 * (info.d_in + info.d_out) + 10 * n**3, 0)
    return float((eigen + grams + inner).sum())


def _spread(modules: list[str], cost: Callable[[str], float], budget: float) -> list[str]:
    """As many evenly spaced modules of every kind as `budget` pays for, at least one of each."""
    kinds: dict[str, list[str]] = {}
    for module, (kind, _) in zip(modules, places(modules), strict=True):
        kinds.setdefault(kind, []).append(module)
    costs = {module: cost(module) for module in modules}
    chosen: set[str] = set()
    for count in range(max(map(len, kinds.values()), default=0), 0, -1):
        chosen = {
            same[int((i + 0.5) * len(same) / min(count, len(same)))]
            for same in kinds.values()
            for i in range(min(count, len(same)))
        }
        if sum(costs[module] for module in chosen) <= budget:
            break
    return [module for module in modules if module in chosen]


def places(names: Iterable[str]) -> list[tuple[str, int | None]]:
    """(kind, layer) of modules by their names: `model.layers.3.mlp.up_proj` → (up_proj, 3).

    Kinds take as much of the name as keeps the pairs distinct. A name without a number has the
    layer None.
    """
    names = list(names)
    parts = [re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", name) for name in names]
    layers = [int(part[2]) if part else None for part in parts]
    short = [name.rsplit(".", 1)[-1] for name in names]
    longer = [part[3] if part else name for part, name in zip(parts, names, strict=True)]
    whole = [f"{p[1]}.*.{p[3]}" if p else name for p, name in zip(parts, names, strict=True)]
    kinds = short
    for wider in (longer, whole):
        seen = Counter(zip(kinds, layers, strict=True))
        doubled = {kind for (kind, _), count in seen.items() if count > 1}
        kinds = [w if k in doubled else k for k, w in zip(kinds, wider, strict=True)]
    return list(zip(kinds, layers, strict=True))


def shared_clusters(store: Store) -> np.ndarray:
    """The cluster whose bases an adapter shares: int64 `[n, m]`; −1 where it shares none."""
    infos = store.manifest.modules
    shared = torch.tensor([info.shared if info.rank else 0 for info in infos])
    first = store.chosen[:, :, 0].long()
    return torch.where(first < shared, first, -1).numpy()


@dataclass(frozen=True)
class ClusterNumbers:
    """Of every module and shared cluster.

    Attributes:
        sizes: adapters, int64 `[m, k]`.
        errors: their mean relative squared error, float64 `[m, k]`; NaN where there are none.
    """

    sizes: np.ndarray
    errors: np.ndarray


def cluster_numbers(store: Store, shared: np.ndarray) -> ClusterNumbers | None:
    """Sizes and errors of the shared clusters, or None without any. `shared` is that of
    `shared_clusters`."""
    used = [i for i, info in enumerate(store.manifest.modules) if info.rank]
    if not used:
        return None
    k = max(store.manifest.modules[i].shared for i in used)
    sizes, errors = np.zeros((len(used), k), dtype=np.int64), np.full((len(used), k), np.nan)
    error = store.error.double().numpy()
    for place, i in enumerate(used):
        inside = shared[:, i] >= 0
        sizes[place] = np.bincount(shared[inside, i], minlength=k)
        sums = np.bincount(shared[inside, i], error[inside, i], minlength=k)
        np.divide(sums, sizes[place], out=errors[place], where=sizes[place] > 0)
    return ClusterNumbers(sizes, errors)


def byte_parts(store: Store) -> dict[str, int]:
    """Bytes of the generation's files by what they hold; they add up to `stored_bytes`.

    `shared bases`, `cores`, `private vectors` (of adapters kept as they are, SVDs), and
    `table`: names, rows, norms, errors and file headers.
    """
    manifest = store.manifest
    itemsize = store.dtype.itemsize

    def vector_bytes(width: int) -> int:
        if manifest.quantised is None:
            return width * itemsize
        return code_width(width, manifest.quantised) + 2 * scale_width(width)

    bases = private = 0
    for info in manifest.modules:
        u = v = 0
        if info.shared:
            rows = store.rows(info.name)[: info.shared]
            v, u = (int((rows[..., side] + rows[..., RANK]).max()) for side in (V_START, U_START))
        for shared, count, width in (
            (u, info.u_vectors, info.d_out),
            (v, info.v_vectors, info.d_in),
        ):
            bases += shared * vector_bytes(width)
            private += (count - shared) * vector_bytes(width)
        bases += info.scale_rows * vector_bytes(info.d_out)
    cores = len(store) * vector_bytes(manifest.core_row)
    table = store.stored_bytes - bases - private - cores
    return {"shared bases": bases, "cores": cores, "private vectors": private, "table": table}


@dataclass(frozen=True)
class AdapterMap:
    """Adapters as points.

    Attributes:
        points: float64 `[s, 2]`, the first two principal components.
        cluster: int64 `[s]`, the cluster that an adapter has in most modules.
        share: float64 `[2]`, of the variance, of each component.
    """

    points: np.ndarray
    cluster: np.ndarray
    share: np.ndarray


def adapter_map(store: Store, shared: np.ndarray) -> AdapterMap | None:
    """PCA of what the store adds for adapters through the bases that they share.

    Cores of different clusters are numbers in different bases, so it is U_cΣ_iV_cᵀ that is
    compared: each at norm 1, in up to 8 modules, seen through 64 orthonormal random directions on
    either side (all of them, and thus exactly, in modules no wider than that). Adapters beyond
    1,000 are left out, evenly.

    Returns:
        None with fewer than 3 adapters that have a core.
    """
    infos = store.manifest.modules
    cored = [i for i, info in enumerate(infos) if info.core_size and info.rank]
    if not cored:
        return None
    widest = max((infos[i].u_vectors + infos[i].v_vectors) * infos[i].d_in for i in cored)
    count = min(len(cored), _MAP_MODULES, max(1, _MAP_BYTES // (widest * store.dtype.itemsize)))
    chosen = [cored[int((i + 0.5) * len(cored) / count)] for i in range(count)]
    adapters = np.flatnonzero((shared[:, chosen] >= 0).any(axis=1))
    adapters = adapters[:: max(1, -(-len(adapters) // _MAP_ADAPTERS))]
    if len(adapters) < 3:
        return None
    if len(adapters) == len(store):
        cores = store.cores(0, len(store))
    else:
        cores = torch.cat([store.cores(i, i + 1) for i in adapters.tolist()])
    generator = torch.Generator().manual_seed(0)
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for column in chosen:
        info = infos[column]
        expert = column % info.each  # one of each layer's stands for them
        first = info.core_offset + expert * info.expert_core
        own = cores[:, first : first + info.expert_core].float()
        features = _features(store, info, expert, shared[adapters, column], own, generator)
        gram += (features @ features.T).double()
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(centred)
    values = values.flip(0).clamp_min(0)
    points = vectors.flip(1)[:, :2] * values[:2].sqrt()
    # The sign of an eigenvector is arbitrary: let the largest coordinate be positive.
    points *= points.gather(0, points.abs().argmax(0, keepdim=True)).sign()
    share = values[:2] / values.sum().clamp_min(1e-300)
    return AdapterMap(points.numpy(), _usual(shared[adapters]), share.numpy())


def _features(
    store: Store,
    info: ModuleInfo,
    expert: int,
    cluster: np.ndarray,
    cores: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The adapters' shared parts in one module, at norm 1: float32 `[s, ·]`, 0 without one."""
    bases = store.bases(info.name)

    def seen(vectors: torch.Tensor) -> torch.Tensor:
        width = vectors.shape[1]
        random = torch.randn(width, min(_MAP_WIDTH, width), generator=generator)
        return vectors.float() @ torch.linalg.qr(random).Q

    r = info.rank
    rows = bases.rows[: int(cluster.max()) + 1].long()
    rows = rows.view(len(rows), info.each, -1)[:, expert]
    at = torch.arange(r)
    u = bases.u[rows[:, U_START, None] + at].float()
    scaled = rows[:, SCALE_ROW] >= 0
    u[scaled] *= bases.scales[rows[scaled, SCALE_ROW]].float()[:, None, :]
    u = seen(u.flatten(0, 1)).unflatten(0, (-1, r))
    v = seen(bases.v[(rows[:, V_START, None] + at).flatten()]).unflatten(0, (-1, r))
    inside = torch.from_numpy(cluster >= 0)
    c = torch.from_numpy(cluster)[inside]
    if int(rows[0, CORE_KIND]) == CORE_FULL:
        left = u[c].mT @ cores[inside, : r * r].unflatten(1, (r, r))
    else:
        left = u[c].mT * cores[inside, None, :r]
    found = (left @ v[c]).flatten(1)
    features = found.new_zeros(len(cluster), found.shape[1])
    features[inside] = found / found.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return features


def _usual(shared: np.ndarray) -> np.ndarray:
    """The most frequent non-negative number of each row."""
    counts = np.stack([(shared == c).sum(axis=1) for c in range(int(shared.max()) + 1)], axis=1)
    return counts.argmax(axis=1)
