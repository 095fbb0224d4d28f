"""Layers of experts with adapters on GPUs: where vLLM's own experts add LoRA.

Its experts that can (`LoRAExpertsMixin`) ask the punica wrapper of a context for what is added
after each of their two products. Our pools stand in for that wrapper.
"""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from vllm_jd.plugin.worker.experts import ELSE, ExpertLayer


def adapt_in_context(runner: MoERunner, adapters: ExpertLayer) -> None:
    """Have a layer's experts add what adapters of them add.

    Raises:
        ValueError: vLLM computes these experts by something that takes no adapters.
    """
    kernel = runner._quant_method.moe_kernel
    stock = None if kernel is None else kernel.fused_experts
    if not isinstance(stock, LoRAExpertsMixin):
        raise ValueError(
            f"the store adapts experts; found {runner.layer_name} computed by "
            f"{type(stock).__name__}, which takes no adapters. Serve with --moe-backend triton; "
            f"where vLLM refuses that, {ELSE}"
        )
    stock.set_lora_context(context_of(adapters, runner.moe_config.experts_per_token))


def context_of(adapters: ExpertLayer, top_k: int) -> MoELoRAContext:
    """What vLLM's experts look at; its own stacked weights are empty."""
    return MoELoRAContext(
        w13_lora_a_stacked=(),
        w13_lora_b_stacked=(),
        w2_lora_a_stacked=(),
        w2_lora_b_stacked=(),
        adapter_enabled=torch.empty(0, dtype=torch.int32),
        max_loras=0,
        top_k=top_k,
        w13_num_slices=len(adapters.gate_up.slices),
        fully_sharded=False,
        tp_rank=0,
        tp_size=1,
        local_num_experts=adapters.experts,
        punica_wrapper=_Wrapper(adapters),
        use_tuned_config=False,
    )


class _Wrapper:
    """As much of a punica wrapper as `LoRAExpertsMixin` calls.

    Args:
        adapters: of the layer.
    """

    def __init__(self, adapters: ExpertLayer):
        self._adapters = adapters

    def add_lora_w13(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        topk_ids: torch.Tensor,
        *_: Any,
        add_inputs: bool = True,
        **__: Any,
    ) -> tuple[None, None, None, None]:
        """Add to gate and up: y `[tokens, k, 2 · d_inner]` in place, x `[tokens, d]`.

        The answer is what vLLM's own hands on to `add_lora_w2`.
        """
        if not add_inputs:
            y.zero_()
        self._pairs, self._order = self._adapters.pairs(topk_ids)
        pools = self._adapters.gate_up
        pools.add_pairs(y.view(-1, y.shape[-1]), x, self._pairs, self._order)
        return None, None, None, None

    def add_lora_w2(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        topk_weights: torch.Tensor,
        *_: Any,
        add_inputs: bool = True,
        **__: Any,
    ) -> None:
        """Add to down: y `[tokens, k, d]`, which is weighted already, in place; x `[tokens · k,
        d_inner]`. Comes after `add_lora_w13` of the same tokens."""
        if not add_inputs:
            y.zero_()
        weighted = (x * topk_weights.reshape(-1, 1)).to(x.dtype)
        pools = self._adapters.down
        pools.add_pairs(y.view(-1, y.shape[-1]), weighted, self._pairs, self._order)
