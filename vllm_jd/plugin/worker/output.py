"""Adapters of the output layer (`lm_head`): what they add to the logits.

Logits are computed of other rows than the model's layers see: of the last token of each request,
and of some of a step's tokens where a client asks for log-probabilities of its prompt.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_jd.plugin.worker.layer import LayerPools
from vllm_jd.plugin.worker.step import Step


class LogitRows:
    """Which adapter each row has that logits are computed of.

    Args:
        step: of these rows, as the layers' is of tokens.
    """

    def __init__(self, step: Step):
        self.step = step
        self._tokens = self._samples = np.empty(0, dtype=np.int32)
        self._keys = np.empty(0, dtype=np.int64)

    def begin(self, tokens: np.ndarray, samples: np.ndarray, keys: np.ndarray) -> None:
        """Take note of the coming step.

        Args:
            tokens: int32 `[tokens]`, the slot of each, −1 for none.
            samples: int32 `[samples]`, the same of each that is sampled after.
            keys: int64 `[slots]`, see `Step.begin`.
        """
        self._tokens, self._samples, self._keys = tokens, samples, keys

    def find(self, hidden_states: torch.Tensor) -> None:
        """Set the slots of rows `[n, d]` that a model runner has logits computed of.

        Those that are sampled after it gathers in a tensor of their own; those of a prompt are a
        part of the model's output, and where they lie there says which they are.
        """
        n, size = len(hidden_states), hidden_states.untyped_storage().nbytes()
        if n == len(self._samples) and size == hidden_states.nbytes:
            slots = self._samples
        else:
            first = hidden_states.storage_offset() // hidden_states.shape[1]
            slots = self._tokens[first : first + n]
        keys = None if self.step.order is None else self._keys[slots]
        self.step.begin(slots, keys, active=bool((slots >= 0).any()))


@dataclass(frozen=True)
class WholeLayer:
    """What `LayerPools` asks of a vLLM LoRA layer, of one that every worker computes as a whole."""

    input_size: int
    output_slices: tuple[int, ...]
    tp_rank: int = 0
    tp_size: int = 1


class OutputLayer:
    """The output layer of a model.

    Args:
        pools: of it.
        rows: whose step the pools have.
    """

    def __init__(self, pools: LayerPools, rows: LogitRows):
        self._pools, self._rows = pools, rows

    def before(self, hidden_states: torch.Tensor) -> None:
        """A model runner is about to have logits computed of `hidden_states` `[n, d]`."""
        if self._pools.in_use:
            self._rows.find(hidden_states)

    def add(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Add each row's adapter to `logits` `[n, vocabulary]`, in place. `hidden_states` `[n, d]`
        is what they were computed of."""
        if self._pools.in_use:
            self._pools.add_lora_linear(logits, hidden_states)
