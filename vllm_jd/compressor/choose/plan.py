"""What different settings would cost and lose: estimated from a sample of modules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.choose.serving_cost import (
    STEPS,
    StepCost,
    all_widths,
    step_cost,
    vector_bytes,
)
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.read.adapters import Collection, experts_in, experts_of
from vllm_jd.compressor.run.clustering import Judge, Sketches, as_judged, quick_assignment
from vllm_jd.compressor.run.compress import sample_modules
from vllm_jd.compressor.run.experts import check_experts, entries, looked_at
from vllm_jd.compressor.run.module import Rounding, fit_module
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import BLOCK

PLANNED = ("none", "svd", "jd-full", "jd-diag")
"""Methods that a target chooses among."""

CHOSEN = ("rank", "clusters", "experts")
"""Options that it chooses; others stay as they are given."""

DTYPES = ("bfloat16", "int8", "int4")
"""Types of the stored numbers that it chooses among where none is given."""

_SAMPLE_BYTES = 192 << 20
_LEAST_MODULES, _MOST_MODULES = 4, 8
_ADAPTER_MODULES = 400  # so many adapters' modules are looked at, where there is the choice
_MOST_ADAPTERS = 1024  # of experts, adapters times experts
_EXPERTS = 2  # of a module that are looked at where each has bases of its own
_ITERATIONS = 4
_RANKS = (4, 8, 16, 32, 64)
_DIAGONAL_RANKS = (8, 16, 24, 32, 48, 64, 96)
_MOST_DIAGONAL = 128  # rank · clusters: beyond, finding the bases takes long
_SVD_RANKS = (1, 2, 3, 4, 6, 8)
_MOST_CLUSTERS = 64
_ADAPTER_BYTES = 64  # of the adapter table: name, hash, sizes
_MODULE_BYTES = 12  # of the adapter table: an adapter's rank, norm and error
_CHOICE_BYTES = 4  # of the adapter table: which row
_ROW_BYTES = 20  # of a module's table


@dataclass(frozen=True)
class Candidate:
    """One choice of settings.

    Args:
        settings: method and parameters.
        bytes: size of the store on disk.
        error: estimated mean relative squared error.
        spread: standard deviation of that between the modules looked at.
        slots: how many vLLM LoRA slots take as much memory as the store (Compress then Serve,
            App. F; slots have the rank of the largest adapter, numbers are 16-bit).
        steps: what decode steps of some sizes read and compute for it.
        best: no other candidate is smaller and closer.
    """

    settings: Settings
    bytes: int
    error: float
    spread: float
    slots: float
    steps: tuple[StepCost, ...] = ()
    best: bool = False

    @property
    def label(self) -> str:
        """The settings in a few words."""
        s = self.settings
        words = [s.method]
        if s.has("rank"):
            words.append(f"r {s.rank}")
        if s.clusters > 1:
            words.append(f"{s.clusters} clusters")
        if s.experts == "joint":
            words.append("joint experts")
        if s.quantised:
            words.append(s.quantised)
        return ", ".join(words)


@dataclass(frozen=True)
class _Sample:
    """What some adapters have of a module: of experts of so many of them (0: it is a plain one),
    evenly spaced."""

    factors: ModuleFactors
    experts: int

    @classmethod
    def of(cls, collection: Collection, module: str, some: torch.Tensor) -> "_Sample":
        """Of these adapters (int64, their indices)."""
        factors, experts = collection.factors(module), experts_of(collection, module)
        whole = cls(factors.subset(entries(some, experts)), experts)
        return whole.reduced(max(_EXPERTS, _MOST_ADAPTERS // len(some)))

    @property
    def few(self) -> "_Sample":
        """Fewer experts: each tells of its own bases, however many there are."""
        return self.reduced(_EXPERTS)

    def reduced(self, most: int) -> "_Sample":
        """At most so many experts."""
        if self.experts <= most:
            return self
        chosen = torch.linspace(0, self.experts - 1, most).long()
        adapters = torch.arange(len(self.factors) // self.experts)
        own = (adapters[:, None] * self.experts + chosen).flatten()
        return _Sample(self.factors.subset(own), most)


def plan(
    collection: Collection,
    *,
    base: Settings,
    candidates: Sequence[Settings] | None = None,
    dtypes: Sequence[str] = (),
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Candidate]:
    """Estimate the candidates' errors on a few modules, spread over the network.

    Args:
        collection: the adapters. Of more than 1,024 a random sample is looked at, in clusters of
            the same size; of experts too, so that adapters times experts are not more.
        base: what all candidates have in common: store_dtype, seed and the like, and the
            options of its method where theirs has them, too.
        candidates: settings to look at; default: `candidate_settings`.
        dtypes: types of the stored numbers that these are looked at with; default: that of `base`.
        on_progress: called with (what is going on, done, total).

    Returns:
        Candidates, smallest first.
    """
    check_experts(collection, base)
    typed = [replace(base, store_dtype=dtype) for dtype in dtypes] or [base]
    every = candidates or [s for one in typed for s in candidate_settings(collection, one)]
    chosen = list(dict.fromkeys(every))
    # What differs in the type alone is fitted once.
    fits: dict[Settings, list[Settings]] = {}
    for settings in chosen:
        fits.setdefault(replace(settings, store_dtype=base.store_dtype), []).append(settings)
    modules = _modules(collection)
    generator = torch.Generator().manual_seed(base.seed)
    n = len(collection.names)
    some = torch.arange(n)
    if n > _MOST_ADAPTERS:
        some = torch.randperm(n, generator=generator)[:_MOST_ADAPTERS].sort().values
    samples: list[_Sample] = []
    for i, module in enumerate(modules):
        on_progress("reading adapters", i, len(modules))
        samples.append(_Sample.of(collection, module, some))
    on_progress("reading adapters", len(modules), len(modules))
    most_rank = int(max(int(sample.factors.ranks.max()) for sample in samples))

    assignments = _assignments(
        [
            own.normalised()[0]
            for sample in samples
            for own in looked_at(sample.factors, sample.experts)
        ],
        sorted({_scaled(settings, len(some) / n).clusters for settings in fits}),
        base,
        on_progress,
    )
    jobs = [(settings, i) for settings in fits for i in range(len(modules))]

    def errors_of(job: tuple[Settings, int]) -> list[float]:
        settings, i = job
        small = _scaled(settings, len(some) / n)
        sample = samples[i] if settings.experts == "joint" else samples[i].few
        fitted = fit_module(
            sample.factors, assignments[small.clusters], small, experts=sample.experts
        )
        parts = [fitted.part(Rounding.of(each)) for each in fits[settings]]
        return [float(part.error[part.rank > 0].double().mean()) for part in parts]

    errors: dict[Settings, list[float]] = {settings: [] for settings in chosen}
    for done, of_types in enumerate(parallel_map(errors_of, jobs)):
        for settings, error in zip(fits[jobs[done][0]], of_types, strict=True):
            errors[settings].append(error)
        on_progress("trying settings", done + 1, len(jobs))
    found = []
    for settings in chosen:
        of_modules = torch.tensor(errors[settings], dtype=torch.float64)
        numbers, size = stored_size(collection, settings)
        found.append(
            Candidate(
                settings,
                size,
                float(of_modules.mean()),
                float(of_modules.std(unbiased=False)),
                numbers / (most_rank * all_widths(collection)),
                tuple(step_cost(collection, settings, requests) for requests in STEPS),
            )
        )
    found.sort(key=lambda candidate: (candidate.bytes, candidate.error))
    return _mark_best(found)


def choose(
    candidates: Sequence[Candidate],
    *,
    target_error: float | None = None,
    max_bytes: int | None = None,
) -> list[Candidate]:
    """Candidates that should meet the targets, the best first.

    With a target error (and perhaps a most size) that is the smallest; with a most size alone,
    the one with the least error.
    """
    fitting = [
        candidate
        for candidate in candidates
        if (target_error is None or candidate.error <= target_error)
        and (max_bytes is None or candidate.bytes <= max_bytes)
    ]
    if target_error is None:
        return sorted(fitting, key=lambda candidate: candidate.error)
    return sorted(fitting, key=lambda candidate: candidate.bytes)


def candidate_settings(collection: Collection, base: Settings) -> list[Settings]:
    """Settings worth looking at for this collection: those that make it smaller.

    Up to 100 adapters the paper's rank n/2 + 7 is among them; clusters double (§6.5).
    """
    n = len(collection.names)
    source = sum(collection.source_bytes)
    least_width = min(min(shape) for shape in collection.shapes.values())
    ranks = {r for r in _RANKS if r <= least_width}
    if n <= 100:
        ranks.add(min(n // 2 + 7, least_width))
    found = [replace(base, method="none")]
    found += [replace(base, method="svd", rank=r) for r in _SVD_RANKS]
    jd_full, jd_diag = replace(base, method="jd-full"), replace(base, method="jd-diag")
    ways = [{}]
    if experts_in(collection):
        ways = [{"experts": "joint"}, {"experts": "separate"}]
    for way in ways:
        clusters = 1
        while clusters <= min(_MOST_CLUSTERS, max(1, n // 8)):
            found += [replace(jd_full, rank=r, clusters=clusters, **way) for r in sorted(ranks)]
            if n >= 4:
                found += [
                    replace(jd_diag, rank=r, clusters=clusters, **way)
                    for r in _DIAGONAL_RANKS
                    if r <= 2 * least_width and r * clusters <= _MOST_DIAGONAL
                ]
            clusters *= 2
    return [
        settings
        for settings in found
        if settings.method == "none" or stored_size(collection, settings)[1] < source
    ]


def stored_size(collection: Collection, settings: Settings) -> tuple[int, int]:
    """(numbers, bytes on disk) of a store of these settings, before it is made; not of merges.

    Exact but for the names, hashes and headers, which are taken as 64 bytes an adapter.
    """
    n, rank = len(collection.names), settings.rank
    method = METHODS[settings.method]
    core = {"jd-full": rank * rank, "jd-diag": rank}.get(settings.method, 0)
    lora_numbers = collection.factor_bytes // 4
    numbers = size = 0
    for module, (d_in, d_out) in collection.shapes.items():
        shared = settings.clusters if method.clustered else 1
        each = max(1, experts_of(collection, module))  # as if an adapter had all experts
        if settings.experts == "separate":
            shared *= each
        own_parts = n * each
        if settings.method == "none":
            vectors_in = vectors_out = each * lora_numbers / all_widths(collection)
        elif settings.method == "svd":
            vectors_in = vectors_out = own_parts * min(rank, d_in, d_out)
        elif settings.method == "hydraopt":
            vectors_in, vectors_out = rank, rank * settings.matrices
        else:
            vectors_in = vectors_out = shared * rank
        own = settings.method in ("none", "svd")
        size += n * _CHOICE_BYTES
        size += (own_parts if own else max(shared, each)) * _ROW_BYTES
        numbers += vectors_in * d_in + vectors_out * d_out + own_parts * core
        size += vectors_in * vector_bytes(d_in, settings) + vectors_out * vector_bytes(
            d_out, settings
        )
        padded = -(-core // BLOCK) * BLOCK if settings.quantised else core
        size += own_parts * vector_bytes(padded, settings)
    size += n * (_ADAPTER_BYTES + _MODULE_BYTES * len(collection.shapes))
    return round(numbers), round(size)


def _modules(collection: Collection) -> list[str]:
    """A few modules, evenly spaced, of all kinds (q_proj, …) or as many as there is room for."""
    kinds: dict[str, list[str]] = {}
    for module in collection.shapes:
        kinds.setdefault(module.rsplit(".", 1)[-1], []).append(module)
    room = len(sample_modules(collection, _SAMPLE_BYTES))
    wanted = _ADAPTER_MODULES // len(collection.names)
    wanted = min(max(wanted, _LEAST_MODULES, len(kinds)), max(_MOST_MODULES, len(kinds)))
    count = min(room, wanted)
    of_kind = list(kinds.values())
    chosen = []
    for i in range(count):
        same = of_kind[i % len(of_kind)]
        chosen.append(same[int((i + 0.5) * len(same) / count)])
    return chosen


def _scaled(settings: Settings, share: float) -> Settings:
    """For a sample of the adapters: as many in a cluster; and few iterations."""
    clusters = max(1, math.floor(settings.clusters * share + 0.5))
    settings = settings.adapted(clusters=clusters)
    if not settings.has("iterations"):
        return settings
    return replace(settings, iterations=min(settings.iterations, _ITERATIONS))


def _assignments(
    samples: list[ModuleFactors],
    counts: list[int],
    base: Settings,
    on_progress: Callable[[str, int, int], None],
) -> dict[int, torch.Tensor]:
    """A quick assignment of the adapters to each number of clusters."""
    found = {}
    sketches = None
    jd = replace(base, method="jd-full")
    samples = [as_judged(sample) for sample in samples]
    for done, clusters in enumerate(counts):
        on_progress("grouping adapters", done, len(counts))
        if clusters == 1:
            found[1] = torch.zeros(len(samples[0]), dtype=torch.int64)
            continue
        judge = Judge.of(samples, clusters, jd.rank, seed=jd.seed)
        sketches = sketches or Sketches.of(judge)
        found[clusters] = quick_assignment(judge, sketches)
    on_progress("grouping adapters", len(counts), len(counts))
    return found


def _mark_best(candidates: list[Candidate]) -> list[Candidate]:
    """Mark those that no smaller one beats; `candidates` come smallest first."""
    least = math.inf
    marked = []
    for candidate in candidates:
        best = candidate.error < least
        least = min(least, candidate.error)
        marked.append(replace(candidate, best=best))
    return marked
