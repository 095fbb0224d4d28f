"""A folder of adapters that a server follows: `--adapter-dir`.

Each folder in it that has an adapter's files is an adapter of the folder's name: one that comes is
uploaded, one that changes replaces the version before, one that goes is deleted. What it has can be
changed there only.
"""

import asyncio
import logging
from http import HTTPStatus
from pathlib import Path

from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import fetch
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.store.files import sha256_files
from vllm_jd.store.fleet import UPLOAD_FILES

logger = logging.getLogger("vllm.vllm_jd")

_EVERY = 2.0  # seconds

Signature = tuple[tuple[int, ...], ...]


async def watch(live: LiveFleet, folder: str) -> None:
    """Follow a folder until the server ends."""
    watched = Watched(live, Path(folder))
    told = ""
    while True:
        try:
            await watched.look()
            told = ""
        except FleetFault as fault:
            if fault.status == HTTPStatus.CONFLICT:  # another server follows it
                logger.debug("vllm-jd: %s is not followed: %s", folder, fault)
            elif str(fault) != told:  # the store cannot be written, say: until somebody mends that
                told = str(fault)
                logger.warning("vllm-jd: %s is not followed: %s; it is tried again", folder, told)
        except Exception:
            logger.exception("vllm-jd: %s could not be followed; it is tried again", folder)
        await asyncio.sleep(_EVERY)


class Watched:
    """What was made of a folder so far.

    Args:
        live: the fleet that follows it.
        folder: of adapters' folders.
    """

    def __init__(self, live: LiveFleet, folder: Path):
        self._live, self._folder = live, folder
        self._seen: dict[str, Signature] = {}  # at the last look
        self._done: dict[str, Signature] = {}  # what was taken
        self._refused: dict[str, Signature] = {}
        self._warned = False

    async def look(self) -> None:
        """Take over what changed since the last time. What has changed a moment ago may still be
        being copied: it is taken the next time.

        Raises:
            FleetFault: another server follows it.
            OSError: the folder cannot be read.
        """
        found = await asyncio.to_thread(_adapters, self._folder)
        self._live.watched = found.keys()
        await self._live.keep_house()
        for name, signature in found.items():
            known = signature in (self._done.get(name), self._refused.get(name))
            if not known and self._seen.get(name) == signature:
                await self._take(name, signature)
        gone = self._taken() - found.keys()
        if gone and not found:
            # Rather a disk that is not there than the wish to be without adapters.
            if not self._warned:
                logger.warning(
                    "vllm-jd: %s is empty; its %d adapters stay", self._folder, len(gone)
                )
            self._warned = True
            return
        self._warned = False
        # Once missed may be in the middle of being replaced.
        gone -= self._seen.keys()
        self._seen = found
        for name in gone:
            self._done.pop(name, None)
            if name in self._live.known:
                await self._live.delete(name)
                logger.info("vllm-jd: deleted %r, which %s no more has", name, self._folder)

    async def _take(self, name: str, signature: Signature) -> None:
        """Have an adapter served. What may go better the next time is tried again then."""
        folder = self._folder / name
        try:
            digest = await asyncio.to_thread(_digest, folder)
            if digest == self._live.digest_of(name):
                self._done[name] = signature
                return
            with self._live.coming() as coming:
                most = self._live.config.max_adapter_bytes
                await asyncio.to_thread(fetch, str(folder), coming, most)
                await self._live.check(coming)
                new = await self._live.give(
                    name, coming, source=str(folder), replace=True, watched=True
                )
        except (FleetFault, OSError) as fault:
            logger.warning("vllm-jd: %s is not served: %s", folder, fault)
            if isinstance(fault, FleetFault) and fault.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                self._refused[name] = signature
        else:
            self._done[name] = signature
            logger.info("vllm-jd: %s %r of %s", "new:" if new else "replaced", name, self._folder)

    def _taken(self) -> set[str]:
        """Names of adapters that came from the folder."""
        before = {
            name
            for name, entry in self._live.fleet.entries.items()
            if entry.source == str(self._folder / name)
        }
        return before | self._done.keys()


def _adapters(folder: Path) -> dict[str, Signature]:
    """The adapters' folders in a folder: name → what differs once a file was changed."""
    found = {}
    for each in sorted(folder.iterdir()):
        if each.name.startswith("."):
            continue
        try:
            stats = [(each / name).stat() for name in UPLOAD_FILES]
        except (FileNotFoundError, NotADirectoryError):
            continue  # none yet, or no more
        found[each.name] = tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)
    return found


def _digest(folder: Path) -> str:
    return sha256_files(*(folder / name for name in UPLOAD_FILES))
