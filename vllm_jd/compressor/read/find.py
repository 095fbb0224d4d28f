"""Which folders hold adapters, and what these are called."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from vllm_jd.compressor.errors import AdapterError, few
from vllm_jd.compressor.read import hub
from vllm_jd.compressor.read.folder import CONVERTED, LEFT_BY_TRAINERS, PICKLED
from vllm_jd.compressor.read.peft_config import CONFIG_FILE, WEIGHTS_FILE

# A weights file alone is a damaged adapter, to be named rather than passed over; but mlx-lm's has
# the name of a store's table.
_MARKS = {CONFIG_FILE, WEIGHTS_FILE, *PICKLED}


def split_name(text: str) -> tuple[str | None, str]:
    """The name and the path of `NAME=PATH`, as in vLLM's --lora-modules; (None, text) of others.

    What is there as a path is one, whatever is in it.
    """
    name, _, path = text.partition("=")
    if not name or not path or "://" in name or os.path.lexists(text):
        return None, text
    return name, path


def find_adapters(
    paths: Iterable[Path], on_note: Callable[[str], None] = lambda what: None
) -> list[Path]:
    """The adapter folders among `paths` and directly or deeper inside of them.

    Adapters inside of an adapter's folder (as PEFT saves a model that has several) are adapters,
    but for what a trainer left there of the same one.

    Args:
        paths: folders.
        on_note: called with a sentence about folders that were left out, if there are any.

    Raises:
        AdapterError: a path does not exist, or holds no adapter.
    """
    folders: dict[Path, list[Path]] = {}  # where it really is → as it was found
    left: dict[Path, Path] = {}
    faults = []
    for path in paths:
        if not path.is_dir():
            faults.append(_no_folder(path))
            continue
        found = _adapter_folders(path.absolute(), left)
        if not found:
            faults.append(f"{path}: found no {CONFIG_FILE} in it or below")
        for real, folder in found.items():
            folders.setdefault(real, []).append(folder)
    if faults:
        raise AdapterError(faults)
    for note in _left_out([folder for real, folder in left.items() if real not in folders]):
        on_note(note)
    # One adapter found by two names keeps its own, whatever the order of the paths.
    return [
        min(same, key=lambda folder: (folder.name != real.name, folder.name))
        for real, same in folders.items()
    ]


def named_folder(name: str, path: Path) -> Path:
    """The folder that `NAME=PATH` means: PATH itself, whatever adapters are inside of it.

    Raises:
        AdapterError: it is not an adapter's folder.
    """
    if not path.is_dir():
        raise AdapterError([f"{_no_folder(path)} (of {name}={path}, read as NAME=PATH)"])
    if not holds_adapter(path):
        raise AdapterError(
            [
                f"{path}: found no {CONFIG_FILE} in it; {name}={path} names one adapter, expected "
                "its own folder"
            ]
        )
    converted = path / CONVERTED
    return (converted if holds_adapter(converted) else path).absolute()


def _no_folder(path: Path) -> str:
    what = "not a folder" if path.exists() else "no such folder"
    fault = f"{path}: {what}; expected an adapter folder, or a folder of them"
    if not path.exists() and hub.has_hub_form(str(path)):
        fault += f" (if it is a repository of the Hub: hf://{path})"
    return fault


def holds_adapter(folder: Path) -> bool:
    """Whether the folder itself is an adapter's."""
    return any((folder / name).exists() for name in _MARKS)


def _left_out(folders: list[Path]) -> list[str]:
    """What to say of an adapter's earlier states, which are not taken."""
    if not folders:
        return []
    owners = list(dict.fromkeys(folder.parent for folder in folders))
    names = [folder.name for folder in folders if folder.parent == owners[0]]
    others = f", and those of {len(owners) - 1:,} more adapters" if len(owners) > 1 else ""
    return [
        f"{owners[0]}: left out {few(names)}, the same adapter at another time of "
        f"its training{others}; give one as a path to have it"
    ]


def _adapter_folders(path: Path, left_out: dict[Path, Path]) -> dict[Path, Path]:
    """The adapter folders in `path` or below, links followed: where it really is → as found.

    Those that are left out are added to `left_out`.
    """
    seen = set()
    found = {}
    within = set()  # folders that are adapters, and those inside of them
    for name, below, files in os.walk(path, followlinks=True):
        folder, real = Path(name), Path(name).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        is_adapter = not _MARKS.isdisjoint(files) or not _MARKS.isdisjoint(below)
        below[:] = [each for each in below if each not in _MARKS]
        # Where LLaMA-Factory has made a plain adapter of one of PiSSA, that is found below.
        if is_adapter and not (CONVERTED in below and holds_adapter(folder / CONVERTED)):
            found[real] = folder
        if is_adapter or str(folder.parent) in within:
            within.add(name)
            left = [each for each in below if LEFT_BY_TRAINERS.fullmatch(each)]
            below[:] = [each for each in below if each not in left]
            left_out |= {
                (folder / each).resolve(): folder / each
                for each in left
                if holds_adapter(folder / each)
            }
    return found


def names_of(folders: list[Path], taken: Collection[str] = ()) -> list[str]:
    """A name for each folder: the last part of its path, or as many as tell it from the others.

    Args:
        folders: absolute paths, all different.
        taken: names that others have.
    """
    parts = [_parts(folder) for folder in folders]
    lengths = [1] * len(folders)
    while True:
        names = ["/".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        uses = Counter(names)
        uses.update(taken)
        longer = [
            min(len(p), n + (uses[name] > 1))
            for p, n, name in zip(parts, lengths, names, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def _parts(folder: Path) -> tuple[str, ...]:
    folder = Path(os.path.normpath(folder))
    if folder.name == CONVERTED:
        folder = folder.parent
    return folder.parts[1:] or folder.parts
