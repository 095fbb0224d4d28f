"""Experts in Triton's interpreter (see `test_interpreter.py`)."""

import pytest
import torch

from tests.kernels.test_experts import check_experts, experts_case
from tests.kernels.triton.interpreted.cases import VARIANTS, run
from tests.kernels.triton.interpreted.check_products import fit
from vllm_jd.kernels.triton.plan import DEFAULT

LONG = ["rows, cores in expand", "tiles of 16, cores in shrink"]


@pytest.mark.parametrize(
    ("variant", "long"), [*((name, False) for name in VARIANTS), *((name, True) for name in LONG)]
)
def test_each_pair_gets_its_adapters_expert(variant, long):
    config, _ = VARIANTS[variant]
    case, added, order = experts_case(fit(variant, 20), torch.bfloat16, long=long)
    check_experts(run(case, config), case, added)
    check_experts(run(case, config, order), case, added)


def test_an_order_that_takes_an_input_apart_is_refused():
    case, _, order = experts_case(4, torch.bfloat16)
    with pytest.raises(IndexError, match="order takes the 2 tokens of an input apart"):
        run(case, DEFAULT, order[torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])])
