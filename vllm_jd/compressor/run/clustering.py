"""Group adapters into clusters that share bases (Compress then Serve, §3.2 and Appendix A.3).

Two scopes: one assignment for all modules of an adapter (`assign_adapters`), or one a module
(`assign_in_module`, the paper's reading, started from the former).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import Bases, BasesFit, Solver, fit_clusters
from vllm_jd.compressor.methods.jd_full import cores, jd_full
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings

_SKETCH = 256  # columns of the random projections that k-means sees
_LOOKS = 32  # random directions from which k-means sees an adapter's spaces
_KMEANS_STARTS = 4
_TRIES = 3
_BALANCED_ROUNDS = 20
_JUDGES = 8  # modules by which the starts are compared
_FIRST_ITERATIONS = 5
_ROUND_ITERATIONS = 3
_MAX_ROUNDS = 30
_SAMPLE = 4096  # adapters that starts are tried on; more are placed by the bases that these have
_SETTLED = 1000  # it ends when fewer than one adapter in so many moves
_BLOCK = 512  # adapters whose products with all bases are held at once


def _fit_from(
    job: tuple[ModuleFactors, Bases | None],
    *,
    assignment: torch.Tensor,
    clusters: int,
    rank: int,
    fit: BasesFit,
) -> Bases:
    factors, start = job
    return fit_clusters(factors, assignment, clusters, rank, fit, start)


def captured(factors: ModuleFactors, bases: Bases) -> torch.Tensor:
    """‖U_jᵀB_iA_iV_j‖²: how much of adapter i's squared norm cluster j's bases keep, `[n, k]`."""
    u = torch.cat([u for u, _ in bases], dim=1)
    v = torch.cat([v for _, v in bases], dim=1)
    kept = factors.a.new_empty(len(factors), len(bases))
    for first in range(0, len(factors), _BLOCK):
        some = factors.subset(torch.arange(first, min(first + _BLOCK, len(factors))))
        w = some.per_adapter(some.a @ v).unflatten(2, (len(bases), -1))
        p = some.per_adapter(some.b @ u).unflatten(2, (len(bases), -1))
        core = p.permute(0, 2, 3, 1) @ w.transpose(1, 2)
        kept[first : first + len(some)] = core.square().sum((2, 3))
    return kept


def assign_adapters(
    modules: list[ModuleFactors],
    clusters: int,
    rank: int,
    *,
    solver: Solver,
    seed: int,
    start: torch.Tensor | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """One cluster for each adapter, judged on all the given modules together.

    A start from the cores of a JD with one cluster, then JD and reassignment in turn until no
    adapter moves (A.3), or of many thousands hardly one. Of those, the start sees a sample.

    Args:
        modules: normalised factors of the modules to judge by.
        clusters: how many.
        rank: of the bases.
        solver: see `jd_full`.
        seed: of every random choice.
        start: int64 `[n]`, clusters to start from instead; −1: a newcomer, which is placed by
            what the bases of the others keep of it.
        on_progress: called with (rounds done, most rounds there can be).

    Returns:
        int64 `[n]`, every cluster used at least once where there are that many adapters.
    """
    n = len(modules[0])
    clusters = min(clusters, n)
    if start is None and n > _SAMPLE:
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(n, generator=generator)[:_SAMPLE].sort().values
        sample = [factors.subset(some) for factors in modules]
        start = torch.full((n,), -1)
        start[some] = assign_adapters(sample, clusters, rank, solver=solver, seed=seed)
        del sample
    if start is not None and bool((start >= 0).any()):
        assignment = _placed(modules, start, clusters, rank, solver, seed)
    else:
        assignment = _start(
            modules,
            Sketches.of(modules, rank, solver, seed),
            clusters,
            rank,
            solver,
            seed,
            _TRIES,
        )
    bases: list[Bases | None] = [None] * len(modules)
    for done in range(_MAX_ROUNDS):
        on_progress(done, _MAX_ROUNDS)

        iterations = _FIRST_ITERATIONS if done == 0 else _ROUND_ITERATIONS
        fit = partial(
            _fit_from,
            assignment=assignment,
            clusters=clusters,
            rank=rank,
            fit=partial(jd_full, iterations=iterations, solver=solver, seed=seed),
        )
        bases = list(parallel_map(fit, zip(modules, bases, strict=True)))
        lost = torch.zeros(n, clusters, dtype=torch.float64)
        for factors, fitted in zip(modules, bases, strict=True):
            lost += _lost(factors, fitted)
        moved = _reassign(assignment, lost)
        settled = int((moved != assignment).sum()) * _SETTLED <= n
        assignment = moved
        if settled:
            break
    on_progress(_MAX_ROUNDS, _MAX_ROUNDS)
    return assignment


def assign_in_module(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    clusters: int,
    rank: int,
    *,
    solver: Solver,
    seed: int,
) -> torch.Tensor:
    """An assignment of its own for one module, started from `assignment`. Returns int64 `[n]`.

    Adapters without a factor here are left where they were, and keep no cluster from being empty.
    """
    present = (factors.ranks > 0).nonzero()[:, 0]
    everyone, assignment = assignment.clone(), assignment[present]
    factors = factors.subset(present)
    bases: Bases | None = None
    for _ in range(_MAX_ROUNDS):
        iterations = _FIRST_ITERATIONS if bases is None else _ROUND_ITERATIONS
        fit = partial(jd_full, iterations=iterations, solver=solver, seed=seed)
        bases = fit_clusters(factors, assignment, clusters, rank, fit, bases)
        moved = _reassign(assignment, _lost(factors, bases))
        if bool((moved == assignment).all()):
            break
        assignment = moved
    everyone[present] = assignment
    return everyone


def _placed(
    modules: list[ModuleFactors],
    start: torch.Tensor,
    clusters: int,
    rank: int,
    solver: Solver,
    seed: int,
) -> torch.Tensor:
    """`start` with each newcomer (−1) where the bases of the others lose least of it."""
    newcomers = start < 0
    lost = torch.zeros(len(start), clusters, dtype=torch.float64)
    if bool(newcomers.any()):
        fit = partial(jd_full, iterations=_ROUND_ITERATIONS, solver=solver, seed=seed)

        def lost_in(factors: ModuleFactors) -> torch.Tensor:
            return _lost(factors, fit_clusters(factors, start, clusters, rank, fit))

        for found in parallel_map(lost_in, modules):
            lost += found
    assignment = torch.where(newcomers, lost.argmin(dim=1), start)
    return _fill_empty(assignment, lost.gather(1, assignment[:, None])[:, 0], clusters)


@dataclass(frozen=True)
class Sketches:
    """Small pictures of the adapters, for k-means: float64 `[n, s]`, by their cores in a JD with
    one cluster, and by the spaces that they write to and read from."""

    cores: torch.Tensor
    spaces: torch.Tensor

    @classmethod
    def of(cls, modules: list[ModuleFactors], rank: int, solver: Solver, seed: int) -> "Sketches":
        """Of the normalised factors of these modules."""
        return cls(_sketch_cores(modules, rank, solver, seed), _sketch_spaces(modules, seed))


def quick_assignment(
    modules: list[ModuleFactors], sketches: Sketches, clusters: int, settings: Settings
) -> torch.Tensor:
    """A start of `assign_adapters` without what follows it: good enough for an estimate."""
    clusters = min(clusters, len(modules[0]))
    return _start(modules, sketches, clusters, settings.rank, settings.solver, settings.seed, 1)


def _start(
    modules: list[ModuleFactors],
    sketches: Sketches,
    clusters: int,
    rank: int,
    solver: Solver,
    seed: int,
    tries: int,
) -> torch.Tensor:
    """The best of several starts, judged by the JD objective on a few of the modules.

    The paper's start is k-means on the cores. Clusters that fit their members well hardly ever
    let go of one afterwards, so the start decides; and where adapters have little in common,
    what counts is that no cluster is crowded: k-means with clusters of equal size is tried too,
    `tries` times. And where there are more groups than one JD has room for, the cores show only
    the largest: k-means on (DDᵀ)^½ and (DᵀD)^½ sees who shares a space with whom, whatever the
    signs.
    """
    rng = np.random.default_rng(seed)
    candidates = [_kmeans(sketches.cores, clusters, rng, tries * _KMEANS_STARTS)]
    candidates.append(_kmeans(sketches.spaces, clusters, rng, tries * _KMEANS_STARTS))
    candidates += [_balanced_kmeans(sketches.cores, clusters, rng) for _ in range(tries)]
    judges = modules[:: -(-len(modules) // _JUDGES)]

    def kept(job: tuple[torch.Tensor, ModuleFactors]) -> float:
        assignment, factors = job
        total = 0.0
        for cluster in range(clusters):
            members = factors.subset((assignment == cluster).nonzero()[:, 0])
            if members.a.shape[0]:
                u, v = jd_full(
                    members, rank, iterations=_ROUND_ITERATIONS, solver=solver, seed=seed
                )
                total += float(cores(members, u, v).double().square().sum())
        return total

    jobs = [(candidate, factors) for candidate in candidates for factors in judges]
    totals = torch.tensor(list(parallel_map(kept, jobs))).view(len(candidates), -1).sum(1)
    return candidates[int(totals.argmax())]


def _sketch_cores(
    modules: list[ModuleFactors], rank: int, solver: Solver, seed: int
) -> torch.Tensor:
    """A random projection of every adapter's cores in a JD with one cluster: float64 `[n, s]`."""

    def flat_cores(factors: ModuleFactors) -> torch.Tensor:
        if factors.a.shape[0] == 0:
            return torch.zeros(len(factors), rank * rank)
        u, v = jd_full(factors, rank, iterations=_FIRST_ITERATIONS, solver=solver, seed=seed)
        return cores(factors, u, v).flatten(1)

    generator = torch.Generator().manual_seed(seed)
    sketch = torch.zeros(len(modules[0]), _SKETCH)
    for flat in parallel_map(flat_cores, modules):
        sketch += flat @ torch.randn(flat.shape[1], _SKETCH, generator=generator)
    return sketch.double()


def _sketch_spaces(modules: list[ModuleFactors], seed: int) -> torch.Tensor:
    """Random projections of every adapter's (DDᵀ)^½ and (DᵀD)^½, D = BA: float64 `[n, s]`."""

    def roots(factors: ModuleFactors) -> torch.Tensor:
        q_b, r_b = torch.linalg.qr(factors.per_adapter(factors.b).mT)
        q_a, r_a = torch.linalg.qr(factors.per_adapter(factors.a).mT)
        u, scales, v = torch.linalg.svd(r_b @ r_a.mT)
        generator = torch.Generator().manual_seed(seed)
        flat = []
        for vectors in (q_b @ u, q_a @ v.mT):
            look = torch.randn(_LOOKS, vectors.shape[1], generator=generator)
            seen = look @ vectors
            flat.append((seen * scales[:, None, :] @ seen.mT).flatten(1))
        return torch.cat(flat, dim=1)

    generator = torch.Generator().manual_seed(seed)
    sketch = torch.zeros(len(modules[0]), _SKETCH)
    for flat in parallel_map(roots, modules):
        sketch += flat @ torch.randn(flat.shape[1], _SKETCH, generator=generator)
    return sketch.double()


def _kmeans(
    points: torch.Tensor, clusters: int, rng: np.random.Generator, starts: int
) -> torch.Tensor:
    """k-means++, the best of several starts. Returns int64 `[n]`."""
    best, best_inertia = torch.zeros(len(points), dtype=torch.int64), np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster: filled below
        warnings.simplefilter("ignore", RuntimeWarning)  # all points the same
        for _ in range(starts):
            centres, labels = kmeans2(points.numpy(), clusters, minit="++", rng=rng)
            inertia = float(np.square(points.numpy() - centres[labels]).sum())
            if inertia < best_inertia:
                best, best_inertia = torch.from_numpy(labels.astype(np.int64)), inertia
    return _fill_empty(best, points.square().sum(1), clusters)


def _balanced_kmeans(points: torch.Tensor, clusters: int, rng: np.random.Generator) -> torch.Tensor:
    """k-means on the points' directions with at most ⌈n/k⌉ a cluster. Returns int64 `[n]`."""
    n = len(points)
    points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-30)
    assignment = torch.from_numpy(rng.permutation(n)) % clusters
    for _ in range(_BALANCED_ROUNDS):
        centres = torch.zeros(clusters, points.shape[1], dtype=points.dtype)
        centres.index_add_(0, assignment, points)
        centres /= torch.bincount(assignment, minlength=clusters)[:, None].clamp_min(1)
        moved = _fill_evenly(-torch.cdist(points, centres).square())
        if bool((moved == assignment).all()):
            break
        assignment = moved
    return assignment


def _fill_evenly(score: torch.Tensor) -> torch.Tensor:
    """Each row of `[n, k]` to its best column that has room; who would lose most goes first."""
    n, clusters = score.shape
    room = [-(-n // clusters)] * clusters
    best = score.topk(min(2, clusters), dim=1).values
    preferences = score.argsort(dim=1, descending=True).tolist()
    assignment = torch.zeros(n, dtype=torch.int64)
    for row in (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist():
        column = next(column for column in preferences[row] if room[column])
        room[column] -= 1
        assignment[row] = column
    return _fill_empty(assignment, -best[:, 0], clusters)


def _lost(factors: ModuleFactors, bases: Bases) -> torch.Tensor:
    """The part of adapter i's squared norm that cluster j's bases do not keep: float64 `[n, k]`."""
    return factors.squared_norms()[:, None] - captured(factors, bases).double()


def _reassign(assignment: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Each adapter to the cluster that loses least of it (A.3, step 2), staying at a tie."""
    best, choice = lost.min(dim=1)
    current = lost.gather(1, assignment[:, None])[:, 0]
    # A gain within rounding would let an adapter move to and fro for ever.
    moved = torch.where(best < current - 1e-6, choice, assignment)
    return _fill_empty(moved, lost.gather(1, moved[:, None])[:, 0], lost.shape[1])


def _fill_empty(assignment: torch.Tensor, badness: torch.Tensor, clusters: int) -> torch.Tensor:
    """Give every empty cluster the worst-placed adapter of a cluster that has more than one."""
    assignment = assignment.clone()
    order = badness.argsort(descending=True, stable=True).tolist()
    counts = torch.bincount(assignment, minlength=clusters).tolist()
    for cluster in range(clusters):
        if counts[cluster]:
            continue
        for adapter in order:
            old = int(assignment[adapter])
            if counts[old] > 1:
                counts[old] -= 1
                counts[cluster] = 1
                assignment[adapter] = cluster
                break
    return assignment
