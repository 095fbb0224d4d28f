"""What the recompression of a store is doing, or came to, in a file that a server shows."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_jd.compressor.change.uploads import TakenIn
from vllm_jd.store import StoreError

FILE = "recompress.json"
_LOCK = "recompress.lock"
_SECONDS = 0.5  # between two writes

State = Literal["running", "done", "failed", "stopped"]


class Recompression(BaseModel):
    """The last recompression of a store.

    `what`, `done` and `total` are of the step that it is at. `kept` (digest → error) and `refused`
    (digest → reason) are of the uploads that could not be compressed with the bases of digest
    `bases`: by this recompression, or by one before it. Times are seconds since 1970, UTC.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    state: State = "running"
    refit: bool = False
    process: int
    host: str
    started_at: float
    ended_at: float | None = None
    what: str = ""
    done: int = 0
    total: int = 0
    message: str | None = None
    generation: int | None = None
    compressed: int = 0
    removed: int = 0
    kept: dict[str, float] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict)
    bases: str = ""
    kept_by_refit: set[str] = Field(default_factory=set)
    """Those of `kept` that the last refit has kept."""

    def tried(self, bases: str) -> set[str]:
        """Digests of the uploads that need not be tried again on these bases."""
        return {*self.kept, *self.refused} if bases == self.bases else set()


def read_recompression(path: Path) -> Recompression | None:
    """Of the last recompression of the store at `path`; None: none is known.

    One whose process is no more is `stopped`.
    """
    try:
        found = Recompression.model_validate_json((path / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    if found.state == "running" and not _runs(path):
        return found.model_copy(update={"state": "stopped"})
    return found


def _runs(path: Path) -> bool:
    """Whether somebody recompresses a store: the system takes the lock from who is no more."""
    try:
        with (path / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Recorder:
    """Writes what one recompression does; see `recording`."""

    def __init__(self, path: Path, *, refit: bool):
        self._file = path / FILE
        self._written = 0.0
        before = read_recompression(path)
        self.now = Recompression(
            refit=refit,
            process=os.getpid(),
            host=socket.gethostname(),
            started_at=time.time(),
            kept=before.kept if before else {},
            refused=before.refused if before else {},
            bases=before.bases if before else "",
            kept_by_refit=before.kept_by_refit if before else set(),
        )
        self.write()

    def on_progress(self, what: str, done: int, total: int) -> None:
        """See `vllm_jd.compressor.run.compress.Progress`."""
        new = what != self.now.what
        self.now.what, self.now.done, self.now.total = what, done, total
        if new or time.monotonic() - self._written > _SECONDS:
            self.write()

    def finish(self, found: TakenIn) -> None:
        """Note what it came to."""
        now = self.now
        if found.bases != now.bases:
            now.kept, now.refused, now.bases, now.kept_by_refit = {}, {}, found.bases, set()
        for names, noted in ((found.kept, now.kept), (found.refused, now.refused)):
            noted.update({found.digests[name]: what for name, what in names.items()})
        if found.refitted:
            now.kept_by_refit = set(now.kept)
        now.generation = found.store.generation
        now.compressed, now.removed = len(found.compressed), len(found.removed)
        self._end("done", None)

    def fail(self, error: BaseException) -> None:
        """Note that it failed, or was stopped."""
        stopped = isinstance(error, KeyboardInterrupt)
        self._end("stopped" if stopped else "failed", None if stopped else str(error))

    def _end(self, state: State, message: str | None) -> None:
        self.now.state, self.now.message, self.now.ended_at = state, message, time.time()
        self.write()

    def write(self) -> None:
        """Write the file; where that fails the recompression goes on all the same."""
        self._written = time.monotonic()
        temporary = self._file.with_name(f".{FILE}.tmp")
        with suppress(OSError):
            temporary.write_text(self.now.model_dump_json(), encoding="utf-8")
            temporary.replace(self._file)


@contextmanager
def recording(path: Path, *, refit: bool) -> Iterator[Recorder]:
    """Record a recompression of the store at `path`, its failure too.

    Raises:
        StoreError: another process recompresses it, or the folder cannot be written.
    """
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StoreError(f"{path}: another process recompresses this store already") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error}") from None
    try:
        recorder = Recorder(path, refit=refit)
        try:
            yield recorder
        except BaseException as error:
            recorder.fail(error)
            raise
    finally:
        lock.release()
