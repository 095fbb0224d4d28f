"""Slots of more rows than the others, in Triton's interpreter (see `test_interpreter.py`)."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_kernels import Case, assert_close, make_case
from tests.kernels.test_long_rows import split
from tests.kernels.triton.interpreted.cases import VARIANTS, kernels_of, run, shuffled
from tests.kernels.triton.interpreted.check_products import fit
from vllm_jd.kernels.triton import backend


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_add_up(variant):
    config, kernels = VARIANTS[variant]
    n_tokens = fit(variant, 19)
    for seed, depth in ((0, 1), (1, 2)):
        case = make_case(
            seed, n_tokens=n_tokens, d_in=65, d_out=(75, 17), ranks=(3, 13), depth=4,
            dtype=torch.bfloat16, layout="mixed", int8=bool(seed),
        )  # fmt: skip
        whole, parts = split(case, 3, depth)
        found = run(parts, config)
        plan = backend.plan_of(parts.pools, n_tokens)
        assert kernels_of(plan) == kernels
        assert plan.launches[0].grid[0 if plan.variant == "tiles" else 1] == 2 * depth
        assert_close(found, whole)
        assert_close(run(parts, config, shuffled(n_tokens)), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_has_none_gets_the_same_bits(variant):
    """As if there were no slots of many rows at all."""
    config, _ = VARIANTS[variant]
    case = make_case(n_tokens=fit(variant, 19), ranks=(3, 13), depth=3, dtype=torch.bfloat16)
    case.token_slots[: len(case.x)].clamp_(max=2)
    _, parts = split(case, 3)
    plain = Case(replace(parts.pools, long_rows=None), case.x, case.y, case.token_slots)
    found = run(parts, config)
    assert torch.equal(found, run(plain, config))
    assert_close(found, plain)
