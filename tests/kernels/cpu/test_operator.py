"""The operator for compiled graphs against the torch reference."""

import pytest
import torch

from vllm_jd import row
from vllm_jd.kernels import ModulePools, reference
from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.cpu.operator import StepState, add_layer
from vllm_jd.row import CORE_FULL, ROW_FIELDS

D_IN, WIDTHS, RANK, SLOTS = 40, (24, 16), 5, 6

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C++ compiler")


def make_pools(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    rows = torch.zeros(SLOTS, len(WIDTHS), 1, len(ROW_FIELDS), dtype=torch.int32)
    slot = torch.arange(SLOTS)
    for s in range(len(WIDTHS)):
        rows[:, s, 0, row.V_START] = (s * 2 + slot % 2) * RANK
        rows[:, s, 0, row.U_START] = (slot % 2) * RANK
        rows[:, s, 0, row.RANK] = RANK
        rows[:, s, 0, row.CORE_SLOT] = slot
        rows[:, s, 0, row.CORE_OFFSET] = s * RANK**2
        rows[:, s, 0, row.CORE_KIND] = CORE_FULL
        rows[:, s, 0, row.SCALE_ROW] = -1
    u = [random(2 * RANK, width) for width in WIDTHS]
    return ModulePools(random(4 * RANK, D_IN), u, random(SLOTS, 2 * RANK**2), rows)


def expected(y, x, pools, slots):
    y = y.clone()
    reference.add_adapters(y, x, pools, slots)
    return y


# Of sums of up to a few hundred: both round.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 7])
def test_it_adds_what_the_reference_adds(dtype, tokens):
    pools = make_pools(dtype)
    slots = torch.tensor([3, -1, 0, 5, 5, 2, -1, 1], dtype=torch.int32)
    step = StepState(slots)
    layer = add_layer(pools, step)
    generator = torch.Generator().manual_seed(tokens)
    # A part of a wider y, as a row of a merged buffer is.
    wide = torch.randn(tokens, sum(WIDTHS) + 3, generator=generator).to(dtype)
    x = torch.randn(tokens, D_IN, generator=generator).to(dtype)
    y = wide[:, : sum(WIDTHS)]
    before = y.clone()
    torch.ops.vllm_jd.add_adapters_cpu(y, x, layer)
    assert torch.equal(y, before), "an inactive step adds nothing"
    step.set_active(True)
    torch.ops.vllm_jd.add_adapters_cpu(y, x, layer)
    wanted = expected(before, x, pools, slots)
    torch.testing.assert_close(y, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not torch.equal(y, before)


def test_a_compiled_function_sees_what_changes_between_its_calls():
    pools, other = make_pools(torch.float32), make_pools(torch.float32, seed=1)
    slots = torch.full((8,), -1, dtype=torch.int32)
    step = StepState(slots)
    first, second = add_layer(pools, step), add_layer(other, step)
    weight = torch.randn(sum(WIDTHS), D_IN)

    @torch.compile(dynamic=False)
    def model(x):
        y = x @ weight.T
        torch.ops.vllm_jd.add_adapters_cpu(y, x, first)
        z = torch.relu(y) + 1
        torch.ops.vllm_jd.add_adapters_cpu(z, x, second)
        return z * 2

    def plain(x):
        y = expected(x @ weight.T, x, pools, slots)
        return expected(torch.relu(y) + 1, x, other, slots) * 2

    x = torch.randn(8, D_IN)
    for chosen in ([-1] * 8, [0, 1, 2, 3, 4, 5, -1, 0], [5, 5, 5, -1, 1, 1, 0, 0]):
        slots.copy_(torch.tensor(chosen))
        step.set_active(max(chosen) >= 0)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("y", "x"),
    [
        (torch.zeros(2, sum(WIDTHS)), torch.zeros(2, D_IN + 1)),
        (torch.zeros(2, sum(WIDTHS) - 1), torch.zeros(2, D_IN)),
        (torch.zeros(3, sum(WIDTHS)), torch.zeros(2, D_IN)),
        (torch.zeros(9, sum(WIDTHS)), torch.zeros(9, D_IN)),
        (torch.zeros(2, sum(WIDTHS)).bfloat16(), torch.zeros(2, D_IN)),
        (torch.zeros(sum(WIDTHS), 2).T, torch.zeros(2, D_IN)),
    ],
    ids=["x too wide", "y too narrow", "other tokens", "too many tokens", "dtype", "strides"],
)
def test_tensors_that_do_not_fit_are_refused(y, x):
    step = StepState(torch.zeros(8, dtype=torch.int32))
    step.set_active(True)
    pools = make_pools(torch.float32)  # kept: the operator has their address
    layer = add_layer(pools, step)
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.vllm_jd.add_adapters_cpu(y, x, layer)
    assert not y.any()


def test_a_slot_or_layer_that_is_not_there_is_refused():
    slots = torch.tensor([SLOTS], dtype=torch.int32)
    step = StepState(slots)
    step.set_active(True)
    pools = make_pools(torch.float32)  # kept: the operator has their address
    layer = add_layer(pools, step)
    y, x = torch.zeros(1, sum(WIDTHS)), torch.zeros(1, D_IN)
    with pytest.raises(IndexError, match=f"slot {SLOTS} of {SLOTS}"):
        torch.ops.vllm_jd.add_adapters_cpu(y, x, layer)
    for index in (-1, 1 << 40):
        with pytest.raises(IndexError, match="no such layer"):
            torch.ops.vllm_jd.add_adapters_cpu(y, x, index)
    with pytest.raises(ValueError, match="int32"):
        StepState(slots.long())
