"""What names stand for beside the live generation: the uploads, blends, deletions and pins of a
fleet.

    fleet.json            the overlay: names, and what each stands for
    uploads/<digest>/     the files of one upload, see `vllm_jd.store.uploads`
    fleet.lock            held while fleet.json is replaced

What a name stands for is a function of fleet.json and a generation, and of nothing else. So an
upload that a new generation contains is served from that without another commit, and as it came
again where an older generation is gone back to. The digest of an upload is what a generation calls
the adapter's `source_sha256`.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_jd.store.blend import Blend
from vllm_jd.store.errors import StoreError, told
from vllm_jd.store.files import replace_text
from vllm_jd.store.reader import Store

FLEET = "fleet.json"
UPLOADS = "uploads"
UPLOAD_FILES = ("adapter_config.json", "adapter_model.safetensors")
NAME_BYTES = 512

_FORMAT = 1
_FLEET_LOCK = "fleet.lock"
_LOCK_SECONDS = 10
_FIELDS = ConfigDict(extra="forbid", frozen=True, strict=True)


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
        # Opened: NFS asks the file server then, and tells of a mere name what it knew a minute ago.
        handle = os.open(path / FLEET, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    return found.st_mtime_ns, found.st_ino, found.st_size


def change_fleet(path: Path, change: Callable[[dict[str, Entry]], None]) -> Fleet:
    """Have `change` change the overlay's entries, and write them: durable when this returns.

    What `change` raises ends it, with nothing changed. Whoever gives names uploads is a
    `vllm_jd.store.uploads.Writer` meanwhile.

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
