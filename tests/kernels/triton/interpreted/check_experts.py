"""Experts in Triton's interpreter (see `test_interpreter.py`)."""

import pytest
import torch

from tests.kernels.test_experts import check_experts, experts_case
from tests.kernels.triton.interpreted.cases import VARIANTS, run
from tests.kernels.triton.interpreted.check_products import fit


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_pair_gets_its_adapters_expert(variant):
    config, _ = VARIANTS[variant]
    case, added, order = experts_case(fit(variant, 20), torch.bfloat16)
    check_experts(run(case, config), case, added)
    check_experts(run(case, config, order), case, added)
