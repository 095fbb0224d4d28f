"""Bootstrap intervals of means over tasks: tasks are drawn again, and in each of them its items."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Statistic = Callable[..., np.ndarray]
"""Of task means, float64 `[..., tasks]` of each series, one number each: `[...]`."""

_AT_ONCE = 1 << 24  # numbers that are drawn before any of them is summed


@dataclass(frozen=True)
class Interval:
    """A figure, and the middle `level` of what resampling makes of it."""

    value: float
    low: float
    high: float


def interval(
    series: Sequence[Sequence[Sequence[float]]],
    statistic: Statistic,
    *,
    draws: int = 2000,
    level: float = 0.95,
    tasks: bool = True,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a statistic of task means; draws of which it is NaN do not count.

    Args:
        series: what is compared, such as a method and LoRA: of each the tasks, of each its items'
            values. All have the same tasks and items, in the same order: the same are drawn in all.
        statistic: takes the task means of each series.
        draws: how often everything is drawn again.
        level: of the interval.
        tasks: whether tasks are drawn, too, or only the items of each: the interval is then one for
            these very tasks.
        seed: of the drawing.

    Raises:
        ValueError: the series differ in their tasks or numbers of items, or a task has no items.
    """
    counts = [len(items) for items in series[0]]
    if any([len(items) for items in each] != counts for each in series):
        raise ValueError("found series of other tasks or items, expected the same in all")
    if not counts or min(counts) == 0:
        raise ValueError("found a task without items, expected at least one in each")
    rng = np.random.default_rng(seed)
    n = len(counts)
    values = np.zeros((len(series), n, max(counts)))
    for s, each in enumerate(series):
        for t, items in enumerate(each):
            values[s, t, : len(items)] = items
    of = np.array(counts)
    drawn = rng.integers(n, size=(draws, n)) if tasks else np.tile(np.arange(n), (draws, 1))
    found = []
    at_once = max(1, _AT_ONCE // (len(series) * n * max(counts)))
    for first in range(0, draws, at_once):
        own = drawn[first : first + at_once]
        at = (rng.random((len(own), n, max(counts))) * of[own][..., None]).astype(int)
        weights = np.arange(max(counts)) < of[own][..., None]  # a task with fewer items has fewer
        picked = values[:, own[..., None], at] * weights
        found.append(np.asarray(statistic(*(picked.sum(-1) / of[own])), dtype=float))
    whole = float(statistic(*(values.sum(-1) / of)))
    if np.isnan(whole):
        return Interval(whole, whole, whole)
    low, high = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(whole, float(low), float(high))


def mean(ours: np.ndarray) -> np.ndarray:
    """Statistic: the mean over tasks."""
    return ours.mean(-1)


def ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Statistic: our mean over tasks, as a share of theirs. (Of ratios of single tasks one whose
    reference is near 0 would decide.) NaN where theirs is 0."""
    reference = theirs.mean(-1)
    return ours.mean(-1) / np.where(reference == 0, np.nan, reference)


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Statistic: our mean over tasks minus theirs."""
    return ours.mean(-1) - theirs.mean(-1)


def shown(value: Interval, digits: int, sign: str = "") -> str:
    """`0.97 [0.94, 1.00]`; a dash where there is no figure."""
    if np.isnan(value.value):
        return "–"
    inside = ", ".join(f"{each:{sign}.{digits}f}" for each in (value.low, value.high))
    return f"{value.value:{sign}.{digits}f} [{inside}]"
