"""JD-Full: min over orthonormal U, V and free Σ_i of Σ_i ‖B_iA_i − UΣ_iVᵀ‖²_F.

Compress then Serve, §3.1 and Appendix A.1 (case 1) and A.2. For fixed U, V the best core is
Σ_i = UᵀB_iA_iV, and the error is Σ‖B_iA_i‖² − Σ‖Σ_i‖². Neither B_iA_i nor a d×d matrix is ever
formed: with W = A·V and P = Bᵀ·U (concatenated over all adapters), Σ_i = P_iᵀW_i, and

    Σ_i B_iA_iVVᵀA_iᵀB_iᵀ·Q = B · [W_i W_iᵀ · (Bᵀ·Q)_i]

costs two products with the concatenated factors.
"""

from typing import Literal

import torch

from vllm_jd.compressor.factors import ModuleFactors

Solver = Literal["alternating", "eigen"]

TOLERANCE = 1e-3  # eq. 19
_OVERSAMPLING = 8
_POWER_STEPS = 2
_START_STEPS = 4


def jd_full(
    factors: ModuleFactors,
    rank: int,
    *,
    iterations: int = 10,
    solver: Solver = "alternating",
    seed: int = 0,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the bases of one module for one cluster of adapters.

    Args:
        factors: normalised factors.
        rank: columns of U and V.
        iterations: at most so many updates of both; fewer once eq. 19 holds (max relative change
            of U and V, outside of the old span, below 0.001).
        solver: `alternating` sets U, then V, to the top eigenvectors given the other (A.1; found
            by a warm-started subspace iteration with Rayleigh–Ritz); `eigen` does one
            power step and a QR for each (A.2).
        seed: of the random start of the subspace iteration.
        start: (U, V) to start from.

    Returns:
        U float32 `[d_out, rank]` and V float32 `[d_in, rank]`. Their columns are orthonormal, but
        for those beyond d_out or d_in, which are 0.
    """
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    u, v = start or _start(factors, rank, seed)
    step = {"alternating": _alternating_step, "eigen": _eigen_step}[solver]
    for _ in range(iterations):
        new_u, new_v = step(factors, u, v)
        change = max(_change(u, new_u), _change(v, new_v))
        u, v = new_u, new_v
        if change < TOLERANCE:
            break
    return _pad(u, rank, d_out), _pad(v, rank, d_in)


def cores(factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_i = UᵀB_iA_iV of every adapter: `[n, rank, rank]`."""
    w = factors.per_adapter(factors.a @ v)
    p = factors.per_adapter(factors.b @ u)
    return p.mT @ w


def _start(factors: ModuleFactors, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V from the top eigenvectors of Σ A_iᵀB_iᵀB_iA_i (JD with U free), then U given V."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = factors.a.shape[1], factors.b.shape[1]
    b = factors.per_adapter(factors.b)
    v = _top_eigenvectors(
        factors,
        factors.a,
        b @ b.mT,
        torch.randn(d_in, min(rank, d_in), generator=generator),
        _START_STEPS,
    )
    u = torch.randn(d_out, min(rank, d_out), generator=generator)
    w = factors.per_adapter(factors.a @ v)
    return _top_eigenvectors(factors, factors.b, w @ w.mT, u, _START_STEPS), v


def _alternating_step(
    factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    w = factors.per_adapter(factors.a @ v)
    u = _top_eigenvectors(factors, factors.b, w @ w.mT, u, _POWER_STEPS)
    p = factors.per_adapter(factors.b @ u)
    v = _top_eigenvectors(factors, factors.a, p @ p.mT, v, _POWER_STEPS)
    return u, v


def _eigen_step(
    factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Eqs. 14–17, both from the old U and V: W_iW_iᵀP_i = W_iΣ_iᵀ and P_iP_iᵀW_i = P_iΣ_i.
    w = factors.per_adapter(factors.a @ v)
    p = factors.per_adapter(factors.b @ u)
    core = p.mT @ w
    new_u = factors.b.T @ factors.per_row(w @ core.mT)
    new_v = factors.a.T @ factors.per_row(p @ core)
    return _orthonormal(new_u), _orthonormal(new_v)


def _top_eigenvectors(
    factors: ModuleFactors,
    rows: torch.Tensor,
    weights: torch.Tensor,
    start: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Top eigenvectors of Σ_i rows_iᵀ · weights_i · rows_i, as many as `start` has columns.

    Subspace iteration with a few more columns than are wanted, then Rayleigh–Ritz. `rows` is
    `[R, d]`, `weights` `[n, max rank, max rank]` positive semidefinite.
    """
    d, wanted = start.shape
    extra = min(_OVERSAMPLING, d - wanted)
    if extra:
        # Rows of the data are better company for the start than noise, and need no generator.
        filler = rows[torch.linspace(0, max(rows.shape[0] - 1, 0), extra).long()].T
        start = torch.cat([start, filler], dim=1)
    q = _orthonormal(start)
    for _ in range(steps):
        q = _orthonormal(rows.T @ factors.per_row(weights @ factors.per_adapter(rows @ q)))
    projected = factors.per_adapter(rows @ q)
    small = torch.einsum("nrq,nrs,nst->qt", projected, weights, projected)
    _, rotation = torch.linalg.eigh(small.double())
    return q @ rotation[:, -wanted:].flip(1).float()


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(x).Q


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """‖U⁺ − UUᵀU⁺‖ / ‖U⁺‖ (eq. 19)."""
    return float((new - old @ (old.T @ new)).norm() / new.norm().clamp_min(1e-30))


def _pad(basis: torch.Tensor, rank: int, d: int) -> torch.Tensor:
    if basis.shape[1] == rank:
        return basis
    return torch.cat([basis, basis.new_zeros(d, rank - basis.shape[1])], dim=1)
