"""Tensor keys of adapters: which layer and side they mean, whatever a trainer left in them.

PEFT writes `base_model.model.<module>.lora_A.weight`. Whoever saves a model's whole `state_dict`
keeps the adapter's name (`lora_A.default.weight`) and the names of what the model was wrapped in;
some tools leave PEFT's prefix out. All of these mean the same layer.
"""

import re
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."

# torch.compile, activation checkpointing and FSDP put these between the names of modules.
_WRAPPERS = frozenset(
    ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
)
_PARALLEL = "module."  # of DistributedDataParallel and DeepSpeed: around the whole model
_WITHIN = (PREFIX, *(f"{name}." for name in _WRAPPERS))

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# Of a table of embeddings PEFT's factors are parameters, not layers that have a weight.
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?")

_VERA_VECTOR = re.compile(r"(?P<key>.+\.vera_lambda_[bd])(\.[^.]+)?")
_VERA_PROJECTION = re.compile(r"(base_model\.)?(?P<key>vera_[AB])(\.[^.]+)?")

# Of an adapted embedding or output layer PEFT saves the base model's own weights, too.
_BASE_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.base_layer\.weight")


class Factor(NamedTuple):
    """What the key of a factor says."""

    module: str
    side: str
    """`A` or `B`."""
    adapter: str | None
    """The adapter's name, where the key has it."""
    embedding: bool = False
    """Of a table of embeddings: A is `[r, vocabulary]` and B `[width, r]`."""


def plain_key(key: str) -> str:
    """The key without PEFT's prefix, once, and without the names of wrappers."""
    if key.startswith(_PARALLEL) and key.startswith(_WITHIN, len(_PARALLEL)):
        key = key.removeprefix(_PARALLEL)
    if key.startswith("_") or "._" in key:  # few do
        key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return key.removeprefix(PREFIX)


@lru_cache(1 << 14)
def factor_of(key: str) -> Factor | None:
    """What a tensor's key means; None: it is no factor of a linear layer or an embedding."""
    plain = plain_key(key)
    embedding = _EMBEDDING.fullmatch(plain)
    match = embedding or _FACTOR.fullmatch(plain)
    if match is None:
        return None
    return Factor(match["module"], match["side"], match["adapter"], embedding is not None)


def is_base_embedding(key: str) -> bool:
    """Whether a tensor is the base model's own, saved beside an adapter of its embeddings."""
    return bool(_BASE_EMBEDDING.fullmatch(plain_key(key)))


def vera_key(key: str) -> str:
    """The key of a VeRA tensor as PEFT writes it; that of any other tensor as it is."""
    plain = plain_key(key)
    if match := _VERA_VECTOR.fullmatch(plain):
        return PREFIX + match["key"]
    if match := _VERA_PROJECTION.fullmatch(plain):
        return f"base_model.{match['key']}"
    return key
