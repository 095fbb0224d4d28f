"""Steps that must not run what vLLM compiled."""

from typing import Any


class CompiledModel:
    """What vLLM compiles of a model: `do_not_compile` of each part, which a step in which an upload
    adapts layers for which the store has nothing has to be run without (CPU only).

    Args:
        model: the model, with its LoRA layers.
    """

    def __init__(self, model: Any):
        self._parts = [
            part for part in model.modules() if getattr(part, "do_not_compile", True) is False
        ]
        self._eagerly = False

    def run_eagerly(self, eagerly: bool) -> None:
        """Whether the next step is run without what was compiled."""
        if eagerly != self._eagerly:
            self._eagerly = eagerly
            for part in self._parts:
                part.do_not_compile = eagerly
