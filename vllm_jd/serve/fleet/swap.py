"""Follow a store's live generation: whenever another is published, serve that.

All workers have the new generation open before a name points to it, and all names are pointed to it
at once; requests that run keep theirs, and the old one goes with its last request. One that cannot
be served (damaged, or not like the first) is left alone, and what was served goes on.
"""

import asyncio
import logging
import time
from pathlib import Path
from typing import Protocol

from vllm_jd.store import Store, StoreError, read_current
from vllm_jd.store.checks import check_contents, check_file
from vllm_jd.store.manifest import CURRENT

logger = logging.getLogger("vllm.vllm_jd")

_AGAIN_SECONDS = 30


class _Refused(Exception):
    """A generation cannot be served; the message says why."""


class Server(Protocol):
    """What a swap needs of the server."""

    @property
    def store(self) -> Store:
        """The generation that it serves."""

    async def open_generation(self, store: Path, generation: int) -> None:
        """Have all workers open a generation beside what they have; the message of what it raises
        says why that cannot be."""

    async def point(self, store: Store) -> None:
        """Have all names stand for what they do beside this generation, at once. Closes the one
        that was served before."""

    async def serve_generation(self, store: Path, generation: int) -> None:
        """Let all other generations go when their last requests end."""


class Swaps:
    """The generations that a server serves, one after the other.

    Args:
        server: see `Server`.
    """

    def __init__(self, server: Server):
        self.count = 0
        """How often another generation came to be served."""
        self.fault: str | None = None
        """Why the live generation is not the one that is served; None: it is."""
        self._server = server
        self._seen: bytes | str | None = "nothing yet"
        self._again = 0.0  # when what could not be served is tried again
        self._swapping = asyncio.Lock()

    @property
    def store(self) -> Store:
        """The generation that is served."""
        return self._server.store

    async def follow(self, *, at_once: bool = False) -> bool:
        """Serve the live generation, if it is not served yet; whether it came to be just now.

        Args:
            at_once: also if it could not be served a moment ago.
        """
        async with self._swapping:
            current = await asyncio.to_thread(_current, self.store.path)
            tried = self.fault is not None and time.monotonic() < self._again
            if current == self._seen and (self.fault is None or tried) and not at_once:
                return False
            self._seen, self._again = current, time.monotonic() + _AGAIN_SECONDS
            try:
                number, digest = await asyncio.to_thread(read_current, self.store.path)
                if number != self.store.generation:
                    await self._swap(number, digest)
                    return True
                self.fault = None
            except _Refused as error:
                self._tell(f"generation {number} cannot be served: {error}")
            except StoreError as error:  # or on a file system that is not there just now
                self._tell(str(error))
            except Exception as error:
                self._tell(f"{type(error).__name__}: {error}")  # tried again like the others
                raise
            return False

    async def _swap(self, number: int, digest: str) -> None:
        old = self.store
        try:
            new = await asyncio.to_thread(_opened, old, number, digest)
        except (StoreError, OSError) as error:
            raise _Refused(str(error)) from None
        try:
            await self._server.open_generation(old.path, number)
        except Exception as error:  # whatever the engine says of it: the old one goes on
            new.close()
            raise _Refused(str(error)) from None
        await self._server.point(new)
        self.fault = None
        self.count += 1
        try:
            await self._server.serve_generation(old.path, number)
        except Exception:  # the old one stays open beside it, until the next swap
            logger.exception("vllm-jd: generation %d could not be closed", old.generation)
        logger.info("vllm-jd: generation %d follows %d", number, old.generation)

    def _tell(self, fault: str) -> None:
        if fault != self.fault:
            logger.error("vllm-jd: %s; generation %d is served on", fault, self.store.generation)
        self.fault = fault


def _current(path: Path) -> bytes | None:
    """CURRENT as it is now. Opened: NFS asks the file server then, and tells of a mere name what it
    knew a minute ago."""
    try:
        return (path / CURRENT).read_bytes()
    except OSError:
        return None


def _opened(old: Store, number: int, digest: str) -> Store:
    """A generation, every byte of it checked but for the files that it shares with one that was
    checked before.

    Raises:
        StoreError: it is damaged.
    """
    new = Store.open_generation(old.path, number, digest, verify=False)
    try:
        for name, info in new.manifest.files.items():
            known = old.manifest.files.get(name) == info
            if not (known and _same_file(old.folder / name, new.folder / name)):
                check_file(new.folder / name, info.bytes, info.sha256)
        check_contents(new)
    except BaseException:
        new.close()
        raise
    return new


def _same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False
