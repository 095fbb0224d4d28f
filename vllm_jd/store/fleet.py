"""What names stand for beside the live generation: the uploads, blends, deletions and pins of a
fleet.

    fleet.json            the overlay: names, and what each stands for
    uploads/<digest>/     adapter_config.json and adapter_model.safetensors of one upload
    writer.lock           who may change the fleet: one process at a time
    fleet.lock            held while fleet.json is replaced

What a name stands for is a function of fleet.json and a generation, and of nothing else. So an
upload that a new generation contains is served from that without another commit, and as it came
again where an older generation is gone back to. The digest of an upload is what a generation calls
the adapter's `source_sha256`.
"""

import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_jd.store.blend import Blend
from vllm_jd.store.errors import StoreError, told
from vllm_jd.store.files import fsync, replace_text, sha256_files
from vllm_jd.store.reader import Store

FLEET = "fleet.json"
UPLOADS = "uploads"
UPLOAD_FILES = ("adapter_config.json", "adapter_model.safetensors")
NAME_BYTES = 512

_FORMAT = 1
_FLEET_LOCK, _WRITER_LOCK = "fleet.lock", "writer.lock"
_LOCK_SECONDS = 10
_HIDDEN = ".incoming-"
_FIELDS = ConfigDict(extra="forbid", frozen=True, strict=True)


class NotTheWriter(StoreError):
    """Another process changes this fleet; the message says which."""


class Entry(BaseModel):
    """What the overlay says of one name: that it stands for an upload, a blend, or for nothing, or
    only that it is pinned (what it stands for is the generation's then)."""

    model_config = _FIELDS

    digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    blend: Blend | None = None
    deleted: bool = False
    pinned: bool = False
    uploaded_at: float | None = None
    """Seconds since 1970, UTC."""
    source: str | None = None
    """Where it was fetched from, if it was."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Entry":
        if self.deleted and (self.digest or self.blend or self.pinned):
            raise ValueError("found a deleted name with an upload, a blend or a pin, expected none")
        if self.digest and self.blend:
            raise ValueError("found a name with an upload and a blend, expected one of them")
        return self


DELETED = Entry(deleted=True)
_NOTHING = Entry()


def uploaded(digest: str, *, pinned: bool = False, source: str | None = None) -> Entry:
    """The entry of a name that is given an upload now."""
    return Entry(digest=digest, pinned=pinned, uploaded_at=time.time(), source=source)


def blended(blend: Blend, *, pinned: bool = False) -> Entry:
    """The entry of a name that is given a blend now."""
    return Entry(blend=blend, pinned=pinned, uploaded_at=time.time())


class Compressed(NamedTuple):
    """A name stands for this adapter of the generation."""

    index: int


class Uploaded(NamedTuple):
    """A name stands for this upload, served as it came."""

    digest: str


class Blended(NamedTuple):
    """A name stands for this blend of what other names stand for."""

    blend: Blend


class Fleet(BaseModel):
    """The overlay, as one version of fleet.json has it."""

    model_config = _FIELDS

    format: Literal[1]
    counter: int = Field(ge=0)
    """One more with each change."""
    entries: dict[str, Entry]

    def meaning(self, name: str, store: Store) -> Compressed | Uploaded | Blended | None:
        """What a name stands for beside a generation; None: for nothing."""
        entry = self.entries.get(name, _NOTHING)
        if entry.deleted:
            return None
        if entry.blend is not None:
            return Blended(entry.blend)
        if name in store:
            index = store.index(name)
            if entry.digest in (None, source_of(store, index)):
                return Compressed(index)
        return Uploaded(entry.digest) if entry.digest else None

    def meanings(self, store: Store) -> Iterator[tuple[str, Compressed | Uploaded | Blended]]:
        """Every name that stands for something: the generation's in its order, then the others in
        theirs."""
        for index, name in enumerate(store.names):
            found = self.meaning(name, store) if name in self.entries else Compressed(index)
            if found is not None:
                yield name, found
        for name in sorted(name for name in self.entries if name not in store):
            found = self.meaning(name, store)
            if found is not None:
                yield name, found

    def settled(self, generations: Iterable[Store]) -> dict[str, Entry]:
        """The entries without what says nothing beside any of these generations: an upload that
        all of them contain under its name, a deletion of what none contains.

        Give all generations that may be served. None may be under way (so hold
        `vllm_jd.store.writing`): it might contain what was deleted since it was begun.
        """
        needless = {name for name, entry in self.entries.items() if entry.digest or entry.deleted}
        for store in generations:
            for name in list(needless):
                meaning = self.meaning(name, store)
                gone = self.entries[name].deleted and name not in store
                if not (gone or isinstance(meaning, Compressed)):
                    needless.discard(name)
        return {
            name: Entry(pinned=True) if name in needless else entry
            for name, entry in self.entries.items()
            if name not in needless or entry.pinned
        }


def source_of(store: Store, index: int) -> str:
    """Hex sha256 of the files that an adapter of a generation was made from."""
    return bytes(store.source_sha256[index].numpy()).hex()


def sources_of(store: Store) -> set[str]:
    """The same of all adapters of a generation."""
    return {bytes(digest).hex() for digest in store.source_sha256.numpy()}


def check_name(name: str) -> None:
    """Whether an adapter may be given a name.

    Raises:
        ValueError: it is blank, too long, or has control or undecodable characters.
    """
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise ValueError(f"found control or undecodable characters in the name {name[:80]!r}")
    size = len(name.encode())
    if not name.strip() or size > NAME_BYTES:
        raise ValueError(
            f"found a name of {size:,} bytes ({name[:40]!r}), expected one that is not blank, of "
            f"up to {NAME_BYTES}"
        )


def read_fleet(path: Path) -> Fleet:
    """The overlay of the store at `path`; an empty one where nothing was changed yet.

    Raises:
        StoreError: it cannot be read, or is not of this form.
    """
    file = path / FLEET
    try:
        return Fleet.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return Fleet(format=_FORMAT, counter=0, entries={})
    except OSError as error:
        raise StoreError(f"{file}: cannot be read: {error}") from None
    except ValidationError as error:
        raise StoreError(
            f"{file}: {told(error)}; expected a fleet of format {_FORMAT} (restore the file, or "
            "use the vllm-jd that wrote it)"
        ) from None


def fleet_stamp(path: Path) -> tuple[int, ...] | None:
    """Another one after each change, to be had without reading the overlay."""
    try:
        found = (path / FLEET).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def change_fleet(path: Path, change: Callable[[dict[str, Entry]], None]) -> Fleet:
    """Have `change` change the overlay's entries, and write them: durable when this returns.

    What `change` raises ends it, with nothing changed. Whoever gives names uploads is the `Writer`.

    Raises:
        StoreError: it cannot be read or written; it is as it was.
    """
    file = path / FLEET
    try:
        with filelock.FileLock(path / _FLEET_LOCK).acquire(timeout=_LOCK_SECONDS):
            old = read_fleet(path)
            entries = dict(old.entries)
            change(entries)
            changed = [n for n, entry in entries.items() if entry is not old.entries.get(n)]
            for name in changed:
                if entries[name] == _NOTHING:
                    del entries[name]
            gone = old.entries.keys() - entries.keys()
            if not gone and all(entries.get(n) == old.entries.get(n) for n in changed):
                return old
            new = Fleet(format=_FORMAT, counter=old.counter + 1, entries=entries)
            replace_text(file, new.model_dump_json(exclude_defaults=True) + "\n")
            return new
    except filelock.Timeout:
        raise StoreError(
            f"{path / _FLEET_LOCK}: held by another process for {_LOCK_SECONDS} s; try again"
        ) from None
    except OSError as error:
        raise StoreError(f"{file}: cannot be written: {error}") from error


def give_way(path: Path, names: Iterable[str]) -> None:
    """Have some names stand for what the generations say of them again, after these were changed by
    hand. A pin stays.

    Raises: as `change_fleet`.
    """

    def change(entries: dict[str, Entry]) -> None:
        for name in entries.keys() & set(names):
            entries[name] = Entry(pinned=entries[name].pinned)

    if (path / FLEET).exists():
        change_fleet(path, change)


def upload_folder(path: Path, digest: str) -> Path:
    """Where a store has the files of an upload."""
    return path / UPLOADS / digest


class Writer:
    """The right to add uploads to the store at `path` and to remove them.

    It is held until `close`, or until the process ends, however it ends.

    Raises:
        NotTheWriter: another process has it.
        StoreError: the folder cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        file = path / _WRITER_LOCK
        try:
            self._file = file.open("a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                who = self._file.read(200).strip()
                self._file.close()
                raise NotTheWriter(
                    f"{path}: another server changes it ({who or 'it has'} {file}); send changes "
                    "to that one"
                ) from None
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()} has")
            self._file.flush()
            (path / UPLOADS).mkdir(exist_ok=True)
            fsync(path)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error}") from error

    def close(self) -> None:
        """Give it up. Harmless when done twice."""
        self._file.close()

    def incoming(self) -> Path:
        """A new, empty folder for the files of an upload that comes in.

        Raises:
            OSError: it cannot be made.
        """
        folder = self._hidden()
        folder.mkdir()
        return folder

    def accept(self, incoming: Path) -> str:
        """Make the files in an incoming folder a durable upload, which nothing names yet, and
        return its digest. The same files once more are the same upload.

        Raises:
            OSError: it cannot be written.
        """
        files = [incoming / name for name in UPLOAD_FILES]
        digest = sha256_files(*files)
        folder = upload_folder(self.path, digest)
        if folder.is_dir():
            if _is_whole(folder, digest):
                shutil.rmtree(incoming)
                return digest
            self.remove(folder)  # damaged meanwhile: what came now takes its place
        for file in files:
            fsync(file)
        fsync(incoming)
        incoming.rename(folder)
        fsync(folder.parent)
        return digest

    def unnamed(self, fleet: Fleet, sources: Iterable[str] = ()) -> list[Path]:
        """Folders of uploads that no entry names, and of those that never came in whole; but for
        those of `sources` (digests): bases can be fitted anew to nothing else."""
        named = {*sources, *(entry.digest for entry in fleet.entries.values())}
        return [each for each in (self.path / UPLOADS).iterdir() if each.name not in named]

    def remove(self, folder: Path) -> None:
        """Delete the folder of an upload. What a kill leaves of it is `unnamed`.

        Raises:
            OSError: it cannot be deleted.
        """
        hidden = self._hidden()
        folder.rename(hidden)
        shutil.rmtree(hidden)

    def _hidden(self) -> Path:
        return self.path / UPLOADS / f"{_HIDDEN}{uuid.uuid4().hex}"


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return sha256_files(*(folder / name for name in UPLOAD_FILES)) == digest
    except OSError:
        return False
