"""Cores as codes, decoded in the Triton kernels: results and loads, in Triton's interpreter.

`test_interpreter.py` runs this file in a process of its own.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_kernels import KINDS, assert_close, make_case
from tests.kernels.test_quantised_cores import QUANTISED, coded
from tests.kernels.triton.interpreted.cases import (
    ROWS,
    TILES_16,
    TILES_64,
    VARIANTS,
    kernels_of,
    run,
    shuffled,
)
from tests.kernels.triton.interpreted.check_products import QUICK, fit
from tests.kernels.triton.interpreted.check_traffic import assert_counts
from vllm_jd.kernels.triton import backend
from vllm_jd.row import CORE_SLOT

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = {"d_in": 65, "d_out": (75, 17), "dtype": BF16}
MET = QUICK | {"rows, cores apart"}  # every kernel that decodes, and the cores in every stage
EVERY = [
    pytest.param(
        variant,
        kind,
        marks=[] if variant in MET and kind == QUANTISED[i % 2] else pytest.mark.slow,
    )
    for i, variant in enumerate(VARIANTS)
    for kind in QUANTISED
]


def check(case, kind, config, *, shift, order=None, strided=False):
    mine, decoded = coded(case, kind, shift=shift, strided=strided)
    assert_close(run(mine, config, order), decoded)
    return mine


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_mixed_ranks_and_kinds(variant, kind):
    """Offsets that are multiples neither of 32 nor of 2; rows beside which lies other memory."""
    n_tokens = fit(variant, 18)
    case = make_case(**SHAPE, n_tokens=n_tokens, ranks=(3, 13), depth=2, layout="runs", int8=True)
    mine = check(case, kind, VARIANTS[variant][0], shift=37, order=shuffled(n_tokens), strided=True)
    assert kernels_of(backend.plan_of(mine.pools, n_tokens)) == VARIANTS[variant][1]


RANKS = [
    pytest.param(rank, core, kind, marks=[] if kind == QUANTISED[i % 2] else pytest.mark.slow)
    for i, (core, rank) in enumerate(product(["full", "diagonal"], [13, 8, 64, 16]))
    for kind in QUANTISED
]


@pytest.mark.parametrize(("rank", "core", "kind"), RANKS)
@pytest.mark.parametrize("config", [ROWS, TILES_16, TILES_64], ids=["rows", "16", "64"])
def test_ranks(config, rank, core, kind):
    case = make_case(
        n_tokens=4, d_in=40, d_out=(33,), ranks=(rank, rank), slots=4, clusters=2, dtype=BF16,
        kinds=(KINDS[core],), layout="distinct",
    )  # fmt: skip
    check(case, kind, replace(config, programs=(1, 1)), shift=rank % 3)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("config", [ROWS, TILES_16], ids=["rows", "tiles"])
def test_ranks_beyond_a_block(config, kind):
    case = make_case(
        n_tokens=3, d_in=70, d_out=(40,), ranks=(70, 150), slots=3, clusters=2, dtype=BF16,
        kinds=(KINDS["full"], KINDS["diagonal"]), layout="distinct",
    )  # fmt: skip
    check(case, kind, config, shift=3)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("config", [ROWS, replace(ROWS, fuse_bytes=0), TILES_64])
def test_other_types(config, kind, dtype):
    check(make_case(**SHAPE | {"dtype": dtype}, n_tokens=5, ranks=(5, 16)), kind, config, shift=1)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v in MET else pytest.mark.slow) for v in VARIANTS]
)
def test_the_same_bits_as_their_numbers(variant):
    """A program decodes what the store would have: nothing else changes in a sum."""
    n_tokens = fit(variant, 17)
    case = make_case(**SHAPE, n_tokens=n_tokens, ranks=(13, 13), layout="distinct")
    config = replace(VARIANTS[variant][0], fuse_bytes=VARIANTS[variant][0].fuse_bytes and 10**9)
    for kind in QUANTISED:
        mine, decoded = coded(case, kind, shift=5)
        assert torch.equal(run(mine, config), run(decoded, config))


@pytest.mark.parametrize(("variant", "kind"), EVERY)
def test_what_is_loaded_is_what_the_plan_says(monkeypatch, variant, kind):
    case = make_case(
        n_tokens=fit(variant, 18), d_in=97, d_out=(75, 17), ranks=(3, 20), depth=2, dtype=BF16,
        layout="runs",
    )  # fmt: skip
    mine, _ = coded(case, kind, shift=7)
    assert_counts(monkeypatch, mine, VARIANTS[variant][0])


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("config", [ROWS, TILES_16], ids=["rows", "tiles"])
def test_so_is_it_of_chunks(monkeypatch, config, kind):
    case = make_case(
        n_tokens=3, d_in=70, d_out=(40,), ranks=(40, 150), slots=3, clusters=2, dtype=FP16,
        layout="distinct",
    )  # fmt: skip
    mine, _ = coded(case, kind, shift=7)
    assert_counts(monkeypatch, mine, replace(config, programs=(4, 4)))


def test_steps_that_are_not_a_cores_own_do_not_reach_it():
    """A NaN in the next block of 32, and in the next row."""
    case = make_case(
        n_tokens=2, d_in=40, d_out=(33,), ranks=(13, 13), slots=2, dtype=BF16,
        kinds=(KINDS["full"],), layout="equal",
    )  # fmt: skip
    mine, decoded = coded(case, "int8")
    slot, offset = case.pools.rows[0, 0, 0, CORE_SLOT:].tolist()
    beyond = -(-(offset + 169) // 32)
    steps = mine.pools.core_steps
    steps[1 - slot] = steps[slot, beyond:] = torch.nan
    steps[slot, : offset // 32] = torch.nan
    for config in (ROWS, TILES_16, TILES_64):
        assert_close(run(mine, config), decoded)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n_tokens=st.integers(1, 20),
    ranks=st.sampled_from([(1, 1), (1, 3), (13, 13), (16, 16), (1, 40)]),
    depth=st.integers(1, 2),
    dtype=st.sampled_from([BF16, FP16]),
    layout=st.sampled_from(["equal", "distinct", "runs", "mixed"]),
    kind=st.sampled_from(QUANTISED),
    shift=st.integers(0, 65),
    variant=st.sampled_from(list(VARIANTS)),
)
def test_any_shape(seed, n_tokens, ranks, depth, dtype, layout, kind, shift, variant):
    case = make_case(
        seed=seed, n_tokens=n_tokens, d_in=31, d_out=(33, 13), ranks=ranks, depth=depth,
        dtype=dtype, layout=layout,
    )  # fmt: skip
    check(case, kind, replace(VARIANTS[variant][0], name=variant), shift=shift)
