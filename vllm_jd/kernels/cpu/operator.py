"""The CPU kernel as an operator of torch's, for compiled graphs.

Between the layers of a step Python's own code and objects are no longer in the caches, and calling
the kernel through Python takes longer than the kernel does for one token. So the graph gets an
operator whose implementation is C++, registered through torch's stable C interface, which needs no
headers. What changes from step to step lies in a `StepState` that the operator looks at when it
runs.
"""

import ctypes
import functools
import logging
from pathlib import Path

import torch

from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.kernels.cpu.build import loaded_library
from vllm_jd.kernels.pools import ModulePools

logger = logging.getLogger(__name__)

_NAME = "add_adapters_cpu"
_LIBRARY = torch.library.Library("vllm_jd", "FRAGMENT")
_LIBRARY.define(f"{_NAME}(Tensor(a!) y, Tensor x, int layer) -> ()")
_LIBRARY.impl(_NAME, lambda y, x, layer: None, "Meta")


class _StepData(ctypes.Structure):
    _fields_ = [
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_slots", "active", "threads")),
    ]


class _TorchApi(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("data_ptr", "size", "stride", "dtype", "free")]


class StepState:
    """What the operator needs to know of the coming step; all layers of a model share one.

    Args:
        token_slots: int32, contiguous; changed in place from step to step.

    Raises:
        ValueError: `token_slots` is not int32, contiguous, in one dimension.
    """

    def __init__(self, token_slots: torch.Tensor):
        if token_slots.dtype != torch.int32 or token_slots.stride() != (1,):
            raise ValueError(
                f"token_slots must be int32 [n] and contiguous, got {token_slots.dtype} "
                f"{tuple(token_slots.shape)}, strides {token_slots.stride()}"
            )
        self._token_slots = token_slots  # kept: the operator has its address
        self.data = _StepData(token_slots.data_ptr(), token_slots.shape[0], 0, 1)

    def set_active(self, active: bool) -> None:
        """Whether any token has an adapter: without, the operator does nothing."""
        self.data.active = active
        self.data.threads = torch.get_num_threads()


def add_layer(pools: ModulePools, step: StepState) -> int | None:
    """Make pools known to the operator `torch.ops.vllm_jd.add_adapters_cpu(y, x, layer)`.

    It does what `vllm_jd.kernels.add_adapters(y, x, pools, token_slots)` does, in a step that is
    active. Pools and step must live as long as anybody calls it.

    Returns:
        The number by which to call it, or None where there is no such operator: no compiler, or a
        torch without the interface.
    """
    library = _registered()
    if library is None:
        return None
    return library.jd_add_layer(cpu.address_of(pools), ctypes.addressof(step.data))


@functools.cache
def _registered() -> ctypes.CDLL | None:
    """The kernel's library, once its operator is registered with torch."""
    library = loaded_library()
    if library is None:
        return None
    library.jd_add_layer.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.jd_add_layer.restype = ctypes.c_int64
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("get_data_ptr", "get_size", "get_stride", "get_dtype", "delete_tensor_object")
        found = [getattr(torch_library, f"aoti_torch_{name}") for name in names]
        init, add = (
            getattr(torch_library, f"aoti_torch_library_{name}") for name in ("init_impl", "impl")
        )
    except (OSError, AttributeError) as error:
        logger.info("compiled graphs call the CPU kernel through Python: %s", error)
        return None
    api = _TorchApi(*(ctypes.cast(function, ctypes.c_void_p) for function in found))
    library.jd_bind_torch(ctypes.byref(api))
    handle = ctypes.c_void_p()  # of a torch::Library, which stays for good
    if init(b"vllm_jd", b"CPU", __file__.encode(), ctypes.c_uint32(0), ctypes.byref(handle)):
        return None
    if add(handle, _NAME.encode(), ctypes.cast(library.jd_torch_op, ctypes.c_void_p)):
        return None
    return library
