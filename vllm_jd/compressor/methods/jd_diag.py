"""JD-Diag: min over U, V and diagonal Σ_i of Σ_i ‖B_iA_i − UΣ_iVᵀ‖²_F.

Compress then Serve, §3.1 and Appendix A.1 (case 2): a CP (PARAFAC) decomposition of the tensor of
all B_iA_i, by alternating least squares. U and V need not be orthonormal; their columns are kept
at unit norm and Σ_i carries the scale. With s_i = diag(Σ_i) as the rows of S, one sweep sets

    U = [Σ_i B_i(A_iV)Σ_i] · (SᵀS ∘ VᵀV)⁻¹
    V = [Σ_i A_iᵀ(B_iᵀU)Σ_i] · (SᵀS ∘ UᵀU)⁻¹
    s_i = (UᵀU ∘ VᵀV)⁻¹ (UᵀB_i ∘ VᵀA_iᵀ)·1

B_iA_i is never formed: with W = A·V and P = Bᵀ·U (concatenated over all adapters), a sweep is four
products with the concatenated factors.

The best CP approximation may not exist: two columns can grow without bound and cancel each other.
So what is minimised is the error plus `RIDGE`·Σ_ij (s_ij ‖u_j‖ ‖v_j‖)². In all three steps this
multiplies the diagonal of the Gram matrix by 1 + `RIDGE`, and each step is its exact minimiser:
the sum never increases.
"""

from functools import partial

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import REFERENCE, JdOptions, fit_shared
from vllm_jd.compressor.methods.jd_full import jd_full
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.row import CORE_DIAGONAL

RIDGE = 8e-6
"""What rounding U, V and Σ to bfloat16 adds to the error for each unit of Σ‖Σ_i‖²: three roundings
with a mean squared relative error of 2.8e-6 each. To weigh it keeps cores small enough to store.
"""
TOLERANCE = 1e-5
"""Sweeps end when one lowers error + ridge by less than this part of it."""

_SMALL_SWEEPS = 100
_RANDOM_STARTS = 4
_RANDOM_SWEEPS = 10
_JUDGING_SWEEPS = 2
_CANDIDATES = 4  # pairs of singular vectors to choose from, for each column

_Pair = tuple[torch.Tensor, torch.Tensor]
"""(U, V) of one cluster."""


def jd_diag(
    factors: ModuleFactors,
    rank: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    start: _Pair | None = None,
) -> _Pair:
    """Find the bases of one module for one cluster of adapters, for diagonal cores.

    Args:
        factors: normalised factors.
        rank: columns of U and V; may exceed d_in and d_out.
        iterations: at most so many sweeps (U, V, then the cores); fewer once a sweep lowers
            error + ridge by less than 0.001 %. Without `start`, a few starts are tried with two
            of these sweeps each, and the best goes on.
        seed: of the random starts.
        start: (U, V) to start from. A column of zeros stays unused.

    Returns:
        U float32 `[d_out, rank]` and V float32 `[d_in, rank]`. Their columns have unit norm, but
        for those that no adapter uses, which may be 0.
    """
    if factors.a.shape[0] == 0:
        return (
            factors.b.new_zeros(factors.b.shape[1], rank),
            factors.a.new_zeros(factors.a.shape[1], rank),
        )
    total = float(factors.squared_norms().sum())
    if start is None:
        judging = min(_JUDGING_SWEEPS, iterations)
        starts = _starts(factors, total, rank, seed)
        tried = [_sweeps(factors, total, one, judging) for one in starts]
        start = min(tried, key=lambda found: found[0])[1]
        iterations -= judging
    return _sweeps(factors, total, start, iterations)[1]


def _sweeps(
    factors: ModuleFactors, total: float, start: _Pair, iterations: int
) -> tuple[float, _Pair]:
    """Up to `iterations` sweeps: (error + ridge, bases). `total` is Σ‖B_iA_i‖²."""
    a, b = factors.a, factors.b
    u, v = (_unit(basis) for basis in start)
    p, w = b @ u, a @ v
    s, captured = _core_step(factors, u, v, p, w)
    lost = total - captured
    for _ in range(iterations):
        before = lost
        u = _unit(_basis_step(b.T @ _times_cores(factors, w, s), s, v))
        p = b @ u
        # The norms that U had belong into S, but they would only scale the columns of V.
        v = _unit(_basis_step(a.T @ _times_cores(factors, p, s), s, u))
        w = a @ v
        s, captured = _core_step(factors, u, v, p, w)
        lost = total - captured
        if before - lost < TOLERANCE * lost:
            break
    return lost, (u, v)


def _core_step(
    factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor, p: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The best cores (float64 `[n, rank]`), and by how much they lower error + ridge from Σ = 0."""
    inner = factors.per_adapter(p * w).sum(1).double()
    s = _solve(_gram(u) * _gram(v), inner)
    return s, float((s * inner).sum())


def _basis_step(products: torch.Tensor, s: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The best U given S and V, or V given S and U, from Σ_i B_i(A_iV)Σ_i or its like."""
    return _solve(_gram(s) * _gram(other), products.double()).float()


def _times_cores(factors: ModuleFactors, rows: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Each adapter's rows times its diagonal core: `[R, rank]`."""
    return factors.per_row(factors.per_adapter(rows) * s[:, None].float())


def _gram(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x.T @ x


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """right · (gram + RIDGE·diag(gram))⁻¹, 0 in the columns where the diagonal is 0."""
    diagonal = gram.diagonal()
    used = diagonal > 0
    inverse = torch.where(used, diagonal.clamp_min(1e-300).rsqrt(), 0.0)
    # With a unit diagonal the ridge means the same in all columns, and Cholesky cannot fail.
    scaled = gram * inverse[:, None] * inverse
    scaled.diagonal().copy_(torch.where(used, 1 + RIDGE, 1.0))
    factor = torch.linalg.cholesky(scaled)
    return torch.cholesky_solve((right * inverse).T, factor).T * inverse


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Columns at unit norm; 0 stays 0."""
    norms = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
    return (x.double() * inverse).float()


def _starts(factors: ModuleFactors, total: float, rank: int, seed: int) -> list[_Pair]:
    """Bases to try: of single adapters, and two that many cheap sweeps have improved.

    Those sweeps run on the factors seen through JD-Full bases of twice the rank, where a sweep
    costs 2·rank/d of a full one. One starts from the single adapters too, one from noise.
    """
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    single = _greedy_start(factors, rank, generator)
    width = min(2 * rank, d_in, d_out)
    full_u, full_v = jd_full(factors, width, iterations=1, seed=seed)
    small = ModuleFactors(factors.a @ full_v, factors.b @ full_u, factors.ranks)
    noise = torch.randn(_RANDOM_STARTS, 2, width, rank, generator=generator).to(single[0])
    tried = [_sweeps(small, total, (u, v), _RANDOM_SWEEPS) for u, v in noise]
    best_noise = min(tried, key=lambda found: found[0])[1]
    starts = [single]
    for u, v in ((full_u.T @ single[0], full_v.T @ single[1]), best_noise):
        _, (small_u, small_v) = _sweeps(small, total, (u, v), _SMALL_SWEEPS)
        starts.append((full_u @ small_u, full_v @ small_v))
    return starts


def _greedy_start(factors: ModuleFactors, rank: int, generator: torch.Generator) -> _Pair:
    """Pairs of singular vectors of single adapters, each the one that most lowers what is left.

    Orthogonal matching pursuit over the pairs of the largest singular values. Columns that no
    pair is left for get noise.
    """
    left, right = _singular_pairs(factors, _CANDIDATES * rank)
    inner = factors.per_adapter((factors.b @ left) * (factors.a @ right)).sum(1).double()
    gram = _gram(left) * _gram(right)
    chosen = []
    for _ in range(min(rank, gram.shape[0])):
        residual = gram.diagonal()
        usable = residual > 1e-6
        gain = torch.where(usable, inner.square().sum(0) / residual.clamp_min(1e-6), 0.0)
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        row = gram[best] / residual[best].sqrt()
        inner = inner - torch.outer(inner[:, best] / residual[best].sqrt(), row)
        gram = gram - torch.outer(row, row)
    missing = rank - len(chosen)

    def filled(basis: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(basis.shape[0], missing, generator=generator).to(basis)
        return torch.cat([basis[:, chosen], noise], dim=1)

    return filled(left), filled(right)


def _singular_pairs(factors: ModuleFactors, count: int) -> _Pair:
    """Left and right singular vectors of single adapters, as columns; largest values first.

    With AAᵀ = LLᵀ and LᵀBᵀBL = ZΛZᵀ, BA has the left vectors B·LZ and the right AᵀBᵀ·B·LZ, up to
    their norms.
    """
    a, b = factors.per_adapter(factors.a), factors.per_adapter(factors.b)
    gram_b = (b @ b.mT).double()
    values, vectors = torch.linalg.eigh((a @ a.mT).double())
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    energies, rotation = torch.linalg.eigh(root.mT @ gram_b @ root)
    largest = energies.flatten().topk(min(count, energies.numel())).indices
    adapter, position = largest // energies.shape[1], largest % energies.shape[1]
    weights = (root @ rotation)[adapter, :, position]
    left = torch.einsum("cr,crd->dc", weights.float(), b[adapter])
    weights = (gram_b[adapter] @ weights[:, :, None])[:, :, 0]
    right = torch.einsum("cr,crd->dc", weights.float(), a[adapter])
    return _unit(left), _unit(right)


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: JdOptions,
    start: Start | None,
    seed: int,
) -> Shared:
    fit = partial(jd_diag, iterations=options.iterations, seed=seed)
    return fit_shared(factors, assignment, options, start, fit, CORE_DIAGONAL)


JD_DIAG = Method(
    "jd-diag",
    "shared bases and a diagonal core for each adapter: r numbers instead of r²",
    f"{REFERENCE}, §3.1, A.1 (case 2)",
    _fit,
    JdOptions,
    normalise=True,
    seeded=True,
    experts=True,
)
