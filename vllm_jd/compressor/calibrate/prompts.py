"""Calibration prompts: read from a file, and turned into tokens as a server would."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_jd.compressor.errors import CalibrationError

Message = dict[str, Any]
Prompt = str | list[Message]
"""Text as it stands, or chat messages for the model's chat template."""


def read_prompts(path: Path) -> list[Prompt]:
    """Calibration prompts of a `.txt` file, one a line, or of a `.jsonl` file.

    A line of the latter is an object with `prompt` or `text` (a string), or with `messages` (as
    in the chat API). Blank lines are passed over.

    Raises:
        CalibrationError: naming the file and the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(
            f"{path}: expected prompts as .txt (one a line) or .jsonl (one object a line, with "
            "prompt, text or messages), or moments measured before as .safetensors"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8 text: {error}") from None
    prompts: list[Prompt] = []
    # Not splitlines(), which also parts lines at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            prompts.append(line if path.suffix == ".txt" else _parse(line, f"{path}:{number}"))
    if not prompts:
        raise CalibrationError(f"{path}: found no prompts in it; expected one a line")
    return prompts


def encode(prompts: list[Prompt], tokenizer: Any, max_tokens: int | None) -> list[list[int]]:
    """The first `max_tokens` token ids of each prompt; special tokens as a server adds them.

    Args:
        prompts: see `Prompt`.
        tokenizer: transformers' one of the model.
        max_tokens: of each prompt; None: all.

    Raises:
        CalibrationError: the model has no chat template for messages, or it refuses them.
    """
    from jinja2 import TemplateError  # what chat templates are written in; torch brings it along

    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            try:
                text = tokenizer.apply_chat_template(
                    prompt,
                    tokenize=False,
                    add_generation_prompt=prompt[-1]["role"] != "assistant",
                )
            except (ValueError, TypeError, KeyError, TemplateError) as error:
                why = str(error).strip() or type(error).__name__
                raise CalibrationError(
                    f"prompt {number}: the model's chat template cannot be applied to its "
                    f"messages: {why.splitlines()[0]}"
                ) from None
            # The template writes the special tokens itself.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        encoded.append(ids[:max_tokens])
    return encoded


def prompts_sha256(prompts: list[Prompt]) -> str:
    """Hex sha256 of the prompts, whatever kind of file they came from."""
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()


def _parse(line: str, where: str) -> Prompt:
    """The prompt of one line of a `.jsonl` file."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a ValueError
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: found {type(value).__name__}, expected a JSON object")
    for field in ("prompt", "text"):
        if field in value:
            if not isinstance(value[field], str):
                raise CalibrationError(
                    f"{where}: {field}: found {type(value[field]).__name__}, expected a string"
                )
            return value[field]
    messages = value.get("messages")
    if messages is None:
        raise CalibrationError(
            f"{where}: found the fields {', '.join(value) or '(none)'}; expected prompt, text or "
            "messages"
        )
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        raise CalibrationError(
            f"{where}: messages: expected a list of objects with role and content"
        )
    return messages
