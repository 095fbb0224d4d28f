"""A model of Mistral-7B's architecture with random weights, its q, k and v carrying adapters.

transformers' own modules, called one after the other as its forward does, but with q, k, v and gate
and up each in one product, as servers have them, and a KV cache that stays where it is: so a step
is one CUDA graph. Nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from shapes import MISTRAL, Layer
from torch import nn

from gpu_steps.layers import StockPools, captured_counts, packed
from gpu_steps.step import Call, recorded
from vllm_jd.kernels import ModulePools, tiles
from vllm_jd.kernels.triton import backend
from vllm_jd.row import RANK


class System(Protocol):
    """Who adds the adapters' part to a layer's q, k and v."""

    def add(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y [tokens, widths of q, k and v] what x [tokens, hidden] gives; in place."""


class Fused(nn.Module):
    """Several linear layers of one input as one product; gives the first one's part."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.merged: torch.Tensor | None = None
        self.widths = [part.out_features for part in parts]
        self.system: System | None = None
        self.layer = 0
        self.use_merged = False
        self.given: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first part; the others ask for theirs next."""
        y = nn.functional.linear(x, self.merged if self.use_merged else self.weight)
        if self.system is not None:
            self.system.add(self.layer, x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        self.given = y.split(self.widths, dim=-1)
        return self.given[0]


class Given(nn.Module):
    """The part of another layer's product; it must have run before on the same input."""

    def __init__(self, fused: Fused, index: int) -> None:
        super().__init__()
        self._of = [fused]  # in a list: it is no submodule
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the product gave for this part."""
        return self._of[0].given[self._index]


class Cache:
    """Keys and values of sequences that are all `length` long with the token that is decoded.

    What is held before is random: zeros can be faster than what is real.
    """

    def __init__(self, model: "Model", sequences: int, length: int) -> None:
        config = model.config
        shape = (2, sequences, config.num_key_value_heads, length, config.head_dim)
        self.layers = [
            torch.randn(shape, dtype=model.dtype, device=model.device) for _ in model.qkv
        ]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new token's at the end; returns all. What transformers' attention calls."""
        held = self.layers[layer]
        held[0, :, :, -1:].copy_(keys)
        held[1, :, :, -1:].copy_(values)
        return held[0], held[1]


class Model:
    """The model, and which of its layers carry adapters.

    Args:
        device: `cuda` or `cpu`.
        dtype: of all weights.
        small: two layers of 64 instead of 32 of 4,096.
    """

    def __init__(self, device: str, dtype: torch.dtype, *, small: bool) -> None:
        from transformers import AutoModelForCausalLM, MistralConfig

        size = {
            "hidden_size": MISTRAL.hidden,
            "intermediate_size": MISTRAL.mlp,
            "num_hidden_layers": MISTRAL.layers,
            "num_attention_heads": MISTRAL.hidden // 128,
            "num_key_value_heads": MISTRAL.kv // 128,
            "head_dim": 128,
            "vocab_size": MISTRAL.vocabulary,
        }
        if small:
            size = {
                "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "vocab_size": 50,
            }  # fmt: skip
        self.device, self.dtype = device, dtype
        # cuDNN's attention gives other bits from call to call, and captured graphs of it crashed.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.config = MistralConfig(
            **size, sliding_window=None, max_position_embeddings=4096, tie_word_embeddings=False
        )
        with torch.device(device):
            whole = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation="sdpa"
            )
        self._whole = whole.to(device).eval().requires_grad_(False)
        self.qkv: list[Fused] = []
        for number, block in enumerate(whole.model.layers):
            attention, mlp = block.self_attn, block.mlp
            qkv = Fused([attention.q_proj, attention.k_proj, attention.v_proj])
            qkv.layer = number
            attention.q_proj = qkv
            attention.k_proj, attention.v_proj = Given(qkv, 1), Given(qkv, 2)
            mlp.gate_proj = Fused([mlp.gate_proj, mlp.up_proj])
            mlp.up_proj = Given(mlp.gate_proj, 1)
            self.qkv.append(qkv)
        self.layer = Layer("qkv", self.config.hidden_size, tuple(self.qkv[0].widths))

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads of weights: all but the embedding."""
        embedding = self._whole.model.embed_tokens.weight
        size = sum(p.numel() * p.element_size() for p in self._whole.parameters())
        return size - embedding.numel() * embedding.element_size()

    def merge(self, systems: "StockPools | list[StockPools]") -> None:
        """Make weights in which the first adapter of each layer's pools is merged."""
        for qkv, pools in zip(self.qkv, systems, strict=True):
            products = [b[0, 0] @ a[0, 0] for a, b in zip(pools.a, pools.b, strict=True)]
            qkv.merged = qkv.weight + torch.cat(products)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache | None,
        system: System | None = None,
        *,
        merged: bool = False,
    ) -> torch.Tensor:
        """Logits of the last token of each sequence: [sequences, vocabulary].

        Args:
            tokens: int64 [sequences, n]; n is 1 with a cache.
            positions: int64, the same shape.
            cache: that of these sequences, or None for a prefill, which keeps nothing.
            system: who adds adapters.
            merged: take the weights that `merge` made.
        """
        for qkv in self.qkv:
            qkv.system, qkv.use_merged = system, merged
        inner = self._whole.model
        hidden = inner.embed_tokens(tokens)
        rope = inner.rotary_emb(hidden, position_ids=positions)
        for block in inner.layers:
            found = block(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rope,
            )
            hidden = found[0] if isinstance(found, tuple) else found
        return self._whole.lm_head(inner.norm(hidden[:, -1]))


@dataclass
class Batch:
    """Tokens of one step, where they stay: a decoding step's, or a prefill's without a cache."""

    model: Model
    tokens: torch.Tensor
    positions: torch.Tensor
    cache: Cache | None

    @classmethod
    def decode(cls, model: Model, sequences: int, length: int) -> "Batch":
        """One token of each sequence, each `length` long."""
        like = {"dtype": torch.int64, "device": model.device}
        return cls(
            model,
            torch.randint(model.config.vocab_size, (sequences, 1), **like),
            torch.full((sequences, 1), length - 1, **like),
            Cache(model, sequences, length),
        )

    @classmethod
    def prefill(cls, model: Model, sequences: int, length: int) -> "Batch":
        """All tokens of prompts of one length."""
        like = {"dtype": torch.int64, "device": model.device}
        return cls(
            model,
            torch.randint(model.config.vocab_size, (sequences, length), **like),
            torch.arange(length, **like).expand(sequences, -1).contiguous(),
            None,
        )

    @property
    def size(self) -> int:
        """Tokens."""
        return self.tokens.numel()

    def logits(self, system: System | None = None, *, merged: bool = False) -> torch.Tensor:
        """Of the last token of each sequence."""
        return self.model(self.tokens, self.positions, self.cache, system, merged=merged)

    def graph(self, system: System | None = None, *, merged: bool = False) -> Call:
        """The step as a captured graph (on CPU: as it is)."""
        return recorded([lambda: self.logits(system, merged=merged)], self.model.device)


class Ours:
    """Adapters in our pools; which token has which is in tensors that stay where they are.

    Args:
        pools: of each layer.
        tokens: at most so many.
        clusters: adapter a has the bases of cluster a % clusters.
    """

    def __init__(self, pools: Sequence[ModulePools], tokens: int, clusters: int) -> None:
        self.pools, self._clusters = pools, clusters
        device = pools[0].device
        here = [torch.zeros(n, dtype=torch.int32) for n in (tokens, tiles.places(tokens))]
        self._slots, self._order = (part.to(device) for part in here)
        self._host = [part.pin_memory() if device.type == "cuda" else part for part in here]
        for part in pools:
            backend.prepare(part, int(part.rows[..., RANK].max()))

    def ask(self, adapters: Sequence[int]) -> None:
        """Token t has adapters[t], −1 for none."""
        # A copy from before may still be on its way from there.
        if self._slots.is_cuda:
            torch.cuda.current_stream().synchronize()
        slots = torch.tensor(adapters, dtype=torch.int32)
        self._host[0].copy_(slots)
        self._host[1].copy_(packed(slots, self._clusters))
        self._slots.copy_(self._host[0], non_blocking=True)
        self._order.copy_(self._host[1], non_blocking=True)

    def add(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """As `System` says."""
        backend.add_adapters(y, x, self.pools[layer], self._slots, self._order)

    def reference(self) -> "Reference":
        """The same by the plain torch path."""
        return Reference(self.pools, self._slots)


@dataclass
class Reference:
    """What `Ours` adds, by `vllm_jd.kernels.reference`."""

    pools: Sequence[ModulePools]
    slots: torch.Tensor

    def add(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """As `System` says."""
        from vllm_jd.kernels import reference

        reference.add_adapters(y, x, self.pools[layer], self.slots)


class Stock:
    """Adapters in vLLM's slots, added by its kernels.

    Args:
        ops: of `gpu_steps.stock`.
        pools: of each layer.
        tokens: at most so many.
    """

    def __init__(self, ops: Any, pools: Sequence[StockPools], tokens: int) -> None:
        self._ops, self.pools = ops, pools
        slots, device = len(pools[0].a[0]), pools[0].a[0].device
        self._meta = ops.LoRAKernelMeta.make(
            slots, tokens, device=device, captured_lora_counts=captured_counts(slots, False)
        )
        self._device = device

    def ask(self, slots: Sequence[int]) -> None:
        """Token t has the adapter in slots[t], −1 for none."""
        self._meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32, device=self._device))

    def add(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """As `System` says."""
        self.pools[layer].add(self._ops, self._meta, x, y, False)
