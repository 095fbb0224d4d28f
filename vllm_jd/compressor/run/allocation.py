"""Ranks that differ between modules: one budget for all of them, spent where it lowers errors most.

Modules differ in how fast their error falls with the rank, and in what a rank costs (d_in + d_out
a basis, and the cores). The paper takes one rank everywhere; here the budget is what that rank
would take, and the mean relative squared reconstruction error over modules and adapters is
minimised under it. Each module has a curve of (stored numbers, error) points, one a rank.
On their lower convex hulls the steps of most gain a number are best, whatever the module: the
Lagrangian solution, optimal for its own cost (Everett 1963; in coding, Shoham and Gersho 1988).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from vllm_jd.compressor.algebra.bounds import spectrum
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.calibrate.calibration import Metric
from vllm_jd.compressor.methods.jd_diag import jd_diag
from vllm_jd.compressor.methods.jd_full import cores, jd_full
from vllm_jd.compressor.read.adapters import Collection, experts_of
from vllm_jd.compressor.run.experts import normalised, of_entries
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings

_AHEAD = 2  # a pilot's rank, in uniform ranks; once more where that turns out to be too small
_LEAST_AHEAD = 8
_SAMPLE = 256  # adapters of a cluster that a pilot's bases are fitted to
_FULL_ITERATIONS = 1
_DIAGONAL_SWEEPS = 10
_SMALLER_SWEEPS = 2
_CORE_NUMBERS = 1 << 24  # of cores that are in memory at once
_DEPENDENT = 1e-4  # of a column's squared norm, outside of the span of those before it
_LOST_NOTHING = 1e-6  # relative squared error
_WORTH = 1e-3
"""Uniform ranks stay where others promise less than this part of the error: pilots are estimates.
"""


@dataclass(frozen=True)
class Curve:
    """What one module takes and loses, at rank 1, 2, … `[most]`.

    Args:
        costs: int64, stored numbers.
        losses: float64, the relative squared errors, summed over the module's adapters; never
            increasing.
        uniform_cost: stored numbers at the uniform rank, which may be above `most`.
        complete: whether higher ranks have nothing more to give.
    """

    costs: np.ndarray
    losses: np.ndarray
    uniform_cost: int
    complete: bool


def allocate_ranks(
    collection: Collection,
    settings: Settings,
    assignment: torch.Tensor,
    *,
    metrics: Mapping[str, Metric] | None = None,
    device: str = "cpu",
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, int]:
    """The rank of every module.

    What `settings.residual_rank` and `mean_rank` add is not looked at: it takes as much with any
    ranks, and the curves are those of the method without it.

    Args:
        collection: the adapters.
        settings: `rank` is that of every module if `rank_allocation` is `uniform`. Else their
            stored numbers together are at most those of `rank` everywhere.
        assignment: int64 `[n]`, the cluster of each adapter; of no account for `svd`.
        metrics: how each module's errors count.
        device: where to compute, as torch names it.
        on_progress: called with (what is going on, done, total).

    Returns:
        Module → rank, in the order of `collection.shapes`. At least 1; with `spectrum` at most
        max(d_in, d_out) for `jd-full`, and no more than the adapters' own ranks can use.
    """
    modules = list(collection.shapes)
    if settings.rank_allocation == "uniform":
        return dict.fromkeys(modules, settings.rank)

    def measure(job: tuple[str, int]) -> Curve:
        module, most = job
        factors = collection.factors(module).to(device)
        if metrics and module in metrics:
            factors = metrics[module].to(device).seen(factors)
        experts = experts_of(collection, module)
        return module_curve(factors, assignment.to(device), settings, most, experts)

    curves: dict[str, Curve] = {}
    jobs = dict.fromkeys(modules, max(_AHEAD * settings.rank, _LEAST_AHEAD))
    while jobs:
        for done, curve in enumerate(parallel_map(measure, jobs.items())):
            on_progress("measuring spectra", done, len(jobs))
            curves[list(jobs)[done]] = curve
        on_progress("measuring spectra", len(jobs), len(jobs))
        ranks = _choose(curves)
        jobs = {
            module: 2 * len(curves[module].costs)
            for module, rank in ranks.items()
            if rank == len(curves[module].costs) and not curves[module].complete
        }
    uniform = {module: min(settings.rank, len(curve.costs)) for module, curve in curves.items()}
    before, after = (
        sum(curve.losses[chosen[module] - 1] for module, curve in curves.items())
        for chosen in (uniform, ranks)
    )
    return uniform if before - after <= _WORTH * before else ranks


def _choose(curves: dict[str, Curve]) -> dict[str, int]:
    ranks = choose_ranks(
        [curve.costs for curve in curves.values()],
        [curve.losses for curve in curves.values()],
        sum(curve.uniform_cost for curve in curves.values()),
    )
    return dict(zip(curves, ranks, strict=True))


def choose_ranks(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int
) -> list[int]:
    """Ranks that make the sum of losses small, their costs together being at most `budget`.

    Greedily along the lower convex hulls, by gain for each unit of cost; what the last steps
    leave over goes to the best single ranks that still fit.

    Args:
        costs: of each module at rank 1, 2, …, increasing; the modules may have different numbers.
        losses: the same for losses, never increasing.
        budget: in the unit of costs.

    Raises:
        ValueError: the budget is too small for rank 1 everywhere.
    """
    left = budget - sum(int(cost[0]) for cost in costs)
    if left < 0:
        raise ValueError(
            f"rank 1 in all {len(costs)} modules takes {budget - left:,} numbers, the budget has "
            f"{budget:,}"
        )
    steps = []
    for module, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        hull = _lower_hull(cost, loss)
        for number, (here, there) in enumerate(pairwise(hull)):
            price = int(cost[there] - cost[here])
            steps.append((-(loss[here] - loss[there]) / price, number, module, there, price))
    chosen = np.zeros(len(costs), dtype=np.int64)
    blocked = set()
    for _, _, module, there, price in sorted(steps):
        if module in blocked:
            continue
        if price > left:
            blocked.add(module)
            continue
        chosen[module] = there
        left -= price
    _fill(costs, losses, chosen, left)
    return (chosen + 1).tolist()


def _lower_hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Indices of the points on the lower convex hull, from the first to the least loss."""
    hull: list[int] = []
    for point in range(len(cost)):
        if hull and loss[point] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            # b is on or above the line from a to the new point.
            if (loss[a] - loss[b]) * (cost[point] - cost[a]) > (loss[a] - loss[point]) * (
                cost[b] - cost[a]
            ):
                break
            hull.pop()
        hull.append(point)
    return hull


def _fill(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], chosen: np.ndarray, left: int
) -> None:
    """Raise `chosen` in place while anything that lowers a loss fits into `left`."""
    while True:
        best, where = 0.0, None
        for module, at in enumerate(chosen):
            price = costs[module][at + 1 :] - costs[module][at]
            gain = losses[module][at] - losses[module][at + 1 :]
            rate = np.where(price <= left, gain / price, 0.0)
            if len(rate) and rate.max() > best:
                best, where = rate.max(), (module, at + 1 + int(rate.argmax()))
        if where is None:
            return
        module, there = where
        left -= int(costs[module][there] - costs[module][chosen[module]])
        chosen[module] = there


def module_curve(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    most: int,
    experts: int = 0,
) -> Curve:
    """The curve of one module up to rank `most`, or to the rank beyond which nothing can improve.

    Exact for `svd`, which ignores `most`. For JD it is an estimate from above, of a JD much
    shorter than the real one.

    Args:
        factors: of all adapters, not normalised.
        assignment: int64 `[n]`, the cluster of each adapter.
        settings: method, rank, clusters and seed.
        most: at least 1.
        experts: how many the module has; 0: it is a plain linear layer.
    """
    if settings.method == "svd":
        return _svd_curve(factors, settings.rank, max(1, experts))
    assignment, settings = of_entries(assignment, settings, experts)
    factors = normalised(factors, experts)
    clusters = [
        factors.subset(((assignment == cluster) & (factors.ranks > 0)).nonzero()[:, 0])
        for cluster in range(settings.clusters)
    ]
    diagonal = settings.method == "jd-diag"
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    limit = max(own.a.shape[0] for own in clusters)
    if not diagonal:
        limit = min(limit, max(d_in, d_out))
    most = max(1, min(most, limit))
    losses = np.zeros(most)
    for own in clusters:
        if own.a.shape[0]:
            pilot = _diagonal_losses if diagonal else _full_losses
            losses += pilot(own, most, settings)

    def cost(rank: np.ndarray | int) -> np.ndarray | int:
        core = rank if diagonal else rank * rank
        return settings.clusters * rank * (d_in + d_out) + len(factors) * core

    losses = _never_increasing(losses)
    complete = most >= limit or losses[-1] <= _LOST_NOTHING * len(factors)
    return Curve(cost(np.arange(1, most + 1)), losses, cost(settings.rank), bool(complete))


def _svd_curve(factors: ModuleFactors, rank: int, each: int) -> Curve:
    """Eckart–Young: an adapter's error is the sum of the squared singular values left out. That of
    its `each` experts is taken for the mean of theirs."""
    most = max(1, int(factors.ranks.max()) if len(factors) else 1)
    kept = spectrum(factors, most).double().cpu().numpy()
    losses = (kept.sum() - kept.cumsum()) * int((factors.ranks > 0).sum()) / each

    def cost(rank: int) -> int:
        width = factors.a.shape[1] + factors.b.shape[1]
        return int(factors.ranks.clamp_max(rank).sum()) * width

    costs = np.array([cost(r) for r in range(1, most + 1)])
    return Curve(costs, _never_increasing(losses), cost(rank), complete=True)


def _full_losses(factors: ModuleFactors, most: int, settings: Settings) -> np.ndarray:
    """JD-Full at rank 1 to `most`: the sum of errors of a cluster's (normalised) adapters.

    The bases' columns are in the order of their eigenvalues, so the leading r×r blocks of the
    cores are a JD of rank r. It is not the best one: over 90 modules of real adapters its error
    was up to 2 % too high, by much the same in all of them at a rank.
    """
    u, v = jd_full(_sample(factors), most, iterations=_FULL_ITERATIONS, seed=settings.seed)
    squares = torch.zeros(most, most, dtype=torch.float64, device=u.device)
    for chunk in torch.arange(len(factors)).split(max(1, _CORE_NUMBERS // most**2)):
        squares += cores(factors.subset(chunk), u, v).square().sum(0).double()
    kept = squares.cumsum(0).cumsum(1).diagonal().cpu().numpy()
    return float(factors.squared_norms().sum()) - kept


def _diagonal_losses(factors: ModuleFactors, most: int, settings: Settings) -> np.ndarray:
    """The same for JD-Diag, whose columns aren't orthogonal and have no order of their own.

    They are put into one by orthogonal matching pursuit. As they serve each other, the leading
    ones are several percent worse than a JD of their number: how much is found by going on from
    them at a few ranks, and interpolated.
    """
    sample = _sample(factors)
    generator = torch.Generator().manual_seed(settings.seed)
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    noise = [torch.randn(d, most, generator=generator).to(factors.a) for d in (d_out, d_in)]
    u, v = jd_diag(sample, most, iterations=_DIAGONAL_SWEEPS, start=(noise[0], noise[1]))
    losses, order = _pursuit(factors, u, v)
    ranks, corrections = [], []
    for rank in sorted({settings.rank // 2, settings.rank, most}):
        if 1 <= rank <= most and losses[rank - 1] > 0:
            start = (u[:, order[:rank]], v[:, order[:rank]])
            fitted = jd_diag(sample, rank, iterations=_SMALLER_SWEEPS, start=start)
            ranks.append(rank)
            corrections.append(min(_pursuit(factors, *fitted)[0][-1] / losses[rank - 1], 1.0))
    if len(ranks) < 2:
        return losses
    at = np.arange(1, most + 1).clip(min=ranks[0], max=ranks[-1])
    from scipy.interpolate import PchipInterpolator  # takes a while, and is seldom asked for

    return losses * PchipInterpolator(ranks, corrections)(at)


def _pursuit(
    factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor
) -> tuple[np.ndarray, list[int]]:
    """Columns of U and V in the order in which each next one lowers the error most, by the best
    diagonal cores for those so far: (the error with 1, 2, … of them, their order)."""
    inner = factors.per_adapter((factors.b @ u) * (factors.a @ v)).sum(1).double()
    gram = (u.double().T @ u.double()) * (v.double().T @ v.double())
    chosen: list[int] = []
    losses = np.empty(u.shape[1])
    loss = float(factors.squared_norms().sum())
    waiting = torch.ones(u.shape[1], dtype=torch.bool, device=u.device)
    for number in range(u.shape[1]):
        left = gram.diagonal().clamp_min(_DEPENDENT)
        gain = torch.where(gram.diagonal() > _DEPENDENT, inner.square().sum(0) / left, 0.0)
        best = int(torch.where(waiting, gain, -1.0).argmax())
        chosen.append(best)
        waiting[best] = False
        loss -= float(gain[best])
        losses[number] = max(loss, 0.0)
        if gain[best] > 0:
            row = gram[best] / left[best].sqrt()
            inner = inner - torch.outer(inner[:, best] / left[best].sqrt(), row)
            gram = gram - torch.outer(row, row)
    return losses, chosen


def _sample(factors: ModuleFactors) -> ModuleFactors:
    """At most `_SAMPLE` adapters, evenly spaced. Losses are taken over all of them all the same.

    Few will not do: of 47 real adapters, bases from 24 kept five sixths of what the allocation
    gains, bases from 12 a third or less, or lost by it.
    """
    if len(factors) <= _SAMPLE:
        return factors
    return factors.subset(torch.linspace(0, len(factors) - 1, _SAMPLE).long())


def _never_increasing(losses: np.ndarray) -> np.ndarray:
    return np.minimum.accumulate(losses.clip(min=0))
