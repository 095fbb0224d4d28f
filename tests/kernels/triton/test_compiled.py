"""The kernels that ship, compiled here for GPUs that are not here."""

import os
import re

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import kernel_builds as build
from vllm_jd.kernels.triton.embedding_kernel import look_up_kernel
from vllm_jd.kernels.triton.plan import MAX_REGISTERS

QUICK = ("default", 90)


def is_quick(one):
    """A part that shows soon whether the kernels compile at all: an H100's, without 8 bits but in
    the smallest kernel that decodes cores."""
    constants = one.launch.constants
    plain = not constants.get("HAS_INT8", False) and not one.chunked
    more = constants.get("CORE_BITS") or constants["LONG"]
    plain = plain and not (more and constants["BLOCK_R"] > 16)
    return (one.config, one.capability) == QUICK and plain and str(one.dtype) == "torch.bfloat16"


def parameters():
    """Everything for an H100; of what A100s and B200s have too, every second for the one and the
    others for the other; with VLLM_JD_ALL_KERNELS all for all, some minutes more."""
    ones = build.shipped()
    if "VLLM_JD_ALL_KERNELS" not in os.environ:
        an_a100s, an_h100s, a_b200s = (
            [one for one in ones if one.capability == capability] for capability in (80, 90, 100)
        )
        ones = [*an_h100s, *an_a100s[::2], *a_b200s[1::2]]
    return [
        pytest.param(one, id=str(one), marks=[] if is_quick(one) else pytest.mark.slow)
        for one in ones
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", parameters())
def test_fits_its_gpu(one):
    built = one.build()
    assert 0 < built.registers <= MAX_REGISTERS
    assert built.spilled_bytes == 0
    assert built.shared_bytes <= build.SHARED_BYTES[one.capability]
    kernel = one.launch.kernel
    if not kernel.endswith("tiles"):
        assert built.instruction == "fma"
    elif one.launch.constants["BLOCK_M"] == 64:  # a tile that Hopper's and later instructions take
        expected = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[one.capability]
        assert built.instruction == expected
    else:
        assert built.instruction == "mma.sync"
    if not kernel.startswith("mix"):
        assert built.wide_load_bytes == 16
    assert built.in_flight == 0
    assert ("griddepcontrol.wait" in built.ptx) == (one.capability >= 90)
    assert not re.search(r"\b(atom|red)\.(global|gpu|relaxed)", built.ptx)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("coded", [False, True])
def test_an_embeddings_kernel_fits_its_gpu(coded, capability):
    """With 64-bit numbers of tokens, as vLLM has them, and ranks up to 64."""
    pointers = {"z": "*bf16", "ids": "*i64", "token_slots": "*i32", "rows": "*i32"}
    pointers |= {"long_rows": "*i32", "v": "*bf16", "codes": "*i8", "steps": "*bf16"}
    names = look_up_kernel.arg_names
    sizes = {"CODED": coded, "WIDTH": 64}
    signature = {name: pointers.get(name, "i32") for name in names} | dict.fromkeys(
        sizes, "constexpr"
    )
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(ASTSource(look_up_kernel, signature, sizes), target, {"num_warps": 1})
    ptx = built.asm["ptx"]
    assert built.metadata.shared == 0
    assert "ld.global" in ptx and "st.global" in ptx and not re.search(r"\.local\.", ptx)


@triton.jit
def product(a, b, c, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c = a · b, a being rounded on its way: in registers."""
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for first in range(0, n, K):
        rounded = tl.load(a + i[:, None] * n + first + k[None, :]).to(tl.bfloat16)
        acc = tl.dot(rounded, tl.load(b + (first + k)[:, None] * N + j[None, :]), acc)
    tl.store(c + i[:, None] * N + j[None, :], acc)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stages", "safe"), [(1, True), (3, False)])
def test_products_that_are_not_waited_for_are_seen(stages, safe):
    """A loop of such products is safe where it is not pipelined: `Built.in_flight` tells."""
    signature = {"a": "*fp32", "b": "*bf16", "c": "*fp32", "n": "i32"}
    sizes = {"M": 64, "N": 128, "K": 64}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(product, signature | dict.fromkeys(sizes, "constexpr"), sizes, aligned)
    options = {"num_warps": 4, "num_stages": stages}
    ptx = triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["ptx"]
    assert re.search(r"wgmma\.mma_async[^;{]*{[^;}]*}, *{", ptx), "no factor in registers"
    assert (build.in_flight(ptx) == 0) == safe


def test_ships_everything():
    ones = build.shipped()
    assert {one.capability for one in ones} == set(build.CAPABILITIES)
    assert {one.launch.kernel for one in ones} == {
        *("shrink_rows", "shrink_tiles", "mix_rows", "expand_rows", "expand_tiles")
    }
    assert len({str(one) for one in ones}) == len(ones)
    decoding = {(one.launch.kernel, one.launch.constants.get("CORE_BITS", 0)) for one in ones}
    assert decoding >= {
        (kernel, bits)
        for kernel in ("mix_rows", "expand_rows", "shrink_tiles")
        for bits in (0, 8, 4)
    }
    assert sum(map(is_quick, ones)) > 15
