"""Stand-ins for the few of vLLM's compiled operators that a small Llama cannot do without.

vLLM imports this in the place of its own library of them (see `carried`). They are torch's own
operators, and as slow; what has a form in Python or Triton in vLLM is told to use it instead.
"""

import torch

LIBRARY = torch.library.Library("_C", "FRAGMENT")


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """out = silu(first half of x) · second half."""
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; here it keeps it alive, too."""
    return tensor.view(tensor.shape)


class _Memory:
    """Memory by its address, in the form in which torch takes a device's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        kind = {1: "|i1", 2: "<i2", 4: "<i4", 8: "<i8"}[tensor.element_size()]
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": kind,
            "shape": tuple(tensor.shape),
            "strides": tuple(n * tensor.element_size() for n in tensor.stride()),
            "data": (tensor.data_ptr(), False),
        }


def get_cuda_view_from_cpu_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Page-locked main memory as a tensor of the GPU, which has it under the same address."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return torch.as_tensor(_Memory(tensor), device="cuda").view(tensor.dtype)


def sees_main_memory() -> bool:
    """Whether `get_cuda_view_from_cpu_tensor` works: what is written here is read there."""
    host = torch.zeros(8, dtype=torch.int32, pin_memory=True)
    try:
        view = get_cuda_view_from_cpu_tensor(host)
        host.copy_(torch.arange(8, dtype=torch.int32))
        return view.is_cuda and (view + 1).tolist() == [*range(1, 9)]
    except (RuntimeError, TypeError, ValueError):
        return False


def unsupported(capability: int) -> bool:
    """What says whether there are kernels of some kind for a GPU: there are none."""
    return False


for _name in (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
):
    LIBRARY.define(f"{_name}(int capability) -> bool")
    LIBRARY.impl(_name, unsupported, "CompositeExplicitAutograd")

for _schema, _call in {
    "silu_and_mul(Tensor! out, Tensor x) -> ()": silu_and_mul,
    "weak_ref_tensor(Tensor tensor) -> Tensor": weak_ref_tensor,
    "get_cuda_view_from_cpu_tensor(Tensor tensor) -> Tensor": get_cuda_view_from_cpu_tensor,
}.items():
    LIBRARY.define(_schema)
    LIBRARY.impl(_schema.split("(")[0], _call, "CompositeExplicitAutograd")
