"""The bounds against dense float64 formulas, and against what JD-Full reaches."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_jd.compressor.algebra import bounds as module
from vllm_jd.compressor.algebra.bounds import LOSSLESS, bounds, spectrum
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd_full import jd_full

property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def random_factors(ranks, d_in, d_out, *, shared=0, seed=0, zero=()):
    """Normalised factors; rank 0 is "no factor". With `shared`, all lie in spaces that large."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    left, right = randn(d_out, shared), randn(shared, d_in)
    pairs = []
    for i, rank in enumerate(ranks):
        b, a = randn(d_out, rank), randn(rank, d_in)
        if shared:
            b, a = left @ randn(shared, rank), randn(rank, shared) @ right
        if i in zero:
            b = torch.zeros_like(b)
        pairs.append((a, b) if rank else None)
    return ModuleFactors.stack(pairs, d_in, d_out).normalised()[0]


def unit_deltas(factors):
    """D_i / ‖D_i‖ of every adapter, float64 `[n, d_out, d_in]`; 0 where D_i is 0."""
    deltas, row = [], 0
    for rank in factors.ranks.tolist():
        rows = slice(row, row + rank)
        delta = factors.b[rows].double().T @ factors.a[rows].double()
        deltas.append(delta / delta.norm().clamp_min(1e-300))
        row += rank
    return torch.stack(deltas)


def dense_bounds(factors, assignment, clusters, rank):
    """(at most, at least, at least one-sided, lossless rank) from the deltas themselves."""
    deltas = unit_deltas(factors)
    present = int((factors.ranks > 0).sum())
    energy = deltas.square().sum()
    merged = stacked = one_sided = torch.tensor(0.0, dtype=torch.float64)
    lossless = 0
    for cluster in range(clusters):
        own = deltas[(assignment == cluster) & (deltas.square().sum((1, 2)) > 0)]
        if not len(own):
            continue
        mean = own.mean(0)  # n · ‖UᵀD̄V‖² for n adapters
        merged = merged + len(own) * torch.linalg.svdvals(mean)[:rank].square().sum()
        vectors = torch.linalg.svdvals(own.flatten(1))
        stacked = stacked + vectors[: rank**2].square().sum()
        beside = torch.cat(list(own), dim=1)
        below = torch.cat(list(own), dim=0)
        one_sided = one_sided + min(
            torch.linalg.svdvals(x)[:rank].square().sum() for x in (beside, below)
        )
        lossless = max(
            lossless, *(int(torch.linalg.matrix_rank(x, rtol=1e-6)) for x in (beside, below))
        )
    errors = [float((energy - x) / max(present, 1)) for x in (merged, stacked, one_sided)]
    return *errors, lossless


def reached(factors, assignment, clusters, rank, **options):
    """The mean relative squared error of JD-Full in every cluster."""
    deltas = unit_deltas(factors)
    captured = 0.0
    for cluster in range(clusters):
        members = ((assignment == cluster) & (factors.ranks > 0)).nonzero()[:, 0]
        if len(members):
            u, v = jd_full(factors.subset(members), rank, **options)
            # Orthonormal in float64: JD-Full's float32 bases are so only to 1e-7.
            u, v = (torch.linalg.qr(x[:, x.any(0)].double()).Q for x in (u, v))
            captured += float((u.T @ deltas[members] @ v).square().sum())
    return (float(deltas.square().sum()) - captured) / max(int((factors.ranks > 0).sum()), 1)


@st.composite
def cases(draw):
    """(factors, assignment, clusters, rank)"""
    ranks = draw(st.lists(st.integers(0, 5), min_size=1, max_size=14))
    d_in, d_out = draw(st.sampled_from([(24, 24), (40, 9), (7, 30), (60, 80)]))
    factors = random_factors(
        ranks,
        d_in,
        d_out,
        shared=draw(st.sampled_from([0, 0, 6])),
        seed=draw(st.integers(0, 1000)),
        zero=draw(st.sets(st.integers(0, len(ranks)), max_size=2)),
    )
    clusters = draw(st.integers(1, 4))
    assignment = draw(
        st.lists(st.integers(0, clusters - 1), min_size=len(ranks), max_size=len(ranks))
    )
    return factors, torch.tensor(assignment), clusters, draw(st.integers(1, 10))


@property_test
@given(case=cases(), block_rows=st.sampled_from([1, 4, 2048]))
def test_bounds_are_those_of_the_dense_formulas(case, block_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ROWS", block_rows)
        ours = bounds(*case)
    at_most, at_least, one_sided, lossless = dense_bounds(*case)
    assert ours.error_at_most == pytest.approx(at_most, abs=1e-12)
    assert ours.error_at_least == pytest.approx(at_least, abs=1e-12)
    assert ours.error_at_least_one_sided == pytest.approx(one_sided, abs=1e-12)
    assert ours.lossless_rank == lossless


@property_test
@given(case=cases())
def test_jd_full_lies_within_the_bounds(case):
    found = bounds(*case)
    for iterations in (1, 100):
        error = reached(*case, iterations=iterations)
        assert error >= found.error_at_least - 1e-12
        assert error >= found.error_at_least_one_sided - 1e-12
    assert error <= found.error_at_most + 1e-3


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_bound_over_all_inner_products_holds_where_there_are_more_adapters_than_r2(rank):
    factors = random_factors([2, 1, 3] * 8, 16, 12, shared=4, seed=rank)
    case = factors, torch.zeros(24, dtype=torch.int64), 1, rank
    found = bounds(*case)
    assert found.error_at_least == pytest.approx(dense_bounds(*case)[1], abs=1e-12)
    assert 0.01 < found.error_at_least <= reached(*case, iterations=100)


def test_as_many_adapters_as_a_core_has_numbers_leave_theorem_1_nothing_to_say(monkeypatch):
    monkeypatch.setattr(module, "_inner_products", None)  # not even asked for
    factors = random_factors([3] * 4, 16, 12)
    assert bounds(factors, torch.zeros(4, dtype=torch.int64), 1, 2).error_at_least == 0


def test_equal_adapters_reach_both_bounds_with_their_truncated_svd():
    # As printed, without 1/n, Theorem 1 would promise an error of 0 here.
    one = random_factors([4], 20, 16, seed=3)
    factors = ModuleFactors(one.a.repeat(5, 1), one.b.repeat(5, 1), one.ranks.repeat(5))
    case = factors, torch.zeros(5, dtype=torch.int64), 1, 2
    values = torch.linalg.svdvals(unit_deltas(one)[0])
    best = float(values[2:].square().sum())
    found = bounds(*case)
    assert best > 0.1
    assert found.error_at_most == pytest.approx(best, abs=1e-12)
    assert found.error_at_least_one_sided == pytest.approx(best, abs=1e-12)
    assert reached(*case, iterations=100) == pytest.approx(best, abs=1e-6)
    assert found.lossless_rank == 4


def test_one_sided_bound_can_be_the_tighter_and_the_looser_one():
    few = random_factors([1] * 3, 64, 64, seed=0)  # n ≤ r²: Theorem 1 says nothing
    found = bounds(few, torch.zeros(3, dtype=torch.int64), 1, 2)
    assert found.error_at_least == 0 < 0.1 < found.error_at_least_one_sided
    many = random_factors([2] * 400, 6, 6)  # 36 dimensions, of which a core has 25
    found = bounds(many, torch.zeros(400, dtype=torch.int64), 1, 5)
    assert found.error_at_least > found.error_at_least_one_sided > 0


@pytest.mark.parametrize("shared", [0, 5])
def test_lossless_rank_loses_nothing_and_a_smaller_one_does(shared):
    factors = random_factors([2, 3, 0, 1, 2, 4], 30, 26, shared=shared, seed=4)
    assignment = torch.tensor([0, 0, 0, 1, 1, 1])
    rank = bounds(factors, assignment, 2, 1).lossless_rank
    assert rank == (shared or 7)
    assert reached(factors, assignment, 2, rank, iterations=100) < 1e-6
    assert reached(factors, assignment, 2, rank - 1, iterations=100) > 1e-4
    at, below = (bounds(factors, assignment, 2, r) for r in (rank, rank - 1))
    assert at.error_at_least_one_sided < LOSSLESS < below.error_at_least_one_sided


def test_lossless_rank_sees_the_wider_side_and_not_the_rank_of_unused_rows():
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(12, 1, generator=generator)
    one_column = [(torch.randn(1, 20, generator=generator), column) for _ in range(6)]
    # Of rank 3 by its A, but B has one column only.
    wasteful = (torch.randn(3, 20, generator=generator), torch.cat([column, column, column], 1))
    factors = ModuleFactors.stack([*one_column, wasteful], 20, 12).normalised()[0]
    assert bounds(factors, torch.zeros(7, dtype=torch.int64), 1, 1).lossless_rank == 7


def test_absent_adapters_do_not_count_and_those_of_norm_0_count_as_lossless():
    plain = random_factors([2, 3, 4], 16, 12, seed=5)
    absent = random_factors([2, 0, 3, 4, 0], 16, 12, seed=5)
    torch.testing.assert_close(plain.a, absent.a)
    found = bounds(plain, torch.tensor([0, 1, 1]), 2, 2)
    assert bounds(absent, torch.tensor([0, -1, 1, 1, -1]), 2, 2) == found
    zero = ModuleFactors(
        torch.cat([plain.a, torch.ones(1, 16)]),
        torch.cat([plain.b, torch.zeros(1, 12)]),
        torch.tensor([2, 3, 4, 1]),
    )
    more = bounds(zero, torch.tensor([0, 1, 1, 1]), 2, 2)
    assert more.error_at_most == pytest.approx(found.error_at_most * 3 / 4)
    assert more.error_at_least_one_sided == pytest.approx(found.error_at_least_one_sided * 3 / 4)
    assert more.lossless_rank == found.lossless_rank


def test_a_module_without_factors_has_no_error():
    factors = random_factors([0] * 3, 16, 12)
    found = bounds(factors, torch.zeros(3, dtype=torch.int64), 2, 4)
    assert found == module.Bounds(0.0, 0.0, 0.0, 0)
    assert spectrum(factors, 3).tolist() == [0, 0, 0]


@property_test
@given(case=cases(), most=st.integers(1, 7), scale=st.floats(1e-3, 1e3))
def test_spectrum_is_the_mean_of_the_deltas_squared_singular_values(case, most, scale):
    factors = case[0]
    present = max(int((factors.ranks > 0).sum()), 1)
    expected = torch.linalg.svdvals(unit_deltas(factors)).square().sum(0) / present
    found = spectrum(ModuleFactors(scale * factors.a, factors.b, factors.ranks), most)
    assert found.dtype == torch.float32
    assert found.shape == (most,)
    torch.testing.assert_close(found, expected[:most].float(), rtol=0, atol=1e-7)
    assert float(found.sum()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("assignment", "clusters", "rank", "message"),
    [
        ([0, 0], 1, 0, "rank 0"),
        ([0, 0], 0, 1, "0 clusters"),
        ([0], 1, 1, "one cluster for each of the 2 adapters"),
        ([0, 2], 2, 1, "adapter 1 is in cluster 2: expected 0 to 1"),
        ([-1, 0], 2, 1, "adapter 0 is in cluster -1"),
    ],
)
def test_what_does_not_fit_is_refused(assignment, clusters, rank, message):
    with pytest.raises(ValueError, match=message):
        bounds(random_factors([1, 2], 8, 8), torch.tensor(assignment), clusters, rank)


def test_numbers_that_are_not_finite_are_refused():
    factors = random_factors([1, 2], 8, 8)
    factors.a[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"adapters \[1\] are not finite"):
        bounds(factors, torch.zeros(2, dtype=torch.int64), 1, 1)
    with pytest.raises(ValueError, match="most is 0"):
        spectrum(factors, 0)
