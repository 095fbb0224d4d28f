"""What stands for the adapters of one module: shared bases and cores."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL

_VERA_AT_ONCE = 16  # adapters
_EXACT_NUMBERS = 1 << 18  # held as float64 at once: what a core's cache holds


@dataclass(frozen=True)
class Shared:
    """Bases shared by clusters of adapters: adapter i becomes scaleᵀ ∘ Uᵀ_c · Σ_i · V_c.

    Args:
        u: float32 `[k, r, d_out]`, or `[1, r, d_out]` where all clusters have the same.
        v: float32 `[k, r, d_in]`, or `[1, r, d_in]`.
        assignment: int64 `[n]`, c of each adapter; −1: nothing of it here.
        core: `CORE_NONE` (Σ = 1), `CORE_FULL` or `CORE_DIAGONAL`. The cores themselves follow
            from the bases (see `best_cores`), unless they are given.
        scales: float32 `[k, d_out]`, or None where all are 1.
        cores: float32 `[n, core_size]` of adapters that stay as they are, each a cluster of its
            own.
    """

    u: torch.Tensor
    v: torch.Tensor
    assignment: torch.Tensor
    core: int
    scales: torch.Tensor | None = None
    cores: torch.Tensor | None = None
    _seen: dict[str | int, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def rank(self) -> int:
        """Rank of the bases."""
        return self.u.shape[1]

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        scales = 1 if self.scales is None else len(self.scales)
        return max(len(self.u), len(self.v), scales)

    @property
    def core_size(self) -> int:
        """Numbers of one adapter's core."""
        return {CORE_FULL: self.rank**2, CORE_DIAGONAL: self.rank}.get(self.core, 0)

    def bases(self, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(U `[d_out, r]`, scaled, and V `[d_in, r]`) of one cluster."""
        u = self.u[min(cluster, len(self.u) - 1)].T
        if self.scales is not None:
            u = u * self.scales[cluster][:, None]
        return u, self.v[min(cluster, len(self.v) - 1)].T

    def projected(
        self, factors: ModuleFactors, cluster: int, members: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B_iᵀU and A_iV of a cluster's members, float64 `[m, max rank, r]`.

        Both cores and errors need them: they are kept until other factors are asked for.
        """
        if self._seen.get("factors") is not factors:
            self._seen.clear()
            self._seen["factors"] = factors
        if cluster not in self._seen:
            own = factors.subset(members)
            u, v = (basis.double() for basis in self.bases(cluster))
            self._seen[cluster] = (
                own.per_adapter(_exact_product(own.b, u)),
                own.per_adapter(_exact_product(own.a, v)),
            )
        return self._seen[cluster]

    def matrices(self, cores: torch.Tensor) -> torch.Tensor:
        """Cores `[m, core_size]` as matrices `[m, r, r]`."""
        if self.core == CORE_FULL:
            return cores.view(-1, self.rank, self.rank)
        if self.core == CORE_DIAGONAL:
            return torch.diag_embed(cores)
        eye = torch.eye(self.rank, dtype=cores.dtype, device=cores.device)
        return eye.expand(len(cores), -1, -1)


def best_cores(factors: ModuleFactors, shared: Shared) -> torch.Tensor:
    """The cores with the least squared error for given bases, whatever these are.

    Full: (UᵀU)⁻¹ UᵀBAV (VᵀV)⁻¹, which is UᵀBAV for orthonormal bases (Compress then Serve, §3.1);
    diagonal: (UᵀU ∘ VᵀV)⁻¹ diag(UᵀBAV) (Appendix A.1, case 2).

    Returns:
        float32 `[n, core_size]`, 0 for adapters without a cluster; `shared.cores` if there are.
    """
    if shared.cores is not None:
        return shared.cores
    cores = torch.zeros(len(factors), shared.core_size, device=factors.ranks.device)
    if shared.core_size == 0:
        return cores
    for cluster in range(shared.clusters):
        members = (shared.assignment == cluster).nonzero()[:, 0]
        if not bool((factors.ranks[members] > 0).any()):
            continue
        u, v = (basis.double() for basis in shared.bases(cluster))
        # In float64: the inverses of bases that are far from orthonormal magnify any rounding.
        p, w = shared.projected(factors, cluster, members)
        gram_u, gram_v = u.T @ u, v.T @ v
        if shared.core == CORE_FULL:
            best = inverse(gram_u) @ (p.mT @ w) @ inverse(gram_v)
        else:
            best = (p * w).sum(1) @ inverse(gram_u * gram_v)
        cores[members] = best.flatten(1).float()
    return cores


def relative_errors(
    factors: ModuleFactors,
    norms: torch.Tensor,
    shared: Shared | None,
    cores: torch.Tensor | None,
) -> torch.Tensor:
    """‖BA − UΣVᵀ‖²_F / norm² of every adapter, in float64 `[n]`; 0 where the norm is 0.

    Args:
        factors: B and A, less whatever else stands for the adapter (see `ModuleFactors.minus`).
        norms: float64 `[n]`, ‖BA‖_F of the adapters as they were.
        shared: bases as they are stored, or None.
        cores: `[n, core_size]` as they are stored.
    """
    lost, vera = factors.squared_norms().clone(), factors.vera
    if shared is not None:
        for cluster in range(shared.clusters):
            u, v = (basis.double() for basis in shared.bases(cluster))
            gram_u = u.T @ u
            if cluster < len(shared.v):  # else it is the V of the cluster before
                gram_v = v.T @ v
                across = None if vera is None else vera.projection_a.double() @ v
            everyone = (shared.assignment == cluster).nonzero()[:, 0]
            for members in everyone.split(_VERA_AT_ONCE if vera else max(len(everyone), 1)):
                if vera is None:
                    p, w = shared.projected(factors, cluster, members)
                else:
                    out = vera.projection_b.double().T * vera.lambda_b[members, None].double()
                    p, w = vera.lambda_d[members, :, None].double() * (out @ u), across
                core = shared.matrices(cores[members].double())
                inner = ((p.mT @ w) * core).sum((1, 2))
                square = ((gram_u @ core @ gram_v) * core).sum((1, 2))
                lost[members] += square - 2 * inner
    square = norms.square()
    return torch.where(square > 0, lost.clamp_min(0) / square.clamp_min(1e-300), 0.0)


def all_bases(shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """U `[k, r, d_out]`, scaled, and V `[k, r, d_in]` of all clusters."""
    u = shared.u if shared.scales is None else shared.u * shared.scales[:, None]
    return u, shared.v


def inverse(gram: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of Grams `[…, r, r]`, as `best_cores` has it."""
    # Beyond that, bases in float32 differ by their rounding alone.
    return torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)


def _exact_product(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """rows · basis in float64, without a float64 copy of all rows at once."""
    return torch.cat(
        [part.double() @ basis for part in rows.split(max(1, _EXACT_NUMBERS // rows.shape[1]))]
    )
