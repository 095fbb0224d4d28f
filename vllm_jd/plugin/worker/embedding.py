"""Adapters of the embedding (`embed_tokens`): what they add to the model's row of each token.

As in vLLM, each worker has all of an adapter's A and B, and adds them once the workers' parts of
the table have been summed up.
"""

from typing import Any, NamedTuple

import torch
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_jd.plugin.worker.layer import LayerPools
from vllm_jd.plugin.worker.output import WholeLayer

_NAMES = frozenset(
    ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embedding")
)
"""What vLLM's models call the table of their tokens; they may have others, of positions, say."""


class Embedding(NamedTuple):
    """A model's embedding: its name, what `LayerPools` asks of it, and vLLM's module."""

    name: str
    layer: WholeLayer
    table: VocabParallelEmbedding


def embedding_of(
    all_modules: list[tuple[str, torch.nn.Module]], prefix: str, targets: list[str] | None
) -> Embedding | None:
    """The embedding of the language model, or None where another pipeline stage has it, or it is
    not among the layers that may be adapted.

    Args:
        all_modules: of the model, with their names.
        prefix: how the names of the language model's layers begin.
        targets: `--lora-target-modules`, or None: all.
    """
    for name, module in all_modules:
        table = isinstance(module, VocabParallelEmbedding) and not isinstance(
            module, ParallelLMHead
        )
        known = table and name.startswith(prefix) and name.rpartition(".")[2] in _NAMES
        if known and is_in_target_modules(name, targets):
            layer = WholeLayer(module.org_vocab_size, (module.embedding_dim,))
            return Embedding(name, layer, module)
    return None


def adapt(table: torch.nn.Module, pools: LayerPools) -> None:
    """Have the pools add to whatever vLLM's table says. It stays in its place: models compute
    their logits with it, too, where they have no other weights for these."""

    def added(table: torch.nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        return pools.add_embedding(found, args[0])

    table.register_forward_hook(added)
