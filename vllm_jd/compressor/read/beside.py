"""Chat templates and tokens that adapters bring along, which a server of them does not use."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_jd.compressor.errors import few
from vllm_jd.compressor.read.weights import Adapter

_INSTEAD = (
    "the server renders every chat with the base model's, or with that of `vllm-jd serve "
    "--chat-template FILE`; a request may bring its own in chat_template, if the server was "
    "started with --trust-request-chat-template"
)
_HEAD = 1 << 20  # characters
_TOKENS = (
    "the server splits text with the base model's tokenizer, which takes these tokens apart, as "
    "vLLM's own LoRA does"
)


def words_beside(adapters: Iterable[Adapter], base_folder: Path | None) -> list[str]:
    """Sentences about chat templates and added tokens that are not the base model's.

    Without the base model's folder nothing can be compared: then one sentence says how many bring
    a template along.
    """
    templates: list[str] = []
    tokens: dict[str, list[str]] = {}
    base = None if base_folder is None else _template(base_folder)
    known = set() if base_folder is None else _tokens(base_folder) | _vocabulary(base_folder)
    for adapter in adapters:
        template = _template(adapter.folder)
        if template and template != base:
            templates.append(adapter.name)
        if base_folder is not None:
            for token in _tokens(adapter.folder) - known:
                tokens.setdefault(token, []).append(adapter.name)
    found = []
    if templates and base_folder is not None:
        found.append(f"{few(templates)}: a chat template of its own; {_INSTEAD}")
    elif templates:
        found.append(
            f"{few(templates)}: a chat template beside it, not compared with the base model's, "
            f"whose folder is not known (--base-model FOLDER); {_INSTEAD}"
        )
    if tokens:
        owners = sorted({name for names in tokens.values() for name in names})
        found.append(
            f"{few(owners)}: tokens that the base model's tokenizer has not "
            f"({few(sorted(map(repr, tokens)))}); {_TOKENS}"
        )
    return found


def _template(folder: Path) -> str | None:
    """A folder's chat template, however it is saved."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        pass
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / file).get("chat_template")
        if template:
            return template.strip() if isinstance(template, str) else json.dumps(template)
    return None


def _tokens(folder: Path) -> set[str]:
    """The tokens that were added to a folder's tokenizer."""
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    entries = [*decoder.values()] if isinstance(decoder, dict) else []
    entries += _added(folder / "tokenizer.json")
    contents = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    return {*_json(folder / "added_tokens.json"), *(c for c in contents if isinstance(c, str))}


def _added(file: Path) -> list[Any]:
    """`added_tokens` of a tokenizer.json, which stand at its beginning: the rest may be large."""
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            head = text.read(_HEAD)
        return json.JSONDecoder().raw_decode(head, head.index("[", head.index('"added_tokens"')))[0]
    except (OSError, ValueError, RecursionError):
        return []


def _vocabulary(folder: Path) -> set[str]:
    """The tokens that a folder's tokenizer has of its own."""
    model = _json(folder / "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of a unigram model: with scores
        vocabulary = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
    return {token for token in vocabulary or () if isinstance(token, str)}


def _json(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
