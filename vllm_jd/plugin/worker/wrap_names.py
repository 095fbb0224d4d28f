"""Which layer of vLLM's model each of a store's modules is."""

from collections.abc import Iterable
from typing import Any

from vllm.lora.utils import parse_fine_tuned_lora_name


def layer_columns(modules: Iterable[str], mapper: Any) -> dict[str, int]:
    """vLLM's name of each module → its place among `modules`.

    Args:
        modules: names as PEFT has them, without `base_model.model.`.
        mapper: the model's `hf_to_vllm_mapper`, for names alone, or None.

    Raises:
        ValueError: two modules are one layer: only one of them could be served, and adapters of
            the other would answer as the base model does.
    """
    modules = list(modules)
    columns: dict[str, int] = {}
    for i, module in enumerate(modules):
        key = f"base_model.model.{module}.lora_A.weight"
        layer, _ = parse_fine_tuned_lora_name(key, mapper)
        other = columns.setdefault(layer, i)
        if other != i:
            raise ValueError(
                f"the store has modules {modules[other]} and {module}, which are one layer of the "
                f"served model, {layer}; expected one module a layer: compress the adapters again"
            )
    return columns
