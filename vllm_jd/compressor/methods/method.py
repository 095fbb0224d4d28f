"""What a compression method is: a function of one module's factors.

What methods have in common (rounding, cores, errors, the store) is done around them, in
`vllm_jd.compressor.run.module`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.settings import Settings

Start = list[tuple[torch.Tensor, torch.Tensor]]
"""Bases to start from: (U `[d_out, r]`, V `[d_in, r]`) of each cluster."""

Fit = Callable[[ModuleFactors, torch.Tensor, Settings, Start | None], Shared | ModuleFactors]
"""(factors, assignment int64 `[n]`, settings, start) → what stands for the adapters: bases that
they share, or factors of their own."""


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Args:
        name: of `--method`.
        summary: one line for people.
        fit: see `Fit`.
        options: fields of `Settings` that it looks at.
        normalise: whether it is given every adapter at norm 1 (Compress then Serve, §6.1).
    """

    name: str
    summary: str
    fit: Fit
    options: tuple[str, ...] = ()
    normalise: bool = False

    @property
    def clustered(self) -> bool:
        """Whether adapters are grouped into clusters first."""
        return "clusters" in self.options

    @property
    def shares(self) -> bool:
        """Whether adapters share bases, beside which a residual or a mean makes sense."""
        return "residual_rank" in self.options
