"""JD-Full against a dense float64 reference that shares no code with it."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vllm_jd
from vllm_jd.compressor import read_adapters
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import fit_clusters
from vllm_jd.compressor.methods.jd_full import cores, grouped, jd_full, jd_full_clusters

SHIPPED = Path(vllm_jd.__file__).parent / "data" / "adapters"
SHAPE = {"m": (40, 28)}  # d_in, d_out

property_test = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def stack(adapters, shape=SHAPE["m"]):
    """`ModuleFactors` of a list of (B, A), or None where an adapter lacks the module."""
    pairs = [None if pair is None else (pair[1], pair[0]) for pair in adapters]
    return ModuleFactors.stack(pairs, *shape)


def dense(factors):
    """B_iA_i of every adapter, float64 `[n, d_out, d_in]`."""
    deltas, row = [], 0
    for rank in factors.ranks.tolist():
        rows = slice(row, row + rank)
        deltas.append(factors.b[rows].double().T @ factors.a[rows].double())
        row += rank
    return torch.stack(deltas)


def top(matrix, rank):
    """The `rank` top eigenvectors of a symmetric matrix."""
    return torch.linalg.eigh(matrix).eigenvectors[:, -rank:]


def left_gram(deltas, v):
    dv = deltas @ v
    return (dv @ dv.mT).sum(0)


def right_gram(deltas, u):
    du = deltas.mT @ u
    return (du @ du.mT).sum(0)


def reference(deltas, rank, iterations, start):
    """The paper's A.1 (case 1) on dense matrices: (U, V)."""
    d_out, d_in = deltas.shape[1:]
    if start == "spectral":
        v = top((deltas.mT @ deltas).sum(0), min(rank, d_in))
        u = top(left_gram(deltas, v), min(rank, d_out))
    else:
        generator = torch.Generator().manual_seed(start)
        v, u = (
            torch.linalg.qr(
                torch.randn(d, min(rank, d), generator=generator, dtype=torch.float64)
            ).Q
            for d in (d_in, d_out)
        )
    for _ in range(iterations):
        u = top(left_gram(deltas, v), u.shape[1])
        v = top(right_gram(deltas, u), v.shape[1])
    return u, v


def dense_errors(deltas, u, v):
    """Relative squared error of every adapter with the best cores for U, V."""
    u, v = u.double(), v.double()
    lost = (deltas - u @ (u.T @ deltas @ v) @ v.T).square().sum((1, 2))
    total = deltas.square().sum((1, 2))
    return torch.where(total > 0, lost / total.clamp_min(1e-300), 0.0)


def module_factors(make_factors, n, **options):
    adapters = make_factors(n, shapes=SHAPE, **options)
    return stack([factors["m"] for factors in adapters]).normalised()[0]


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("ranks", [(4,), (1, 3, 8)])
@pytest.mark.parametrize("rank", [2, 6, 12])
def test_error_is_within_one_percent_of_the_dense_reference(make_factors, kind, ranks, rank):
    for seed in range(2):
        factors = module_factors(make_factors, 12, kind=kind, ranks=ranks, seed=seed)
        deltas = dense(factors)
        ours = dense_errors(deltas, *jd_full(factors, rank)).mean()
        for start in ["spectral", 0]:
            theirs = dense_errors(deltas, *reference(deltas, rank, 10, start)).mean()
            assert ours <= 1.01 * theirs, (seed, start)


@pytest.mark.parametrize("iterations", [1, 2, 3, 30])
def test_error_matches_the_reference_at_the_same_number_of_iterations(make_factors, iterations):
    factors = module_factors(make_factors, 16, kind="real", ranks=(2, 5), seed=7)
    deltas = dense(factors)
    ours = dense_errors(deltas, *jd_full(factors, 5, iterations=iterations)).mean()
    theirs = dense_errors(deltas, *reference(deltas, 5, iterations, "spectral")).mean()
    assert ours <= 1.01 * theirs


def test_shipped_adapters_reach_the_reference():
    collection = read_adapters([SHIPPED])
    modules = list(collection.shapes)
    for module in modules[:: len(modules) // 2 + 1]:  # one of k and one of q
        factors = collection.factors(module).normalised()[0]
        few = factors.subset(torch.arange(min(16, len(factors))))
        deltas = dense(few)
        ours = dense_errors(deltas, *jd_full(few, 16)).mean()
        theirs = dense_errors(deltas, *reference(deltas, 16, 10, "spectral")).mean()
        assert ours <= 1.01 * theirs, module


def test_lossless_at_the_rank_of_proposition_1(make_factors):
    factors = module_factors(make_factors, 4, ranks=(2, 3), seed=1)
    bound = max(int(torch.linalg.matrix_rank(factors.a)), int(torch.linalg.matrix_rank(factors.b)))
    assert bound == 10
    assert dense_errors(dense(factors), *jd_full(factors, bound)).max() < 1e-9
    assert dense_errors(dense(factors), *jd_full(factors, bound - 1)).max() > 1e-4


def test_lossless_although_the_spectrum_decays_over_four_decades():
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(28, 6, generator=generator) * torch.logspace(0, -4, 6),
            torch.randn(6, 40, generator=generator),
        )
        for _ in range(3)
    ]
    factors = stack(pairs).normalised()[0]
    assert dense_errors(dense(factors), *jd_full(factors, 18)).max() < 1e-9


@pytest.mark.parametrize("rank", [20, 28, 35, 64])
def test_rank_beyond_the_layer_or_the_adapters_is_lossless_and_padded(make_factors, rank):
    factors = module_factors(make_factors, 3, ranks=(2, 4), seed=2)
    u, v = jd_full(factors, rank)
    assert u.shape == (28, rank)
    assert v.shape == (40, rank)
    assert dense_errors(dense(factors), u, v).max() < 1e-9
    for basis, d in ((u, 28), (v, 40)):
        used = min(rank, d)
        assert torch.allclose(basis[:, :used].T @ basis[:, :used], torch.eye(used), atol=1e-5)
        assert not basis[:, used:].any()


def test_one_adapter_gets_its_own_truncated_svd(make_factors):
    factors = module_factors(make_factors, 1, ranks=(8,), seed=3)
    (delta,) = dense(factors)
    values = torch.linalg.svdvals(delta)
    best = values[3:].square().sum() / values.square().sum()
    error = dense_errors(delta[None], *jd_full(factors, 3, iterations=50))
    assert float(error) == pytest.approx(float(best), rel=0.01)


def test_absent_and_zero_adapters_change_nothing_for_the_others(make_factors):
    pairs = [factors["m"] for factors in make_factors(6, kind="real", shapes=SHAPE)]
    zero = (torch.zeros(28, 4), torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    plain = stack(pairs).normalised()[0]
    mixed = stack([None, *pairs[:3], zero, None, *pairs[3:]]).normalised()[0]
    u, v = jd_full(mixed, 4)
    assert bool(u.isfinite().all() and v.isfinite().all())
    ours = dense_errors(dense(mixed), u, v)
    assert ours[[0, 4, 5]].tolist() == [0, 0, 0]
    theirs = dense_errors(dense(plain), *jd_full(plain, 4))
    torch.testing.assert_close(ours[[1, 2, 3, 6, 7, 8]], theirs, rtol=0.01, atol=1e-6)
    assert not cores(mixed, u, v)[[0, 4, 5]].any()


def test_only_zero_adapters_give_finite_bases(make_factors):
    a = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    factors, norms = stack([(torch.zeros(28, 2), a)] * 2).normalised()
    u, v = jd_full(factors, 4)
    assert bool(u.isfinite().all() and v.isfinite().all())
    assert norms.tolist() == [0, 0]


def test_the_same_seed_gives_the_same_bits_and_another_a_similar_error(make_factors):
    factors = module_factors(make_factors, 12, kind="real", ranks=(2, 5))
    first, again, other = (jd_full(factors, 4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    errors = [float(dense_errors(dense(factors), *found).mean()) for found in (first, other)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@property_test
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 8),
    rank=st.integers(1, 20),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    kind=st.sampled_from(["random", "real"]),
)
def test_more_iterations_never_lose_and_errors_are_fractions(
    make_factors, seed, n, rank, ranks, kind
):
    factors = module_factors(make_factors, n, kind=kind, ranks=ranks, seed=seed)
    deltas = dense(factors)
    last = 1.0
    for iterations in (1, 2, 4, 8):
        errors = dense_errors(deltas, *jd_full(factors, rank, iterations=iterations))
        assert errors.min() >= 0
        assert errors.max() <= 1 + 1e-6
        assert errors.mean() <= last + 1e-5
        last = float(errors.mean())


def cluster_errors(deltas, bases, assignment):
    """Relative squared error of every adapter in its own cluster's bases."""
    found = torch.zeros(len(deltas), dtype=torch.float64)
    for cluster, (u, v) in enumerate(bases):
        own = (assignment == cluster).nonzero()[:, 0]
        found[own] = dense_errors(deltas[own], u, v)
    return found


@pytest.mark.parametrize("ranks", [(4,), (1, 3, 8)])
@pytest.mark.parametrize("known", [False, True])
def test_clusters_at_once_are_each_as_if_alone(make_factors, ranks, known):
    pairs = [
        factors["m"] for factors in make_factors(24, kind="real", ranks=ranks, seed=4, shapes=SHAPE)
    ]
    pairs[5] = pairs[11] = None
    factors = stack(pairs).normalised()[0]
    # Of many sizes; 3 has no adapter, 5 only one that lacks the module.
    assignment = torch.tensor([0] * 6 + [1] * 6 + [2] * 5 + [4] + [6] * 6)
    assignment = assignment[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assignment[[5, 11]] = torch.tensor([5, 0])
    options = {"iterations": 6, "seed": 0}
    start = None
    if known:
        start = jd_full_clusters(factors, assignment, 7, 5, iterations=1, seed=1)
    found = jd_full_clusters(factors, assignment, 7, 5, **options, start=start)

    def alone(members, rank, start):
        return jd_full(members, rank, **options, start=start)

    expected = fit_clusters(factors, assignment, 7, 5, alone, start)
    deltas = dense(factors)
    assert not any(bool(side.any()) for cluster in (3, 5) for side in found[cluster])
    torch.testing.assert_close(
        cluster_errors(deltas, found, assignment),
        cluster_errors(deltas, expected, assignment),
        rtol=0.02,
        atol=1e-6,
    )


def test_groups_hold_every_cluster_once_and_waste_little():
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(0, 40, (600,), generator=generator) ** 2 // 40
    ranks = torch.randint(0, 9, (600,), generator=generator)
    rows = int(ranks.sum())
    factors = ModuleFactors(torch.zeros(rows, 700), torch.zeros(rows, 700), ranks)
    groups = grouped(factors, assignment, 40)
    seen = [cluster for group in groups for cluster in group.clusters]
    sizes = torch.zeros(40, dtype=torch.int64).index_add_(0, assignment, ranks)
    assert sorted(seen) == sizes.nonzero()[:, 0].tolist()
    assert 1 < len(groups) < len(seen)
    for group in groups:
        for cluster, members in zip(group.clusters, group.members, strict=True):
            expected = ((assignment == cluster) & (ranks > 0)).nonzero()[:, 0]
            assert torch.equal(members, expected)
        own = [int(ranks[members].sum()) for members in group.members]
        assert sum(own) >= 0.7 * len(own) * max(own)
        assert len(own) == 1 or len(own) * max(own) * 1400 <= 1 << 23


def test_a_run_of_adapters_is_a_view_of_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.tensor([2, 0, 3, 1, 4])
    factors = ModuleFactors(
        torch.randn(10, 7, generator=generator), torch.randn(10, 5, generator=generator), ranks
    )
    run = factors.subset(torch.tensor([1, 2, 3]))
    assert run.a.data_ptr() == factors.a[2:].data_ptr()
    torch.testing.assert_close(dense(run), dense(factors)[1:4])
    assert len(factors.subset(torch.tensor([], dtype=torch.int64))) == 0


@property_test
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_factors_keep_every_adapter_apart(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        None
        if r == 0
        else (torch.randn(5, r, generator=generator), torch.randn(r, 7, generator=generator))
        for r in ranks
    ]
    factors = stack(pairs, (7, 5))
    expected = torch.stack(
        [torch.zeros(5, 7).double() if p is None else p[0].double() @ p[1].double() for p in pairs]
    )
    torch.testing.assert_close(dense(factors), expected)
    torch.testing.assert_close(factors.squared_norms(), expected.square().sum((1, 2)))
    u = torch.randn(5, 2, generator=generator)
    v = torch.randn(7, 2, generator=generator)
    found = cores(factors, u, v).double()
    torch.testing.assert_close(found, u.double().T @ expected @ v.double(), rtol=1e-4, atol=1e-4)
    rows = torch.randn(sum(ranks), 3, generator=generator)
    assert torch.equal(factors.per_row(factors.per_adapter(rows)), rows)
    keep = torch.arange(0, len(ranks), 2)
    torch.testing.assert_close(dense(factors.subset(keep)), expected[keep])
    normalised, norms = factors.normalised()
    torch.testing.assert_close(norms, expected.square().sum((1, 2)).sqrt())
    again = dense(normalised) * norms[:, None, None]
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
