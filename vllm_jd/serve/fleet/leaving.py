"""What no name stands for any more: versions that the engine has, and their files."""

import asyncio
import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.names import LoRARequest, Names
from vllm_jd.plugin.api.requests import is_store_request
from vllm_jd.store.fleet import Fleet
from vllm_jd.store.uploads import Writer, unnamed_uploads

_DRAIN = 30.0  # s that a version stays loaded which nobody names: requests may be on their way
_SWEEP = 60.0  # s that its files stay


@dataclass
class _Left:
    request: LoRARequest
    until: float
    """When the engine is told (`time.monotonic`)."""


class Leaving:
    """The versions of adapters that leave the engine of a server.

    Args:
        names: the server's.
    """

    def __init__(self, names: Names):
        self._names = names
        self._left: list[_Left] = []

    def add(self, request: LoRARequest, *, pinned: bool) -> None:
        """A version that no name stands for from now on; whether the engine was told to hold it."""
        if not (is_store_request(request) or is_blend_request(request)):
            self._left.append(_Left(request, time.monotonic() + _DRAIN))
        elif pinned:  # it needs no more than to be let go
            self._left.append(_Left(request, 0))

    async def let_go(self) -> None:
        """Tell the engine of those that have drained."""
        now = time.monotonic()
        due = [left for left in self._left if left.until <= now]
        self._left = [left for left in self._left if left.until > now]
        for left in due:
            await self._names.unload(left.request)


class Sweeper:
    """Removes the files of uploads that no name stands for, once the engine needs them no more.

    Args:
        names: the server's.
    """

    def __init__(self, names: Names):
        self._names = names
        self._unnamed: dict[Path, float] = {}  # when each was seen first

    async def due(self, path: Path, fleet: Fleet, sources: Set[str]) -> list[Path]:
        """Folders of uploads of a store that have been unnamed for a while; `sources` are digests
        of what the generation was made from."""
        now = time.monotonic()
        unnamed = await asyncio.to_thread(unnamed_uploads, path, fleet, sources)
        self._unnamed = {folder: self._unnamed.get(folder, now) for folder in unnamed}
        due = [folder for folder, since in self._unnamed.items() if now - since >= _SWEEP]
        told = await self._names.residents_of(due)
        return [folder for folder, found in zip(due, told, strict=True) if not found.known]

    def remove(self, writer: Writer, fleet: Fleet, sources: Set[str], due: list[Path]) -> None:
        """Remove them, but those that have a name by now."""
        unnamed = set(unnamed_uploads(writer.path, fleet, sources))
        for folder in due:
            if folder in unnamed:
                with suppress(OSError):  # it is tried again
                    writer.remove(folder)
