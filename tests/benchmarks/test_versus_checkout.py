"""What `versus_checkout.py` makes of the times of two engines' steps."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from versus_checkout import counted, figures

from vllm_jd.plugin.engine.residency import Capacity, Residency


@pytest.mark.parametrize("slower", [1.0, 1.01, 0.9])
def test_the_ratio_is_that_of_the_engines_though_caches_are_warm_for_every_other_step(slower):
    rng = random.Random(0)
    times = []
    for i in range(400):
        noise = [1 + 0.002 * rng.random() for _ in range(2)]
        warm = [1.0, 0.8]  # of each four steps A, B, B, A the third, and so A's first of the next
        here, other = (
            0.03 * n * w for n, w in zip(noise, warm if i % 2 else warm[::-1], strict=True)
        )
        times.append((here * slower, other))
    found = figures(times)
    assert found["ratio"] == pytest.approx(slower, abs=1e-3)
    assert found["ratio_from"] <= slower * 1.0005 and found["ratio_to"] >= slower * 0.9995
    # The mean of a step that finds its caches warm and one that does not.
    assert found["more_us"] == pytest.approx(27_000 * (slower - 1), abs=30)
    assert found["more_from"] < found["more_us"] < found["more_to"]
    assert found["pairs"] == 400
    assert found["here_ms"] == pytest.approx(1e3 * np.median([here for here, _ in times]), abs=1e-3)


def test_instructions_are_those_of_the_call_and_the_same_each_time():
    def work(times):
        for _ in range(times):
            pass

    each = [counted(lambda n=n: work(n)) for n in (10, 20, 30, 10)]
    assert each[0] == each[3] and {one["ours"] for one in each} == {0}
    ten = each[1]["all"] - each[0]["all"]
    assert each[2]["all"] - each[1]["all"] == ten >= 10
    ours = counted(lambda: Residency(Capacity(cores=1, bases={}, uploads={})))
    assert 0 < ours["ours"] < ours["all"]
