"""Forget what a store's overlay of names says that its generations say too, and delete uploads that
nothing needs any more."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from vllm_jd.store.errors import StoreError
from vllm_jd.store.fleet import (
    FLEET,
    UPLOADS,
    Entry,
    change_fleet,
    read_fleet,
    sources_of,
)
from vllm_jd.store.generations import generations_on_disk, open_number
from vllm_jd.store.uploads import (
    INCOMING,
    Keeper,
    NotTheKeeper,
    Writer,
    clear_abandoned,
    unnamed_uploads,
)
from vllm_jd.store.writer import writing

_WAIT = 10.0  # seconds for a server's change


@dataclass(frozen=True)
class Settled:
    """What `settle` did.

    Attributes:
        names: entries of the overlay that were needed no more.
        uploads: deleted uploads.
        bytes: of their files, and of what never came in whole.
        held: which server deletes uploads, if one does: none was deleted here.
    """

    names: list[str] = field(default_factory=list)
    uploads: int = 0
    bytes: int = 0
    held: str | None = None


def settle(path: Path, *, originals: bool = False) -> Settled:
    """Take out of fleet.json what every generation on disk says too, and delete the uploads that no
    name stands for: replaced, deleted, or never come in whole. Does nothing without a fleet.

    What names stand for does not change. Uploads that the live generation was made from stay,
    since new bases can be fitted to nothing else.

    Args:
        path: the store.
        originals: delete also those.

    Raises:
        StoreError: there is no store, it is damaged, another process is writing it, or a file
            cannot be written.
    """
    if not any((path / each).exists() for each in (FLEET, UPLOADS, INCOMING)):
        return Settled()
    with writing(path), ExitStack() as opened:
        stores = [
            opened.enter_context(open_number(path, number, verify=False))
            for number in generations_on_disk(path)
        ]
        before = read_fleet(path)

        def change(entries: dict[str, Entry]) -> None:
            left = before.model_copy(update={"entries": dict(entries)}).settled(stores)
            entries.clear()
            entries.update(left)

        after = change_fleet(path, change)
        names = [name for name in before.entries if name not in after.entries]
        kept = set() if originals else sources_of(stores[-1])
        try:
            opened.callback(Keeper(path).close)
        except NotTheKeeper as error:
            return Settled(names, held=str(error))
        writer = Writer(path, wait=_WAIT)
        opened.callback(writer.close)
        try:
            after, count, size = read_fleet(path), 0, clear_abandoned(path)
            for folder in unnamed_uploads(path, after, kept):
                size += sum(file.stat().st_size for file in folder.iterdir())
                count += 1
                writer.remove(folder)
        except OSError as error:
            raise StoreError(f"{path / UPLOADS}: cannot be deleted: {error}") from None
        return Settled(names, count, size)
