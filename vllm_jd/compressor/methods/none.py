"""No compression: every adapter as it is."""

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.methods.options import Options
from vllm_jd.row import CORE_DIAGONAL


def _keep(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: Options,
    start: Start | None,
    seed: int,
) -> ModuleFactors | Shared:
    """The factors themselves.

    Of VeRA adapters the vectors themselves: bases that all share, and for each adapter a diagonal
    core λ_d and a scale λ_b.
    """
    vera = factors.vera
    if vera is None:
        return factors
    present = factors.ranks > 0
    return Shared(
        u=vera.projection_b.T[None].contiguous(),
        v=vera.projection_a[None],
        assignment=torch.where(present, present.cumsum(0) - 1, -1),
        core=CORE_DIAGONAL,
        scales=vera.lambda_b[present],
        cores=vera.lambda_d,
    )


NONE = Method(
    "none",
    "every adapter as it is, uncompressed",
    "LoRA (Hu et al., 2022); VeRA (Kopiczko et al., 2024)",
    _keep,
    experts=True,
)
