"""Data files of `train_adapters.py`: a JSON-lines file for each task."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vllm_jd.compressor.choose.examples import Example

SPLITS = ("train", "validation", "test")
LINE_FORMAT = '{"split": "train", "input": "...", "output": "..."}'


class UserError(Exception):
    """A mistake in what the user gave: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  remedy: {remedy}")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data file under the name that its adapter will have."""

    name: str
    path: Path

    @property
    def source(self) -> str:
        """The folder and file name: where the data came from, without this machine's paths."""
        return f"{self.path.resolve().parent.name}/{self.path.name}"


def find_tasks(data_dir: Path, wanted: str | None) -> list[Task]:
    """Return the tasks to train on, in the order asked for (all, by name, if `wanted` is None).

    Args:
        data_dir: folder of JSON-lines files.
        wanted: comma-separated file stems; ``name=stem`` gives the adapter another name.

    Raises:
        UserError: no such folder or task, no task at all, or one name given twice.
    """
    if not data_dir.is_dir():
        raise UserError(
            f"{data_dir} is not a folder",
            "a folder of JSON-lines files, one a task",
            f"give a folder whose .jsonl files hold lines like {LINE_FORMAT}",
        )
    files = {path.stem: path for path in sorted(data_dir.glob("*.jsonl"))}
    if not files:
        raise UserError(
            f"{data_dir} holds no .jsonl file",
            "one JSON-lines file a task",
            f"put files with lines like {LINE_FORMAT} there",
        )
    if wanted is None:
        return [Task(stem, path) for stem, path in files.items()]
    tasks: list[Task] = []
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        name, _, stem = item.rpartition("=")
        name = name or stem
        if stem not in files:
            raise UserError(
                f"--tasks names {stem!r}, but {data_dir} holds no {stem}.jsonl",
                f"one of {', '.join(list(files)[:8])}{', ...' if len(files) > 8 else ''}",
                "correct the name, or leave --tasks out to train on every file",
            )
        if name in (".", "..") or "/" in name or "\\" in name:
            raise UserError(
                f"--tasks gives the adapter the name {name!r}",
                "a name that can be a folder's",
                "choose one without slashes",
            )
        if name in {task.name for task in tasks}:
            raise UserError(
                f"--tasks names the adapter {name!r} twice",
                "names that differ",
                "write another_name=task for one of them",
            )
        tasks.append(Task(name, files[stem]))
    if not tasks:
        raise UserError("--tasks is empty", "at least one task", "leave --tasks out for all")
    return tasks


def read_task(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> dict[str, list[Example]]:
    """Read and tokenise one data file.

    Args:
        path: JSON-lines file.
        tokenizer: the base model's.
        max_tokens: the base model's longest sequence, in tokens.

    Returns:
        The instances of each split; a split may be empty, but train is not.

    Raises:
        UserError: names the file and line that is no such instance, or the file if it holds no
            train instance.
    """
    from vllm_jd.compressor.choose.cores import length
    from vllm_jd.compressor.choose.examples import Example

    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "a JSON-lines file in UTF-8", "check the file"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse_line(line, where)
        instance = Example(
            tokenizer(f"Input: {row['input']}\nOutput:")["input_ids"],
            tokenizer(f" {row['output']}", add_special_tokens=False)["input_ids"]
            + [tokenizer.eos_token_id],
        )
        if length(instance) > max_tokens:
            raise UserError(
                f"{where}: {length(instance)} tokens",
                f"at most {max_tokens}, the longest sequence of the base model",
                "shorten or remove this line",
            )
        splits[row["split"]].append(instance)
    if not splits["train"]:
        raise UserError(
            f'{path} has no line with "split": "train"',
            "at least one instance to train on",
            f"add lines like {LINE_FORMAT}",
        )
    return splits


def _parse_line(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno})",
            LINE_FORMAT,
            "correct or remove this line",
        ) from error
    if not isinstance(row, dict):
        problem = f"a JSON {type(row).__name__} instead of an object"
    elif missing := [key for key in ("split", "input", "output") if key not in row]:
        problem = f"no {' and no '.join(map(repr, missing))}"
    elif wrong := [key for key in ("split", "input", "output") if not isinstance(row[key], str)]:
        problem = f"{wrong[0]!r} is {json.dumps(row[wrong[0]])[:40]}, not a string"
    elif row["split"] not in SPLITS:
        problem = f"the split {row['split']!r}, which is none of {', '.join(SPLITS)}"
    else:
        return row
    raise UserError(f"{where}: {problem}", LINE_FORMAT, "correct or remove this line")
