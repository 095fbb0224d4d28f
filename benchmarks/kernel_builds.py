"""Compiling the Triton kernels for a GPU that need not be there, and what came out."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_jd.kernels.triton import kernels
from vllm_jd.kernels.triton.plan import (
    CONFIGS,
    DEFAULT,
    MAX_BLOCK_R,
    Config,
    Launch,
    LayerShape,
    Plan,
)
from vllm_jd.kernels.triton.plan import plan as plan_of
from vllm_jd.row import BLOCK, ROW_FIELDS

CAPABILITIES = (80, 90, 100)
"""Ampere (A100), Hopper (H100), Blackwell (B200)."""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory of one program, at most (CUDA C++ Programming Guide, compute capabilities)."""
TENSOR_CORE = ("wgmma", "tcgen05", "mma.sync")
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_ALIGNMENT = ["tt.divisibility", 16]


@dataclass(frozen=True)
class Built:
    """A compiled kernel.

    Args:
        registers: of one thread, at most `plan.MAX_REGISTERS`.
        spilled_bytes: stored to memory for want of registers.
        shared_bytes: shared memory of one program.
        instruction: the tensor-core instruction, one of `TENSOR_CORE`, or `fma` without any.
        ptx: what ptxas made the binary of.
        wide_load_bytes: the widest load from global memory that one thread makes.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instruction: str
    ptx: str

    @property
    def wide_load_bytes(self) -> int:
        """Bytes of the widest load or copy from global memory that one thread makes."""
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x)?(\d+)\s*,", self.ptx)
        loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        sizes = [int(copied, 16) for copied in copies]
        sizes += [int(count or 1) * int(bits) // 8 for count, bits in loads]
        return max(sizes, default=0)

    @property
    def in_flight(self) -> int:
        """Hopper's products whose first factor is in registers and which are not waited for at
        once: ptxas before 13.3 may write to these registers while they are still read
        (https://github.com/triton-lang/triton/issues/9433)."""
        return in_flight(self.ptx)


def in_flight(ptx: str) -> int:
    """See `Built.in_flight`."""
    found = begun = 0
    for line in re.findall(r"wgmma\.[^;]*;|^\$L__BB\w+:|\bbra\b", ptx, re.MULTILINE):
        if line.startswith("wgmma.mma_async"):
            begun += line.count("{") == 2  # the sums, and the first factor
        elif line.startswith("wgmma.wait_group") and line.endswith(" 0;"):
            begun = 0
        elif not line.startswith(("wgmma.fence", "wgmma.commit_group")):
            found, begun = found + begun, 0
    return found + begun


@dataclass(frozen=True)
class Shipped:
    """A kernel as it ships: from which configuration, specialised how, for which type and GPU."""

    config: str
    plan: Plan
    launch: Launch
    dtype: torch.dtype
    capability: int

    @property
    def chunked(self) -> bool:
        """Whether ranks go beyond what a program holds at once."""
        return self.plan.shape.chunks > 1

    def __str__(self) -> str:
        constants = "-".join(f"{name}{int(value)}" for name, value in self.launch.constants.items())
        chunked = "-chunked" if self.chunked else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.config}-{self.launch.kernel}-{constants}{chunked}-{dtype}-sm{self.capability}"
        )

    def build(self) -> Built:
        """Compile it. Raises as `build`."""
        return build(self.plan, self.launch, self.dtype, self.capability)


def shipped() -> list[Shipped]:
    """All that ships, each once, under the first configuration that has it.

    All configurations in bfloat16 for all `CAPABILITIES`; the default one also with cores in codes
    of 8 and 4 bits, and in float16 and float32 for an H100: the others differ in conversions; and
    for an H100 with room for adapters of many rows (`LONG`), as a server has that makes blends,
    and with eight experts of a token (`FAN`).
    """
    found: dict[tuple[object, ...], Shipped] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bf16 = dtype == torch.bfloat16
        for config in CONFIGS if bf16 else (DEFAULT,):
            bits = (0, 8, 4) if bf16 and config is DEFAULT else (0,)
            long = (0, 8) if bf16 and config is DEFAULT else (0,)
            fans = (1, 8) if bf16 and config is DEFAULT else (1,)
            made = variants(
                config, element_size=dtype.itemsize, core_bits=bits, long_depths=long, fans=fans
            )
            for plan, launch in made:
                everywhere = bf16 and not launch.constants["LONG"]
                everywhere = everywhere and launch.constants.get("FAN", 1) == 1
                for capability in CAPABILITIES if everywhere else (90,):
                    constants = tuple(sorted(launch.constants.items()))
                    key = (launch.kernel, launch.num_warps, launch.num_stages, constants)
                    key += (plan.shape.chunks > 1, dtype, capability)
                    found.setdefault(key, Shipped(config.name, plan, launch, dtype, capability))
    return list(found.values())


def variants(
    config: Config,
    *,
    element_size: int = 2,
    core_bits: Sequence[int] = (0,),
    long_depths: Sequence[int] = (0,),
    fans: Sequence[int] = (1,),
) -> list[tuple[Plan, Launch]]:
    """Each kernel of a configuration, once for each way in which it may be specialised.

    With an example of a plan in which it is launched: q, k and v of Mistral-7B.

    Args:
        config: of the launches.
        element_size: as in `LayerShape`.
        core_bits: as in `LayerShape`, all that are wanted. Those who have cores in codes have
            bases in 8 bits too, and ranks that need no chunks.
        long_depths: as in `LayerShape`, all that are wanted; with cores that are numbers.
        fans: tokens of one input, all that are wanted; with more than one, the kernels that know
            of that, for the lowest rank without any of these.
    """
    base = LayerShape(4096, (4096, 1024, 1024), element_size=element_size, scales=True)
    shapes = [
        replace(base, max_rank=max_rank, int8=int8, core_bits=bits, long_depth=long)
        for bits in core_bits
        for long in long_depths
        if not (bits and long)
        for max_rank in (16, 32, 64, 256)
        for int8 in (False, True)
        if not bits or (int8 and max_rank <= MAX_BLOCK_R)
    ]
    found: dict[tuple[object, ...], tuple[Plan, Launch]] = {}
    for shape, fan in product(shapes, fans):
        if fan > 1 and shape != replace(base, max_rank=16):
            continue
        for n_tokens in (1, 16, 17, 64, 65, 256, 257, 1024, 8192):
            one = plan_of(shape, n_tokens * fan, config, fan)
            for launch in one.launches:
                if launch.constants.get("FAN", 1) != fan:
                    continue
                constants = tuple(sorted(launch.constants.items()))
                key = (launch.kernel, launch.num_warps, launch.num_stages, constants)
                key += (shape.chunks > 1,)  # Triton compiles an argument of 1 in
                found.setdefault(key, (one, launch))
    return list(found.values())


def build(
    plan: Plan, launch: Launch, dtype: torch.dtype, capability: int, *, order: bool = True
) -> Built:
    """Compile one launch of a plan, as the dispatcher would on aligned tensors.

    Args:
        plan: gives the values of the kernel's arguments: a 1, and multiples of 16, are compiled in.
        launch: of the plan.
        dtype: of x, y and the pools.
        capability: of the GPU, one of `CAPABILITIES`; from 90 on with programmatic dependent
            launch.
        order: whether tokens come in an order of their own.

    Raises:
        ValueError: Triton runs in its interpreter here, where nothing can be compiled.
    """
    if kernels.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: unset it to compile kernels")
    kernel = getattr(kernels, launch.kernel)
    pdl = capability >= 90
    constants = dict(launch.constants) | {"PDL": pdl, "HAS_ORDER": order, "ALIGNED": True}
    signature, values, attributes = {}, {}, {}
    arguments = _example(plan, dtype)
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
            continue
        argument = arguments[name]
        if isinstance(argument, str):
            signature[name] = argument
            attributes[(position,)] = [_ALIGNMENT]
        elif name in kernels.COUNTS:
            signature[name] = "i32"
        elif argument == 1:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[(position,)] = [_ALIGNMENT]
    options = launch.options | {"launch_pdl": pdl}
    log = io.StringIO()
    source = ASTSource(kernel, signature, values, attributes)
    nvidia, compilation = triton.knobs.nvidia, triton.knobs.compilation
    with nvidia.scope(), compilation.scope(), contextlib.redirect_stdout(log):
        nvidia.dump_ptxas_log = compilation.always_compile = True
        built = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    ptx = built.asm["ptx"]
    found = [name for name in TENSOR_CORE if f"{name}." in ptx]
    return Built(
        registers=int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        spilled_bytes=int(re.search(r"(\d+) bytes spill stores", log.getvalue())[1]),
        shared_bytes=built.metadata.shared,
        instruction=found[0] if found else "fma",
        ptx=ptx,
    )


def _example(plan: Plan, dtype: torch.dtype) -> dict[str, str | int]:
    """Types of the kernels' pointers, and values of their numbers, for one call."""
    shape = plan.shape
    numbers, floats, indices = _POINTERS[dtype], "*fp32", "*i32"
    d_out, core_row = sum(shape.widths), shape.rows * shape.max_rank**2
    return {
        **dict.fromkeys(("x", "y", "v"), numbers),
        **dict.fromkeys(("z", "h"), floats),
        **dict.fromkeys(("slots", "order", "rows", "long_rows"), indices),
        "table": "*i64",
        "codes": "*i8" if shape.int8 else numbers,
        "steps": "*bf16" if shape.int8 else numbers,
        "cores": {0: numbers, 8: "*i8", 4: "*u8"}[shape.core_bits],
        "core_steps": "*bf16" if shape.core_bits else numbers,
        "n_tokens": plan.n_tokens,
        "n_places": plan.places,
        "blocks_0": 16,
        "blocks_1": 4,
        "n_rows": shape.scratch_rows,
        "n_slices": len(shape.widths),
        "n_slots": 1024,
        "depth": shape.depth,
        "long_depth": shape.long_depth,
        "long_stride": len(shape.widths) * shape.long_depth * len(ROW_FIELDS),
        "chunks": shape.chunks,
        "splits": plan.splits,
        "split_stride": plan.n_tokens * shape.scratch_rows * plan.scratch_width,
        "d_in": shape.d_in,
        "split_width": plan.split_width,
        "x_stride": shape.d_in,
        "y_stride": d_out,
        "v_stride": shape.d_in,
        "slot_stride": shape.rows * len(ROW_FIELDS),
        "core_stride": core_row * (shape.core_bits or 8) // 8,
        "step_stride": core_row // BLOCK,
        "n_int8": 1024,
    }
