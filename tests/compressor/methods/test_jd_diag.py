"""JD-Diag against a dense float64 reference that shares no code with it, and against L-BFGS."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods import jd_diag as module
from vllm_jd.compressor.methods.jd_diag import RIDGE, _core_step, jd_diag
from vllm_jd.compressor.methods.jd_full import jd_full

D_IN, D_OUT = 40, 28

property_test = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def diagonal_cores(factors, u, v):
    """The method's own cores for any bases: least squares with its ridge, float32 `[n, rank]`."""
    u, v = u.float(), v.float()
    return _core_step(factors, u, v, factors.b @ u, factors.a @ v)[0].float()


def stack(adapters, d_in=D_IN, d_out=D_OUT):
    """`ModuleFactors` of a list of (B, A), or None where an adapter lacks the module."""
    pairs = [None if pair is None else (pair[1], pair[0]) for pair in adapters]
    return ModuleFactors.stack(pairs, d_in, d_out)


def dense(factors):
    """B_iA_i of every adapter, float64 `[n, d_out, d_in]`."""
    deltas, row = [], 0
    for rank in factors.ranks.tolist():
        rows = slice(row, row + rank)
        deltas.append(factors.b[rows].double().T @ factors.a[rows].double())
        row += rank
    return torch.stack(deltas)


def best_cores(deltas, u, v):
    """diag(Σ_i) by least squares on the d_out·d_in equations themselves: `[n, rank]`."""
    columns = torch.einsum("or,ir->oir", u, v).flatten(0, 1)
    return (torch.linalg.pinv(columns) @ deltas.flatten(1).T).T


def lost(deltas, u, v, s):
    """Σ‖B_iA_i − UΣ_iVᵀ‖² / Σ‖B_iA_i‖²."""
    rebuilt = torch.einsum("or,nr,ir->noi", u.double(), s.double(), v.double())
    return float((deltas - rebuilt).square().sum() / deltas.square().sum())


def error(factors, u, v):
    return lost(dense(factors), u, v, diagonal_cores(factors, u, v))


def reference(deltas, u, v, iterations):
    """The paper's loop (A.1, case 2), adapter by adapter."""
    s = best_cores(deltas, u, v)
    for _ in range(iterations):
        diagonals = [torch.diag(x) for x in s]
        left = sum(d @ v @ c for d, c in zip(deltas, diagonals, strict=True))
        u = left @ torch.linalg.inv(sum(c @ v.T @ v @ c for c in diagonals))
        right = sum(d.T @ u @ c for d, c in zip(deltas, diagonals, strict=True))
        v = right @ torch.linalg.inv(sum(c @ u.T @ u @ c for c in diagonals))
        gram = torch.linalg.inv((u.T @ u) * (v.T @ v))
        s = torch.stack([gram @ ((u.T @ d) * v.T).sum(1) for d in deltas])
        scale = s.norm()
        s, u = s / scale, u * scale
    return u, v, s


def lbfgs(deltas, u, v, s, steps=150):
    """The smallest error that L-BFGS on all three blocks finds from here."""
    found = [x.double().clone().requires_grad_() for x in (u, v, s)]
    optimiser = torch.optim.LBFGS(
        found,
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective():
        rebuilt = torch.einsum("or,nr,ir->noi", *(found[0], found[2], found[1]))
        return (deltas - rebuilt).square().sum()

    def closure():
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)
    return float(objective().detach() / deltas.square().sum())


def random_start(rank, seed=0, d_in=D_IN, d_out=D_OUT):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(d_out, rank, generator=generator),
        torch.randn(d_in, rank, generator=generator),
    )


def module_factors(make_factors, n, **options):
    adapters = make_factors(n, shapes={"m": (D_IN, D_OUT)}, **options)
    return stack([factors["m"] for factors in adapters]).normalised()[0]


def planted(n, rank, *, each=3, seed=0, common=0.0):
    """Adapters that are sums of `each` out of `rank` rank-1 terms; (factors, U, V).

    `common` adds so much of one vector to all columns: terms that are hard to tell apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def basis(d):
        x = torch.randn(d, rank, generator=generator)
        return torch.nn.functional.normalize(
            x + common * torch.randn(d, 1, generator=generator), dim=0
        )

    u, v = basis(D_OUT), basis(D_IN)
    pairs = []
    for i in range(n):
        picked = (torch.arange(each) + i) % rank
        pairs.append((u[:, picked] * torch.randn(each, generator=generator), v[:, picked].T))
    return stack(pairs).normalised()[0], u, v


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("ranks", [(4,), (1, 3, 8)])
def test_sweeps_are_those_of_the_paper(make_factors, monkeypatch, iterations, kind, ranks):
    monkeypatch.setattr(module, "TOLERANCE", -1.0)  # no early end
    factors = module_factors(make_factors, 12, kind=kind, ranks=ranks)
    deltas = dense(factors)
    start = random_start(5)
    u, v = jd_diag(factors, 5, iterations=iterations, start=start)
    s = diagonal_cores(factors, u, v)
    theirs = reference(deltas, *(x.double() for x in start), iterations)
    assert lost(deltas, u, v, s) == pytest.approx(lost(deltas, *theirs), rel=1e-4)
    rebuilt = torch.einsum("or,nr,ir->noi", u, s, v).double()
    expected = torch.einsum("or,nr,ir->noi", theirs[0], theirs[2], theirs[1])
    assert (rebuilt - expected).norm() < 2e-3 * expected.norm()


def test_diagonal_cores_are_the_least_squares_solution(make_factors):
    factors = module_factors(make_factors, 9, ranks=(2, 5))
    u, v = random_start(6, seed=3)
    expected = best_cores(dense(factors), u.double(), v.double())
    found = diagonal_cores(factors, u, v)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_diagonal_cores_of_dependent_and_zero_columns_lose_nothing(make_factors, scale):
    factors = module_factors(make_factors, 9, ranks=(2, 5))
    deltas = dense(factors)
    u, v = random_start(4)
    zeros = torch.zeros(1, 1)
    twice_u = torch.cat([u, -2 * scale * u, zeros.expand(D_OUT, 1)], dim=1)
    twice_v = torch.cat([v, v, v[:, :1]], dim=1)
    s = diagonal_cores(factors, twice_u, twice_v)
    assert bool(s.isfinite().all())
    assert not s[:, -1].any()
    expected = lost(deltas, u, v, best_cores(deltas, u.double(), v.double()))
    assert lost(deltas, twice_u, twice_v, s) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("rank", [3, 8, 34])
def test_no_block_raises_the_objective(make_factors, monkeypatch, kind, rank):
    """Error + ridge after U, after V and after the cores, from each solve on dense matrices."""
    factors = module_factors(make_factors, 12, kind=kind, ranks=(2, 5))
    deltas = dense(factors)
    steps, solve = [], module._solve

    def recorded(gram, right):
        steps.append(solve(gram, right))
        return steps[-1]

    monkeypatch.setattr(module, "_solve", recorded)
    u, v = (torch.nn.functional.normalize(x, dim=0) for x in random_start(rank))
    jd_diag(factors, rank, iterations=12, start=(u, v))
    blocks = {"u": u.double(), "v": v.double()}
    history = []
    for i, step in enumerate(steps):
        block = ("s", "u", "v")[i % 3]
        if block == "s":
            blocks |= {name: blocks[name] / blocks[name].norm(dim=0) for name in ("u", "v")}
        if block == "v":  # solved for unit columns of U, with their norms left to V
            blocks["u"] = blocks["u"] / blocks["u"].norm(dim=0)
        blocks[block] = step
        u, v, s = blocks["u"], blocks["v"], blocks["s"]
        ridge = (s * u.norm(dim=0) * v.norm(dim=0)).square().sum() / deltas.square().sum()
        history.append(lost(deltas, u, v, s) + RIDGE * float(ridge))
    assert len(history) > 9
    assert history[0] <= 1
    assert history[-1] < 0.95 * history[0]
    for before, after in itertools.pairwise(history):
        assert after <= before + 2e-7


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("kind", ["random", "real"])
def test_lbfgs_cannot_improve_what_was_found(make_factors, kind, rank):
    for seed in range(2):
        factors = module_factors(make_factors, 10, kind=kind, ranks=(2, 4), seed=seed)
        deltas = dense(factors)
        u, v = jd_diag(factors, rank, iterations=100)
        s = diagonal_cores(factors, u, v)
        assert lost(deltas, u, v, s) <= 1.002 * lbfgs(deltas, u, v, s), seed


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("kind", ["random", "real"])
def test_ten_sweeps_come_close_to_the_best_of_many_descents(make_factors, kind, rank):
    factors = module_factors(make_factors, 10, kind=kind, ranks=(2, 4), seed=5)
    deltas = dense(factors)
    descents = []
    for seed in range(4):
        u, v = random_start(rank, seed)
        descents.append(lbfgs(deltas, u, v, diagonal_cores(factors, u, v)))
    assert error(factors, *jd_diag(factors, rank)) <= 1.01 * min(descents)


@pytest.mark.parametrize("rank", [4, 12, 32])
def test_a_planted_decomposition_is_found(rank):
    factors, u, v = planted(3 * rank, rank)
    found_u, found_v = jd_diag(factors, rank, iterations=30)
    assert error(factors, found_u, found_v) < 1e-6
    # CP is unique here (Kruskal): the same columns up to order and sign.
    match = ((found_u.T @ u) * (found_v.T @ v)).abs()
    assert sorted(match.argmax(0).tolist()) == list(range(rank))
    assert match.amax(0).min() > 0.999


def test_a_planted_decomposition_of_similar_terms_is_found():
    factors, _, _ = planted(30, 8, common=1.5)
    assert error(factors, *jd_diag(factors, 8)) < 1e-5


@pytest.mark.parametrize("rank", [20, 64])
def test_lossless_where_every_rank_1_term_has_a_column(make_factors, rank):
    factors = module_factors(make_factors, 5, ranks=(1, 3, 8, 4, 4))  # 20 terms
    u, v = jd_diag(factors, rank)
    assert u.shape == (D_OUT, rank)
    assert v.shape == (D_IN, rank)
    assert u.dtype == v.dtype == torch.float32
    assert error(factors, u, v) < 1e-6


def test_one_adapter_gets_its_own_truncated_svd(make_factors):
    factors = module_factors(make_factors, 1, ranks=(8,))
    values = torch.linalg.svdvals(dense(factors)[0]).square()
    best = float(values[3:].sum() / values.sum())
    assert error(factors, *jd_diag(factors, 3)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_not_closer_than_jd_full_and_closer_at_equal_parameters(make_factors, rank):
    """A diagonal core is a special full one; here it is the cheaper one, as n is large."""
    factors = module_factors(make_factors, 60, ranks=(4,))
    deltas = dense(factors)

    def full_error(r):
        u, v = (x.double() for x in jd_full(factors, r, iterations=50))
        return 1 - float((u.T @ deltas @ v).square().sum() / deltas.square().sum())

    diagonal = error(factors, *jd_diag(factors, rank))
    assert diagonal >= full_error(rank) - 1e-3
    parameters = rank * (D_IN + D_OUT + len(factors))
    smaller = max(
        r for r in range(1, rank + 1) if r * (D_IN + D_OUT) + len(factors) * r**2 <= parameters
    )
    assert diagonal < full_error(smaller)


def test_cores_stay_small_where_the_best_approximation_does_not_exist():
    """x⊗x⊗y + x⊗y⊗x + y⊗x⊗x has rank 3 and comes as close as one likes to rank 2."""
    x, y = torch.eye(4)[:2]
    first, second = torch.outer(x, y) + torch.outer(y, x), torch.outer(x, x)
    factors = stack([(first, torch.eye(4)), (second, torch.eye(4))], 4, 4)
    u, v = jd_diag(factors, 2, iterations=200)
    s = diagonal_cores(factors, u, v)
    assert s.square().sum() < 0.1 / RIDGE
    assert lost(dense(factors), u, v, s) < 0.05
    rounded = [z.bfloat16() for z in (u, v, s)]
    assert lost(dense(factors), *rounded) < 0.1


def test_absent_and_zero_adapters_change_nothing_for_the_others(make_factors):
    pairs = [f["m"] for f in make_factors(6, kind="real", shapes={"m": (D_IN, D_OUT)})]
    zero = (torch.zeros(D_OUT, 4), torch.randn(4, D_IN, generator=torch.Generator().manual_seed(0)))
    plain = stack(pairs).normalised()[0]
    mixed = stack([None, *pairs[:3], zero, None, *pairs[3:]]).normalised()[0]
    start = random_start(4)
    for options in ({"start": start}, {}):
        found, expected = (jd_diag(f, 4, **options) for f in (mixed, plain))
        assert all(bool(x.isfinite().all()) for x in found)
        assert not diagonal_cores(mixed, *found)[[0, 4, 5]].any()
        assert error(mixed, *found) == pytest.approx(error(plain, *expected), rel=0.01)


@pytest.mark.parametrize(
    "pairs",
    [
        [(torch.zeros(D_OUT, 2), torch.ones(2, D_IN))] * 2,
        [(torch.zeros(D_OUT, 2), torch.zeros(2, D_IN)), None],
        [None, None],
    ],
    ids=["zero", "zero-and-absent", "absent"],
)
def test_nothing_to_fit_gives_finite_bases_and_zero_cores(pairs):
    factors = stack(pairs).normalised()[0]
    for options in ({}, {"start": random_start(4)}):
        u, v = jd_diag(factors, 4, **options)
        assert u.shape == (D_OUT, 4)
        assert v.shape == (D_IN, 4)
        assert bool(u.isfinite().all() and v.isfinite().all())
        assert diagonal_cores(factors, u, v).tolist() == [[0.0] * 4] * len(pairs)


def test_the_same_seed_gives_the_same_bits_and_another_a_similar_error(make_factors):
    factors = module_factors(make_factors, 12, kind="real", ranks=(2, 5))
    first, again, other = (jd_diag(factors, 4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert error(factors, *first) == pytest.approx(error(factors, *other), rel=0.02)


@property_test
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 8),
    rank=st.integers(1, 45),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    kind=st.sampled_from(["random", "real"]),
)
def test_columns_are_unit_and_more_sweeps_never_lose(make_factors, seed, n, rank, ranks, kind):
    factors = module_factors(make_factors, n, kind=kind, ranks=ranks, seed=seed)
    last = 1.0
    start = random_start(rank, seed)
    for iterations in (0, 1, 3, 9):
        u, v = jd_diag(factors, rank, iterations=iterations, start=start)
        for norms in (u.norm(dim=0), v.norm(dim=0)):
            assert bool(((norms - 1).abs().lt(1e-5) | norms.eq(0)).all())
        if factors.a.shape[0]:
            found = error(factors, u, v)
            assert found <= last + 2 * RIDGE * float(diagonal_cores(factors, u, v).square().sum())
            last = found


@property_test
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-4, 1e4),
    n=st.integers(2, 7),
    rank=st.integers(1, 8),
)
def test_order_and_scale_of_the_input_do_not_matter(make_factors, seed, scale, n, rank):
    """One factor for all adapters, scaled and swapped columns of the start, another order."""
    generator = torch.Generator().manual_seed(seed)
    adapters = make_factors(n, kind="real", ranks=(1, 4), seed=seed, shapes={"m": (D_IN, D_OUT)})
    pairs = [factors["m"] for factors in adapters]
    plain = stack(pairs).normalised()[0]
    start_u, start_v = random_start(rank, seed)
    expected_u, expected_v = jd_diag(plain, rank, iterations=2, start=(start_u, start_v))
    expected_s = diagonal_cores(plain, expected_u, expected_v)

    order = torch.randperm(n, generator=generator)
    columns = torch.randperm(rank, generator=generator)
    shuffled = stack([pairs[i] for i in order.tolist()]).normalised()[0]
    moved = ModuleFactors(shuffled.a, shuffled.b * scale, shuffled.ranks)
    start = (start_u[:, columns] * scale, start_v[:, columns] / scale)
    u, v = jd_diag(moved, rank, iterations=2, start=start)
    s = diagonal_cores(moved, u, v)
    rebuilt = torch.einsum("or,nr,ir->noi", u, s / scale, v)
    expected = torch.einsum("or,nr,ir->noi", expected_u, expected_s, expected_v)[order]
    assert (rebuilt - expected).norm() < 5e-3 * expected.norm()
