"""HydraOpt against dense float64 references: autograd, SVD, medians, plain Adam."""

import math

import pytest
import torch
from scipy.optimize import minimize

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods import hydraopt as module
from vllm_jd.compressor.methods.hydraopt import hydraopt, hydraopt_vera

D_IN, D_OUT = 20, 14
DISTANCES = ["mae", "frobenius"]


def randn(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stack(pairs):
    """`ModuleFactors` of a list of (B, A), or None where an adapter lacks the module."""
    return ModuleFactors.stack([p and (p[1], p[0]) for p in pairs], D_IN, D_OUT)


def real(make_factors, n, ranks=(2, 4), seed=0):
    shapes = {"m": (D_IN, D_OUT)}
    adapters = make_factors(n, kind="real", ranks=ranks, shapes=shapes, seed=seed)
    return [factors["m"] for factors in adapters]


def planted(groups, *, rank=3, seed=0, noise=0.0):
    """Adapters B_g·A of a shared A, split between B and A in ways of their own."""
    a = randn(rank, D_IN, seed=seed)
    bs = randn(max(groups) + 1, D_OUT, rank, seed=seed + 1)
    pairs = []
    for t, group in enumerate(groups):
        turn = torch.linalg.qr(randn(rank, rank, seed=100 + t)).Q * (0.5 + t)
        b = bs[group] + noise * randn(D_OUT, rank, seed=200 + t)
        pairs.append((b @ torch.linalg.inv(turn), turn @ a))
    return pairs


def distances(deltas, approximations, distance):
    lost = approximations - deltas
    return lost.abs().mean((1, 2)) if distance == "mae" else lost.flatten(1).norm(dim=1)


def dense(pairs):
    return torch.stack(
        [
            torch.zeros(D_OUT, D_IN).double() if p is None else p[0].double() @ p[1].double()
            for p in pairs
        ]
    )


def loss_of(fit, pairs, distance):
    """Σ_t D of the result, over the adapters that have the module."""
    present = fit.assignment >= 0
    found = fit.b[fit.assignment[present]].double().mT @ fit.a.double()
    return float(distances(dense(pairs)[present], found, distance).sum())


def same_groups(assignment, groups):
    pairs = set(zip(assignment.tolist(), groups, strict=True))
    return len(pairs) == len(set(groups)) == len(set(assignment.tolist()))


def autograd(deltas, product, distance, *inputs):
    """Loss and gradients of Σ_t D(deltas, product(*inputs)) by autograd, all in one piece."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = distances(deltas, product(*inputs), distance).sum()
    return float(loss.detach()), torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("block_rows", [1, 3, 14, 1000])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_equal_autograd_on_the_whole_products(
    make_factors, monkeypatch, distance, block_rows
):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_rows * D_IN * 8)
    pairs = real(make_factors, 5, ranks=(1, 3, 6))
    tasks = [(a.double(), b.T.double()) for b, a in pairs]
    a = randn(4, D_IN, dtype=torch.float64)
    mixed = randn(5, 4, D_OUT, seed=1, dtype=torch.float64)
    theirs = autograd(dense(pairs), lambda a, b: b.mT @ a, distance, a, mixed)
    measure = {"mae": module._mae, "frobenius": module._frobenius}[distance]
    loss, *gradients = measure(tasks, a, mixed)
    unit = 1 if distance == "mae" else math.sqrt(D_IN * D_OUT)
    assert loss * unit == pytest.approx(theirs[0], rel=1e-10)
    for found, expected in zip(gradients, theirs[1], strict=True):
        torch.testing.assert_close(found * unit, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block_rows", [1, 5, 1000])
@pytest.mark.parametrize("distance", DISTANCES)
def test_vera_gradients_equal_autograd_on_the_whole_products(monkeypatch, distance, block_rows):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_rows * D_IN * 8)
    n, r = 4, 6
    projection_a, projection_b, lambda_d, lambda_b, d, mixed = (
        randn(*size, seed=seed, dtype=torch.float64)
        for seed, size in enumerate([(r, D_IN), (D_OUT, r), (n, r), (n, D_OUT), (r,), (n, D_OUT)])
    )

    def product(d, b):
        return b[:, :, None] * (projection_b @ torch.diag(d) @ projection_a)

    deltas = torch.stack([product(lambda_d[t], lambda_b[t, None])[0] for t in range(n)])
    theirs = autograd(deltas, product, distance, d, mixed)
    measure = {"mae": module._vera_mae, "frobenius": module._vera_frobenius}[distance]
    loss, *gradients = measure(lambda_d, lambda_b, projection_a, projection_b, d, mixed)
    unit = 1 if distance == "mae" else math.sqrt(D_IN * D_OUT)
    assert loss * unit == pytest.approx(theirs[0], rel=1e-10)
    for found, expected in zip(gradients, theirs[1], strict=True):
        torch.testing.assert_close(found * unit, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("distance", DISTANCES)
def test_both_stages_follow_plain_adam_on_equation_1(make_factors, distance):
    """The same start, step for step, with autograd through softmax and whole products."""
    pairs, matrices, steps, tau, rate = real(make_factors, 6), 3, 20, 0.2, 0.02
    deltas = dense(pairs)
    tasks = [(a.double(), b.T.double()) for b, a in pairs]
    a, b = randn(2, D_IN, dtype=torch.float64), randn(3, 2, D_OUT, seed=1, dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    measure = {"mae": module._mae, "frobenius": module._frobenius}[distance]
    unit = 1 if distance == "mae" else math.sqrt(D_IN * D_OUT)
    ours = module._fit(
        a, b, groups, lambda x, y: measure(tasks, x, y), tau, steps, rate, 5, unit, None
    )

    noise = 0.1 * randn(6, matrices, seed=5)
    c = (tau * (noise + 2 * torch.nn.functional.one_hot(groups, matrices))).double()
    a, b, c = (x.clone().requires_grad_() for x in (a, b, c))
    losses = []
    for stage, count in (("soft", 12), ("hard", 8)):
        parameters = [a, b, c] if stage == "soft" else [a, b]
        adam = torch.optim.Adam(parameters, eps=0.0)
        best = math.inf
        for step in range(count + 1):
            weights = torch.softmax(c / tau, 1)
            if stage == "hard":
                weights = torch.nn.functional.one_hot(c.argmax(1), matrices).double()
            found = torch.einsum("tm,mro,ri->toi", weights, b, a)
            loss = distances(deltas, found, distance).sum()
            if float(loss.detach()) < best:
                best = float(loss.detach())
                kept = [p.detach().clone() for p in (a, b, c)]
            if step < count:
                losses.append(float(loss.detach()))
                adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / count)) / 2
                adam.zero_grad()
                loss.backward()
                adam.step()
        a, b, c = (x.requires_grad_() for x in kept)
    assert ours[3] == pytest.approx([*losses, best], rel=1e-6)
    assert ours[2].tolist() == c.argmax(1).tolist()
    torch.testing.assert_close(ours[0], a.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_one_adapter_in_the_frobenius_norm_is_its_truncated_svd(make_factors, rank):
    pairs = real(make_factors, 1, ranks=(6,))
    fit = hydraopt(stack(pairs), 1, rank=rank, distance="frobenius")
    best = float(torch.linalg.svdvals(dense(pairs)[0])[rank:].norm())
    assert best * (1 - 1e-6) <= fit.losses[-1] <= best * (1 + 1e-4)


def test_one_matrix_of_full_rank_is_the_median_of_the_adapters(make_factors):
    """Σ_t |W_t − X| is least, entry by entry, at the median."""
    pairs = real(make_factors, 5)
    fit = hydraopt(stack(pairs), 1, rank=D_OUT, steps=400)
    deltas = dense(pairs)
    median = deltas.median(0).values
    best = float((deltas - median).abs().mean((1, 2)).sum())
    assert best * (1 - 1e-6) <= fit.losses[-1] <= best * 1.01


def test_one_matrix_of_full_rank_is_the_geometric_median(make_factors):
    pairs = real(make_factors, 5)
    fit = hydraopt(stack(pairs), 1, rank=D_OUT, distance="frobenius", steps=400)
    deltas = dense(pairs)

    def objective(x):
        point = torch.from_numpy(x).view(D_OUT, D_IN).requires_grad_()
        loss = (deltas - point).flatten(1).norm(dim=1).sum()
        (gradient,) = torch.autograd.grad(loss, point)
        return float(loss.detach()), gradient.flatten().numpy()

    best = minimize(objective, deltas.mean(0).flatten().numpy(), jac=True, method="L-BFGS-B").fun
    assert best * (1 - 1e-3) <= fit.losses[-1] <= best * (1 + 1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_planted_shared_a_and_its_groups_are_found(distance, noise):
    groups = [0, 1, 2, 0, 1, 2, 0, 0]
    pairs = planted(groups, noise=noise)
    fit = hydraopt(stack(pairs), 3, rank=3, distance=distance)
    assert same_groups(fit.assignment, groups)
    nothing = float(distances(dense(pairs), torch.zeros(D_OUT, D_IN), distance).sum())
    assert fit.losses[-1] <= (0.06 if noise else 1e-3) * nothing
    assert loss_of(fit, pairs, distance) == pytest.approx(
        fit.losses[-1], rel=1e-3, abs=1e-6 * nothing
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_more_matrices_lose_less(make_factors, distance):
    pairs = real(make_factors, 8)
    factors = stack(pairs)
    finals = []
    for matrices in (1, 2, 4, 8):
        fit = hydraopt(factors, matrices, rank=6, distance=distance, steps=100)
        assert fit.a.shape == (6, D_IN)
        assert fit.b.shape == (matrices, 6, D_OUT)
        assert fit.a.dtype == fit.b.dtype == torch.float32
        assert loss_of(fit, pairs, distance) == pytest.approx(fit.losses[-1], rel=1e-4)
        finals.append(fit.losses[-1])
    assert finals == sorted(finals, reverse=True)
    assert finals[-1] < 0.8 * finals[0]


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_plain_run_from_gaussian_factors_is_no_better(make_factors, distance):
    """Plain Adam on eq. 1 as the paper writes it, 2.5 times the steps, best of two starts."""
    pairs, matrices, rank, tau = real(make_factors, 8), 3, 4, 0.1
    ours = hydraopt(stack(pairs), matrices, rank=rank, distance=distance).losses[-1]
    deltas = dense(pairs)
    size = float(deltas.square().mean().sqrt())
    theirs = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in [(rank, D_IN), (matrices, rank, D_OUT), (8, matrices)]
        )
        adam = torch.optim.Adam([a, b, c], lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 500)
        for _ in range(500):
            adam.zero_grad()
            mixed = torch.einsum("tm,mro->tro", torch.softmax(c / tau, 1), b)
            distances(deltas / size, mixed.mT @ a, distance).sum().backward()
            adam.step()
            schedule.step()
        kept = (b[c.argmax(1)].mT @ a).detach()
        theirs.append(float(distances(deltas, size * kept, distance).sum()))
    assert ours <= 1.005 * min(theirs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_closing_stage_lowers_the_loss_of_the_kept_matrices(make_factors, distance):
    fit = hydraopt(stack(real(make_factors, 10)), 4, rank=4, distance=distance, steps=100)
    assert len(fit.losses) == 101
    assert fit.losses[-1] == min(fit.losses[60:])
    assert fit.losses[-1] < 0.999 * fit.losses[60]  # the first after the argmax


@pytest.mark.parametrize("distance", DISTANCES)
def test_missing_and_zero_adapters_and_ranks_that_differ(make_factors, distance):
    pairs = real(make_factors, 5, ranks=(1, 3, 6))
    zero = (torch.zeros(D_OUT, 2), randn(2, D_IN))
    mixed = [None, *pairs[:2], None, *pairs[2:], zero]
    fit = hydraopt(stack(mixed), 3, rank=5, distance=distance)
    assert (fit.assignment == -1).tolist() == [pair is None for pair in mixed]
    assert loss_of(fit, mixed, distance) == pytest.approx(fit.losses[-1], rel=1e-4)
    plain = hydraopt(stack([*pairs, zero]), 3, rank=5, distance=distance)
    assert torch.equal(plain.assignment, fit.assignment[fit.assignment >= 0])
    assert torch.equal(plain.b, fit.b)


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_more_adapters_than_matrices_get_one_each(make_factors, distance):
    pairs = real(make_factors, 2)
    fit = hydraopt(stack([None, pairs[0], None, pairs[1]]), 4, rank=8, distance=distance)
    assert fit.assignment.tolist() == [-1, 0, -1, 1]
    assert not fit.b[2:].any()
    nothing = float(distances(dense(pairs), torch.zeros(D_OUT, D_IN), distance).sum())
    assert fit.losses[-1] < 1e-4 * nothing  # rank 8 holds both


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_adapter_or_only_zero_adapters_give_zeros(distance):
    empty = hydraopt(stack([None, None]), 2, rank=3, distance=distance)
    assert empty.assignment.tolist() == [-1, -1]
    assert not empty.a.any()
    assert not empty.b.any()
    zero = (torch.zeros(D_OUT, 2), randn(2, D_IN))
    fit = hydraopt(stack([zero] * 3), 2, rank=3, distance=distance, steps=10)
    assert loss_of(fit, [zero] * 3, distance) == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_adapters_that_are_all_the_same_cost_nothing(make_factors, distance):
    pairs = real(make_factors, 1, ranks=(4,)) * 4
    fit = hydraopt(stack(pairs), 2, rank=4, distance=distance)
    nothing = float(distances(dense(pairs), torch.zeros(D_OUT, D_IN), distance).sum())
    assert loss_of(fit, pairs, distance) < 1e-3 * nothing


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_rank_beyond_the_layer_is_padded_with_zeros(make_factors, distance):
    pairs = real(make_factors, 3)
    fit = hydraopt(stack(pairs), 3, rank=30, distance=distance, steps=20)
    used = int(stack(pairs).ranks.sum())
    assert not fit.a[used:].any()
    assert not fit.b[:, used:].any()
    nothing = float(distances(dense(pairs), torch.zeros(D_OUT, D_IN), distance).sum())
    assert fit.losses[-1] < 1e-4 * nothing


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("factor", [0.01, 64.0])
def test_scaling_all_adapters_scales_the_result(make_factors, distance, factor):
    pairs = real(make_factors, 6)
    scaled = [(b * factor, a) for b, a in pairs]
    one, other = (
        hydraopt(stack(p), 3, rank=4, distance=distance, steps=40) for p in (pairs, scaled)
    )
    assert torch.equal(one.assignment, other.assignment)
    assert [factor * x for x in one.losses] == pytest.approx(other.losses, rel=1e-3)
    assert loss_of(other, scaled, distance) == pytest.approx(other.losses[-1], rel=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_what_an_adapter_scales_up_in_b_and_down_in_a_counts_for_nothing(make_factors, distance):
    pairs = real(make_factors, 6)
    turned = [(b * 4.0 ** (t - 3), a / 4.0 ** (t - 3)) for t, (b, a) in enumerate(pairs)]
    one, other = (
        hydraopt(stack(p), 3, rank=4, distance=distance, steps=40) for p in (pairs, turned)
    )
    assert one.losses == pytest.approx(other.losses, rel=1e-3)


def test_the_size_of_a_block_changes_rounding_only(make_factors, monkeypatch):
    factors = stack(real(make_factors, 6))
    fits = []
    for rows in (1, 4, 1000):
        monkeypatch.setattr(module, "_BLOCK_BYTES", rows * D_IN * 4)
        fits.append(hydraopt(factors, 3, rank=4, steps=40))
    for fit in fits[1:]:
        assert torch.equal(fit.assignment, fits[0].assignment)
        assert fit.losses == pytest.approx(fits[0].losses, rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_same_seed_gives_the_same_bits(make_factors, distance):
    factors = stack(real(make_factors, 6))
    torch.manual_seed(1)
    one = hydraopt(factors, 3, rank=4, distance=distance, steps=20)
    torch.manual_seed(2)
    again = hydraopt(factors, 3, rank=4, distance=distance, steps=20)
    assert torch.equal(one.a, again.a)
    assert torch.equal(one.b, again.b)
    assert one.losses == again.losses


def test_every_step_is_reported(make_factors):
    seen = []
    fit = hydraopt(
        stack(real(make_factors, 4)), 2, rank=3, steps=7, on_step=lambda *step: seen.append(step)
    )
    assert seen == list(enumerate(fit.losses[:-1], start=1))


@pytest.mark.parametrize(
    ("matrices", "wrong", "message"),
    [
        (0, {}, "matrices is 0; with 3 adapters choose 1 to 3"),
        (4, {}, "matrices is 4"),
        (2, {"rank": 0}, "rank is 0"),
        (2, {"distance": "mse"}, 'choose "mae" or "frobenius"'),
        (2, {"steps": 0}, "steps is 0"),
        (2, {"temperature": 0.0}, "temperature is 0.0"),
        (2, {"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_a_wrong_argument_is_named(make_factors, matrices, wrong, message):
    with pytest.raises(ValueError, match=message):
        hydraopt(stack(real(make_factors, 3)), matrices, **({"rank": 2} | wrong))


def vera(groups, *, r=8, noise=0.0):
    """λ_d, λ_b, A, B: a λ_d common to all up to a factor, one λ_b a group."""
    n = len(groups)
    size = torch.linspace(0.5, 2, n)[:, None]
    d = 0.1 + 0.03 * randn(r, seed=1)
    lambda_d = (d + noise * randn(n, r, seed=2)) * size
    lambda_b = (randn(max(groups) + 1, D_OUT, seed=3)[groups] + noise * randn(n, D_OUT)) / size
    return lambda_d, lambda_b, randn(r, D_IN, seed=4), randn(D_OUT, r, seed=5)


def vera_deltas(lambda_d, lambda_b, projection_a, projection_b):
    return torch.stack(
        [
            torch.diag(b) @ projection_b.double() @ torch.diag(d) @ projection_a.double()
            for d, b in zip(lambda_d.double(), lambda_b.double(), strict=True)
        ]
    )


def vera_loss(fit, vectors, distance):
    n = len(vectors[0])
    found = vera_deltas(fit.d.expand(n, -1), fit.b[fit.assignment], *vectors[2:])
    return float(distances(vera_deltas(*vectors), found, distance).sum())


@pytest.mark.parametrize("distance", DISTANCES)
def test_vera_planted_vectors_are_found(distance):
    groups = [0, 1, 1, 0, 2, 2, 0]
    vectors = vera(groups)
    fit = hydraopt_vera(*vectors, 3, distance=distance)
    assert same_groups(fit.assignment, groups)
    nothing = float(distances(vera_deltas(*vectors), torch.zeros(D_OUT, D_IN), distance).sum())
    assert vera_loss(fit, vectors, distance) < 1e-3 * nothing


@pytest.mark.parametrize("distance", DISTANCES)
def test_vera_with_more_vectors_loses_less(distance):
    vectors = vera([0, 1, 2, 3, 4, 5], noise=0.02)
    finals = []
    for matrices in (1, 2, 4, 6):
        fit = hydraopt_vera(*vectors, matrices, distance=distance, steps=100)
        assert fit.d.shape == (8,)
        assert fit.b.shape == (matrices, D_OUT)
        assert vera_loss(fit, vectors, distance) == pytest.approx(fit.losses[-1], rel=1e-4)
        finals.append(fit.losses[-1])
    assert finals == sorted(finals, reverse=True)
    scaled = (vectors[0], 100 * vectors[1], *vectors[2:])
    other = hydraopt_vera(*scaled, 6, distance=distance, steps=100)
    assert other.losses[-1] == pytest.approx(100 * finals[-1], rel=1e-3)


def test_vera_shapes_that_do_not_fit_are_named():
    lambda_d, lambda_b, projection_a, projection_b = vera([0, 1])
    with pytest.raises(ValueError, match=r"lambda_b has the shape \(2, 3\)"):
        hydraopt_vera(lambda_d, lambda_b[:, :3], projection_a, projection_b, 1)
    with pytest.raises(ValueError, match="matrices is 3"):
        hydraopt_vera(lambda_d, lambda_b, projection_a, projection_b, 3)
