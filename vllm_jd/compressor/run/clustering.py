"""Group adapters into clusters that share bases (Compress then Serve, §3.2 and Appendix A.3).

One assignment for all modules of an adapter, so that one grouping of a step's tokens serves all of
them. The paper clusters every module by itself, which gains nothing (docs/compression.md).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import Bases
from vllm_jd.compressor.methods.jd_full import (
    Fitted,
    Group,
    cores,
    fit_group,
    fit_modules,
    grouped,
    in_bfloat16,
)
from vllm_jd.compressor.run.parallel import parallel_map

_SKETCH = 256  # columns of the random projections that k-means sees
_ROOTS = 64  # adapters whose spaces are looked at together
_RIDGE = 1e-10
_LOOKS = 32  # random directions from which k-means sees an adapter's spaces
_KMEANS_STARTS = 4
_KMEANS_ROUNDS = 10
_TRIES = 3
_BALANCED_ROUNDS = 20
_JUDGES = 8  # modules by which the starts are compared
_FIRST_ITERATIONS = 5
_ROUND_ITERATIONS = 3
_MAX_ROUNDS = 30
_SAMPLE = 4096  # adapters that starts are tried on; more are placed by the bases that these have
_SETTLED = 1000  # it ends when fewer than one adapter in so many moves,
_LEAST_GAIN = 1e-3  # or a round adds less than that to what the bases keep,
_FEW = 512  # unless there are no more adapters than that, whose rounds take no time
_BLOCK = 512  # adapters whose products with all bases are held at once


def as_judged(factors: ModuleFactors) -> ModuleFactors:
    """Normalised factors in the numbers in which clusters are judged: bfloat16, where products of
    those are faster and adapters are many. It is rounding that a store does, too, and halves what
    has to be held."""
    exact = len(factors) <= _FEW or not in_bfloat16(factors.a, factors.b)
    if exact or factors.a.dtype == torch.bfloat16:
        return factors
    judged = ModuleFactors(factors.a.bfloat16(), factors.b.bfloat16(), factors.ranks)
    judged.squared_norms()  # now, where modules are gone through by several threads
    return judged


def _blocks(n: int) -> list[torch.Tensor]:
    return list(torch.arange(n).split(_BLOCK))


def _captured(factors: ModuleFactors, bases: Bases, some: torch.Tensor) -> torch.Tensor:
    """‖U_jᵀB_iA_iV_j‖²: how much of some adapters' squared norms each cluster's bases keep,
    `[n, k]`."""
    own = factors.subset(some)
    if own.a.shape[0] == 0:
        return torch.zeros(len(some), len(bases))
    u, v = (torch.cat(side, dim=1).to(own.a.dtype) for side in zip(*bases, strict=True))
    w = own.per_adapter((own.a @ v).float()).unflatten(2, (len(bases), -1))
    p = own.per_adapter((own.b @ u).float()).unflatten(2, (len(bases), -1))
    # Cluster by cluster: all at once would have to be copied into another order first.
    products = (p[:, :, c].mT @ w[:, :, c] for c in range(len(bases)))
    return torch.stack([core.square().sum((1, 2)) for core in products], dim=1)


@dataclass(frozen=True)
class Judge:
    """The modules by which clusters are judged; `each` maps over jobs in them."""

    modules: list[ModuleFactors]
    clusters: int
    rank: int
    seed: int
    each: Callable[..., Iterable[Any]] = parallel_map

    @classmethod
    def of(cls, modules: list[ModuleFactors], clusters: int, rank: int, *, seed: int) -> "Judge":
        """By normalised factors; not more clusters than adapters."""
        judged = [as_judged(factors) for factors in modules]
        return cls(judged, min(clusters, len(modules[0])), rank, seed)

    def fitted(
        self, assignment: torch.Tensor, iterations: int, start: list[Bases] | None = None
    ) -> list[Bases]:
        """The bases of every cluster in every module; −1 in `assignment`: in no cluster."""
        fit = partial(self.fit_group, iterations=iterations)
        return fit_modules(
            self.modules, assignment, self.clusters, self.rank, fit, self.each, start
        )

    def fit_group(
        self, factors: ModuleFactors, group: Group, iterations: int, start: Bases | None = None
    ) -> Fitted:
        """See `jd_full.fit_group`."""
        return fit_group(
            factors,
            group,
            self.rank,
            iterations=iterations,
            seed=self.seed,
            start=start,
        )

    def lost(self, bases: list[Bases]) -> torch.Tensor:
        """What each cluster's bases lose of each adapter's squared norm, in all modules: float64
        `[n, k]`."""
        norms = sum(factors.squared_norms() for factors in self.modules)
        lost = norms[:, None].repeat(1, self.clusters)
        blocks = _blocks(len(lost))
        jobs = [(at, some) for at in range(len(self.modules)) for some in blocks]

        def kept(job: tuple[int, torch.Tensor]) -> torch.Tensor:
            at, some = job
            return _captured(self.modules[at], bases[at], some)

        for (_, some), found in zip(jobs, self.each(kept, jobs), strict=True):
            lost[some] -= found
        return lost


def assign_adapters(
    modules: list[ModuleFactors],
    clusters: int,
    rank: int,
    *,
    seed: int,
    start: torch.Tensor | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """One cluster for each adapter, judged on all the given modules together.

    A start from the cores of a JD with one cluster, then JD and reassignment in turn until no
    adapter moves (A.3), or of many hardly one, or the moves no longer gain anything. Of many
    thousands, a sample is clustered first; the others join where its bases keep most of them.

    Args:
        modules: normalised factors of the modules to judge by.
        clusters: how many.
        rank: of the bases.
        seed: of every random choice.
        start: int64 `[n]`, clusters to start from instead; −1: a newcomer, which is placed by
            what the bases of the others keep of it.
        on_progress: called with (rounds done, most rounds there can be).

    Returns:
        int64 `[n]`, every cluster used at least once where there are that many adapters.
    """
    n = len(modules[0])
    judge = Judge.of(modules, clusters, rank, seed=seed)
    bases = None
    if start is not None and bool((start >= 0).any()):
        bases = judge.fitted(start, _ROUND_ITERATIONS)
        assignment = _joined(start, judge.lost(bases))
    elif n > _SAMPLE:
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(n, generator=generator)[:_SAMPLE].sort().values
        sample = replace(judge, modules=[factors.subset(some) for factors in judge.modules])
        start = torch.full((n,), -1)
        start[some], bases = _settled(sample, _start(sample, Sketches.of(sample), _TRIES))
        del sample
        assignment = _joined(start, judge.lost(bases))
    else:
        assignment = _start(judge, Sketches.of(judge), _TRIES)
    return _settled(judge, assignment, bases, on_progress)[0]


def _settled(
    judge: Judge,
    assignment: torch.Tensor,
    bases: list[Bases] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[torch.Tensor, list[Bases]]:
    """JD and reassignment in turn, and the bases of the last turn; `bases` are to start from."""
    everything = float(sum(factors.squared_norms().sum() for factors in judge.modules))
    kept = 0.0
    for done in range(_MAX_ROUNDS):
        on_progress(done, _MAX_ROUNDS)
        iterations = _FIRST_ITERATIONS if bases is None else _ROUND_ITERATIONS
        bases = judge.fitted(assignment, iterations, bases)
        lost = judge.lost(bases)
        moved = _reassign(assignment, lost)
        before, kept = kept, everything - float(lost.gather(1, moved[:, None]).sum())
        moves = int((moved != assignment).sum())
        assignment = moved
        gains = len(moved) <= _FEW or kept - before >= _LEAST_GAIN * kept
        if moves * _SETTLED <= len(moved) or not gains:
            break
    on_progress(_MAX_ROUNDS, _MAX_ROUNDS)
    return assignment, bases


def _joined(start: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """`start` with each newcomer (−1) where the bases of the others lose least of it."""
    assignment = torch.where(start < 0, lost.argmin(dim=1), start)
    return _fill_empty(assignment, lost.gather(1, assignment[:, None])[:, 0], lost.shape[1])


@dataclass(frozen=True)
class Sketches:
    """Small pictures of the adapters, for k-means: float64 `[n, s]`, by their cores in a JD with
    one cluster, and by the spaces that they write to and read from."""

    cores: torch.Tensor
    spaces: torch.Tensor

    @classmethod
    def of(cls, judge: Judge) -> "Sketches":
        """Of what the adapters have in these modules."""
        return cls(_sketch_cores(judge), _sketch_spaces(judge))


def quick_assignment(judge: Judge, sketches: Sketches) -> torch.Tensor:
    """A start of `assign_adapters` without what follows it: good enough for an estimate."""
    return _start(judge, sketches, 1)


def _start(judge: Judge, sketches: Sketches, tries: int) -> torch.Tensor:
    """The best of several starts, judged by the JD objective on a few of the modules.

    The paper's start is k-means on the cores. Clusters that fit their members well hardly ever
    let go of one afterwards, so the start decides; and where adapters have little in common,
    what counts is that no cluster is crowded: k-means with clusters of equal size is tried too,
    `tries` times. And where there are more groups than one JD has room for, the cores show only
    the largest: k-means on (DDᵀ)^½ and (DᵀD)^½ sees who shares a space with whom, whatever the
    signs.
    """
    clusters = judge.clusters
    starts = tries * _KMEANS_STARTS
    searches = [
        partial(_kmeans, sketches.cores, starts=starts),
        partial(_kmeans, sketches.spaces, starts=starts),
        *[partial(_balanced_kmeans, sketches.cores)] * tries,
    ]
    draws = np.random.default_rng(judge.seed).spawn(len(searches))

    def search(i: int) -> torch.Tensor:
        return searches[i](clusters=clusters, rng=draws[i])

    candidates = list(parallel_map(search, range(len(searches))))
    judges = judge.modules[:: -(-len(judge.modules) // _JUDGES)]

    jobs = [
        (i, factors, group)
        for i, candidate in enumerate(candidates)
        for factors in judges
        for group in grouped(factors, candidate, clusters)
    ]

    def kept(job: tuple[int, ModuleFactors, Group]) -> float:
        return judge.fit_group(*job[1:], _ROUND_ITERATIONS).kept

    totals = [0.0] * len(candidates)
    for (i, _, _), found in zip(jobs, parallel_map(kept, jobs), strict=True):
        totals[i] += found
    return candidates[totals.index(max(totals))]


def _sketch_cores(judge: Judge) -> torch.Tensor:
    """A random projection of every adapter's cores in a JD with one cluster: float64 `[n, s]`."""

    def of_module(at: int) -> torch.Tensor:
        factors = judge.modules[at]
        if factors.a.shape[0] == 0:
            return torch.zeros(len(factors), _SKETCH)
        everyone = Group([0], [(factors.ranks > 0).nonzero()[:, 0]])
        ((u, v),) = judge.fit_group(factors, everyone, _FIRST_ITERATIONS).bases
        return _projected(cores(factors, u, v).flatten(1), judge.seed + at)

    return _total(parallel_map(of_module, range(len(judge.modules))))


def _sketch_spaces(judge: Judge) -> torch.Tensor:
    """Random projections of every adapter's (DDᵀ)^½ and (DᵀD)^½, D = BA: float64 `[n, s]`."""

    def of_module(at: int) -> torch.Tensor:
        factors = judge.modules[at]
        blocks = torch.arange(len(factors)).split(_ROOTS)
        seen = [_roots_seen(factors.subset(some), judge.seed) for some in blocks]
        return _projected(torch.cat(seen), judge.seed + at)

    return _total(parallel_map(of_module, range(len(judge.modules))))


def _projected(flat: torch.Tensor, seed: int) -> torch.Tensor:
    """A random projection: `[n, q]` → `[n, s]`."""
    generator = torch.Generator().manual_seed(seed)
    return flat @ torch.randn(flat.shape[1], _SKETCH, generator=generator)


def _total(sketches: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(sketches)).sum(0, dtype=torch.float64)


def _roots_seen(factors: ModuleFactors, seed: int) -> torch.Tensor:
    """(DDᵀ)^½ and (DᵀD)^½ of every adapter, each seen from both sides from a few random
    directions: `[n, 2 · _LOOKS²]`.

    With AAᵀ = L_aL_aᵀ and BᵀB = L_bL_bᵀ, D has the singular values S of K = L_bᵀL_a = XSYᵀ, and
    its vectors are those of K in the orthonormal rows L_b⁻¹Bᵀ and L_a⁻¹A.
    """
    if factors.a.shape[0] == 0:
        return torch.zeros(len(factors), 2 * _LOOKS**2)
    generator = torch.Generator().manual_seed(seed)
    triangles, looks = [], []
    for rows in (factors.b, factors.a):
        look = torch.randn(_LOOKS, rows.shape[1], generator=generator)
        own = factors.per_adapter(rows).double()
        gram = own @ own.mT
        # Enough for Cholesky, too little to be seen.
        size = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None]
        gram.diagonal(dim1=1, dim2=2).add_(_RIDGE * size + 1e-30)
        triangles.append(torch.linalg.cholesky(gram))
        seen = own @ look.T.double()
        looks.append(torch.linalg.solve_triangular(triangles[-1], seen, upper=False))
    kernel = triangles[0].mT @ triangles[1]
    squares, vectors = torch.linalg.eigh(kernel @ kernel.mT)
    scales = squares.clamp_min(0).sqrt()
    inverse = torch.where(scales > _RIDGE**0.5 * scales[:, -1:], 1 / scales.clamp_min(1e-300), 0.0)
    left = vectors.mT @ looks[0]
    right = vectors.mT @ kernel @ looks[1]
    pictures = (left.mT * scales[:, None] @ left, right.mT * inverse[:, None] @ right)
    return torch.cat([each.flatten(1) for each in pictures], dim=1).float()


def _kmeans(
    points: torch.Tensor, clusters: int, rng: np.random.Generator, starts: int
) -> torch.Tensor:
    """k-means++, the best of several starts. Returns int64 `[n]`.

    Not scipy's `kmeans2`, whose compiled part never lets go of Python's lock (1.17): the searches
    of `_start` would come one after the other, whatever the cores. On one core it is as fast (12
    starts of 4,096 × 256 numbers in 25 clusters on an Intel Xeon, processor time: 2.6 s here, 2.3 s
    there, inertias within 1 %).
    """
    squares = points.square().sum(1)
    best, least = torch.zeros(len(points), dtype=torch.int64), torch.inf
    for _ in range(starts):
        centres = _spread(points, clusters, rng)
        for _ in range(_KMEANS_ROUNDS):
            nearest = torch.cdist(points, centres).square().min(dim=1)
            counts = torch.bincount(nearest.indices, minlength=clusters)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, nearest.indices, points)
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        inertia = float(nearest.values.sum())
        if inertia < least:
            best, least = nearest.indices, inertia
    return _fill_empty(best, squares, clusters)


def _spread(points: torch.Tensor, clusters: int, rng: np.random.Generator) -> torch.Tensor:
    """Some of the points as centres, each the likelier the farther from those before it."""
    chosen = [int(rng.integers(len(points)))]
    far = points.new_full((len(points),), torch.inf)
    while len(chosen) < clusters:
        far = torch.minimum(far, torch.cdist(points, points[chosen[-1:]]).square()[:, 0])
        until = far.cumsum(0)
        # Where all are in the same place, any will do.
        drawn = rng.random() * float(until[-1])
        chosen.append(min(int(torch.searchsorted(until, drawn, right=True)), len(points) - 1))
    return points[chosen]


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
