"""Weigh errors by the inputs that a module really sees."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors

DAMPING = 1e-2
"""Part of the mean eigenvalue that is added to every one of them."""


@dataclass(frozen=True)
class Metric:
    """S with SSᵀ = E[xxᵀ] over a module's inputs x, so that E‖Dx‖² = ‖DS‖²_F.

    S is the Cholesky factor. Any other square root is S times a rotation, which a Frobenius norm
    and the best basis for it do not see; this one costs a tenth of an eigenvalue decomposition.

    Args:
        root: S, float32 `[d_in, d_in]`, lower triangular, invertible.
    """

    root: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> "Metric":
        """From E[xxᵀ], symmetric `[d_in, d_in]`.

        One percent of its mean eigenvalue is added to the diagonal, so that directions that the
        calibration inputs lack still count for something.
        """
        moment = moment.to(torch.float64, copy=True)
        # float32 sums leave eigenvalues a little below 0; the damping is far above them.
        damping = DAMPING * moment.diagonal().mean().clamp_min(1e-30)
        moment.diagonal().add_(damping)
        return cls(torch.linalg.cholesky(moment).float())

    def see(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rows of A, or vectors of V, `[n, d_in]`, times S."""
        return vectors @ self.root

    def undo(self, vectors: torch.Tensor) -> torch.Tensor:
        """Inverse of `see`."""
        return torch.linalg.solve_triangular(self.root, vectors, upper=False, left=False)

    def seen(self, factors: ModuleFactors) -> ModuleFactors:
        """Factors of D_iS."""
        return ModuleFactors(self.see(factors.a), factors.b, factors.ranks, factors.scales)

    def to(self, device: str) -> "Metric":
        """The same on another device."""
        return Metric(self.root.to(device))

    @cached_property
    def digest(self) -> str:
        """sha256 of S."""
        return hashlib.sha256(self.root.cpu().numpy().tobytes()).hexdigest()
