"""Which adapters are asked, and which items: a store, the adapters as they are, and their data."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_jd.compressor.choose.examples import Line, read_lines
from vllm_jd.compressor.errors import AdapterError, few
from vllm_jd.compressor.read.adapters import find_sources
from vllm_jd.compressor.read.peft_config import CONFIG_FILE, LoraConfig, parse_config
from vllm_jd.evaluate.errors import EvaluateError, UsageError
from vllm_jd.store import Store

_SUFFIX = ".jsonl"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""


@dataclass(frozen=True)
class Item:
    """One item of an adapter, as text and as token ids (see `Question`)."""

    text: str
    expected: str
    asked: list[int]
    prompt: list[int]
    completion: list[int]

    def tokens(self, max_new_tokens: int) -> int:
        """Of the longest request that it takes."""
        return max(len(self.asked) + max_new_tokens, len(self.prompt) + len(self.completion) + 1)


@dataclass
class Asked:
    """An adapter that is asked.

    Args:
        name: of it, in the store.
        folder: where it lies as it is.
        items: what it is asked.
        too_long: items that the model has no room for.
    """

    name: str
    folder: Path
    items: list[Item] = field(default_factory=list)
    too_long: int = 0


def find_asked(
    store: Store,
    sources: Iterable[str],
    data: Path,
    names: Sequence[str],
    on_note: Callable[[str], None],
) -> dict[str, tuple[Path, Path]]:
    """The adapters that can be asked: name → (folder, file of items), in the store's order.

    Args:
        store: whose adapters they are.
        sources: as `compress` takes adapters.
        data: a folder with a file NAME.jsonl for each.
        names: only these; none: all that there are files for.
        on_note: called with a sentence about what is left out.

    Raises:
        UsageError: an adapter of `names` is not in the store.
        EvaluateError: an adapter of `names`, or every one, lacks its file or its folder.
    """
    if not data.is_dir():
        raise UsageError(
            f"--data {data}: no such folder; expected one with a file NAME{_SUFFIX} "
            "for each adapter"
        )
    unknown = [name for name in names if name not in store]
    if unknown:
        raise UsageError(f"--adapter {unknown[0]}: {store.path} has {store.unknown(unknown[0])}")
    files = {
        file.relative_to(data).as_posix().removesuffix(_SUFFIX): file
        for file in sorted(data.rglob(f"*{_SUFFIX}"))
    }
    wanted = [name for name in store.names if name in (names or files)]
    strangers = [name + _SUFFIX for name in files if name not in store]
    if strangers:
        on_note(f"{data}: left out what no adapter of {store.path} names: {few(strangers)}")
    without = [name for name in wanted if name not in files]
    if without:
        raise EvaluateError(
            f"{data}: found no {few([name + _SUFFIX for name in without])}, "
            "expected the items of each --adapter"
        )
    if not wanted:
        raise EvaluateError(
            f"{data}: found {len(files):,} files NAME{_SUFFIX}, expected at least one named by an "
            f"adapter of {store.path} (such as {few(store.names)})"
        )
    try:
        folders = {name: folder for folder, name, _ in find_sources(sources, on_note=on_note)}
    except AdapterError as error:
        raise EvaluateError(f"--adapters: {'; '.join(error.faults)}") from None
    missing = [name for name in wanted if name not in folders]
    if missing and (names or len(missing) == len(wanted)):
        raise EvaluateError(
            f"--adapters: found no folder of {few(missing)} among {len(folders):,} "
            f"({few(sorted(folders))}); expected the folders that the store was made from, given "
            "as `compress` was given them (NAME=FOLDER gives one another name)"
        )
    if missing:
        on_note(f"left out {few(missing)}: found items, but no folder in --adapters")
    return {name: (folders[name], files[name]) for name in wanted if name in folders}


def choose_items(
    lines: Sequence[Line],
    tokenizer: Any,
    *,
    most: int,
    seed: int,
    max_tokens: int | None,
    max_new_tokens: int,
) -> tuple[list[Item], int]:
    """Up to `most` items, drawn by the seed and in the file's order, of those that fit into
    `max_tokens`; and how many that were drawn did not.

    Raises:
        ExampleError: a line that was drawn has no prompt, or no completion, or messages that the
            model's chat template does not take.
    """
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    found: dict[int, Item] = {}
    too_long = 0
    for number in order:
        if len(found) == most:
            break
        line = lines[number]
        example = line.encoded(tokenizer)
        asked = line.asked_ids(tokenizer)
        item = Item(line.asked, line.expected, asked, example.prompt, example.completion)
        if max_tokens is not None and item.tokens(max_new_tokens) > max_tokens:
            too_long += 1
        else:
            found[number] = item
    return [found[number] for number in sorted(found)], too_long


def read_asked(
    found: dict[str, tuple[Path, Path]],
    tokenizer: Any,
    *,
    items: int,
    seed: int,
    max_tokens: int | None,
    max_new_tokens: int,
    on_note: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> list[Asked]:
    """Read the items of adapters (`find_asked`).

    Raises:
        ExampleError: a file or a line of it cannot be used; it is named.
        EvaluateError: no item of any adapter fits into `max_tokens`.
    """
    read = []
    for number, (name, (folder, file)) in enumerate(found.items()):
        chosen, too_long = choose_items(
            read_lines(file),
            tokenizer,
            most=items,
            seed=seed,
            max_tokens=max_tokens,
            max_new_tokens=max_new_tokens,
        )
        read.append(Asked(name, folder, chosen, too_long))
        on_progress(number + 1, len(found))
    dropped = sum(each.too_long for each in read)
    if dropped:
        on_note(
            f"left out items that are longer than the model's {max_tokens:,} tokens with an answer "
            f"of {max_new_tokens}: {dropped:,}"
        )
    empty = [each.name for each in read if not each.items]
    if len(empty) == len(read):
        raise EvaluateError(
            f"no item fits into {max_tokens:,} tokens with an answer of {max_new_tokens}; expected "
            "shorter ones (--max-new-tokens and --max-model-len change what fits)"
        )
    if empty:
        on_note(f"left out {few(empty)}: none of its items fits")
    return [each for each in read if each.items]


def highest_rank(folders: Iterable[Path]) -> int:
    """The least of vLLM's `max_lora_rank` with which all of these adapters can be served; those
    whose configuration cannot be read are the engine's to refuse."""
    most = 1
    for folder in folders:
        try:
            config = parse_config(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, AdapterError):
            continue
        patterns = config.rank_pattern if isinstance(config, LoraConfig) else None
        most = max(most, config.r, *(patterns or {}).values())
    return next((rank for rank in _RANKS if rank >= most), _RANKS[-1])
