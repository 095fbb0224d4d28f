"""Which layers of a model carry adapters: linear ones are wrapped in vLLM's own LoRA layers, each
of which asks our pools instead of vLLM's; the output layer is asked for its logits, the embedding
for its rows; layers of experts have those that compute them ask."""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import from_layer, is_in_target_modules, replace_submodule
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models import supports_multimodal
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_jd.plugin.engine.residency import Capacity
from vllm_jd.plugin.on_objects import replace_logits
from vllm_jd.plugin.worker.embedding import adapt, embedding_of
from vllm_jd.plugin.worker.expert_names import ExpertNames
from vllm_jd.plugin.worker.experts import check_experts, expert_layer
from vllm_jd.plugin.worker.experts_context import adapt_in_context
from vllm_jd.plugin.worker.layer import LayerPools, Slice
from vllm_jd.plugin.worker.output import LogitRows, OutputLayer, WholeLayer
from vllm_jd.plugin.worker.sharded import parallel_of
from vllm_jd.plugin.worker.step import Step
from vllm_jd.plugin.worker.wrap_names import layer_columns
from vllm_jd.store import ModuleInfo, Store


class Wrapped(NamedTuple):
    """What was wrapped: vLLM's name of each layer → its pools; how the names of layers begin that
    other pipeline stages have; and the layers of experts."""

    layers: dict[str, LayerPools]
    elsewhere: tuple[str, ...]
    experts: ExpertNames


def wrap_layers(
    model: torch.nn.Module,
    packed: dict[str, list[str]],
    store: Store,
    lora_config: Any,
    capacity: Capacity,
    *,
    step: Step,
    rows: LogitRows | None,
    embeds: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Wrapped:
    """Wrap a model's linear layers, its embedding and its output layer, in place.

    Args:
        model: vLLM's.
        packed: layer → the modules that it computes at once, as vLLM has it.
        store: that the server starts with.
        lora_config: vLLM's.
        capacity: how many slots there are.
        step: shared with all linear layers, and the embedding.
        rows: of the output layer, or None: it is to have no adapters.
        embeds: whether the embedding may have adapters.
        dtype: of the pools.
        device: of the pools.

    Raises:
        ValueError: the store has modules that the model lacks, of other shapes, or two that are
            one layer of the model.
    """
    modules = _modules_by_name(model, store)
    all_modules = list(model.named_modules(remove_duplicate=False))
    elsewhere = tuple(
        f"{name}." for name, module in all_modules if isinstance(module, PPMissingLayer)
    )
    prefix = _language_prefix(model)
    pools_of = partial(LayerPools, store=store, capacity=capacity, dtype=dtype, device=device)
    known: dict[int, BaseLayerWithLoRA] = {}
    layers: dict[str, LayerPools] = {}
    for name, module in all_modules:
        if not isinstance(module, LinearBase) or not name.startswith(prefix):
            continue
        if id(module) in known:  # the same layer in another place of the model
            replace_submodule(model, name, known[id(module)])
            continue
        if not is_in_target_modules(name, lora_config.target_modules, packed):
            continue
        parent, _, last = name.rpartition(".")
        parts = packed.get(last, [])
        wrapped = _wrap(module, parts, model, lora_config, device)
        if not isinstance(wrapped, BaseLayerWithLoRA):
            continue
        full_names = [f"{parent}.{part}" if parent else part for part in parts] or [name]
        slices = _slices(name, full_names, len(wrapped.output_slices), modules)
        if not slices:
            continue
        sharded = parallel_of(wrapped) if lora_config.fully_sharded_loras else None
        layer = pools_of(name, wrapped, slices, step=step, sharded=sharded)
        replace_submodule(model, name, wrapped)
        wrapped.set_mapping(layer)
        known[id(module)] = wrapped
        layers[name] = layer
    targets = lora_config.target_modules
    embedding = embedding_of(all_modules, prefix, targets) if embeds else None
    if embedding is not None:
        name = embedding.name
        slices = [Slice(name, modules.pop(name, None))]
        layers[name] = pools_of(name, embedding.layer, slices, step=step, embedding=True)
        adapt(embedding.table, layers[name])
    output = None if rows is None else _output_layer(model, all_modules, prefix)
    if output is not None and is_in_target_modules(output.name, lora_config.target_modules, packed):
        slices = [Slice(output.name, modules.pop(output.name, None))]
        layers[output.name] = pools_of(
            output.name, output.layer, slices, step=rows.step, compiled=False
        )
        head = OutputLayer(layers[output.name], rows)
        replace_logits(model, output.processor, head.before, head.add)
    runners = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoERunner)
        and name.startswith(prefix)
        and any(info.experts for info in modules.values())
        and is_in_target_modules(name, lora_config.target_modules, packed)
    }
    experts = ExpertNames(runners)
    of_experts = _of_experts(experts, modules)
    for name, runner in runners.items():
        check_experts(runner)
        found = expert_layer(name, runner, of_experts.get(name, {}), partial(pools_of, step=step))
        for layer in (found.gate_up, found.down):
            layers[layer.name] = layer
        if device.type == "cpu":
            # vLLM for GPUs lacks what this imports.
            from vllm_jd.plugin.worker.experts_cpu import adapt_on_cpu

            adapt_on_cpu(runner, found)
        else:
            adapt_in_context(runner, found)
    left = [name for name in modules if not f"{name}.".startswith(elsewhere)]
    if left:
        raise ValueError(
            f"the store adapts {len(left)} modules that the served model does not have, or "
            f"that LoRA cannot wrap (such as {left[0]}); it was made for base "
            f"model {store.manifest.base_model.name}"
        )
    return Wrapped(layers, elsewhere, experts)


def _of_experts(
    experts: ExpertNames, modules: dict[str, ModuleInfo]
) -> dict[str, dict[str, ModuleInfo]]:
    """Layer of experts → projection → what the store has of it, which is taken out of `modules`."""
    found: dict[str, dict[str, ModuleInfo]] = {}
    for name in [name for name, info in modules.items() if info.experts]:
        place = experts.find(name)
        if place is not None:
            layer, _, projection = place
            found.setdefault(layer, {})[projection] = modules.pop(name)
    return found


class _Output(NamedTuple):
    name: str
    layer: WholeLayer
    processor: LogitsProcessor


def _output_layer(
    model: torch.nn.Module, all_modules: list[tuple[str, torch.nn.Module]], prefix: str
) -> _Output | None:
    """The output layer, or None where another pipeline stage has it, or vLLM's model has it in a
    way of its own. A model whose output layer is its embedding need not have one by that name."""
    for name, module in all_modules:
        if not isinstance(module, LogitsProcessor) or not name.startswith(prefix):
            continue
        parent = name.rpartition(".")[0]
        head = getattr(model.get_submodule(parent), "lm_head", None)
        if isinstance(head, PPMissingLayer):
            return None
        layer = WholeLayer(model.config.get_text_config().hidden_size, (module.org_vocab_size,))
        return _Output(f"{parent}.lm_head" if parent else "lm_head", layer, module)
    return None


def _slices(
    layer: str, names: list[str], outputs: int, modules: dict[str, ModuleInfo]
) -> list[Slice]:
    """The modules of a layer; those that the store adapts are taken out of `modules`.

    Args:
        layer: its name. A store may adapt it as a whole, where vLLM has it in parts.
        names: of the modules that it computes, as vLLM has them.
        outputs: how many outputs it has.
        modules: of the store, by vLLM's names.

    Raises:
        ValueError: the store adapts both the layer and a part of it.
    """
    if layer in modules and layer not in names:
        both = [name for name in names if name in modules]
        if both:
            raise ValueError(
                f"the store has modules {layer} and {both[0]}, which is a part of it; expected "
                "all adapters to have the one or the other: compress them into stores of their own"
            )
        names = [layer]
    if len(names) > outputs:
        return []  # such as two modules that vLLM has merged into one weight
    # Where modules have several outputs, vLLM's first has them: Qwen 3.5's q, k and v beside z.
    counts = [1 + outputs - len(names), *[1] * (len(names) - 1)]
    return [
        Slice(name, modules.pop(name, None), count)
        for name, count in zip(names, counts, strict=True)
    ]


def _modules_by_name(model: torch.nn.Module, store: Store) -> dict[str, ModuleInfo]:
    """vLLM's name of each of the store's modules → the module."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        mapper = mapper.get_rename_mapper()
    modules = store.manifest.modules
    columns = layer_columns((module.name for module in modules), mapper)
    return {name: modules[column] for name, column in columns.items()}


def _wrap(
    module: LinearBase,
    parts: list[str],
    model: torch.nn.Module,
    lora_config: Any,
    device: torch.device,
) -> torch.nn.Module:
    """vLLM's LoRA layer around a linear one, for 0 adapters, or the layer itself."""
    # vLLM asks where the weight lies. A quantised layer may have packed it away, and left None.
    packed = getattr(module, "weight", module) is None
    if packed:
        module.weight = torch.nn.Parameter(torch.empty(0, device=device), False)
    # Its layers for fully sharded adapters ask their punica wrapper for each stage.
    plain_config = copy.copy(lora_config)
    plain_config.fully_sharded_loras = False
    try:
        wrapped = from_layer(module, 0, plain_config, parts, model.config)
    finally:
        if packed:
            module.weight = None
    if lora_config.fully_sharded_loras and hasattr(wrapped, "_enable_aux_cuda_stream"):
        # As with those: the workers' sends to each other stay on one stream.
        wrapped._enable_aux_cuda_stream = False
    return wrapped


def _language_prefix(model: torch.nn.Module) -> str:
    """How the names of the language model's layers begin: the others see other tokens than those
    that have adapters."""
    if supports_multimodal(model) and hasattr(model, "get_mm_mapping"):
        return model.get_mm_mapping().language_model[0]
    return ""
