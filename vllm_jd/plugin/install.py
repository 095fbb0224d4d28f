"""The replacements of a process (see `vllm_jd.plugin.patches`), made when the plugin is loaded."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm_jd.plugin.config import adapts_experts, plugin_config
from vllm_jd.plugin.faults import faults_told
from vllm_jd.plugin.on_objects import mark, ours
from vllm_jd.plugin.patches import TRIED, check_vllm

_ENGINE_CALLS = ("preprocess_add_request", "add_lora", "remove_lora", "pin_lora", "list_loras")


def install() -> None:
    """Make the replacements of a process, which ask for a store and without one do as before.

    Harmless when repeated. A vLLM without these is left alone: it works on, without the plugin.
    """
    try:
        from vllm.model_executor.layers.fused_moe import layer as fused_moe
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker import lora_model_runner_mixin

        manager = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
        configure = CpuPlatform.check_and_update_config.__func__
        experts, current = fused_moe.FusedMoEConfig, fused_moe.get_current_vllm_config
        calls = {name: getattr(EngineCore, name) for name in _ENGINE_CALLS}
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.vllm_jd").warning(
            "vllm-jd was tried with vLLM %s and is off: %s", TRIED, error
        )
        return
    if not ours(manager):
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _manager_maker(manager)
    if not ours(configure):
        CpuPlatform.check_and_update_config = classmethod(_compiling(configure))
    if not ours(experts):
        fused_moe.FusedMoEConfig = _experts_without_lora(experts, current)
    for name, call in calls.items():
        if not ours(call):
            setattr(EngineCore, name, _by_the_engine(call, name))
    EngineCore.vllm_jd_serve_generation = _serve_generation
    EngineCore.vllm_jd_tell = _tell
    EngineCore.vllm_jd_measure = _measure


def _by_the_engine(stock: Any, name: str) -> Any:
    """vLLM loads its plugins while an EngineCore is made: what is called of it later is ours."""

    @functools.wraps(stock)
    def call(self: Any, *args: Any) -> Any:
        connected = getattr(self.scheduler, "connected_to", None)
        if connected is None:
            return stock(self, *args)
        adapters = connected(self)
        if name == "preprocess_add_request":
            return stock(self, *args)
        return getattr(adapters, name)(*args)

    return mark(call)


def _serve_generation(self: Any, path: str, generation: int) -> None:
    """An EngineCore's call of ours: see `vllm_jd.plugin.api.generations`."""
    self.scheduler.connected_to(self).serve_generation(path, generation)


def _tell(self: Any, adapters: list[tuple[str, str]]) -> list[tuple[bool, bool, int, float | None]]:
    """The same: see `vllm_jd.plugin.api.residents`."""
    return self.scheduler.connected_to(self).tell(adapters)


def _measure(self: Any, names: int) -> dict[str, Any]:
    """The same: see `vllm_jd.plugin.api.measures`."""
    self.scheduler.connected_to(self)
    return self.scheduler.measure(names)


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

    return mark(make_manager)


def _compiling(stock: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if plugin_config(vllm_config.additional_config) is None:
            return stock(cls, vllm_config)
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            return stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    return mark(check_and_update_config)


def _experts_without_lora(stock: Any, current_vllm_config: Callable[[], Any]) -> Any:
    def make_config(*args: Any, **kwargs: Any) -> Any:
        vllm_config = current_vllm_config()
        config = plugin_config(vllm_config.additional_config)
        # On CPU those that it takes with LoRA do not run (see `vllm_jd.plugin.worker.experts_cpu`).
        cpu = vllm_config.device_config.device_type == "cpu"
        if config is not None and (cpu or not adapts_experts(config)):
            kwargs["is_lora_enabled"] = False
        return stock(*args, **kwargs)

    return mark(make_config)
