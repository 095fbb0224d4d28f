"""Weigh errors by the inputs that a module really sees."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_jd.compressor.factors import ModuleFactors

_DAMPING = 1e-2


@dataclass(frozen=True)
class Metric:
    """S with S² = E[xxᵀ] over a module's inputs x, so that E‖Dx‖² = ‖DS‖²_F.

    Args:
        root: S, float32 `[d_in, d_in]`, symmetric and positive definite.
        inverse: its inverse.
    """

    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> "Metric":
        """From E[xxᵀ] `[d_in, d_in]`.

        One percent of its mean eigenvalue is added, so that directions that the calibration
        inputs lack still count for something.
        """
        moment = moment.double()
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        values = values.clamp_min(0)
        values = (values + _DAMPING * values.mean().clamp_min(1e-30)).sqrt()
        root = vectors * values @ vectors.T
        inverse = vectors / values @ vectors.T
        return cls(root.float(), inverse.float())

    def see(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of A or of V `[n, d_in]`, times S."""
        return rows @ self.root

    def undo(self, rows: torch.Tensor) -> torch.Tensor:
        """Inverse of `see`."""
        return rows @ self.inverse

    def seen(self, factors: ModuleFactors) -> ModuleFactors:
        """Factors of D_iS."""
        return ModuleFactors(self.see(factors.a), factors.b, factors.ranks, factors.scales)

    def to(self, device: str) -> "Metric":
        """The same on another device."""
        return Metric(self.root.to(device), self.inverse.to(device))

    @cached_property
    def digest(self) -> str:
        """sha256 of S."""
        return hashlib.sha256(self.root.cpu().numpy().tobytes()).hexdigest()
