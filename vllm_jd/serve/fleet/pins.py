"""Adapters that stay resident, because their names are pinned."""

import logging
import time
from collections.abc import Set

from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.names import LoRARequest, Names
from vllm_jd.plugin.api.requests import is_store_request

logger = logging.getLogger("vllm.vllm_jd")

_AGAIN = 30.0  # s until one is tried again that could not be pinned


class Pins:
    """What the engine of a server holds for pinned names.

    Args:
        names: the server's.
    """

    def __init__(self, names: Names):
        self._names = names
        self._held: dict[str, LoRARequest] = {}
        self._no_room: dict[str, float] = {}  # when one could not be pinned

    @property
    def held(self) -> Set[str]:
        """The names of those that are held."""
        return self._held.keys()

    def forget(self, name: str, request: LoRARequest) -> bool:
        """Know no more of a version that leaves; whether it was held."""
        if self._held.get(name) is not request:
            return False
        del self._held[name]
        return True

    async def pin(self, name: str, request: LoRARequest) -> bool:
        """Hold what a name stands for; whether there is room."""
        try:
            await self._names.pin(request)
        except Exception as error:
            logger.warning("vllm-jd: %r is not pinned: %s", name, error)
            self._no_room[name] = time.monotonic()
            return False
        self._held[name] = request
        self._no_room.pop(name, None)
        return True

    async def unpin(self, name: str) -> None:
        """Hold it no more. Harmless where it is not held."""
        old = self._held.pop(name, None)
        if old is None:
            return
        if self._names.get(name) is old:
            # By another id, so that it stays loaded when this one goes.
            new = self._names.new(name, old.lora_path)
            if not (is_store_request(new) or is_blend_request(new)):
                await self._names.load(new)
            self._names.point({name: new})
        await self._names.unload(old)

    async def hold(self, wanted: Set[str], known: Set[str]) -> None:
        """Hold these names and no others: after a start, a swap, or for want of room before.

        Args:
            wanted: the pinned ones.
            known: those that stand for an adapter.
        """
        for name in self._held.keys() - wanted:  # by another process
            await self.unpin(name)
        now = time.monotonic()
        for name in wanted & known:
            request = self._names.get(name)
            if request is None:  # a blend that cannot be served now
                continue
            waits = now - self._no_room.get(name, -_AGAIN) < _AGAIN
            if self._held.get(name) is not request and not waits:
                await self.pin(name, request)
