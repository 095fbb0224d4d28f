"""How much a tenant may have in its name space: adapters, and bytes of their weights."""

from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path

from vllm_jd.plugin.api.callers import caller
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import weights_bytes
from vllm_jd.store import Store
from vllm_jd.store.fleet import UPLOAD_FILES, Compressed, Fleet, Uploaded


def check_room(names: Iterable[str], name: str) -> None:
    """Whether there is room for one more.

    Args:
        names: of all adapters.
        name: what is given, which may be there already.

    Raises:
        FleetFault: whoever asks has as many as their key may have.
    """
    who = caller.get()
    if who is None or who.most_adapters is None:
        return
    others = sum(1 for each in _of(who.space, names) if each != name)
    if others >= who.most_adapters:
        raise FleetFault(
            f"found {others:,} adapters of {who.space!r}, expected {who.most_adapters:,} at "
            "most with this key; delete some",
            HTTPStatus.FORBIDDEN,
            "name",
        )


def check_bytes(names: Iterable[str], name: str, folder: Path, store: Store, fleet: Fleet) -> None:
    """Whether there is room for the weights of an upload. What is there counts as it came, also
    where it is compressed by now: it is kept for new bases.

    Args:
        names: of all adapters.
        name: what is given; a version that is there goes.
        folder: of its files.
        store: the generation that is served.
        fleet: what names stand for over it.

    Raises:
        FleetFault: whoever asks would have more than their key may have.
    """
    who = caller.get()
    if who is None or who.most_bytes is None:
        return
    size, others = (folder / UPLOAD_FILES[1]).stat().st_size, 0
    for each in _of(who.space, names):
        meaning = fleet.meaning(each, store) if each != name else None
        if isinstance(meaning, Compressed):
            others += int(store.source_bytes[meaning.index])
        elif isinstance(meaning, Uploaded):
            others += weights_bytes(store.path, meaning.digest) or 0
    if others + size > who.most_bytes:
        raise FleetFault(
            f"found {size:,} bytes of weights beside {others:,} of {who.space!r}, expected "
            f"{who.most_bytes:,} at most with this key; delete some adapters",
            HTTPStatus.FORBIDDEN,
            "adapter_model",
        )


def _of(space: str | None, names: Iterable[str]) -> Iterable[str]:
    return (name for name in names if name.startswith(f"{space}/"))
