"""Launch plans: plain Python, which must import without Triton."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.kernels.triton.plan import CONFIGS, MAX_SPLITS, LayerShape, column_blocks, plan
from vllm_jd.row import BLOCK

MISTRAL_QKV = LayerShape(4096, (4096, 1024, 1024), max_rank=16)

shapes = st.builds(
    LayerShape,
    d_in=st.integers(1, 30000),
    widths=st.lists(st.integers(1, 30000), min_size=1, max_size=3).map(tuple),
    depth=st.integers(1, 4),
    max_rank=st.integers(1, 300),
    element_size=st.sampled_from([2, 4]),
    int8=st.booleans(),
    scales=st.booleans(),
    core_bits=st.sampled_from([0, 8, 4]),
)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, n_tokens=st.integers(1, 20000), config=st.sampled_from(CONFIGS))
def test_a_plan_covers_everything_once(shape, n_tokens, config):
    made = plan(shape, n_tokens, config)
    shrink, *middle, expand = made.launches
    block_k, block_n = shrink.constants["BLOCK_K"], expand.constants["BLOCK_N"]
    tiles = -(-n_tokens // made.block_m)
    parts = sorted([tiles, shape.rows * made.shape.chunks, made.splits])
    assert sorted(shrink.grid) == parts
    assert made.split_width * (made.splits - 1) < shape.d_in <= made.split_width * made.splits
    assert made.split_width % block_k == 0 and block_k % BLOCK == 0
    assert 1 <= made.splits <= MAX_SPLITS
    assert prod(expand.grid) == tiles * column_blocks(shape, block_n)
    assert block_n % BLOCK == 0
    assert made.scratch_width >= shape.max_rank
    # The cores are applied once: beside a base stage, or in a launch of its own.
    fused = [one.constants.get("FUSE_MIX", False) for one in (shrink, expand)]
    assert sum(fused) + len(middle) == 1 and made.has_mix == bool(middle)
    if fused[0]:
        assert made.splits == 1
    if any(fused):
        assert shape.chunks == 1
    for one in made.launches:  # which kernel decodes, and so is another one
        mixes = one in middle or one.constants.get("FUSE_MIX", False)
        assert one.constants.get("CORE_BITS", 0) == (shape.core_bits if mixes else 0)
    # CUDA's limits of a grid.
    for one in made.launches:
        assert one.grid[0] < 2**31 and max(one.grid[1:]) < 2**16
    if shape.element_size == 4:
        assert made.variant == "rows"


def test_no_plan_depends_on_what_tokens_hold():
    """The same launches, and so the same graph, for any adapters; they differ by n_tokens alone."""
    assert plan(MISTRAL_QKV, 64) is plan(replace(MISTRAL_QKV), 64)
    assert plan(MISTRAL_QKV, 64) != plan(MISTRAL_QKV, 65)


def test_variants_by_tokens():
    kernels = {
        n: [one.kernel for one in plan(MISTRAL_QKV, n).launches] for n in (1, 32, 33, 256, 8192)
    }
    assert kernels[1] == kernels[32] == ["shrink_rows", "expand_rows"]
    assert kernels[33] == kernels[256] == ["shrink_tiles", "mix_rows", "expand_tiles"]
    assert kernels[8192] == ["shrink_tiles", "expand_tiles"]


def test_codes_are_applied_in_expand_for_longer():
    """What decides is how many bytes all programs read."""
    for bits, last in ((0, 42), (8, 80), (4, 151)):
        shape = replace(MISTRAL_QKV, max_rank=32, core_bits=bits)
        config = replace(CONFIGS[0], row_tokens=10**9)
        assert len(plan(shape, last, config).launches) == 2
        assert len(plan(shape, last + 1, config).launches) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerShape(0, (4,)), "positive"),
        (lambda: LayerShape(4, ()), "positive"),
        (lambda: LayerShape(4, (4, 0)), "positive"),
        (lambda: LayerShape(4, (4,), element_size=8), "element_size"),
        (lambda: LayerShape(4, (4,), core_bits=16), "core_bits must be 0, 8 or 4, not 16"),
        (lambda: plan(MISTRAL_QKV, 0), "n_tokens"),
        (lambda: plan(MISTRAL_QKV, 4, fan=2, places=31), "places must be a positive multiple of 2"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
