"""Recompress a store behind a running server: when, and in a process of its own that gives way."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vllm_jd.compressor.change.progress import Recompression, read_recompression
from vllm_jd.compressor.change.uploads import bases_digest, waiting
from vllm_jd.plugin.config import RecompressConfig
from vllm_jd.store import Store
from vllm_jd.store.fleet import Fleet

logger = logging.getLogger("vllm.vllm_jd")

_NICE = 19
_STOP_SECONDS = 10
_RETRY_SECONDS = 60  # after a failure; twice as long after each more, up to an hour
_RETRY_MOST = 3600


class _Found(NamedTuple):
    """How many uploads wait, when the oldest of them came in (seconds since 1970), and how many
    came since the last refit which the bases do not suit."""

    waiting: int
    oldest: float
    unsuited: int


class AlreadyRunning(Exception):
    """A recompression runs; the message says since when."""


class Recompressions:
    """The recompressions that one server starts: one at a time.

    Args:
        path: the store.
        settings: see `RecompressConfig`.
    """

    def __init__(self, path: Path, settings: RecompressConfig):
        self.path = path
        self.settings = settings
        self.starting = asyncio.Lock()
        """Held while one is started, and by whoever must have none run."""
        self._process: asyncio.subprocess.Process | None = None
        self._stopped: asyncio.subprocess.Process | None = None  # the last that `stop` has ended
        self._failures = {False: 0, True: 0}  # by whether it had to fit new bases
        self._not_before = {False: 0.0, True: 0.0}
        self._bases: tuple[int, str] | None = None  # of a generation
        self._key: Any = None
        self._last_found = _Found(0, 0.0, 0)

    @property
    def runs(self) -> bool:
        """Whether one runs that this server started."""
        return self._process is not None and self._process.returncode is None

    async def start(self, *, refit: bool = False) -> None:
        """Start one: `vllm-jd recompress`, which publishes a generation if it has reason to.

        Raises:
            AlreadyRunning: one runs.
        """
        async with self.starting:
            await self._start(refit)

    async def _start(self, refit: bool) -> None:
        last = await asyncio.to_thread(read_recompression, self.path)
        if self.runs or (last is not None and last.state == "running"):
            number = self._process.pid if self.runs else last.process
            raise AlreadyRunning(
                f"a recompression of {self.path} runs already (process {number}); GET /v1/store "
                "shows how far it is"
            )
        settings = self.settings
        command = [sys.executable, "-m", "vllm_jd.cli.app", "recompress", str(self.path), "--json"]
        command += ["--nice", str(_NICE), "--threads", str(settings.threads)]
        command += ["--device", settings.device]
        if refit:
            command.append("--refit")
            for folder in settings.originals:
                command += ["--originals", folder]
        # As many threads as it may use, in its libraries too.
        budget = {
            "OMP_NUM_THREADS": str(settings.threads),
            "MKL_NUM_THREADS": str(settings.threads),
        }
        self._process = await asyncio.create_subprocess_exec(
            *command,
            env=_environment() | budget,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        logger.info("vllm-jd: recompressing %s, process %d", self.path, self._process.pid)
        self._ended = asyncio.create_task(self._wait(self._process, refit))

    async def _wait(self, process: asyncio.subprocess.Process, refit: bool) -> None:
        _, said = await process.communicate()
        if process.returncode == 0:
            self._failures[refit] = 0
            return
        if process is self._stopped:
            return
        pause = min(_RETRY_MOST, _RETRY_SECONDS * 2 ** self._failures[refit])
        self._failures[refit] += 1
        self._not_before[refit] = time.monotonic() + pause
        tail = said.decode(errors="replace").strip()[-2000:]
        logger.error("vllm-jd: recompression ended with code %s: %s", process.returncode, tail)

    async def stop(self) -> None:
        """End one that runs; nothing of it is published. What it has done of a refit is kept."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._stopped = process
        # It may end by itself meanwhile; and what it has started may outlive it for a moment.
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def due(self, fleet: Fleet, store: Store) -> bool | None:
        """Whether one should be started now: with new bases (True), without (False), or none
        (None)."""
        last, found = read_recompression(self.path), self._found(fleet, store)
        if self.runs or (last is not None and last.state == "running"):  # somebody else's
            return None
        settings, now = self.settings, time.monotonic()
        if found.waiting and now >= self._not_before[False]:
            if settings.count is not None and found.waiting >= settings.count:
                return False
            if settings.age is not None and time.time() - found.oldest >= settings.age:
                return False
        share = settings.refit_share
        if share is None or now < self._not_before[True]:
            return None
        return True if found.unsuited > share * len(store) else None

    def status(self, fleet: Fleet, store: Store) -> dict[str, Any]:
        """What to show of the last or the running one, and what waits for the next."""
        last = read_recompression(self.path)
        count, since = self.waiting(fleet, store)
        shown: dict[str, Any] = {"waiting": count, "waiting_since": since if count else None}
        return shown | {"last": None if last is None else _shown(last)}

    def waiting(self, fleet: Fleet, store: Store) -> tuple[int, float]:
        """How many uploads wait, and when the oldest of them came in (seconds since 1970)."""
        found = self._found(fleet, store)
        return found.waiting, found.oldest

    def _found(self, fleet: Fleet, store: Store) -> "_Found":
        """What there is to compress. Looked for only when something has changed: there may be many
        names."""
        last = read_recompression(self.path)
        key = fleet.counter, store.generation, last and (last.started_at, last.state)
        if key != self._key:
            tried = last.tried(self._bases_of(store)) if last else set()
            wait = waiting(fleet, store, tried)
            oldest = min((fleet.entries[name].uploaded_at or 0.0 for name in wait), default=0.0)
            unsuited = 0
            if last is not None:
                named = {entry.digest for entry in fleet.entries.values()}
                unsuited = len((named & last.kept.keys() & tried) - last.kept_by_refit)
            self._key, self._last_found = key, _Found(len(wait), oldest, unsuited)
        return self._last_found

    def _bases_of(self, store: Store) -> str:
        if self._bases is None or self._bases[0] != store.generation:
            self._bases = store.generation, bases_digest(store)
        return self._bases[1]


def _environment() -> Mapping[str, str]:
    # vLLM's own settings are none of a compressor's business.
    return {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}


def _shown(last: Recompression) -> dict[str, Any]:
    found = last.model_dump(exclude={"format", "kept", "refused", "bases", "kept_by_refit"})
    return found | {"kept": len(last.kept), "refused": len(last.refused)}
