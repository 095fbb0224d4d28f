"""The generations that a store still has on disk: open an old one, go back to one, delete the
oldest."""

from dataclasses import dataclass, field
from pathlib import Path

from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import fsync, sha256_file
from vllm_jd.store.holding import Deletion
from vllm_jd.store.manifest import GENERATIONS, MANIFEST
from vllm_jd.store.reader import Store, read_current
from vllm_jd.store.writer import GenerationWriter, sweep, writing


def generations_on_disk(path: Path) -> list[int]:
    """Numbers of the live generation and of those before it, ascending.

    Raises:
        StoreError: there is no store at `path`.
    """
    live, _ = read_current(path)
    numbers = [int(entry.name) for entry in _entries(path) if entry.name.isdecimal()]
    return sorted(number for number in numbers if number <= live)


def open_number(path: Path, number: int, *, verify: bool = True) -> Store:
    """Open generation `number`, the live one or an older one.

    CURRENT holds the sha256 of the live manifest only. The manifest of an older generation is
    taken as it is found: it must be valid, and every file must be what it says (with `verify` as
    in `Store.open`), but a manifest that was changed together with its files goes unnoticed.

    Raises:
        StoreError: there is no such generation, or it is damaged.
    """
    live, digest = read_current(path)
    if number != live:
        found = generations_on_disk(path)
        if number not in found:
            listed = ", ".join(map(str, found))
            raise StoreError(f"{path}: no generation {number} on disk; found {listed}")
        file = path / GENERATIONS / str(number) / MANIFEST
        try:
            digest = sha256_file(file)
        except OSError as error:
            raise StoreError(f"{file}: cannot be read: {error}") from None
    return Store.open_generation(path, number, digest, verify=verify)


def revert(path: Path, number: int | None = None) -> Store:
    """Make what an older generation holds the live generation again, under a new number: no number
    ever stands for two contents, and no reader is left with one that is gone.

    The files are shared on disk, so that it takes no room and no time to speak of. Every byte of
    them is checked first.

    Args:
        path: the store's folder.
        number: the older generation; default: the one before the live one.

    Returns:
        The new generation.

    Raises:
        StoreError: there is no such generation, it is damaged, or another process is writing the
            store.
    """
    read_current(path)  # writing() would make a folder of what is none
    with writing(path):
        *older, live = generations_on_disk(path)
        if number is None and not older:
            raise StoreError(f"{path}: no generation before {live} is on disk to go back to")
        if number == live:
            raise StoreError(f"{path}: generation {live} is the live one already")
        with open_number(path, older[-1] if number is None else number) as old:
            return GenerationWriter(path).publish_again(old)


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        deleted: numbers of the deleted generations, ascending.
        held: those that readers hold → the readers' process ids, as far as they can be told (those
            of other machines and users cannot).
    """

    deleted: list[int] = field(default_factory=list)
    held: dict[int, list[int]] = field(default_factory=dict)


def prune(path: Path, keep: int, *, force: bool = False) -> Pruned:
    """Delete the generations before the live one, but for the newest `keep` of those, and for
    those that somebody reads.

    Files that a later generation shares with a deleted one stay. A reader that has opened a
    generation goes on reading it (see `Store`) although `force` deleted it; one that is just
    opening it fails, and so does a part of a server that is started again on it.

    Args:
        path: the store's folder.
        keep: how many to keep beside the live one, 0 or more.
        force: delete also what readers hold; it is among `held` then, too.

    Returns:
        What was deleted, and what is held.

    Raises:
        StoreError: there is no store, another process is writing it, or a file cannot be deleted.
        ValueError: `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}, expected 0 or more")
    read_current(path)  # writing() would make a folder of what is none
    done = Pruned()
    with writing(path):
        *old, _ = generations_on_disk(path)
        folder = path / GENERATIONS
        locks = []
        for number in old[: len(old) - keep] if keep else old:
            lock = Deletion(folder / str(number) / MANIFEST)
            if lock.holders is not None:
                done.held[number] = lock.holders
                if not force:
                    continue
            locks.append(lock)  # until it is gone: nobody may open it meanwhile
            # Hidden first: a kill must not leave half a generation under a number.
            (folder / str(number)).rename(folder / f".{number}.deleted")
            done.deleted.append(number)
        fsync(folder)
        sweep(path)
        locks.clear()
    return done


def _entries(path: Path) -> list[Path]:
    try:
        return list((path / GENERATIONS).iterdir())
    except OSError as error:
        raise StoreError(f"{path / GENERATIONS}: cannot be read: {error}") from None
