"""HydraOpt: one matrix A' for all adapters of a module, and M matrices B' that they share.

HydraOpt (Ceritli et al., 2025), section 3.2. For T adapters and 1 < M < T it minimises

    Σ_t D(B_tA_t, Σ_m softmax(c_t / τ)_m B'_m A')                                   (eq. 1)

over A', B'_1..M and the coefficients c with Adam; then adapter t keeps B'_m with m = argmax c_t.
With M = T each adapter has a B' of its own (eq. 2), with M = 1 all have the same; neither needs
coefficients. D is the mean absolute error or the Frobenius norm.

What the paper leaves open was settled by trials on 20 trained adapters of SmolLM2-135M:

- Start: A' from the singular vectors of the stacked adapters, B' from the means of Ward clusters
  of the adapters' least-squares B, c Gaussian with a lean to the own cluster. From Gaussian A',
  B' and c the objective ended 4 to 17 % higher (one module, M = 2, 5 and 10 of 20 adapters).
- Learning rate: cosine decay to 0, after scaling the problem so that the entries of the B_tA_t
  have a root mean square of 1, and each row of A' that of its row of B'.
- Second stage: the last 40 % of the steps go on from the argmax without coefficients. That takes
  0.1 to 11 % off the objective after the argmax.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors, VeraFactors
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.methods.options import Options, option
from vllm_jd.row import CORE_NONE

Distance = Literal["mae", "frobenius"]

TEMPERATURE = 0.1
STEPS = 200
LEARNING_RATE = 0.03
_SOFT_PART = 0.6  # of the steps are with coefficients
_LEAN = 2.0  # of the first c_t / τ to the own cluster
_NOISE = 0.1  # standard deviation of the first c / τ
_BLOCK_BYTES = 2**23  # of one block of rows of a product; the speed is flat from 1 to 64 MB

# (shared, every adapter's own part) → Σ_t D and its gradients for both
_Measured = tuple[float, torch.Tensor, torch.Tensor]
_Objective = Callable[[torch.Tensor, torch.Tensor], _Measured]
_Report = Callable[[int, float], None]


@dataclass(frozen=True)
class HydraOptOptions(Options):
    """Those of equation 1."""

    rank: int = option(16, "Rank of A and of each B.", least=1)
    matrices: int = option(1, "HydraOpt's M: matrices B to choose from.", least=1)
    temperature: float = option(TEMPERATURE, "Of HydraOpt's softmax.", above=0)
    distance: Distance = option("mae", "What HydraOpt minimises.")
    steps: int = option(STEPS, "Of HydraOpt's optimiser.", least=1)


class HydraFit(NamedTuple):
    """The delta of adapter t is `b[assignment[t]]ᵀ · a`.

    `a` float32 `[rank, d_in]` and `b` float32 `[M, rank, d_out]` hold basis vectors as rows.
    `assignment` is int64 `[n]`, -1 for an adapter without a factor in this module. A matrix that
    no adapter keeps is 0. `losses` holds the objective before each step, in the unit of the
    adapters' entries (mae) or norms (frobenius), and last that of this very result.
    """

    a: torch.Tensor
    b: torch.Tensor
    assignment: torch.Tensor
    losses: list[float]


class VeraFit(NamedTuple):
    """The delta of adapter t is `diag(b[assignment[t]]) · B · diag(d) · A`, B and A as given.

    `d` float32 `[r]`, `b` float32 `[M, d_out]`; `assignment` and `losses` as in `HydraFit`.
    """

    d: torch.Tensor
    b: torch.Tensor
    assignment: torch.Tensor
    losses: list[float]


def hydraopt(
    factors: ModuleFactors,
    matrices: int,
    *,
    rank: int,
    temperature: float = TEMPERATURE,
    distance: Distance = "mae",
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: _Report | None = None,
) -> HydraFit:
    """Merge the adapters of one module into one A' and `matrices` B' (section 3.2).

    Scaling all adapters by one factor scales the result by it. No product B_tA_t is ever whole in
    memory: "mae" forms blocks of at most 8 MB of its rows (one row, if that is longer), one
    adapter at a time; "frobenius" needs r×r Gram products only. Beside this, memory is about ten
    times n·rank·d_out numbers and twice `factors` (all in float64 for "frobenius"), and for the
    start a few square float64 matrices of min(Σ ranks, d_in). A "mae" step takes about
    8·n·d_in·d_out·rank operations.

    Args:
        factors: with the norms that the deltas have (not normalised): the sum over adapters in
            eq. 1 is over them.
        matrices: M, 1 to n. Where no more than M adapters have a factor, each has its own.
        rank: of A' and of each B'.
        temperature: τ. The coefficients start in units of it.
        distance: "mae", the mean of the absolute differences, or "frobenius", the norm of the
            difference (not squared), of each adapter.
        steps: of Adam, both stages together.
        learning_rate: the first of a cosine decay, for factors with entries about 1.
        seed: of the coefficients' start.
        on_step: called with (steps done, objective before this step).

    Raises:
        ValueError: an argument out of its range.
    """
    _check(matrices, len(factors), temperature, distance, steps, learning_rate)
    if rank < 1:
        raise ValueError(f"rank is {rank}; HydraOpt needs a rank of at least 1.")
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    present = (factors.ranks > 0).nonzero()[:, 0]
    assignment = torch.full_like(factors.ranks, -1)
    a = factors.a.new_zeros(rank, d_in)
    b = factors.b.new_zeros(matrices, rank, d_out)
    if len(present) == 0:
        return HydraFit(a, b, assignment, [])

    # The common scale: the root mean square of all entries of all deltas.
    power = float(factors.squared_norms()[present].clamp_min(0).mean()) / (d_in * d_out)
    scale = math.sqrt(power) or 1.0
    dtype = torch.float32 if distance == "mae" else torch.float64
    ranks = factors.ranks[present].tolist()
    tasks = list(
        zip(
            factors.a.to(dtype).split(ranks),
            (factors.b.to(dtype) / scale).split(ranks),
            strict=True,
        )
    )
    shared, own, groups = _start(tasks, matrices, rank)
    measure = _mae if distance == "mae" else _frobenius
    unit = scale if distance == "mae" else scale * math.sqrt(d_in * d_out)
    shared, own, kept, losses = _fit(
        shared,
        own,
        groups,
        lambda shared, mixed: measure(tasks, shared, mixed),
        temperature,
        steps,
        learning_rate,
        seed,
        unit,
        on_step,
    )
    assignment[present] = kept.to(present.device)
    a.copy_(shared)
    b[: len(own)] = own.float() * scale
    return HydraFit(a, b, assignment, losses)


def hydraopt_vera(
    lambda_d: torch.Tensor,
    lambda_b: torch.Tensor,
    projection_a: torch.Tensor,
    projection_b: torch.Tensor,
    matrices: int,
    *,
    temperature: float = TEMPERATURE,
    distance: Distance = "mae",
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: _Report | None = None,
) -> VeraFit:
    """Merge VeRA adapters of one module: one vector d for all, `matrices` vectors b.

    The delta of adapter t is diag(lambda_b[t]) · B · diag(lambda_d[t]) · A with frozen B and A,
    which all adapters share and which stay as they are (section 4.2, "Different low-rank-based
    adapter types"). d takes the part of A', which starts alike in all adapters, and b that of B',
    which starts at 0. Memory: the inputs several times, and blocks as in `hydraopt`.

    Args:
        lambda_d: float32 `[n, r]`, PEFT's `vera_lambda_d`.
        lambda_b: float32 `[n, d_out]`, PEFT's `vera_lambda_b`.
        projection_a: A, float32 `[r, d_in]`, PEFT's `vera_A` cut to the layer.
        projection_b: B, float32 `[d_out, r]`, PEFT's `vera_B` cut to the layer.
        matrices, temperature, distance, steps, learning_rate, seed, on_step: see `hydraopt`.

    Raises:
        ValueError: an argument out of its range, or shapes that do not fit together.
    """
    _check(matrices, len(lambda_d), temperature, distance, steps, learning_rate)
    n, (r, d_in), d_out = len(lambda_d), projection_a.shape, len(projection_b)
    for name, tensor, shape in (
        ("lambda_d", lambda_d, (n, r)),
        ("lambda_b", lambda_b, (n, d_out)),
        ("projection_b", projection_b, (d_out, r)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}; {shape} fits {n} adapters and "
                f"projection_a {tuple(projection_a.shape)}."
            )
    gram = projection_a.double() @ projection_a.double().T

    def row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """For each output o the product of row o of B·diag(left)·A and of B·diag(right)·A."""
        rows = projection_b.double()
        return ((rows * left) @ gram * (rows * right)).sum(1)

    # d: the direction that most of the λ_d share. Then each adapter's best b for it.
    weighted = lambda_d.double() * lambda_b.double().norm(dim=1, keepdim=True)
    d = torch.linalg.svd(weighted, full_matrices=False).Vh[0] * math.sqrt(r)
    lengths = row_products(d, d).clamp_min(0)
    fitted = torch.stack([row_products(own, d) for own in lambda_d.double()])
    fitted = lambda_b * (fitted / lengths.clamp_min(1e-300)).float()

    power = sum(
        float((row_products(own, own) * out.double().square()).sum())
        for own, out in zip(lambda_d.double(), lambda_b, strict=True)
    ) / (n * d_in * d_out)
    scale = math.sqrt(max(power, 0)) or 1.0
    # B in a unit such that d and b have entries about 1 where the deltas have.
    stretch = math.sqrt(float(lengths.mean()) / d_in) or 1.0
    targets = (lambda_d, lambda_b / scale * stretch, projection_a, projection_b / stretch)
    points = fitted / scale * stretch
    groups = _ward(points, matrices) if matrices < n else torch.arange(n)
    measure = _vera_mae if distance == "mae" else _vera_frobenius
    unit = scale if distance == "mae" else scale * math.sqrt(d_in * d_out)
    d, own, kept, losses = _fit(
        d.to(points.dtype),
        _means(points, groups),
        groups,
        lambda shared, mixed: measure(*targets, shared, mixed),
        temperature,
        steps,
        learning_rate,
        seed,
        unit,
        on_step,
    )
    # Only the product of d and b counts: give d the size that the adapters' λ_d have.
    size = float(lambda_d.double().square().mean().sqrt()) or 1.0
    b = lambda_b.new_zeros(matrices, d_out)
    b[: len(own)] = own * (scale / stretch / size)
    return VeraFit(d * size, b, kept, losses)


def _check(
    matrices: int,
    adapters: int,
    temperature: float,
    distance: str,
    steps: int,
    learning_rate: float,
) -> None:
    if not 1 <= matrices <= adapters:
        raise ValueError(
            f"matrices is {matrices}; with {adapters} adapters choose 1 to {adapters}."
        )
    if distance not in ("mae", "frobenius"):
        raise ValueError(f'distance is {distance!r}; choose "mae" or "frobenius".')
    if steps < 1:
        raise ValueError(f"steps is {steps}; HydraOpt needs at least 1.")
    for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be above 0 and finite.")


_Tasks = list[tuple[torch.Tensor, torch.Tensor]]  # (a_t [r_t, d_in], b_t [r_t, d_out])


def _start(
    tasks: _Tasks, matrices: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A' `[rank, d_in]`, B' `[groups, rank, d_out]` and each task's group `[n]`.

    Up to the grouping, the solution for D squared: with orthonormal rows A' the best B'_m is the
    mean of the members' B_tA_tA'ᵀ, and A' spans the top right singular vectors of the B_tA_t
    (M = T) or of their mean (M = 1).
    """
    n = len(tasks)
    together = [tasks] if matrices == 1 else [[task] for task in tasks]
    rows = []
    for members in together:
        # (QR)A has the right singular vectors of RA.
        b = torch.cat([b for _, b in members])
        rows.append(torch.linalg.qr(b.T).R @ torch.cat([a for a, _ in members]))
    shared = _top_right(torch.cat(rows), rank)
    own = torch.stack([(shared @ a.T) @ b for a, b in tasks])
    if matrices >= n:
        groups = torch.arange(n)
    elif matrices == 1:
        groups = torch.zeros(n, dtype=torch.int64)
    else:
        groups = _ward(own.flatten(1), matrices)
    own = _means(own, groups)
    # Rows of A' and B' of one size, so that one learning rate suits both.
    size_b, size_a = own.square().mean((0, 2)).sqrt(), shared.square().mean(1).sqrt()
    used = (size_b > 0) & (size_a > 0)
    stretch = torch.where(used, (size_b / size_a).sqrt(), 1.0)[:, None]
    return shared * stretch, own / stretch, groups


def _top_right(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The top right singular vectors of `[k, d]`, orthonormal rows `[rank, d]`, 0 beyond its rank.

    By eigenvectors of the smaller Gram matrix: a few of them are wanted of a long matrix.
    """
    x = rows.double()
    wide = x.shape[0] <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    count = min(rank, int((values > 1e-12 * values[-1].clamp_min(1e-300)).sum()))
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    if count == 0:
        return rows.new_zeros(rank, rows.shape[1])
    found = (vectors.T @ x) / values.sqrt()[:, None] if wide else vectors.T
    return torch.cat([found.to(rows.dtype), rows.new_zeros(rank - count, rows.shape[1])])


def _ward(points: torch.Tensor, groups: int) -> torch.Tensor:
    """Ward's clusters of `[n, q]`: int64 `[n]`, every group used.

    On the trained adapters as good as the best of 200 k-means++ starts, and without a seed.
    """
    points = points.double()
    values, vectors = torch.linalg.eigh(points @ points.T)
    coordinates = vectors * values.clamp_min(0).sqrt()
    # Not before: importing these takes long, and every command imports this file.
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import pdist

    tree = linkage(pdist(coordinates.cpu().numpy()), "ward")
    return torch.from_numpy(cut_tree(tree, n_clusters=groups)[:, 0]).long()


def _means(points: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The mean of each group's points `[n, ...]`: `[groups, ...]`."""
    return torch.stack([points[groups == m].mean(0) for m in range(int(groups.max()) + 1)])


def _fit(
    shared: torch.Tensor,
    own: torch.Tensor,
    groups: torch.Tensor,
    objective: _Objective,
    temperature: float,
    steps: int,
    learning_rate: float,
    seed: int,
    unit: float,
    on_step: _Report | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
    """Both stages: (shared, own `[M, ...]`, assignment `[n]`, losses in `unit`)."""
    n, matrices = len(groups), len(own)
    shared, own = shared.clone().requires_grad_(), own.clone().requires_grad_()
    losses: list[float] = []

    def report(loss: float) -> None:
        losses.append(loss * unit)
        if on_step is not None:
            on_step(len(losses), losses[-1])

    def evaluate(mixed: torch.Tensor) -> float:
        loss, shared_gradient, mixed_gradient = objective(shared.detach(), mixed.detach())
        mixed.backward(mixed_gradient)
        shared.grad = shared_gradient
        return loss

    if 1 < matrices < n:
        soft_steps = int(steps * _SOFT_PART)
        noise = torch.randn(n, matrices, generator=torch.Generator().manual_seed(seed))
        lean = torch.nn.functional.one_hot(groups, matrices)
        logits = (_LEAN * lean + _NOISE * noise).to(own)
        coefficients = (temperature * logits).requires_grad_()

        def evaluate_mixtures() -> float:
            weights = torch.softmax(coefficients / temperature, dim=1)
            return evaluate((weights @ own.flatten(1)).view(n, *own.shape[1:]))

        if soft_steps:
            parameters = [shared, own, coefficients]
            _descend(parameters, evaluate_mixtures, soft_steps, learning_rate, report)
        groups = coefficients.detach().argmax(1).cpu()
        steps -= soft_steps
    index = groups.to(own.device)
    best = _descend([shared, own], lambda: evaluate(own[index]), steps, learning_rate, report)
    losses.append(best * unit)
    used = torch.zeros(matrices, dtype=torch.bool)
    used[groups] = True
    own = own.detach()
    own[~used.to(own.device)] = 0
    return shared.detach(), own, groups, losses


def _descend(
    parameters: list[torch.Tensor],
    evaluate: Callable[[], float],
    steps: int,
    learning_rate: float,
    report: Callable[[float], None],
) -> float:
    """Adam with cosine decay. Leaves the best parameters seen, and returns their objective.

    `evaluate` returns the objective and adds the gradients.
    """
    # The gradient of a mean over d_in·d_out entries may be as small as Adam's usual 1e-8.
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-16)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, kept = math.inf, [p.detach().clone() for p in parameters]
    for step in range(steps + 1):
        optimiser.zero_grad()
        loss = evaluate()
        if loss < best:
            best = loss
            for copy, parameter in zip(kept, parameters, strict=True):
                copy.copy_(parameter.detach())
        if step < steps:
            report(loss)
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        for copy, parameter in zip(kept, parameters, strict=True):
            parameter.copy_(copy)
    return best


def _block_rows(width: int, item: int) -> int:
    return max(1, _BLOCK_BYTES // (width * item))


def _mae(tasks: _Tasks, shared: torch.Tensor, mixed: torch.Tensor) -> _Measured:
    """Σ_t mean |mixed_tᵀ·shared − b_tᵀ·a_t| and its gradients, `mixed` `[n, rank, d_out]`."""
    d_in, d_out = shared.shape[1], mixed.shape[2]
    rows = min(d_out, _block_rows(d_in, shared.element_size()))
    buffer = shared.new_empty(rows, d_in)
    total = 0.0
    shared_gradient, mixed_gradient = torch.zeros_like(shared), torch.empty_like(mixed)
    for t, (a, b) in enumerate(tasks):
        left, right = torch.cat([mixed[t], -b]), torch.cat([shared, a])
        for block in torch.arange(d_out).split(rows):
            span = slice(int(block[0]), int(block[-1]) + 1)
            lost = torch.mm(left[:, span].T, right, out=buffer[: len(block)])
            lengths = torch.linalg.vector_norm(lost, 1, dim=1)
            total += float(lengths.sum(dtype=torch.float64))
            signs = torch.sign(lost, out=lost)
            mixed_gradient[t, :, span] = shared @ signs.T
            shared_gradient.addmm_(mixed[t, :, span], signs)
    entries = d_in * d_out
    return total / entries, shared_gradient / entries, mixed_gradient / entries


def _frobenius(tasks: _Tasks, shared: torch.Tensor, mixed: torch.Tensor) -> _Measured:
    """Σ_t ‖mixed_tᵀ·shared − b_tᵀ·a_t‖_F / √(d_in·d_out) and its gradients, float64.

    From Gram products: ‖X − Y‖² = ‖X‖² − 2⟨X, Y⟩ + ‖Y‖² loses half of the digits near 0.
    """
    total = 0.0
    shared_gradient, mixed_gradient = torch.zeros_like(shared), torch.empty_like(mixed)
    gram = shared @ shared.T
    for t, (a, b) in enumerate(tasks):
        across_a, across_b = shared @ a.T, mixed[t] @ b.T
        inner = mixed[t] @ mixed[t].T
        size = ((a @ a.T) * (b @ b.T)).sum()
        squared = size - 2 * (across_a * across_b).sum() + (inner * gram).sum()
        # The norm has no gradient at 0; below rounding it is only kept finite.
        length = squared.clamp_min(1e-20 * float(size) + 1e-200).sqrt()
        total += float(length)
        mixed_gradient[t] = (gram @ mixed[t] - across_a @ b) / length
        shared_gradient += (inner @ shared - across_b @ a) / length
    root = math.sqrt(shared.shape[1] * mixed.shape[2])
    return total / root, shared_gradient / root, mixed_gradient / root


def _vera_mae(
    lambda_d: torch.Tensor,
    lambda_b: torch.Tensor,
    projection_a: torch.Tensor,
    projection_b: torch.Tensor,
    d: torch.Tensor,
    mixed: torch.Tensor,
) -> _Measured:
    """Σ_t mean |diag(mixed_t)·B·diag(d)·A − diag(λ_b)·B·diag(λ_d)·A| and its gradients."""
    (r, d_in), d_out = projection_a.shape, len(projection_b)
    rows = _block_rows(max(r, d_in), d.element_size())
    total = 0.0
    d_gradient, mixed_gradient = torch.zeros_like(d), torch.empty_like(mixed)
    for t in range(len(mixed)):
        for block in torch.arange(d_out).split(rows):
            span = slice(int(block[0]), int(block[-1]) + 1)
            out = projection_b[span]
            left = out * (mixed[t, span, None] * d - lambda_b[t, span, None] * lambda_d[t])
            lost = left @ projection_a
            lengths = torch.linalg.vector_norm(lost, 1, dim=1)
            total += float(lengths.sum(dtype=torch.float64))
            gradient = (torch.sign(lost, out=lost) @ projection_a.T) * out
            mixed_gradient[t, span] = gradient @ d
            d_gradient += mixed[t, span] @ gradient
    entries = d_in * d_out
    return total / entries, d_gradient / entries, mixed_gradient / entries


def _vera_frobenius(
    lambda_d: torch.Tensor,
    lambda_b: torch.Tensor,
    projection_a: torch.Tensor,
    projection_b: torch.Tensor,
    d: torch.Tensor,
    mixed: torch.Tensor,
) -> _Measured:
    """The same in the Frobenius norm, over √(d_in·d_out), by the Gram matrix of A."""
    (r, d_in), d_out = projection_a.shape, len(projection_b)
    rows = _block_rows(r, d.element_size())
    gram = projection_a @ projection_a.T
    total = 0.0
    d_gradient, mixed_gradient = torch.zeros_like(d), torch.empty_like(mixed)
    for t in range(len(mixed)):
        squared, own_gradient = 0.0, torch.zeros_like(d)
        for block in torch.arange(d_out).split(rows):
            span = slice(int(block[0]), int(block[-1]) + 1)
            out = projection_b[span]
            left = out * (mixed[t, span, None] * d - lambda_b[t, span, None] * lambda_d[t])
            gradient = left @ gram
            squared += float((gradient * left).sum(dtype=torch.float64))
            gradient *= out
            mixed_gradient[t, span] = gradient @ d
            own_gradient += mixed[t, span] @ gradient
        length = math.sqrt(max(squared, 1e-30))
        total += length
        mixed_gradient[t] /= length
        d_gradient += own_gradient / length
    root = math.sqrt(d_in * d_out)
    return total / root, d_gradient / root, mixed_gradient / root


def _fit_module(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: HydraOptOptions,
    start: Start | None,
    seed: int,
) -> Shared:
    """VeRA adapters keep their own rank."""
    if factors.vera is not None:
        return _fit_vera_module(factors, factors.vera, options, seed)
    fit = hydraopt(
        factors,
        min(options.matrices, len(factors)),
        rank=options.rank,
        temperature=options.temperature,
        distance=options.distance,
        steps=options.steps,
        seed=seed,
    )
    return Shared(u=fit.b, v=fit.a[None], assignment=fit.assignment, core=CORE_NONE)


def _fit_vera_module(
    factors: ModuleFactors, vera: VeraFactors, options: HydraOptOptions, seed: int
) -> Shared:
    """One d for all, which goes into V, and M scales."""
    present = (factors.ranks > 0).nonzero()[:, 0]
    fit = hydraopt_vera(
        vera.lambda_d[present],
        vera.lambda_b[present],
        vera.projection_a,
        vera.projection_b,
        min(options.matrices, len(present)),
        temperature=options.temperature,
        distance=options.distance,
        steps=options.steps,
        seed=seed,
    )
    assignment = torch.full_like(factors.ranks, -1)
    assignment[present] = fit.assignment.to(present.device)
    return Shared(
        u=vera.projection_b.T[None].contiguous(),
        v=(fit.d[:, None] * vera.projection_a)[None],
        assignment=assignment,
        core=CORE_NONE,
        scales=fit.b,
    )


HYDRAOPT = Method(
    "hydraopt",
    "one A for all adapters and M matrices B, each adapter keeping one of these",
    "HydraOpt (Ceritli et al., 2025), §3.2",
    _fit_module,
    HydraOptOptions,
    seeded=True,
)
