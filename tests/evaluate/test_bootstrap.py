"""Bootstrap intervals against formulas, and against resampling in plain loops."""

import math
import random
import statistics

import numpy as np
import pytest

from vllm_jd.evaluate import bootstrap

SEVERAL = [[0.1, 0.5, 0.3], [0.9, 0.7], [0.2, 0.2, 0.4, 0.8], [0.6]]
OTHERS = [[0.3, 0.6, 0.3], [0.8, 0.9], [0.1, 0.4, 0.5, 0.9], [0.7]]


def of_means(statistic, *series):
    return float(statistic(*(np.array([statistics.mean(items) for items in s]) for s in series)))


def plain(statistic, series, draws, tasks):
    rng = random.Random(5)
    found = []
    for _ in range(draws):
        n = len(series[0])
        chosen = [rng.randrange(n) for _ in range(n)] if tasks else range(n)
        drawn = [[] for _ in series]
        for task in chosen:
            at = [rng.randrange(len(series[0][task])) for _ in series[0][task]]
            for each, into in zip(series, drawn, strict=True):
                into.append([each[task][i] for i in at])
        found.append(of_means(statistic, *drawn))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


@pytest.mark.parametrize("tasks", [True, False])
@pytest.mark.parametrize(
    ("statistic", "count"),
    [(bootstrap.mean, 1), (bootstrap.ratio, 2), (bootstrap.difference, 2)],
)
def test_as_resampling_in_loops(statistic, count, tasks):
    series = [SEVERAL, OTHERS][:count]
    found = bootstrap.interval(series, statistic, draws=4000, tasks=tasks)
    assert found.value == pytest.approx(of_means(statistic, *series))
    low, high = plain(statistic, series, 4000, tasks)
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.low < found.value < found.high


def test_as_wide_as_the_formula_says():
    rng = np.random.default_rng(3)
    tasks = rng.normal(size=12)
    items = [list(mean + 2 * rng.normal(size=20)) for mean in tasks]
    found = bootstrap.interval([items], bootstrap.mean, draws=8000)
    means = np.array([np.mean(each) for each in items])
    within = np.mean([np.var(each) / len(each) for each in items])
    expected = 2 * 1.96 * math.sqrt((means.var() + within) / len(items))
    assert found.high - found.low == pytest.approx(expected, rel=0.05)


def test_the_same_items_are_drawn_in_all_series():
    # Much noise in both, and all of it common: nothing of it in the difference.
    ours = [[value + 0.25 for value in items] for items in SEVERAL]
    found = bootstrap.interval([ours, SEVERAL], bootstrap.difference)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("series", [[SEVERAL, SEVERAL[:-1]], [[[1.0], []]], [[]]])
def test_series_that_cannot_be_compared_are_refused(series):
    with pytest.raises(ValueError, match="expected"):
        bootstrap.interval(series, bootstrap.ratio)


def test_no_more_is_held_at_once_than_is_allowed_and_the_draws_are_the_same(monkeypatch):
    whole = bootstrap.interval([SEVERAL, OTHERS], bootstrap.ratio)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 100)
    assert bootstrap.interval([SEVERAL, OTHERS], bootstrap.ratio) == whole


def test_a_share_of_nothing_is_no_figure():
    nothing = [[0.0, 0.0], [0.0]]
    found = bootstrap.interval([[[0.5, 1.0], [0.0]], nothing], bootstrap.ratio)
    assert all(math.isnan(each) for each in (found.value, found.low, found.high))
    assert bootstrap.shown(found, 2) == "–"
    # One task of two scores something: draws of the other alone do not count.
    found = bootstrap.interval([[[0.5], [0.0]], [[1.0], [0.0]]], bootstrap.ratio)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert bootstrap.shown(found, 2, "+") == "+0.50 [+0.50, +0.50]"
