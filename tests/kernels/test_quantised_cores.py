"""Cores as codes with steps: the numbers of the store, in the reference and whoever takes them."""

import pytest
import torch

from tests.kernels.test_kernels import (
    CORE_KIND,
    CORE_OFFSET,
    DTYPES,
    KINDS,
    Case,
    assert_close,
    make_case,
    needs_compiler,
)
from vllm_jd import kernels
from vllm_jd.kernels import ModulePools
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, RANK, SCALE_ROW, Row
from vllm_jd.store.quantise import Kind, dequantise, quantise

QUANTISED = ["int8", "int4"]


@pytest.fixture(autouse=True, params=["reference", pytest.param("cpu", marks=needs_compiler)])
def backend(request, monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", request.param)
    return request.param


def coded(case: Case, kind: Kind, *, shift: int = 0, strided: bool = False) -> tuple[Case, Case]:
    """The case with its cores as the codes of `kind`, and with the numbers that these stand for.

    All cores begin `shift` entries later in their rows. Blocks of 32 differ in size by powers of
    two, and one is 0.
    """
    pools = case.pools
    generator = torch.Generator().manual_seed(1)
    slots, length = pools.cores.shape
    numbers = torch.randn(slots, shift + length, generator=generator)
    numbers[:, shift:] = pools.cores.float()
    blocks = -(-(shift + length) // 32)
    sizes = torch.exp2(torch.randint(-3, 4, (slots, blocks), generator=generator).float())
    sizes[0, -1] = 0
    numbers *= sizes.repeat_interleave(32, dim=1)[:, : shift + length]
    codes, steps = quantise(numbers, kind)
    decoded = dequantise(codes, steps, shift + length).to(pools.dtype)
    if strided:  # in wider memory, whose other numbers would show
        codes = torch.cat([codes, torch.full_like(codes, 77)], dim=1)[:, : codes.shape[1]]
        steps = torch.cat([steps, torch.full_like(steps, torch.nan)], dim=1)[:, : steps.shape[1]]
    rows = pools.rows.clone()
    rows[..., CORE_OFFSET] += shift
    return tuple(
        Case(with_cores(pools, rows, *cores), case.x, case.y, case.token_slots)
        for cores in ((codes, steps), (decoded, None))
    )


def with_cores(pools, rows, cores, steps):
    return ModulePools(
        v=pools.v,
        u=pools.u,
        cores=cores,
        rows=rows,
        scales=pools.scales,
        v_int8=pools.v_int8,
        u_int8=pools.u_int8,
        core_steps=steps,
    )


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("rank", [8, 13, 16, 64])
@pytest.mark.parametrize("shift", [0, 1, 38])
def test_ranks_and_offsets_that_are_no_round_numbers(kind, core, rank, shift):
    case = make_case(
        n_tokens=9, d_in=70, d_out=(40, 33), ranks=(rank, rank), depth=2, kinds=(KINDS[core],)
    )
    mine, decoded = coded(case, kind, shift=shift, strided=True)
    assert mine.pools.core_bits == (8 if kind == "int8" else 4)
    assert_close(mine.run(), decoded)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_all_kinds_of_cores_in_every_dtype(kind, dtype, backend):
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the kernel takes no float64")
    mine, decoded = coded(make_case(ranks=(1, 21), depth=3, dtype=dtype), kind, shift=5)
    if dtype == torch.float64:
        torch.testing.assert_close(mine.run(), decoded.run(), rtol=1e-12, atol=1e-12)
    else:
        assert_close(mine.run(), decoded)


def one_diagonal(kind, dtype, codes, steps):
    """Pools whose adapter multiplies 8 numbers by the entries 3 … 10 of its row."""
    eye = torch.eye(8, dtype=dtype)
    rows = torch.tensor([[[Row(0, 0, 8, CORE_DIAGONAL, -1, 0, 3)]]], dtype=torch.int32)
    return ModulePools(v=eye, u=[eye], cores=codes, rows=rows, core_steps=steps)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_entry_is_rounded_before_it_multiplies(kind, dtype):
    codes = torch.tensor([[0, 0, 0, 1, -7, 3, 5, -3, 7, 6, -5]], dtype=torch.int8)
    if kind == "int8":
        codes = codes * 17 + 1
    stored = codes
    if kind == "int4":
        pairs = torch.nn.functional.pad(codes, (0, 1)).to(torch.int32) + 8
        stored = (pairs[:, 0::2] + 16 * pairs[:, 1::2]).to(torch.uint8)
    step = torch.tensor([[1 / 7]], dtype=torch.bfloat16)
    if dtype == torch.float16:
        step = torch.tensor([[2.0**-20 / 7]], dtype=torch.bfloat16)  # entries are subnormal
    exact = codes[:, 3:].float() * step.float()
    x = torch.full((1, 8), 11.0, dtype=dtype)
    y = torch.zeros(1, 8, dtype=dtype)
    pools = one_diagonal(kind, dtype, stored, step)
    kernels.add_adapters(y, x, pools, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(y, (exact.to(dtype).float() * 11).to(dtype))
    assert not torch.equal(y, (exact * 11).to(dtype))


@pytest.mark.parametrize("kind", QUANTISED)
def test_entries_beyond_the_row_are_found(kind):
    case, _ = coded(make_case(ranks=(8, 8), layout="equal"), kind)  # rows of 128 entries
    starts = case.pools.rows[0, 0, 0, :RANK].tolist()
    case.pools.rows[0, 0, 0] = torch.tensor(
        Row(*starts, 8, CORE_FULL, int(case.pools.rows[0, 0, 0, SCALE_ROW]), 0, 64)
    )
    case.run()
    for kind_of_core, offset in ((CORE_FULL, 65), (CORE_DIAGONAL, 121)):
        case.pools.rows[0, 0, 0, CORE_OFFSET] = offset
        case.pools.rows[0, 0, 0, CORE_KIND] = kind_of_core
        with pytest.raises(IndexError, match=r"outside (0\.\.128|a core row of 128)"):
            case.run()


@pytest.mark.parametrize(
    ("cores", "steps", "message"),
    [
        (torch.zeros(2, 33), torch.zeros(2, 2), "cores must be torch.int8 or torch.uint8"),
        (torch.int8, None, "cores is torch.int8, but v is torch.float32; codes need core_steps"),
        (torch.int8, torch.zeros(2, 2), "core_steps must be torch.bfloat16"),
        (torch.int8, torch.zeros(2, 1, dtype=torch.bfloat16), r"\[2, 2\] for cores of torch.int8"),
        (torch.uint8, torch.zeros(2, 2, dtype=torch.bfloat16), r"\[2, 3\] for .* \[2, 33\]"),
        (torch.int8, torch.zeros(4, dtype=torch.bfloat16), "core_steps must have 2 dimensions"),
        (torch.int8, torch.zeros(2, 2, dtype=torch.bfloat16).T, "core_steps must be contiguous"),
    ],
)
def test_codes_that_do_not_fit(cores, steps, message):
    if isinstance(cores, torch.dtype):
        cores = torch.zeros(2, 33, dtype=cores)
    rows = torch.zeros(3, 1, 1, 7, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ModulePools(
            v=torch.zeros(4, 6), u=[torch.zeros(4, 8)], cores=cores, rows=rows, core_steps=steps
        )
