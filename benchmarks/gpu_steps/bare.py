"""vLLM from its Python files alone (`carried`), on a GPU or on `fake_gpu`: what must be said to it,
and what must stand in the place of its compiled operators (`compiled_ops`)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_steps.interpreter import hasten


def environment(site: Path, work: Path, runner: int = 2) -> dict[str, str]:
    """What a process that is to import it needs beside its environment.

    Args:
        site: what `carried.unpack` filled.
        work: a folder for its cache.
        runner: vLLM's first or second model runner.
    """
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        "PYTHONPATH": os.pathsep.join([*filter(None, known), str(site)]),
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == 2)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "vllm_jd",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "TORCH_COMPILE_DISABLE": "1",
        # A machine without a network may have no name of its own, either.
        "VLLM_HOST_IP": "127.0.0.1",
        **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo"),
    }


def put_up() -> dict[str, Any]:
    """Import vLLM on its CUDA platform, before anything else of it; returns what there is."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from gpu_steps import fake_gpu

        fake_gpu.put_up()
    import vllm

    hasten()
    if not on_gpu:
        fake_gpu.choose_platform()
    from vllm.platforms import current_platform
    from vllm.platforms.cuda import CudaPlatform

    from gpu_steps import compiled_ops

    sees = on_gpu and compiled_ops.sees_main_memory()
    if not sees:  # vLLM copies then
        CudaPlatform.is_pin_memory_available = classmethod(lambda cls: False)
    # Known already, a model's class is not looked at by a process of vLLM's own.
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.v1.worker import gpu_worker

    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    gpu_worker.kernel_warmup = lambda worker: None  # it imports models that need more packages
    return {
        "vllm": vllm.__version__,
        "platform": type(current_platform).__name__,
        "sees_main_memory": sees,
    }


def options(captured: Sequence[int]) -> dict[str, Any]:
    """Of an engine: no torch.compile, and no kernels that are not there.

    Args:
        captured: numbers of requests for whose decoding steps there are CUDA graphs, of whole
            steps, as no piece of them is compiled; none: eager.
    """
    graphs: dict[str, Any] = {"cudagraph_mode": "NONE"}
    if captured:
        graphs = {
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(captured),
        }
    return {
        "enforce_eager": not captured,
        "disable_custom_all_reduce": True,
        "attention_backend": "TRITON_ATTN",
        "compilation_config": {"mode": 0, "custom_ops": ["none"], **graphs},
        "kernel_config": {
            "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
            "enable_flashinfer_autotune": False,
        },
    }
