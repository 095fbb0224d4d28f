"""A CUDA device that is none, for a rehearsal of vLLM's CUDA platform where there is no GPU.

Tensors that are asked for on `cuda` are made in main memory, streams and events do nothing, and
Triton's kernels run in its interpreter. What it cannot show: memory that is really elsewhere, any
order between streams, CUDA graphs, compiled kernels.
"""

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)
MEMORY = 8 << 30


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on a CUDA device is made in main memory."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.record_stream:
            return None
        return function(*map(_here, args), **kwargs)


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class _Stream:
    """A stream or an event: all is done when it is asked."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    record = synchronize = wait = wait_stream = wait_event = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()


def put_up() -> None:
    """Replace what vLLM asks torch and Triton of a GPU, in this process, before it is imported."""
    import torch._dynamo  # which files away what torch has, each function once

    torch.compile = lambda function=None, **_: function or (lambda function: function)
    OnCpu().__enter__()
    properties = SimpleNamespace(
        name="no GPU", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY,
        multi_processor_count=132, is_integrated=False, L2_cache_size=50 << 20, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=227 << 10,
    )  # fmt: skip
    stream = _Stream()

    def nothing(*_: Any, **__: Any) -> None:
        pass

    of_both = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "memory_stats": lambda *_: {},
        "current_stream": lambda *_: stream,
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), _none),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), nothing),
        **dict.fromkeys(("set_stream", "set_device", "set_device_index"), nothing),
        **dict.fromkeys(("current_device", "current_device_index"), _none),
        **dict.fromkeys(("get_memory_info", "mem_get_info"), lambda *_: (MEMORY, MEMORY)),
    }
    _replace(torch.accelerator, of_both)
    _replace(torch.accelerator, {"current_accelerator": lambda *_: torch.device("cuda")})
    _replace(torch.cuda, of_both)
    of_cuda = {
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "stream": lambda *_: contextlib.nullcontext(),
        **dict.fromkeys(("is_initialized", "_is_compiled"), lambda: True),
        **dict.fromkeys(("manual_seed_all", "init"), nothing),
        **dict.fromkeys(("Stream", "Event"), _Stream),
    }
    _replace(torch.cuda, of_cuda)
    _replace(torch, {"Stream": _Stream, "Event": _Stream})
    _replace(torch.cuda.memory, {"get_allocator_backend": lambda: "none"})
    _put_up_driver()


def _none(*_: Any) -> int:
    return 0


def _replace(module: Any, attributes: Mapping[str, Any]) -> None:
    """Replace those that are there: what this torch lacks, vLLM must do without here, too."""
    for name, value in attributes.items():
        if hasattr(module, name):
            setattr(module, name, value)


def _put_up_driver() -> None:
    """vLLM does with Triton's interpreter, but looks for a driver that is active."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends = triton.backends.backends
    for name in list(backends):
        del backends[name]
    backends["nvidia"] = triton.backends.Backend(compiler=None, driver=Driver)


def choose_platform() -> None:
    """Have vLLM find its CUDA platform, which asks NVML for devices, and its two ways to other
    processes do without a GPU."""
    import vllm.platforms as platforms

    for name in platforms.builtin_platform_plugins:
        platforms.builtin_platform_plugins[name] = lambda: None
    platforms.builtin_platform_plugins["cuda"] = lambda: "vllm.platforms.cuda.CudaPlatform"
    from vllm.platforms.cuda import CudaPlatform

    CudaPlatform.dist_backend, CudaPlatform.dispatch_key = "gloo", "CPU"
    CudaPlatform.is_pin_memory_available = classmethod(lambda cls: False)
