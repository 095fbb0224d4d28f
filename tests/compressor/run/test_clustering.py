"""Clusters: planted ones are found, none is wasted, and they never cost accuracy."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods import jd_full as jd_full_module
from vllm_jd.compressor.methods.jd import fit_clusters
from vllm_jd.compressor.methods.jd_full import cores, jd_full
from vllm_jd.compressor.run import clustering
from vllm_jd.compressor.run.clustering import assign_adapters

property_test = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
OPTIONS = {"seed": 0}


def fit(iterations):
    return partial(jd_full, iterations=iterations, **OPTIONS)


D_IN, D_OUT = 36, 30


def stack(pairs):
    pairs = [None if pair is None else (pair[1], pair[0]) for pair in pairs]
    return ModuleFactors.stack(pairs, D_IN, D_OUT).normalised()[0]


def planted(sizes, *, modules=3, noise=0.1, seed=0, rank=3, common=0.0):
    """Modules of adapters in groups that share a column and a row space; the true groups."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth), generator=generator)]
    result = []
    for _ in range(modules):
        spaces = [(randn(D_OUT, rank), randn(rank, D_IN)) for _ in sizes]
        shared = (randn(D_OUT, rank), randn(rank, D_IN))
        pairs = []
        for group in truth.tolist():
            left, right = spaces[group]
            b = (left + common * shared[0]) @ randn(rank, rank) + noise * randn(D_OUT, rank)
            a = randn(rank, rank) @ (right + common * shared[1]) + noise * randn(rank, D_IN)
            pairs.append((b, a))
        result.append(stack(pairs))
    return result, truth


def unstructured(make_factors, n, *, modules=3, seed=0, ranks=(3,), kind="random"):
    shapes = {str(i): (D_IN, D_OUT) for i in range(modules)}
    adapters = make_factors(n, kind=kind, seed=seed, ranks=ranks, shapes=shapes)
    return [stack([factors[str(i)] for factors in adapters]) for i in range(modules)]


def same_partition(one, two):
    """Whether two assignments are the same but for the clusters' numbers."""
    pairs = set(zip(one.tolist(), two.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def captured(factors, bases):
    """‖U_jᵀ D_i V_j‖², D_i = B_iA_i as it stands: float64 `[n, k]`."""
    ranks = factors.ranks.tolist()
    deltas = [
        b.double().T @ a.double()
        for a, b in zip(factors.a.split(ranks), factors.b.split(ranks), strict=True)
    ]
    return torch.tensor(
        [
            [float((u.double().T @ delta @ v.double()).square().sum()) for u, v in bases]
            for delta in deltas
        ],
        dtype=torch.float64,
    )


def mean_error(modules, assignment, clusters, rank, iterations=10):
    """Mean relative squared error over the adapters that have the module."""
    errors = []
    for factors in modules:
        bases = fit_clusters(factors, assignment, clusters, rank, fit(iterations))
        kept = captured(factors, bases).gather(1, assignment[:, None])[:, 0]
        errors.append((1 - kept)[factors.ranks > 0])
    return float(torch.cat(errors).double().mean())


@pytest.mark.parametrize("sizes", [(10, 10), (12, 5, 3), (20, 6, 3, 9), (4, 4, 4, 4, 4, 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_of_unequal_sizes_are_found_exactly(sizes, seed):
    modules, truth = planted(sizes, seed=seed)
    found = assign_adapters(modules, len(sizes), 3, **OPTIONS)
    assert same_partition(found, truth)


@pytest.mark.parametrize("fast", [True, False])
def test_planted_clusters_are_found_whatever_numbers_they_are_judged_in(monkeypatch, fast):
    monkeypatch.setattr(jd_full_module, "bfloat16_is_fast", lambda device: fast)
    monkeypatch.setattr(clustering, "_FEW", 0)
    modules, truth = planted((12, 5, 3), common=0.5)
    judged = {clustering.as_judged(factors).a.dtype for factors in modules}
    assert judged == {torch.bfloat16 if fast else torch.float32}
    assert same_partition(assign_adapters(modules, 3, 3, **OPTIONS), truth)


def test_planted_clusters_are_found_from_a_sample(monkeypatch):
    monkeypatch.setattr(clustering, "_SAMPLE", 18)
    modules, truth = planted((20, 16, 12, 9))
    assert same_partition(assign_adapters(modules, 4, 3, **OPTIONS), truth)


def test_planted_clusters_are_found_although_adapters_share_a_common_part():
    modules, truth = planted((9, 6, 4), common=1.0, noise=0.05)
    assert same_partition(assign_adapters(modules, 3, 6, **OPTIONS), truth)


def test_planted_clusters_are_found_from_a_wrong_start():
    modules, truth = planted((8, 8), modules=1)
    start = truth.clone()
    start[:2] = 1 - start[:2]
    assert same_partition(assign_adapters(modules, 2, 3, **OPTIONS, start=start), truth)


def test_planted_clusters_are_found_when_some_adapters_lack_modules():
    modules, truth = planted((8, 5, 3), modules=4)
    generator = torch.Generator().manual_seed(0)
    thinned = []
    for i, factors in enumerate(modules):
        keep = torch.rand(len(truth), generator=generator) < 0.6
        keep[torch.arange(len(truth)) % 4 == i] = True  # every adapter has a module at least
        pairs = [
            (factors.b[3 * row : 3 * row + 3].T, factors.a[3 * row : 3 * row + 3])
            if keep[row]
            else None
            for row in range(len(truth))
        ]
        thinned.append(stack(pairs))
    assert same_partition(assign_adapters(thinned, 3, 3, **OPTIONS), truth)


@property_test
@given(
    n=st.integers(1, 12),
    clusters=st.integers(1, 14),
    kind=st.sampled_from(["random", "real"]),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_every_cluster_is_used_where_there_are_that_many_adapters(
    make_factors, n, clusters, kind, ranks, seed
):
    modules = unstructured(make_factors, n, modules=2, seed=seed, ranks=ranks, kind=kind)
    found = assign_adapters(modules, clusters, 2, **OPTIONS)
    assert found.shape == (n,)
    assert set(found.tolist()) == set(range(min(n, clusters)))


def test_equal_adapters_and_adapters_of_zeros_are_spread_without_a_warning(recwarn):
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(D_OUT, 2, generator=generator), torch.randn(2, D_IN, generator=generator))
    zero = (torch.zeros(D_OUT, 2), pair[1])
    for pairs in ([pair] * 6, [zero] * 6, [pair, zero] * 3):
        found = assign_adapters([stack(pairs)], 3, 2, **OPTIONS)
        assert set(found.tolist()) == {0, 1, 2}
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_more_clusters_are_never_worse_than_one(make_factors, kind, clusters):
    for seed in range(3):
        modules = unstructured(make_factors, 15, seed=seed, kind=kind)
        one = mean_error(modules, torch.zeros(15, dtype=torch.int64), 1, 4)
        found = assign_adapters(modules, clusters, 4, **OPTIONS)
        many = mean_error(modules, found, clusters, 4)
        assert many <= one + 1e-6


def paper_assignment(modules, clusters, rank, seed):
    """A.3 as written: k-means on the cores of one JD, then JD and reassignment in turn."""
    points = torch.cat(
        [cores(m, *jd_full(m, rank, iterations=10)).flatten(1) for m in modules], dim=1
    )
    _, labels = kmeans2(points.double().numpy(), clusters, minit="++", rng=seed)
    assignment = torch.from_numpy(labels.astype(np.int64))
    for _ in range(30):
        kept = sum(
            captured(m, fit_clusters(m, assignment, clusters, rank, fit(10))) for m in modules
        )
        moved = kept.argmax(dim=1)
        if torch.equal(moved, assignment):
            break
        assignment = moved
    return assignment


@pytest.mark.filterwarnings("ignore:One of the clusters is empty")
@pytest.mark.parametrize("kind", ["random", "real"])
def test_unstructured_adapters_do_not_fare_worse_than_from_the_papers_start(make_factors, kind):
    ours, papers = [], []
    for seed in range(3):
        modules = unstructured(make_factors, 20, modules=2, seed=seed, kind=kind)
        ours.append(mean_error(modules, assign_adapters(modules, 4, 4, **OPTIONS), 4, 4))
        theirs = paper_assignment(modules, 4, 4, seed)
        papers.append(mean_error(modules, theirs, 4, 4))
    assert sum(ours) <= 1.01 * sum(papers), (ours, papers)


def test_an_emptied_cluster_gets_the_adapter_that_loses_most(make_factors):
    (factors,) = unstructured(make_factors, 6, modules=1)
    zero = stack([(torch.zeros(D_OUT, 2), torch.ones(2, D_IN))] * 2)
    both = ModuleFactors(
        torch.cat([factors.a, zero.a]),
        torch.cat([factors.b, zero.b]),
        torch.cat([factors.ranks, zero.ranks]),
    )
    found = assign_adapters([both], 4, 2, **OPTIONS)
    assert set(found[:6].tolist()) == {0, 1, 2, 3}


def test_the_search_ends_when_moves_gain_nothing(make_factors, monkeypatch):
    monkeypatch.setattr(clustering, "_reassign", lambda assignment, lost: 1 - assignment)
    monkeypatch.setattr(clustering, "_FEW", 0)
    steps = []
    modules = unstructured(make_factors, 12)
    start = torch.arange(12) % 2
    options = {"start": start, "on_progress": lambda *step: steps.append(step), **OPTIONS}
    assign_adapters(modules, 2, 2, **options)
    assert len(steps) < 8
    assert steps[-1] == (30, 30)


def test_the_search_for_clusters_ends(make_factors, monkeypatch):
    monkeypatch.setattr(clustering, "_MAX_ROUNDS", 2)
    crossing = iter([torch.tensor([0, 1] * 6), torch.tensor([1, 0] * 6)])
    monkeypatch.setattr(clustering, "_reassign", lambda *_: next(crossing))
    modules = unstructured(make_factors, 12)
    steps = []
    assign_adapters(modules, 2, 2, **OPTIONS, on_progress=lambda *step: steps.append(step))
    assert steps == [(0, 2), (1, 2), (2, 2)]
