"""The files of a store's uploads: how they come in, who may add and remove them, what nobody needs.

uploads/<digest>/     adapter_config.json and adapter_model.safetensors of one upload
incoming/<process>/   what comes in to one process, until it is an upload
writer.lock           held for each change: one process at a time
keeper.lock           held by the one server that keeps house
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import fsync, sha256_files
from vllm_jd.store.fleet import UPLOAD_FILES, UPLOADS, Fleet, upload_folder
from vllm_jd.store.locks import Held, Lock

INCOMING = "incoming"
_WRITER_LOCK, _KEEPER_LOCK = "writer.lock", "keeper.lock"
_REMOVED = ".removed-"


class NotTheWriter(StoreError):
    """Another process changes the uploads just now; the message says which."""


class NotTheKeeper(StoreError):
    """Another server keeps house: `who`, in words."""

    def __init__(self, path: Path, who: str):
        super().__init__(f"{path}: another server keeps house: {who} has {path / _KEEPER_LOCK}")
        self.who = who


class Keeper:
    """The right of one server of a store to keep house: to clear away what nobody needs, to
    recompress by itself, to follow a folder of adapters.

    It is held until `close`, or until the process ends, however it ends.

    Attributes:
        who: keeps house: this process, in words.

    Raises:
        NotTheKeeper: another server has it.
        StoreError: the folder cannot be written.
    """

    def __init__(self, path: Path):
        try:
            self._lock = Lock(path / _KEEPER_LOCK)
            self.who = self._lock.who
            fsync(path / _KEEPER_LOCK)  # other machines are to read it, too
        except Held as held:
            raise NotTheKeeper(path, str(held)) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error}") from error

    def close(self) -> None:
        """Give it up. Harmless when done twice."""
        self._lock.close()


class Writer:
    """The right to add uploads to the store at `path`, to give names to them, and to remove them:
    for one change, since others want to change something, too.

    Args:
        path: the store.
        wait: for how many seconds, while others change something.

    Raises:
        NotTheWriter: another process changes something still.
        StoreError: the folder cannot be written.
    """

    def __init__(self, path: Path, wait: float = 0.0):
        self.path = path
        try:
            (path / UPLOADS).mkdir(exist_ok=True)
            self._lock = Lock(path / _WRITER_LOCK, wait)
        except Held as held:
            raise NotTheWriter(
                f"{path}: another process changes it: {held} has {path / _WRITER_LOCK}; try again"
            ) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error}") from error

    def close(self) -> None:
        """Give it up. Harmless when done twice."""
        self._lock.close()

    def accept(self, incoming: Path, digest: str | None = None) -> str:
        """Make the files in a folder of `Incoming` a durable upload, which nothing names yet, and
        return its digest. The same files once more are the same upload.

        Args:
            incoming: the folder.
            digest: what `flushed` has said of it, which takes long where files are large; default:
                it is asked now.

        Raises:
            OSError: it cannot be written.
        """
        digest = digest or flushed(incoming)
        folder = upload_folder(self.path, digest)
        if folder.is_dir():
            if _is_whole(folder, digest):
                shutil.rmtree(incoming)
                return digest
            self.remove(folder)  # damaged meanwhile: what came now takes its place
        incoming.rename(folder)
        fsync(folder.parent)
        return digest

    def remove(self, folder: Path) -> None:
        """Delete the folder of an upload. What a kill leaves of it is among `unnamed_uploads`.

        Raises:
            OSError: it cannot be deleted.
        """
        hidden = self.path / UPLOADS / f"{_REMOVED}{uuid.uuid4().hex}"
        folder.rename(hidden)
        shutil.rmtree(hidden)


class Incoming:
    """Where uploads come in to this process, which nobody clears away as long as it lives.

    Args:
        path: the store.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        (path / INCOMING).mkdir(exist_ok=True)
        while True:
            self._folder = path / INCOMING / uuid.uuid4().hex
            self._file = _lock_of(self._folder)
            self._lock: int | None = _opened(self._file)
            # Until it was locked, it could be cleared away.
            if _is_ours(self._lock, self._file):
                break
            os.close(self._lock)
        self._folder.mkdir()

    def folder(self) -> Path:
        """A new, empty folder for the files of an upload.

        Raises:
            OSError: it cannot be made.
        """
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def close(self) -> None:
        """Take it away with all that is in it. Harmless when done twice."""
        if self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def flushed(incoming: Path) -> str:
    """Flush the files of an upload that has come in, and return their digest.

    Raises:
        OSError: they cannot be written.
    """
    files = [incoming / name for name in UPLOAD_FILES]
    for file in files:
        fsync(file)
    fsync(incoming)
    return sha256_files(*files)


def unnamed_uploads(path: Path, fleet: Fleet, sources: Iterable[str] = ()) -> list[Path]:
    """Folders of uploads of the store at `path` that no entry names, and of those that were half
    removed; but for those of `sources` (digests): bases can be fitted anew to nothing else.

    Only the `Writer` may remove them: others may be about to give them a name.

    Raises:
        OSError: the folder cannot be read.
    """
    if not (path / UPLOADS).is_dir():
        return []
    named = {*sources, *(entry.digest for entry in fleet.entries.values())}
    return [each for each in (path / UPLOADS).iterdir() if each.name not in named]


def clear_abandoned(path: Path) -> int:
    """Delete what came in to processes of the store at `path` that live no more; how many bytes.

    Raises:
        OSError: something cannot be deleted.
    """
    size = 0
    for folder in _processes(path):
        try:
            lock = _opened(_lock_of(folder))
        except FileNotFoundError:  # all of it was taken away meanwhile
            continue
        try:
            if _is_ours(lock, _lock_of(folder)):
                size += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                if folder.exists():
                    shutil.rmtree(folder)
                _lock_of(folder).unlink()
        finally:
            os.close(lock)
    return size


def _processes(path: Path) -> Iterator[Path]:
    """The folders of all processes, also of those that have a lock only."""
    if (path / INCOMING).is_dir():
        yield from {each.with_suffix("") for each in (path / INCOMING).iterdir()}


def _lock_of(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _opened(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


def _is_ours(lock: int, file: Path) -> bool:
    """Whether an open lock file could be locked, and is still the one of that name."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), file.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return sha256_files(*(folder / name for name in UPLOAD_FILES)) == digest
    except OSError:
        return False
