"""Who asks a running server, and what they ask for at the moment."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_jd.serve.tenants.door import Door
from vllm_jd.serve.tenants.meter import Meter
from vllm_jd.serve.tenants.metrics import refused_counter, waiting_gauge
from vllm_jd.serve.tenants.ring import KeyRing

_SHOWN = 20  # groups


class Tenants:
    """The keys of a server, what each has used, and the door before its engine.

    Args:
        file: of keys.
        max_queued: requests of one group that may wait.

    Attributes:
        ring: the keys.
        meter: what they have used.
        door: before the engine; None: it has not started.

    Raises:
        KeyFileError: the file is broken.
    """

    def __init__(self, file: Path, max_queued: int):
        self.meter = Meter()
        self.ring = KeyRing(file, self.meter.forget)
        self.max_queued = max_queued
        self.door: Door | None = None
        self._queued: Counter[str] = Counter()

    def open_door(self, places: int, step_tokens: int) -> None:
        """Let so many sequences into the engine at a time, whose steps are of `step_tokens`."""
        refused_counter()
        waiting = waiting_gauge()
        self.door = door = Door(
            places,
            max(1, step_tokens // 2),
            shared=lambda: self.ring.groups > 1,
            changed=lambda: waiting.set(door.waiting()),
        )

    def status(self) -> dict[str, Any]:
        """What GET /v1/store shows of the door; whose requests those are is for `admin` only."""
        door = self.door
        if door is None:
            return {"door": None}
        counts = {"inside": door.inside, "waiting": door.waiting()}
        return {"door": counts | {"busiest": door.busiest(_SHOWN)}}

    @contextmanager
    def queued(self, group: str) -> Iterator[None]:
        """Count a request that the engine is to answer, from its arrival to its end."""
        self._queued[group] += 1
        try:
            yield
        finally:
            self._queued[group] -= 1
            if not self._queued[group]:
                del self._queued[group]

    def waiting(self, group: str) -> int:
        """How many requests of a group wait, or will: some are on their way to the door, some are
        several sequences there. Less than 0: so many more would find a place."""
        if self.door is None:
            return 0
        on_the_way = self._queued[group] - self.door.inside_of(group)
        return max(on_the_way, self.door.waiting(group)) - self.door.free_for(group)

    def seconds_for(self, group: str, requests: int) -> int:
        """About how long so many of a group's take."""
        return 1 if self.door is None else self.door.seconds_for(group, requests)
