"""What any rank-r joint diagonalisation of a module could reach, without running one.

Compress then Serve, §4 (Proposition 1 and Theorem 1). With D_i = B_iA_i of norm 1 and orthonormal
U, V, the relative squared reconstruction error of adapter i is 1 − ‖UᵀD_iV‖², so bounds on the
captured energy Σ_i‖UᵀD_iV‖² are bounds on the error. Everything is in float64 and from complete
eigendecompositions: no iteration that could stop early on the wrong side.

Theorem 1's lower side is printed as Σ_{j≤r} σ̄_j² ≤ Σ‖Σ_i‖², σ̄ being those of ΣD_i. That misses a
factor: by Cauchy–Schwarz ‖Σx_i‖² ≤ n·Σ‖x_i‖², and n equal adapters have Σσ̄_j² = n² but an energy
of only n. Here it is Σ_{j≤r} σ̄_j² / n, which merging all n adapters into one attains.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors

LOSSLESS = 1e-10
"""Relative squared error below which a cluster counts as lossless (see `Bounds`)."""

# A block of rows in float64 takes at most this much, both factors of two blocks together; the
# products of two blocks take up to 24 · _BLOCK_ROWS² = 100 MB more.
_BLOCK_BYTES = 128 << 20
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Bounds:
    """Bounds on the best JD-Full: the error's mean over the adapters with a factor in the module.

    Errors are relative squared reconstruction errors ‖BA − UΣVᵀ‖²_F / ‖BA‖²_F in 0…1, exact but
    for float64 rounding; an adapter of norm 0 has error 0.

    Attributes:
        error_at_most: the best JD is no worse (Theorem 1, lower side, with the factor 1/n).
        error_at_least: no JD is better (Theorem 1, upper side): the energy captured is at most
            the r² largest squared singular values of [vec D_1 … vec D_n]. 0 with n ≤ r².
        error_at_least_one_sided: no JD is better: ‖UᵀDV‖ is at most ‖UᵀD‖ and at most ‖DV‖, so
            the energy captured is at most the r largest eigenvalues of ΣD_iD_iᵀ, and of ΣD_iᵀD_i.
        lossless_rank: the smallest rank that loses nothing in any cluster (Proposition 1):
            max(rank ΣD_iD_iᵀ, rank ΣD_iᵀD_i), which is the paper's max(rank[A_1…A_n],
            rank[B_1…B_n]) where every A_i and B_i has full rank. Numerical ranks: the eigenvalues
            left out sum to at most `LOSSLESS` of all. So at this rank a JD exists in every cluster
            with an error of at most 2 · LOSSLESS, and in some cluster none below LOSSLESS exists
            at a smaller one.
    """

    error_at_most: float
    error_at_least: float
    error_at_least_one_sided: float
    lossless_rank: int


def bounds(factors: ModuleFactors, assignment: torch.Tensor, clusters: int, rank: int) -> Bounds:
    """Bounds for one module, with a JD-Full of rank `rank` in each cluster.

    The cost is that of up to three symmetric eigenvalue problems a cluster, of the smaller of
    d and Σ r_i, and, in a cluster of more than rank² adapters, of their inner products.

    Args:
        factors: of n adapters. Normalised or not: each delta is taken at norm 1, as a mean of
            relative errors asks for.
        assignment: int64 `[n]`, the cluster 0…clusters − 1 of every adapter; anything for an
            adapter without a factor.
        clusters: number of clusters.
        rank: columns of U and V of each cluster.

    Raises:
        ValueError: rank or clusters below 1, an assignment that doesn't fit, factors not finite.
    """
    present = factors.ranks > 0
    _check(assignment, present, clusters, rank)
    squared_norms = torch.cat([block.squared_norms() for block in _blocks(factors)])
    if not bool(squared_norms.isfinite().all()):
        faults = (~squared_norms.isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(f"factors of adapters {faults[:5]} are not finite: leave them out")
    nonzero = squared_norms > 0
    energy = int(nonzero.sum())
    at_least = at_most = at_most_one_sided = 0.0  # of the energy captured
    lossless_rank = 0
    for cluster in range(clusters):
        members = (nonzero & (assignment == cluster)).nonzero()[:, 0]
        n = members.shape[0]
        if n == 0:
            continue
        own = factors.subset(members)
        left, right = _left_eigenvalues(own), _right_eigenvalues(own)
        at_most_one_sided += min(_top(left, rank), _top(right, rank))
        lossless_rank = max(lossless_rank, _numerical_rank(left), _numerical_rank(right))
        at_least += _top(_merged_eigenvalues(own), rank) / n
        at_most += n if n <= rank**2 else _top(_eigenvalues(_inner_products(own)), rank**2)

    def error(captured: float) -> float:
        return min(max(energy - captured, 0.0) / max(int(present.sum()), 1), 1.0)

    return Bounds(
        error_at_most=error(at_least),
        error_at_least=error(at_most),
        error_at_least_one_sided=error(at_most_one_sided),
        lossless_rank=lossless_rank,
    )


def spectrum(factors: ModuleFactors, most: int) -> torch.Tensor:
    """The mean squared singular values of the deltas, each taken at ‖D_i‖_F = 1.

    From r×r Gram products alone: they are the eigenvalues of (A_iA_iᵀ)^½ B_iᵀB_i (A_iA_iᵀ)^½.

    Args:
        factors: of n adapters, normalised or not.
        most: how many values; those beyond the largest rank are 0.

    Returns:
        float32 `[most]`, descending; the mean over the adapters with a factor. All of them sum to
        1, less the share of adapters of norm 0.

    Raises:
        ValueError: `most` below 1.
    """
    if most < 1:
        raise ValueError(f"most is {most}: expected at least 1 singular value")
    total = torch.zeros(most, dtype=torch.float64)
    for block in _blocks(factors):
        a, b = _unit_rows(block)
        root = _roots(block.per_adapter(a))
        b = block.per_adapter(b)
        values = torch.linalg.eigvalsh(root @ (b @ b.mT) @ root.mT).flip(1).clamp_min(0)
        kept = values[:, :most].sum(0)
        total[: kept.shape[0]] += kept
    return (total / max(int((factors.ranks > 0).sum()), 1)).float()


def _check(assignment: torch.Tensor, present: torch.Tensor, clusters: int, rank: int) -> None:
    if rank < 1 or clusters < 1:
        raise ValueError(f"rank {rank} and {clusters} clusters: expected at least 1 of both")
    if assignment.shape != present.shape:
        raise ValueError(
            f"assignment has shape {list(assignment.shape)}: expected one cluster for each of the "
            f"{present.shape[0]} adapters"
        )
    outside = present & ((assignment < 0) | (assignment >= clusters))
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"adapter {row} is in cluster {int(assignment[row])}: expected 0 to {clusters - 1}"
        )


def _blocks(factors: ModuleFactors) -> Iterator[ModuleFactors]:
    """Runs of adapters, few enough to be held in float64."""
    d_sum = factors.a.shape[1] + factors.b.shape[1]
    rows = min(_BLOCK_ROWS, _BLOCK_BYTES // (16 * d_sum))
    width = int(factors.ranks.max()) if len(factors) else 0
    for block in torch.arange(len(factors)).split(max(1, rows // max(width, 1))):
        yield factors.subset(block)


def _unit_rows(factors: ModuleFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors in float64, b scaled to ‖D_i‖_F = 1 (0 for a D_i of 0).

    Normalised float32 factors are off by 1e-7, which a bound must not be.
    """
    norms = factors.squared_norms().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
    scale = torch.repeat_interleave(inverse, factors.ranks)
    return factors.a.double(), factors.b.double() * scale[:, None]


def _roots(rows: torch.Tensor) -> torch.Tensor:
    """H_i with H_iᵀH_i = rows_i·rows_iᵀ, largest rows first: `[n, q, d]` → `[n, q, q]`."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return (values.clamp_min(0).sqrt()[:, :, None] * vectors.mT).flip(1)


def _left_eigenvalues(factors: ModuleFactors) -> torch.Tensor:
    """Of ΣD_iD_iᵀ = Σ(H_iB_iᵀ)ᵀ(H_iB_iᵀ), H_i the root of A_iA_iᵀ; those that may not be 0."""

    def weighted() -> Iterator[torch.Tensor]:
        for block in _blocks(factors):
            a, b = _unit_rows(block)
            # Padding adds zeros to H_i's spectrum, after the adapter's own: `per_row` drops them.
            yield block.per_row(_roots(block.per_adapter(a)) @ block.per_adapter(b))

    return _eigenvalues(_smaller_gram(weighted(), *factors.b.shape))


def _right_eigenvalues(factors: ModuleFactors) -> torch.Tensor:
    """Of ΣD_iᵀD_i."""
    return _left_eigenvalues(ModuleFactors(factors.b, factors.a, factors.ranks))


def _smaller_gram(parts: Iterator[torch.Tensor], rows: int, d: int) -> torch.Tensor:
    """The lower triangle of XXᵀ or XᵀX, the smaller one; X `[rows, d]` comes in parts."""
    if rows <= d:
        x = torch.cat(list(parts))
        return x @ x.T
    gram = torch.zeros(d, d, dtype=torch.float64)
    for x in parts:
        for columns in torch.arange(d).split(512):
            first, end = int(columns[0]), int(columns[-1]) + 1
            gram[first:end, :end].addmm_(x[:, first:end].T, x[:, :end])
    return gram


def _merged_eigenvalues(factors: ModuleFactors) -> torch.Tensor:
    """σ̄_j²: the squared singular values of ΣD_i."""
    (rows, d_in), d_out = factors.a.shape, factors.b.shape[1]
    if rows < d_out:
        a, b = _unit_rows(factors)
        merged = torch.linalg.qr(b.T, mode="r").R @ a
    else:
        merged = torch.zeros(d_out, d_in, dtype=torch.float64)
        for block in _blocks(factors):
            a, b = _unit_rows(block)
            merged.addmm_(b.T, a)
    return _eigenvalues(_smaller_gram(iter([merged]), *merged.shape))


def _inner_products(factors: ModuleFactors) -> torch.Tensor:
    """⟨D_i, D_j⟩ = Σ over their rows ρ, τ of (a_ρ·a_τ)(b_ρ·b_τ): float64 `[n, n]`.

    Only the lower triangle is complete.
    """
    n = len(factors)
    gram = torch.zeros(n, n, dtype=torch.float64)
    row = 0
    for mine in _blocks(factors):
        a_i, b_i = _unit_rows(mine)
        column = 0
        for other in _blocks(factors):
            if column > row:
                break
            a_j, b_j = _unit_rows(other)
            products = (a_i @ a_j.T).mul_(b_i @ b_j.T)
            tile = gram[row : row + len(mine), column : column + len(other)]
            tile.copy_(_members(mine).T @ products @ _members(other))
            column += len(other)
        row += len(mine)
    return gram


def _members(factors: ModuleFactors) -> torch.Tensor:
    """1 where a row belongs to an adapter: float64 `[R, n]`."""
    owners = torch.eye(len(factors), dtype=torch.float64)
    return torch.repeat_interleave(owners, factors.ranks, dim=0)


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    """Of a positive semidefinite matrix, of which the lower triangle is read; descending."""
    return torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp_min(0)


def _top(eigenvalues: torch.Tensor, count: int) -> float:
    return float(eigenvalues[:count].sum())


def _numerical_rank(eigenvalues: torch.Tensor) -> int:
    """How many must be kept so that the others sum to at most `LOSSLESS` of all."""
    left_out = eigenvalues.flip(0).cumsum(0) <= LOSSLESS * eigenvalues.sum()
    return len(eigenvalues) - int(left_out.sum())
