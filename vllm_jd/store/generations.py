"""The generations that a store still has on disk: open an old one, delete the oldest."""

import shutil
from pathlib import Path

from vllm_jd.store.errors import StoreError
from vllm_jd.store.files import fsync, sha256_file
from vllm_jd.store.reader import GENERATIONS, MANIFEST, Store, read_current
from vllm_jd.store.writer import writing


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


def prune(path: Path, keep: int) -> list[int]:
    """Delete the generations before the live one, but for the newest `keep` of those.

    Files that a later generation shares with a deleted one stay. A server that has loaded a
    generation does not need its files any more; one that is just starting on a deleted
    generation fails, and so does a part of a server that is started again on it.

    Args:
        path: the store's folder.
        keep: how many to keep beside the live one, 0 or more.

    Returns:
        Numbers of the deleted generations, ascending.

    Raises:
        StoreError: there is no store, another process is writing it, or a file cannot be deleted.
        ValueError: `keep` is negative.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}, expected 0 or more")
    read_current(path)  # writing() would make a folder of what is none
    with writing(path):
        *old, _ = generations_on_disk(path)
        doomed = old[: len(old) - keep] if keep else old
        folder = path / GENERATIONS
        for number in doomed:
            # Hidden first: a kill must not leave half a generation under a number.
            (folder / str(number)).rename(folder / f".{number}.deleted")
        fsync(folder)
        for entry in _entries(path):
            if entry.name.startswith("."):
                shutil.rmtree(entry)
    return doomed


def _entries(path: Path) -> list[Path]:
    try:
        return list((path / GENERATIONS).iterdir())
    except OSError as error:
        raise StoreError(f"{path / GENERATIONS}: cannot be read: {error}") from None
