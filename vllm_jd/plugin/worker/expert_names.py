"""Which layer of experts of vLLM's model a store's module of experts is, and which projection.

PEFT's names of them differ with the release of transformers that an adapter was trained with
(Mixtral's are `block_sparse_moe.experts.5.w1`, or `mlp.experts.gate_up_proj`), vLLM's do not. What
they have in common is the number of the decoder layer.
"""

import re
from collections.abc import Iterable

GATE, UP, DOWN, BOTH = "gate_proj", "up_proj", "down_proj", "gate_up_proj"
_PROJECTIONS = {name: name for name in (GATE, UP, DOWN, BOTH)} | {"w1": GATE, "w3": UP, "w2": DOWN}
_MODULE = re.compile(
    r"(?P<layer>.*\.layers\.\d+)\.(.*\.)?experts\.((?P<expert>\d+)\.)?(?P<last>\w+)"
)
_LAYER = re.compile(r".*\.layers\.\d+(?=\.)")


def expert_module(name: str, expert: int) -> str:
    """The name of one expert's linear layer, of one that stands for all of them."""
    parent, _, projection = name.rpartition(".")
    return f"{parent}.{expert}.{projection}"


class ExpertNames:
    """The layers of experts of a model.

    Args:
        layers: vLLM's names of them.
    """

    def __init__(self, layers: Iterable[str]):
        self._layers: dict[str, str | None] = {}
        for name in layers:
            found = _LAYER.match(f"{name}.")
            if found:  # of two in one decoder layer none is meant
                its = found[0]
                self._layers[its] = None if its in self._layers else name

    def find(self, module: str) -> tuple[str, int | None, str] | None:
        """(the layer, the expert, the projection) that a module of an adapter or a store is, or
        None; without an expert it is all of them.

        Args:
            module: its name, with vLLM's name of the decoder layer.
        """
        found = _MODULE.fullmatch(module)
        layer = self._layers.get(found["layer"]) if found else None
        projection = _PROJECTIONS.get(found["last"]) if found else None
        if layer is None or projection is None:
            return None
        expert = found["expert"]
        return layer, None if expert is None else int(expert), projection
