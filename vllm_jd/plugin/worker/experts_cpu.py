"""Layers of experts with adapters on CPU.

vLLM computes a layer's experts in one operator there, which has no place where anything could be
added between its two products. So a layer that adapters may touch is computed here, expert by
expert; all other layers, and all of them where the store has no adapters of experts, stay vLLM's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from vllm_jd.plugin.worker.experts import ELSE, ExpertLayer

_LAYERS: dict[str, "_Layer"] = {}

_LIBRARY = torch.library.Library("vllm_jd", "FRAGMENT")
_LIBRARY.define(
    "run_experts(Tensor(a!) output, Tensor x, Tensor weights, Tensor experts, str layer) -> ()"
)


def _run_by_name(
    output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, layer: str
) -> None:
    _LAYERS[layer].run(output, x, weights, experts)


_LIBRARY.impl("run_experts", _run_by_name, "CPU")
_LIBRARY.impl("run_experts", lambda output, x, weights, experts, layer: None, "Meta")


def _oai(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _halves(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def activation(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=1)
        return act(gate).mul_(up)

    return activation


_ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: _halves(silu),
    MoEActivation.GELU: _halves(gelu),
    MoEActivation.GELU_TANH: _halves(lambda x: gelu(x, approximate="tanh")),
    MoEActivation.SWIGLUOAI: _oai,
}
"""Those of vLLM's operator, with its constants."""


def adapt_on_cpu(runner: MoERunner, adapters: ExpertLayer) -> None:
    """Have a layer's experts computed here, with what adapters add.

    The weights are put back into the order that they had before vLLM packed them for its operator.

    Raises:
        ValueError: vLLM computes these experts by something else, or packs their weights in a way
            that is not known.
    """
    kernel = runner._quant_method.moe_kernel
    stock = None if kernel is None else kernel.fused_experts
    if not isinstance(stock, CPUUnquantizedExperts):
        raise ValueError(
            f"the store adapts experts; found {runner.layer_name} computed by "
            f"{type(stock).__name__}, expected {CPUUnquantizedExperts.__name__}. On CPU, serve the "
            f"model that is not quantised; of a quantised one {ELSE}"
        )
    _LAYERS[adapters.name] = _Layer(runner, stock, adapters)
    kernel.impl.fused_experts = _AdaptedExperts(stock, adapters.name)


class _AdaptedExperts(CPUUnquantizedExperts):
    """In the place of vLLM's experts."""

    def __init__(self, stock: CPUUnquantizedExperts, name: str):
        super().__init__(stock.moe_config, stock.quant_config)
        self.isa, self._name = stock.isa, name

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """An operator of its own to torch.compile: what it does depends on the step."""
        torch.ops.vllm_jd.run_experts(output, hidden_states, topk_weights, topk_ids, self._name)


class _Layer:
    """One layer: its weights, and what adapters add.

    Args:
        runner: vLLM's.
        stock: its experts.
        adapters: of the layer.
    """

    def __init__(self, runner: MoERunner, stock: CPUUnquantizedExperts, adapters: ExpertLayer):
        config, weights = runner.moe_config, runner.routed_experts
        self._adapters = adapters
        self._activation = _ACTIVATIONS[config.activation]
        inner = config.intermediate_size_per_partition
        padded = weights.w2_weight.shape[2]
        for name in ("w13_weight", "w2_weight"):
            parameter = getattr(weights, name)
            if not stock._use_zentorch:
                parameter.data = _unpacked(parameter.data, stock.isa, runner.layer_name)
        if padded != inner:  # by zeros behind each half
            w13 = weights.w13_weight.data
            halves = [half[:, :inner] for half in w13.chunk(2, dim=1)]
            weights.w13_weight.data = torch.cat(halves, dim=1)
            weights.w2_weight.data = weights.w2_weight.data[..., :inner].contiguous()
        self._w13, self._w2 = weights.w13_weight.data, weights.w2_weight.data
        self._bias13, self._bias2 = stock.w1_bias, stock.w2_bias
        if padded != inner and self._bias13 is not None:
            halves = [half[:, :inner] for half in self._bias13.chunk(2, dim=1)]
            self._bias13 = torch.cat(halves, dim=1)

    def run(
        self, output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> None:
        """Compute the layer.

        Args:
            output: `[tokens, d]`, overwritten.
            x: `[tokens, d]`.
            weights: float32 `[tokens, k]`, of each of a token's experts.
            experts: int32 `[tokens, k]`, which they are; negative: none.
        """
        n, k = experts.shape
        slots, _ = self._adapters.pairs(experts)
        chosen, pairs = experts.flatten().sort(stable=True)
        counts = torch.bincount(chosen.clamp(min=-1) + 1, minlength=len(self._w13) + 1).tolist()
        of_expert = pairs.split(counts)
        both = self._product(x, k, self._w13, self._bias13, of_expert)
        self._adapters.gate_up.add_pairs(both, x, slots, None)
        inner = self._activation(both)
        outputs = self._product(inner, 1, self._w2, self._bias2, of_expert)
        self._adapters.down.add_pairs(outputs, inner, slots, None)
        outputs.mul_(weights.view(-1, 1))
        torch.sum(outputs.view(n, k, -1), dim=1, out=output)

    def _product(
        self,
        x: torch.Tensor,
        fan: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        of_expert: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Each pair's input by its expert's weight: `[pairs, d_out]`.

        Args:
            x: `[pairs / fan, d_in]`, an input for so many pairs.
            fan: how many.
            weight: `[experts, d_out, d_in]`.
            bias: `[experts, d_out]` or None.
            of_expert: the pairs without an expert, then those of each expert.
        """
        y = x.new_empty(len(x) * fan, weight.shape[1])
        for expert, pairs in enumerate(of_expert, start=-1):
            if not len(pairs):
                continue
            if expert < 0:
                y[pairs] = 0
                continue
            offset = None if bias is None else bias[expert].to(x.dtype)
            y[pairs] = linear(x[pairs // fan], weight[expert], offset)
        return y


def _unpacked(packed: torch.Tensor, isa: str, layer: str) -> torch.Tensor:
    """Weights `[experts, d_out, d_in]` as they were before `cpu_prepack_moe_weight`."""
    experts, d_out, d_in = packed.shape
    shape = experts, d_out // 16, d_in // 2, 16, 2
    found = {
        "vec": lambda: packed.view(experts, d_out // 16, d_in, 16).transpose(2, 3),
        "amx": lambda: packed.view(shape).permute(0, 1, 3, 2, 4),
    }
    if isa in found:
        weight = found[isa]().reshape(experts, d_out, d_in)
        if torch.equal(cpu_prepack_moe_weight(weight[:1].clone(), isa), packed[:1]):
            return weight
    raise ValueError(
        f"the store adapts experts; found the weights of {layer} packed for {isa!r} in a way "
        f"that is not known, expected one of {', '.join(found)}. On this machine {ELSE}"
    )
