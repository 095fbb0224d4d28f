"""Adapters of a layer of experts (MoE): what each adapter adds to each expert, in the one path.

A token goes through some of the layer's experts, as its router chooses. To the kernels each *pair*
of a token and one of its experts is a token, whose slot is the adapter's slot times the number of
experts plus the expert (`LayerPools`, `experts`). Such a layer has two of these:

    gate and up     what is added to w13 · x, before the activation
    down            what is added to w2 · a, before the experts' outputs are weighted and summed

Where these are added depends on who computes the experts: `experts_cpu`, `experts_context`.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_jd.kernels.tiles import places
from vllm_jd.plugin.worker.expert_names import BOTH, DOWN, GATE, UP, expert_module
from vllm_jd.plugin.worker.layer import LayerPools, Slice
from vllm_jd.store import ModuleInfo


class Projection:
    """How the workers of tensor parallelism share a projection of experts: what `LayerPools` asks
    of vLLM's LoRA layers. Gate and up are cut by their outputs, down by its inputs.

    Args:
        d_in: of the model's layer.
        d_out: of each slice of it.
        rank: which worker this is.
        size: how many there are.
        by_output: whether outputs are cut.
        halves: whether the only slice is gate and up in one, one behind the other.
    """

    def __init__(
        self,
        d_in: int,
        d_out: Sequence[int],
        rank: int,
        size: int,
        *,
        by_output: bool,
        halves: bool = False,
    ):
        self.tp_rank, self.tp_size = rank, size
        self.base_layer = SimpleNamespace(output_sizes=list(d_out), input_size=d_in)
        self.input_size = d_in if by_output else d_in // size
        self.output_slices = tuple(d // size if by_output else d for d in d_out)
        self._by_output, self._halves = by_output, halves

    def slice_lora_a(self, a: Any) -> Any:
        """This worker's columns of A `[r, d_in]`; of several slices of each, or None."""
        if isinstance(a, list):
            return [None if one is None else self.slice_lora_a(one) for one in a]
        first = self.tp_rank * self.input_size
        return a if self._by_output else a[:, first : first + self.input_size]

    def slice_lora_b(self, b: Any) -> Any:
        """This worker's rows of B `[d_out, r]`; of several slices of each, or None."""
        if isinstance(b, list):
            return [None if one is None else self.slice_lora_b(one) for one in b]
        if not self._by_output:
            return b
        parts = b.chunk(2) if self._halves else [b]
        width = len(parts[0]) // self.tp_size
        first = self.tp_rank * width
        return torch.cat([part[first : first + width] for part in parts])


class ExpertLayer:
    """The adapters of one layer of experts.

    Args:
        name: vLLM's name of it.
        experts: how many there are.
        gate_up: the pools of gate and up.
        down: those of down.
    """

    def __init__(self, name: str, experts: int, gate_up: LayerPools, down: LayerPools):
        self.name, self.experts = name, experts
        self.gate_up, self.down = gate_up, down
        self._step = gate_up.step

    def pairs(self, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The slot of each pair, and an order for a backend that wants one (see `Step.order`).

        Args:
            topk_ids: int `[tokens, k]`, the experts of each token; negative: none.

        Returns:
            int32 `[tokens · k]`, −1 where nothing is added; int32 `[places · k]` or None.
        """
        n, k = topk_ids.shape
        slots = self._step.token_slots[:n, None]
        pairs = slots * self.experts + topk_ids.to(torch.int32)
        pairs = torch.where((slots < 0) | (topk_ids < 0), -1, pairs).flatten()
        if self._step.order is None:
            return pairs, None
        each = torch.arange(k, dtype=torch.int32, device=pairs.device)
        order = self._step.order[: places(n), None]
        return pairs, torch.where(order < 0, -1, order * k + each).flatten()


ELSE = "only adapters that leave experts alone are served: make a store of such"


def check_experts(runner: MoERunner) -> None:
    """Raise ValueError where adapters of a layer's experts would not be added right."""
    config, parallel = runner.moe_config, runner.moe_config.moe_parallel_config
    others = f"Of this model {ELSE}"
    found = todo = None
    if parallel.use_ep:
        found, todo = "--enable-expert-parallel", "Serve without it; tensor parallel is served"
    elif parallel.dp_size > 1 or parallel.is_sequence_parallel:
        found, todo = "data parallel", "Serve with a data-parallel size of 1, several servers"
    elif config.num_experts != config.num_logical_experts:
        found = "experts that are there several times (--enable-eplb, or shared experts among them)"
        todo = "Serve without --enable-eplb"
    elif not config.is_act_and_mul:
        found, todo = "experts without a gate", others
    elif runner.routed_experts.apply_router_weight_on_input:
        found, todo = "experts whose inputs are weighted", others
    elif runner.routed_input_transform is not None or (
        config.hidden_dim != config.hidden_dim_unpadded
    ):
        found, todo = "experts with inputs of another width than the model's", others
    if found:
        raise ValueError(
            f"the store adapts experts, expected a layer that can add it; found {found} in "
            f"{runner.layer_name}. {todo}"
        )


def expert_layer(
    name: str,
    runner: MoERunner,
    modules: dict[str, ModuleInfo],
    pools_of: Callable[..., LayerPools],
) -> ExpertLayer:
    """The pools of a layer of experts.

    Args:
        name: vLLM's name of it.
        runner: vLLM's object.
        modules: projection → what the store has of it.
        pools_of: makes LayerPools of (name, layer, slices, experts).

    Raises:
        ValueError: the store's modules do not fit the layer.
    """
    config, parallel = runner.moe_config, runner.moe_config.moe_parallel_config
    experts, rank, size = config.num_experts, parallel.tp_rank, parallel.tp_size
    hidden, inner = config.hidden_dim, config.intermediate_size_per_partition_unpadded * size
    for module in modules.values():
        if module.experts > experts:
            raise ValueError(
                f"the store's module {module.name} is of {module.experts} experts, the model's "
                f"layer has {experts}; the store was made for another base model"
            )
    parts = [part for part in (GATE, UP) if part in modules]
    if BOTH in modules and parts:
        raise ValueError(
            f"the store has modules {modules[BOTH].name} and {modules[parts[0]].name}, which is a "
            "part of it; expected the one or the other: compress the adapters again"
        )

    def pools(names: Sequence[str], layer: Projection) -> LayerPools:
        slices = [Slice(f"{name}.{part}", modules.get(part)) for part in names]
        whole = f"{name}.{'+'.join(names)}"
        return pools_of(whole, layer, slices, experts=experts)

    alternate = config.activation == MoEActivation.SWIGLUOAI  # gate, up, gate, up …
    if BOTH in modules or alternate:
        own = Projection(hidden, [2 * inner], rank, size, by_output=True, halves=not alternate)
        gate_up = pools([BOTH], own)
    else:
        own = Projection(hidden, [inner, inner], rank, size, by_output=True)
        gate_up = pools([GATE, UP], own)
    down = pools([DOWN], Projection(inner, [hidden], rank, size, by_output=False))
    return ExpertLayer(name, experts, gate_up, down)


def fit_halves(upload: LoRAModel, layer: LayerPools) -> None:
    """Give an upload gate and up in one where a layer of experts has them so, or each for itself
    where the layer has it so. What is in one has the ranks of both."""
    if layer.experts is None:
        return
    loras = upload.loras
    name = layer.slices[0].name.rpartition(".")[0]
    for expert in range(layer.experts):
        both, gate, up = (expert_module(f"{name}.{part}", expert) for part in (BOTH, GATE, UP))
        if layer.slices[0].name == f"{name}.{GATE}" and both in loras:
            whole = loras.pop(both)
            for half, b in zip((gate, up), whole.lora_b.chunk(2), strict=True):
                loras[half] = _factors(half, whole.lora_a, b)
        elif layer.slices[0].name == f"{name}.{BOTH}" and (gate in loras or up in loras):
            width = layer.shapes[0][0] // 2
            halves = [loras.pop(half, None) for half in (gate, up)]
            a = torch.cat([half.lora_a for half in halves if half is not None])
            blocks = [
                a.new_zeros(width, 0) if half is None else half.lora_b.to(a.dtype)
                for half in halves
            ]
            loras[both] = _factors(both, a, torch.block_diag(*blocks))


def _factors(name: str, a: torch.Tensor, b: torch.Tensor) -> LoRALayerWeights:
    return LoRALayerWeights(name, len(a), len(a), a, b.contiguous(), scaling=1)
