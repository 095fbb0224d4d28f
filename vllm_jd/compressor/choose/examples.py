"""Examples of a task: prompts and what is to be said to them, of a JSON-lines file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_jd.compressor.choose.encode import Prompt, encode
from vllm_jd.compressor.errors import CompressorError, ModelError

_FORM = (
    "expected an object with prompt and completion (texts), or with messages of which the last is "
    "the assistant's"
)


class ExampleError(CompressorError):
    """A file of examples, or a line of it, that cannot be used; the message names it."""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its completion."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Line:
    """One example as text.

    Args:
        where: its file and line, for messages.
        asked: the prompt as people read it.
        expected: what is to be said.
        first: the prompt, for the tokenizer.
        whole: the prompt and the completion.
    """

    where: str
    asked: str
    expected: str
    first: Prompt
    whole: Prompt

    def asked_ids(self, tokenizer: Any) -> list[int]:
        """Token ids of the prompt alone, as a server gets it.

        Raises:
            ExampleError: as `encoded`.
        """
        return self._encode([self.first], tokenizer, None)[0]

    def encoded(
        self, tokenizer: Any, max_tokens: int | None = None, *, end: bool = False
    ) -> Example:
        """As token ids, cut after `max_tokens`. `end`: a completion that is a text, and whole, ends
        with the end-of-sequence token; chat templates write their own.

        Raises:
            ExampleError: nothing is left of the prompt or the completion, or the model has no chat
                template for messages, or it refuses them.
        """
        before, ids = self._encode([self.first, self.whole], tokenizer, max_tokens)
        pairs = zip(before, ids, strict=False)
        n = next((i for i, (a, b) in enumerate(pairs) if a != b), len(before))
        n = min(n, len(ids))
        if not 0 < n < len(ids):
            within = "" if max_tokens is None else f" within {max_tokens} tokens"
            raise ExampleError(
                f"{self.where}: found no completion{within}, expected a prompt and a completion, "
                "neither empty"
            )
        if end and isinstance(self.whole, str) and len(ids) != max_tokens:
            stop = tokenizer.eos_token_id
            ids = ids if stop is None or ids[-1] == stop else [*ids, stop]
        return Example(ids[:n], ids[n:])

    def _encode(
        self, prompts: list[Prompt], tokenizer: Any, max_tokens: int | None
    ) -> list[list[int]]:
        try:
            return encode(prompts, tokenizer, max_tokens)
        except ModelError as error:
            raise ExampleError(f"{self.where}: {error}") from None


def read_examples(
    path: Path, tokenizer: Any, max_tokens: int = 512, *, end: bool = False
) -> list[Example]:
    """The examples of a file, as token ids, each cut after `max_tokens`; see `read_lines` and
    `Line.encoded`.

    Raises:
        ExampleError: naming the file and the line.
    """
    return [line.encoded(tokenizer, max_tokens, end=end) for line in read_lines(path)]


def read_lines(path: Path) -> list[Line]:
    """Examples of a `.jsonl` file: objects with `prompt` and `completion`, or with `messages` whose
    last is the assistant's. Blank lines are passed over.

    Raises:
        ExampleError: the file cannot be read or has none, or a line is of another form; naming the
            file and the line.
    """
    found = list(_lines(path))
    if not found:
        raise ExampleError(f"{path}: found no examples in it, expected one a line")
    return found


def _lines(path: Path) -> Iterator[Line]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ExampleError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ExampleError(f"{where}: cannot be read as JSON: {error}") from None
        yield _line(value, where)


def _line(value: Any, where: str) -> Line:
    fields = value if isinstance(value, dict) else {}
    prompt, completion, messages = (fields.get(f) for f in ("prompt", "completion", "messages"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Line(where, prompt, completion, prompt, prompt + completion)
    if (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(each, dict) for each in messages)
        and messages[-1].get("role") == "assistant"
    ):
        *asked, said = messages
        text = "\n".join(f"{each.get('role')}: {each.get('content')}" for each in asked)
        return Line(where, text, str(said.get("content")), asked, messages)
    raise ExampleError(f"{where}: {_FORM}")
