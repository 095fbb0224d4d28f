"""Who reads a generation: each reader holds it until it is closed, and `prune` leaves it alone.

A reader has a shared lock (flock) on the generation's manifest, which no two generations share;
who wants to delete the generation needs the lock alone. The system gives the lock up when its
process ends, however it ends. Where there are no locks (some network file systems), reading and
deleting go on without.
"""

import fcntl
import os
import weakref
from pathlib import Path

from vllm_jd.store.errors import StoreError

_PROCESSES = Path("/proc")


class Hold:
    """A reader's hold of a generation, from now on until `close`, or until nobody refers to it.

    Args:
        manifest: the generation's manifest.

    Raises:
        StoreError: there is no such file, it cannot be read, or the generation is being deleted.
    """

    def __init__(self, manifest: Path):
        try:
            descriptor = os.open(manifest, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"{manifest}: missing; the store is damaged, compress again") from None
        except OSError as error:
            raise StoreError(f"{manifest}: cannot be read: {error}") from None
        self.close = weakref.finalize(self, os.close, descriptor)
        """Give it up. Harmless when done twice."""
        if not _lock(descriptor, fcntl.LOCK_SH):
            self.close()
            raise StoreError(
                f"{manifest}: the generation is being deleted (`vllm-jd prune`); open the live one"
            )


class Deletion:
    """The right to delete a generation, where nobody holds it.

    Args:
        manifest: the generation's manifest; where it is missing, nobody can.

    Attributes:
        holders: process ids of those who hold it, as far as they can be told; None: nobody does.
    """

    def __init__(self, manifest: Path):
        self.holders: list[int] | None = None
        try:
            descriptor = _opened(manifest)
        except OSError:
            return
        self._close = weakref.finalize(self, os.close, descriptor)
        if not _lock(descriptor, fcntl.LOCK_EX):
            self._close()
            self.holders = _holders(manifest)


def _opened(manifest: Path) -> int:
    try:
        # NFS gives a lock to one alone only where the file could be written.
        return os.open(manifest, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(manifest, os.O_RDONLY | os.O_CLOEXEC)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether there is the lock now, or no lock can be had at all."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holders(manifest: Path) -> list[int]:
    """Processes that have the file open: those of this machine that we may look at."""
    found = []
    try:
        wanted = manifest.stat()
        processes = sorted(
            int(entry.name) for entry in _PROCESSES.iterdir() if entry.name.isdigit()
        )
    except OSError:
        return []
    for process in processes:
        try:
            files = list((_PROCESSES / str(process) / "fd").iterdir())
        except OSError:
            continue
        if any(_same(file, wanted) for file in files):
            found.append(process)
    return found


def _same(file: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(file.stat(), wanted)
    except OSError:
        return False
