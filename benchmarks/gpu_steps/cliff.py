"""Step `cliff`: what it costs that adapters have to come to the device, at the same decoding steps.

A closed loop of requests for ten tokens each on the model of the step `model`, adapters uniform.
vLLM's way: so many slots; a step has at most that many adapters, a request whose adapter finds no
slot waits, and one that is in none is copied over PCIe from page-locked memory before the step, as
its LoRA layers do it, tensor by tensor. Ours: all are resident. Prefills are left out in both.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_steps.layers import ADAPTERS
from gpu_steps.mistral import Batch, Ours, Stock
from gpu_steps.model import LENGTH, Adapted, equal_slots
from gpu_steps.step import Call, Step, alternate, main, summary

CONCURRENT = 64
SIZES = (8, 16, 32, 64)  # of batches for which graphs are captured
IN_TRAFFIC = (16, 1024, 128, 8)
FEW_SLOTS = 8  # those of the anchor: SGLang's 16 adapters in 8 slots, 40 ms to 6,278 ms
NEW_TOKENS = 10
HOST_ADAPTERS = 32  # in page-locked memory; more would be the same copies from other addresses
TURNS, SECONDS_OF_A_TURN = 3, 0.7


@dataclass
class Request:
    """One that waits or runs."""

    adapter: int
    arrived: float
    left: int = NEW_TOKENS
    first: float | None = None


@dataclass
class Outcome:
    """What a loop did, summed over its turns."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    copies: int = 0
    waits: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As it is kept."""
        ordered = sorted(self.waits) or [float("nan")]
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "first_token_ms": {
                "median": 1e3 * ordered[len(ordered) // 2],
                "p99": 1e3 * ordered[round(0.99 * (len(ordered) - 1))],
                "n": len(self.waits),
            },
            "running": self.tokens / self.steps,
            "copies": self.copies,
            "copies_per_step": self.copies / self.steps,
            "steps": self.steps,
        }


class Resident:
    """All adapters are on the device: any request runs."""

    slots: int | None = None

    def __init__(self, systems: dict[int, Ours]) -> None:
        self._systems = systems

    def admit(self, adapter: int, running: set[int]) -> bool:
        """Whether a request may run beside those."""
        return True

    def bring(self, adapters: Sequence[int]) -> int:
        """Bring what is missing; returns how many came."""
        return 0

    def ask(self, size: int, adapters: Sequence[int]) -> None:
        """Say which token has which adapter, for the graph of that size."""
        padding = [-1] * (size - len(adapters))
        self._systems[size].ask([*adapters, *padding])


class Paged:
    """vLLM's way: slots, filled from the host, least recently used first out."""

    def __init__(self, systems: dict[int, Stock], host: "Host") -> None:
        self._systems, self._host = systems, host
        self._pools = next(iter(systems.values())).pools
        self.slots = len(self._pools[0].a[0])
        self._place: OrderedDict[int, int] = OrderedDict()

    def admit(self, adapter: int, running: set[int]) -> bool:
        """Whether a step may have that adapter, too."""
        return adapter in running or len(running) < self.slots

    def bring(self, adapters: Sequence[int]) -> int:
        """Copy those that are in no slot; the ones of this step stay."""
        wanted = set(adapters)
        for adapter in wanted & self._place.keys():
            self._place.move_to_end(adapter)
        missing = wanted - self._place.keys()
        for adapter in sorted(missing):
            slot = len(self._place)
            if slot >= self.slots:
                gone = next(old for old in self._place if old not in wanted)
                slot = self._place.pop(gone)
            self._place[adapter] = slot
            self._host.copy(adapter, self._pools, slot)
        return len(missing)

    def ask(self, size: int, adapters: Sequence[int]) -> None:
        """Say which token has which slot, for the graph of that size."""
        padding = [-1] * (size - len(adapters))
        self._systems[size].ask([*(self._place[adapter] for adapter in adapters), *padding])


class Host:
    """Adapters in page-locked host memory: for each layer A and B of q, k and v."""

    def __init__(self, adapted: Adapted, adapters: int, device: str) -> None:
        layer, rank = adapted.model.layer, adapted.stock_pools[1][0].a[0].shape[2]
        self._shapes = [
            *((rank, layer.d_in) for _ in layer.d_out),
            *((width, rank) for width in layer.d_out),
        ]
        numbers = sum(m * n for m, n in self._shapes) * len(adapted.model.qkv)
        self.adapter_bytes = numbers * adapted.model.dtype.itemsize
        self._adapters, self.blobs = [], []
        for _ in range(adapters):
            blob = torch.randn(numbers, dtype=torch.float32).mul_(0.01).to(adapted.model.dtype)
            self.blobs.append(blob.pin_memory() if device == "cuda" else blob)
            sizes = [m * n for m, n in self._shapes] * len(adapted.model.qkv)
            shapes = self._shapes * len(adapted.model.qkv)
            parts = self.blobs[-1].split(sizes)
            self._adapters.append([p.view(s) for p, s in zip(parts, shapes, strict=True)])

    def copy(self, adapter: int, pools: Sequence[Any], slot: int) -> None:
        """Bring one into a slot of all layers, without waiting."""
        parts = iter(self._adapters[adapter % len(self._adapters)])
        for layer in pools:
            for stacked in (*layer.a, *layer.b):
                stacked[slot, 0].copy_(next(parts), non_blocking=True)


@torch.inference_mode()
def run(step: Step) -> None:
    """Measure a copy, then the loops, in turns."""
    step.doing("random weights and adapters")
    concurrent, sizes = (4, (2, 4)) if step.small else (CONCURRENT, SIZES)
    few = 2 if step.small else FEW_SLOTS
    many = equal_slots(step.small)
    adapted = Adapted(step, 12 if step.small else ADAPTERS, (1, few, many))
    host = Host(adapted, 3 if step.small else HOST_ADAPTERS, step.device)
    step.doing("copies")
    step.put("copy", copies(step, adapted, host, few))
    step.doing("graphs")
    systems, graphs = _systems(step, adapted, host, (few, many), sizes)
    for adapters in (4,) if step.small else IN_TRAFFIC:
        turns = 1 if step.small else TURNS
        seconds = 0.0 if step.small else SECONDS_OF_A_TURN
        if not step.enough(turns * len(systems) * (seconds + 0.5), f"{adapters} adapters"):
            continue
        found = {name: Outcome() for name in systems}
        for turn in range(turns):
            for name, system in systems.items():
                loop(
                    found[name], system, graphs[name], adapters,
                    concurrent=concurrent, seconds=seconds, seed=turn,
                    synchronise=step.on_gpu,
                )  # fmt: skip
        for name, outcome in found.items():
            row = {"adapters": adapters, "system": name, "slots": systems[name].slots}
            step.add("loops", row | outcome.row())


def copies(step: Step, adapted: Adapted, host: Host, slots: int) -> dict[str, Any]:
    """One adapter over PCIe: as vLLM copies it, tensor by tensor, and as one block."""
    pools = adapted.stock_pools[slots]
    block = torch.empty_like(host.blobs[0], device=step.device)
    taken = alternate(
        {
            "tensors": lambda: host.copy(0, pools, 0),
            "block": lambda: block.copy_(host.blobs[0], non_blocking=True),
        },
        step.device,
        15 if step.on_gpu else 1,
    )
    found = {name: summary(each) for name, each in taken.items()}
    return {
        "adapter_bytes": host.adapter_bytes,
        "tensors": 2 * len(adapted.model.layer.d_out) * len(adapted.model.qkv),
        "microseconds": found,
        "block_bytes_per_second": 1e6 * host.adapter_bytes / found["block"]["median"],
    }


def _systems(
    step: Step, adapted: Adapted, host: Host, slots: Sequence[int], sizes: Sequence[int]
) -> tuple[dict[str, Any], dict[str, dict[int, Call]]]:
    """(the systems, for each the graphs by batch size)."""
    batches = {n: Batch.decode(adapted.model, n, 5 if step.small else LENGTH) for n in sizes}
    by_size: dict[str, dict[int, Any]] = {"ours": {n: adapted.ours(n) for n in sizes}}
    if adapted.ops is not None:
        adapted.ops.forget()
        for n_slots in slots:
            name = f"vLLM, {n_slots} slots"
            by_size[name] = {n: adapted.stock(n_slots, n) for n in sizes}
    graphs: dict[str, dict[int, Call]] = {}
    for name, systems in by_size.items():
        for size, system in systems.items():
            system.ask([0] * size)
            graphs.setdefault(name, {})[size] = batches[size].graph(system)
    found: dict[str, Any] = {"ours": Resident(by_size.pop("ours"))}
    found |= {name: Paged(systems, host) for name, systems in by_size.items()}
    return found, graphs


def loop(
    outcome: Outcome,
    system: Any,
    graphs: dict[int, Call],
    adapters: int,
    *,
    concurrent: int,
    seconds: float,
    seed: int,
    synchronise: bool,
) -> None:
    """Serve `concurrent` requests at a time for so many seconds; each that ends is followed by
    another. At least one step is made."""
    chance = random.Random(seed)
    start = time.perf_counter()
    waiting = [Request(chance.randrange(adapters), start) for _ in range(concurrent)]
    running: list[Request] = []
    while True:
        held = {request.adapter for request in running}
        still: list[Request] = []
        for request in waiting:  # in turn; one that must wait lets others pass
            if len(running) < max(graphs) and system.admit(request.adapter, held):
                running.append(request)
                held.add(request.adapter)
            else:
                still.append(request)
        waiting = still
        size = min(n for n in graphs if n >= len(running))
        asked = [request.adapter for request in running]
        outcome.copies += system.bring(asked)
        system.ask(size, asked)
        graphs[size]()
        if synchronise:
            torch.cuda.synchronize()
        now = time.perf_counter()
        outcome.steps += 1
        outcome.tokens += len(running)
        for request in running:
            request.left -= 1
            if request.first is None:
                request.first = now
                outcome.waits.append(now - request.arrived)
        ended = sum(request.left == 0 for request in running)
        running = [request for request in running if request.left > 0]
        waiting += [Request(chance.randrange(adapters), now) for _ in range(ended)]
        if now - start >= seconds:
            outcome.seconds += now - start
            return


if __name__ == "__main__":
    main("cliff", run)
