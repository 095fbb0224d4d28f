"""JD-Full: min over orthonormal U, V and free Σ_i of Σ_i ‖B_iA_i − UΣ_iVᵀ‖²_F.

Compress then Serve, §3.1 and Appendix A.1 (case 1) and A.2. For fixed U, V the best core is
Σ_i = UᵀB_iA_iV, and the error is Σ‖B_iA_i‖² − Σ‖Σ_i‖². Neither B_iA_i nor a d×d matrix is ever
formed: with W = A·V and P = Bᵀ·U (concatenated over all adapters), Σ_i = P_iᵀW_i, and

    Σ_i B_iA_iVVᵀA_iᵀB_iᵀ·Q = B · [W_i W_iᵀ · (Bᵀ·Q)_i]

costs two products with the concatenated factors.
"""

from functools import partial

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import REFERENCE, Bases, JdOptions, Solver, fit_shared
from vllm_jd.compressor.methods.method import Method
from vllm_jd.row import CORE_FULL

TOLERANCE = 1e-3  # eq. 19
_ROUGH_TOLERANCE = 5e-3  # what is above the noise of bfloat16
_OVERSAMPLING = 8
_START_STEPS = 4

# On processors with AMX, torch 2.13's bfloat16 product of some matrices that are wider than this
# (32 × 49152) ends the process. Only vocabularies are.
_WIDEST_ROUGH = 32768


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
    if solver == "eigen":
        u, v = _eigen(factors, *(start or _start(factors, rank, seed)), iterations)
    else:
        u, v = _alternating(factors, rank, iterations, seed, start)
    return _pad(u[:, :rank], rank, d_out), _pad(v[:, :rank], rank, d_in)


def cores(factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_i = UᵀB_iA_iV of every adapter: `[n, rank, rank]`."""
    w = factors.per_adapter(factors.a @ v)
    p = factors.per_adapter(factors.b @ u)
    return p.mT @ w


class _Side:
    """One of the two bases while it is sought, with a few more vectors than are wanted.

    Keeps `seen` = rows · basis, so that an update costs two products with the rows and no more.
    Those products are nearly all of the work, and memory-bound: while `rough`, they are taken in
    bfloat16, where the machine has it.
    """

    def __init__(
        self,
        factors: ModuleFactors,
        rows: torch.Tensor,
        rank: int,
        start: torch.Tensor,
        rough: bool,
    ):
        self.factors = factors
        self.rank = rank
        self._exact_rows = rows
        self._rows = rows.bfloat16() if rough else rows
        wanted = min(rank + _OVERSAMPLING, rows.shape[1])
        extra = wanted - start.shape[1]
        if extra > 0:
            # Rows of the data are better company for the start than noise.
            at = torch.linspace(0, max(rows.shape[0] - 1, 0), extra, device=rows.device).long()
            start = torch.cat([start, rows[at].T], dim=1)
        self._set(_orthonormal(start))

    def make_exact(self) -> None:
        """No longer `rough`."""
        self._rows = self._exact_rows

    def _set(self, basis: torch.Tensor) -> None:
        self.basis = basis
        # As a product of wide matrices: several times as fast as of tall ones.
        seen = basis.T.to(self._rows.dtype) @ self._rows.T
        self.seen = seen.T.contiguous().float()

    def _back(self, seen: torch.Tensor) -> torch.Tensor:
        return (seen.T.to(self._rows.dtype) @ self._rows).T.float()

    @property
    def wanted(self) -> torch.Tensor:
        """The basis found so far, `[d, rank]`."""
        return self.basis[:, : self.rank]

    @property
    def products(self) -> torch.Tensor:
        """rows_i · basis of each adapter: `[n, max rank, rank]`."""
        return self.factors.per_adapter(self.seen[:, : self.rank])

    def update(self, weights: torch.Tensor, steps: int = 1) -> None:
        """Towards the top eigenvectors of Σ_i rows_iᵀ · weights_i · rows_i.

        `weights` is `[n, max rank, max rank]`, positive semidefinite. Power steps, then
        Rayleigh–Ritz: afterwards the basis' columns are in descending order of eigenvalue.
        """
        for _ in range(steps):
            weighted = weights @ self.factors.per_adapter(self.seen)
            self._set(_orthonormal(self._back(self.factors.per_row(weighted))))
        seen = self.factors.per_adapter(self.seen)
        small = seen.flatten(0, 1).T @ (weights @ seen).flatten(0, 1)
        _, rotation = torch.linalg.eigh(small.double())
        rotation = rotation.flip(1).to(self.basis.dtype)
        self.basis = self.basis @ rotation
        self.seen = self.seen @ rotation


def _alternating(
    factors: ModuleFactors,
    rank: int,
    iterations: int,
    seed: int,
    start: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    widest = max(factors.a.shape[1], factors.b.shape[1])
    rough = iterations > 1 and _bfloat16_is_fast(factors.a.device) and widest <= _WIDEST_ROUGH
    left, right = _sides(factors, rank, seed, start, rough)
    for done in range(1, iterations + 1):
        if rough and done == iterations:
            rough = _leave_roughness(left, right)
        old_u, old_v = left.wanted, right.wanted
        w = right.products
        left.update(w @ w.mT)
        p = left.products
        right.update(p @ p.mT)
        change = max(_change(old_u, left.wanted), _change(old_v, right.wanted))
        if not rough and change < TOLERANCE:
            break
        if rough and change < _ROUGH_TOLERANCE:
            rough = _leave_roughness(left, right)
    return left.wanted, right.wanted


def _leave_roughness(left: _Side, right: _Side) -> bool:
    left.make_exact()
    right.make_exact()
    return False


def _bfloat16_is_fast(device: torch.device) -> bool:
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _sides(
    factors: ModuleFactors,
    rank: int,
    seed: int,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    rough: bool,
) -> tuple[_Side, _Side]:
    """The two bases at the start: the given ones, or V from the top eigenvectors of
    Σ A_iᵀB_iᵀB_iA_i (JD with U free), then U given V."""
    if start is not None:
        u, v = start
        return (
            _Side(factors, factors.b, rank, u.to(factors.b), rough),
            _Side(factors, factors.a, rank, v.to(factors.a), rough),
        )
    generator = torch.Generator().manual_seed(seed)
    sides = []
    weights = factors.per_adapter(factors.b)
    for rows in (factors.a, factors.b):
        d = rows.shape[1]
        random = torch.randn(d, min(rank, d), generator=generator).to(rows.device)
        side = _Side(factors, rows, rank, random, rough)
        side.update(weights @ weights.mT, _START_STEPS)
        weights = side.products
        sides.append(side)
    right, left = sides
    return left, right


def _start(factors: ModuleFactors, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _sides(factors, rank, seed, None, rough=False)
    return left.wanted, right.wanted


def _eigen(
    factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    # Eqs. 14–17, both from the old U and V: W_iW_iᵀP_i = W_iΣ_iᵀ and P_iP_iᵀW_i = P_iΣ_i.
    for _ in range(iterations):
        w = factors.per_adapter(factors.a @ v)
        p = factors.per_adapter(factors.b @ u)
        core = p.mT @ w
        new_u = _orthonormal(factors.b.T @ factors.per_row(w @ core.mT))
        new_v = _orthonormal(factors.a.T @ factors.per_row(p @ core))
        change = max(_change(u, new_u), _change(v, new_v))
        u, v = new_u, new_v
        if change < TOLERANCE:
            break
    return u, v


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(x).Q


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """‖U⁺ − UUᵀU⁺‖ / ‖U⁺‖ (eq. 19)."""
    return float((new - old @ (old.T @ new)).norm() / new.norm().clamp_min(1e-30))


def _pad(basis: torch.Tensor, rank: int, d: int) -> torch.Tensor:
    if basis.shape[1] == rank:
        return basis
    return torch.cat([basis, basis.new_zeros(d, rank - basis.shape[1])], dim=1)


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: JdOptions,
    start: Bases | None,
    seed: int,
) -> Shared:
    fit = partial(jd_full, iterations=options.iterations, solver=options.solver, seed=seed)
    return fit_shared(factors, assignment, options, start, fit, CORE_FULL)


JD_FULL = Method(
    "jd-full",
    "shared orthonormal bases and a full r × r core for each adapter",
    f"{REFERENCE}, §3.1, A.1 (case 1), A.2",
    _fit,
    JdOptions,
    normalise=True,
    seeded=True,
)
