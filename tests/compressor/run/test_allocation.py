"""Ranks by spectrum, against brute force and the true errors of `compress_module`."""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.calibrate.calibration import Metric
from vllm_jd.compressor.run.allocation import allocate_ranks, choose_ranks, module_curve
from vllm_jd.compressor.run.module import compress_module
from vllm_jd.compressor.settings import Settings

property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
D_IN, D_OUT = 40, 28


@dataclass
class Planted:
    """A collection in memory: as much of `Collection` as allocation looks at."""

    modules: dict[str, ModuleFactors]

    @property
    def shapes(self):
        return {name: (f.a.shape[1], f.b.shape[1]) for name, f in self.modules.items()}

    def factors(self, module):
        return self.modules[module]


def planted(width, *, n=12, rank=4, noise=0.02, seed=0, d_in=D_IN, d_out=D_OUT, groups=1):
    """`n` adapters, those of one group within a space of `width` left and right directions."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    left = torch.linalg.qr(randn(groups, d_out, width)).Q
    right = torch.linalg.qr(randn(groups, d_in, width)).Q
    pairs = []
    for i in range(n):
        b, a = left[i % groups] @ randn(width, rank), randn(rank, width) @ right[i % groups].T
        pairs.append((a + noise * randn(rank, d_in), b + noise * randn(d_out, rank)))
    return ModuleFactors.stack(pairs, d_in, d_out)


def one_cluster(collection):
    return torch.zeros(len(next(iter(collection.modules.values()))), dtype=torch.int64)


def compressed(collection, settings, assignment, ranks, metrics=None):
    """(mean relative squared error, stored numbers) of the real thing."""
    errors, numbers = [], 0
    for module, rank in ranks.items():
        part = compress_module(
            collection.factors(module),
            assignment,
            replace(settings, rank=rank),
            metric=(metrics or {}).get(module),
        )
        error = part.error if metrics is None else part.input_error
        errors.append(error[part.rank > 0].double())
        numbers += sum(each.data.numel() for each in (part.u, part.v, part.cores))
    return float(torch.cat(errors).mean()), numbers


def spectrum_settings(method, rank, clusters=1):
    settings = Settings(method, rank=rank, rank_allocation="spectrum", store_dtype="float32")
    return settings if method == "svd" else replace(settings, clusters=clusters)


def both(collection, settings, assignment, metrics=None):
    """((error, numbers) with uniform ranks, the same by spectrum, the ranks)."""
    ranks = allocate_ranks(collection, settings, assignment, metrics=metrics)
    uniform = dict.fromkeys(collection.shapes, settings.rank)
    before = compressed(collection, settings, assignment, uniform, metrics)
    return before, compressed(collection, settings, assignment, ranks, metrics), ranks


@pytest.mark.parametrize(
    ("method", "rank", "clusters", "part"),
    [("jd-full", 6, 1, 0.5), ("jd-full", 6, 3, 0.5), ("jd-diag", 12, 1, 0.8), ("svd", 2, 1, 0.9)],
)
def test_modules_that_differ_are_better_off_at_the_same_bytes(method, rank, clusters, part):
    widths = (2, 10, 3, 8)
    collection = Planted(
        {
            f"layers.{i}.proj": planted(width, seed=i, groups=clusters, rank=min(width, 6))
            for i, width in enumerate(widths)
        }
    )
    assignment = torch.arange(12) % clusters
    before, after, ranks = both(collection, spectrum_settings(method, rank, clusters), assignment)
    assert after[1] <= before[1]
    assert after[0] < part * before[0]
    assert ranks["layers.1.proj"] > rank > ranks["layers.0.proj"]


def test_a_module_that_needs_many_times_the_uniform_rank_gets_it():
    """A pilot looks only so far ahead at first."""
    modules = {f"layers.{i}.proj": planted(1, seed=i, noise=0) for i in range(9)}
    modules["layers.9.proj"] = planted(24, seed=9, rank=8, n=12, noise=0)
    collection = Planted(modules)
    assignment = one_cluster(collection)
    before, after, ranks = both(collection, spectrum_settings("jd-full", 4), assignment)
    assert ranks["layers.9.proj"] > 12
    assert after[1] <= before[1] and after[0] < 0.5 * before[0]


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "svd"])
def test_modules_that_are_alike_stay_uniform(method, make_factors):
    shapes = {f"layers.{i}.proj": (D_IN, D_OUT) for i in range(4)}
    adapters = make_factors(10, kind="real", shapes={"m": (D_IN, D_OUT)}, shared=12)
    factors = ModuleFactors.stack([(f["m"][1], f["m"][0]) for f in adapters], D_IN, D_OUT)
    collection = Planted(dict.fromkeys(shapes, factors))
    for rank in (1, 3):
        settings = spectrum_settings(method, rank)
        assert allocate_ranks(collection, settings, one_cluster(collection)) == dict.fromkeys(
            shapes, rank
        )


def test_uniform_ranks_read_nothing():
    class Unread(Planted):
        def factors(self, module):
            raise AssertionError(module)

    collection = Unread({"a": planted(2), "b": planted(10)})
    settings = Settings(rank=7)
    assert allocate_ranks(collection, settings, one_cluster(collection)) == {"a": 7, "b": 7}


@pytest.mark.parametrize("method", ["hydraopt", "ties", "none"])
def test_a_method_without_ranks_to_allocate_is_refused(method):
    with pytest.raises(ValueError, match=f"method {method} has no option rank_allocation"):
        Settings(method=method, rank_allocation="spectrum")
    collection = Planted({"a": planted(2)})
    rank = Settings(method=method).rank
    found = allocate_ranks(collection, Settings(method=method), one_cluster(collection))
    assert found == {"a": rank}


def test_absent_adapters_modules_and_zeros():
    """No factors at all, an adapter without, a delta of 0: rank 1 is enough for nothing."""
    zero = planted(8, noise=0)
    nothing = ModuleFactors.stack([None] * 12, D_IN, D_OUT)
    pairs = [None if i % 3 else (torch.randn(4, D_IN), torch.randn(D_OUT, 4)) for i in range(12)]
    collection = Planted(
        {
            "full": planted(12, seed=1),
            "some": ModuleFactors.stack(pairs, D_IN, D_OUT),
            "zero": ModuleFactors(zero.a, zero.b * 0, zero.ranks),
            "none": nothing,
        }
    )
    for method in ("jd-full", "jd-diag", "svd"):
        settings = spectrum_settings(method, 3, clusters=1 if method == "svd" else 2)
        before, after, ranks = both(collection, settings, torch.arange(12) // 6)
        assert after[1] <= before[1] and after[0] <= before[0]
        assert ranks["zero"] == ranks["none"] == 1


def test_a_metric_decides_what_counts():
    """Inputs that see only two directions: there is nothing to lose beyond them."""
    collection = Planted({name: planted(10, seed=1, rank=6) for name in ("narrow", "wide")})
    seen = torch.diag(torch.tensor([1.0] * 2 + [0.0] * (D_IN - 2)))
    metrics = {"narrow": Metric.of(seen), "wide": Metric.of(torch.eye(D_IN))}
    settings = spectrum_settings("svd", 3)
    before, after, ranks = both(collection, settings, one_cluster(collection), metrics)
    assert ranks["narrow"] < 3 < ranks["wide"]
    assert after[1] <= before[1] and after[0] < before[0]


def test_the_same_again():
    collection = Planted({f"layers.{i}": planted(2 + 3 * i, seed=i) for i in range(4)})
    for method in ("jd-full", "jd-diag"):
        settings = spectrum_settings(method, 5)
        first, second = (
            allocate_ranks(collection, settings, one_cluster(collection)) for _ in range(2)
        )
        assert first == second and len(set(first.values())) > 1


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "svd"])
def test_curves_are_near_the_true_errors(method, make_factors):
    adapters = make_factors(12, kind="real", shapes={"m": (D_IN, D_OUT)}, ranks=(4, 6), shared=12)
    factors = ModuleFactors.stack([(f["m"][1], f["m"][0]) for f in adapters], D_IN, D_OUT)
    settings = spectrum_settings(method, 6)
    assignment = torch.zeros(12, dtype=torch.int64)
    curve = module_curve(factors, assignment, settings, 12)
    tolerance = {"svd": 1e-4, "jd-full": 0.15, "jd-diag": 0.3}[method]
    for rank in range(1, len(curve.costs) + 1):
        part = compress_module(factors, assignment, replace(settings, rank=rank))
        numbers = sum(each.data.numel() for each in (part.u, part.v, part.cores))
        true = float(part.error.double().sum())
        assert curve.costs[rank - 1] == numbers
        assert curve.losses[rank - 1] == pytest.approx(true, rel=tolerance, abs=0.01)


def test_a_pilot_on_a_sample_sees_what_all_show(monkeypatch):
    factors = planted(8, n=60)
    assignment = torch.zeros(60, dtype=torch.int64)
    settings = spectrum_settings("jd-full", 6)
    whole = module_curve(factors, assignment, settings, 12).losses
    monkeypatch.setattr("vllm_jd.compressor.run.allocation._SAMPLE", 20)
    monkeypatch.setattr("vllm_jd.compressor.run.allocation._CORE_NUMBERS", 1000)
    sampled = module_curve(factors, assignment, settings, 12).losses
    assert np.allclose(sampled, whole, rtol=0.25, atol=0.05)
    assert not np.array_equal(sampled, whole)


@st.composite
def curves(draw, modules=4, most=5):
    """Costs and losses of a few modules, convex or not."""
    costs, losses = [], []
    for _ in range(draw(st.integers(1, modules))):
        length = draw(st.integers(1, most))
        prices = draw(st.lists(st.integers(1, 30), min_size=length, max_size=length))
        falls = draw(st.lists(st.integers(0, 20), min_size=length, max_size=length))
        costs.append(np.cumsum(prices))
        losses.append(np.array(falls[::-1], dtype=float).cumsum()[::-1])
    return costs, losses


def spent(values, ranks):
    return sum(value[rank - 1] for value, rank in zip(values, ranks, strict=True))


def brute_force(costs, losses, budget):
    every = product(*(range(1, len(cost) + 1) for cost in costs))
    return min(spent(losses, ranks) for ranks in every if spent(costs, ranks) <= budget)


def largest_step(costs, losses):
    """The most that one step along a hull lowers a loss; vertices found by looking at all lines."""

    def is_vertex(cost, loss, i):
        left = [(loss[a] - loss[i]) / (cost[i] - cost[a]) for a in range(i)]
        right = [(loss[i] - loss[b]) / (cost[b] - cost[i]) for b in range(i + 1, len(cost))]
        return i == 0 or (min(left) > 0 and (not right or min(left) > max(right)))

    largest = 0.0
    for cost, loss in zip(costs, losses, strict=True):
        at = [i for i in range(len(cost)) if is_vertex(cost, loss, i)]
        largest = max([largest, *(loss[a] - loss[b] for a, b in pairwise(at))])
    return largest + 1e-9


@property_test
@given(curves(), st.integers(0, 200))
def test_greedy_is_within_one_step_of_brute_force(case, extra):
    costs, losses = case
    budget = int(sum(cost[0] for cost in costs)) + extra
    ranks = choose_ranks(costs, losses, budget)
    assert all(1 <= rank <= len(cost) for rank, cost in zip(ranks, costs, strict=True))
    assert spent(costs, ranks) <= budget
    best = brute_force(costs, losses, budget)
    found = spent(losses, ranks)
    assert best <= found <= best + largest_step(costs, losses)


@property_test
@given(curves(), st.integers(0, 200))
def test_greedy_is_optimal_for_what_it_spends_on_hulls(case, extra):
    """Convex curves, one price: no allocation of that budget is better by as much as a step."""
    costs = [np.arange(1, len(cost) + 1) for cost in case[0]]
    losses = []
    for loss in case[1]:
        falls = np.sort(loss - np.append(loss[1:], 0.0))
        losses.append(falls.cumsum()[::-1])
    budget = len(costs) + extra % 12
    ranks = choose_ranks(costs, losses, budget)
    assert spent(losses, ranks) == brute_force(costs, losses, budget)


@property_test
@given(curves(), st.integers(0, 200), st.integers(1, 100))
def test_more_budget_is_never_worse_by_more_than_a_step(case, extra, more):
    costs, losses = case
    budget = int(sum(cost[0] for cost in costs)) + extra
    less, larger = (
        spent(losses, choose_ranks(costs, losses, size)) for size in (budget, budget + more)
    )
    assert larger <= less + largest_step(costs, losses)
    everything = int(sum(cost[-1] for cost in costs))
    assert spent(losses, choose_ranks(costs, losses, everything)) == spent(
        losses, [len(cost) for cost in costs]
    )


def test_a_budget_below_rank_1_is_refused():
    costs = [np.array([10, 20]), np.array([10, 20])]
    with pytest.raises(ValueError, match=r"rank 1 in all 2 modules takes 20 numbers, .* has 19"):
        choose_ranks(costs, [np.array([1.0, 0.0])] * 2, 19)


def numbers(collection, settings, ranks):
    """Stored numbers, written out from the format."""
    total = 0
    for module, rank in ranks.items():
        factors, width = collection.factors(module), sum(collection.shapes[module])
        if settings.method == "svd":
            total += sum(min(rank, own) for own in factors.ranks.tolist()) * width
        else:
            core = rank if settings.method == "jd-diag" else rank**2
            total += settings.clusters * rank * width + len(factors) * core
    return total


@settings(parent=property_test, max_examples=12)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    rank=st.integers(1, 24),
    clusters=st.integers(1, 3),
    method=st.sampled_from(["jd-full", "jd-diag", "svd"]),
)
def test_ranks_are_at_least_1_and_within_d_and_the_budget(widths, rank, clusters, method):
    collection = Planted(
        {
            f"layers.{i}": planted(width, seed=i, n=6, rank=3, d_in=16, d_out=10 + 2 * width)
            for i, width in enumerate(widths, start=1)
        }
    )
    clusters = 1 if method == "svd" else clusters
    settings = spectrum_settings(method, rank, clusters)
    assignment = torch.arange(6) % clusters
    ranks = allocate_ranks(collection, settings, assignment)
    assert list(ranks) == list(collection.shapes)
    for module, chosen in ranks.items():
        most = sum(collection.factors(module).ranks.tolist())
        assert 1 <= chosen <= (most if method == "jd-diag" else max(collection.shapes[module]))
    uniform = dict.fromkeys(ranks, rank)
    assert numbers(collection, settings, ranks) <= numbers(collection, settings, uniform)
