"""What all layers of one model share of a step: which adapter each token has.

The tensors are made once and rewritten in place before each step, because a CUDA graph replays its
kernels with the addresses that it was recorded with. Nothing here waits for the device.
"""

import numpy as np
import torch

from vllm_jd.kernels import backend_name
from vllm_jd.kernels.cpu.operator import StepState
from vllm_jd.kernels.tiles import pack, places, tile_of


class Step:
    """The slots of a step's tokens, renewed by `begin`.

    Args:
        token_slots: int32 `[max_tokens]`, the slot of each token's adapter, −1 for none.
        active: whether any token has an adapter.
        recorded: whether a step's calls may be recorded and replayed with other slots, as CUDA
            graphs are. Which layers are called must then not depend on the step.
    """

    def __init__(self, token_slots: torch.Tensor, active: bool = False, *, recorded: bool = False):
        self.token_slots = token_slots
        self.order: torch.Tensor | None = None
        """int32 `[places]`, for a backend that wants it: the token of each place of its tiles
        (`kernels.tiles.pack`), −1 for none. A call of n tokens has the first `places(n)`."""
        self.recorded = recorded
        # The same memory: in few numbers, torch's own assignments take several times as long.
        self._numbers = token_slots.numpy() if token_slots.is_cpu else None
        self._used = len(token_slots)
        self.state = StepState(token_slots) if token_slots.is_cpu else None
        self.active = active

    @classmethod
    def make(cls, max_tokens: int, device: torch.device, *, recorded: bool = False) -> "Step":
        """A step of at most `max_tokens` tokens, with an order where the device's backend
        (`vllm_jd.kernels.backend_name`) wants one."""
        if backend_name(device) != "triton":
            slots = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
            return cls(slots, recorded=recorded)
        both = torch.empty(max_tokens + places(max_tokens), dtype=torch.int32, device=device)
        step = cls(both[:max_tokens], recorded=recorded)
        step.order, step._both = both[max_tokens:], both
        step.begin(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64), active=False)
        return step

    @property
    def active(self) -> bool:
        """Whether any token of the step has an adapter, or a warm-up run stands for such a step."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        if self.state is not None:
            self.state.set_active(active)

    def begin(self, slots: np.ndarray, keys: np.ndarray | None = None, *, active: bool) -> None:
        """Set the adapters of the coming step's tokens; all tokens after these have none.

        Args:
            slots: int32 `[tokens]`, −1 for none.
            keys: int64 `[tokens]`, only looked at where there is an order: tokens go by it
                (`kernels.tiles.keys_of`).
            active: see the attribute.
        """
        n = len(slots)
        if self.order is None and self._numbers is not None:
            self._numbers[:n] = slots
            self._numbers[n : self._used] = -1
            self._used = n
        elif self.order is None:
            self.token_slots[:n] = to_device(torch.from_numpy(slots), self.token_slots.device)
            self.token_slots[n:] = -1
        else:
            both = np.full(len(self._both), -1, dtype=np.int32)
            both[:n] = slots
            if n:
                first, size = len(self.token_slots), places(n)
                keys = np.where(slots < 0, -1, keys)
                both[first : first + size] = pack(keys, size, tile_of(n))
            copy_to(self._both, torch.from_numpy(both))
        self.active = active


def copy_to(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor in main memory into one on any device, without waiting for a GPU.

    The copy takes its turn on the current stream. Torch keeps the page-locked memory that it reads
    from until it is done.
    """
    if target.is_cuda:
        source = source.to(target.dtype).contiguous().pin_memory()
    target.copy_(source, non_blocking=True)


def to_device(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of main memory on any device, likewise."""
    if device.type == "cuda":
        source = source.pin_memory()
    return source.to(device, non_blocking=True)
