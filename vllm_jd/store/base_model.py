"""The fingerprint of a base model: which model a store belongs to, and whether this is it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vllm_jd.store.errors import StoreError
from vllm_jd.store.manifest import BaseModelInfo

# What decides whether an adapter's numbers mean anything for a model. Fields that differ between
# two saves of one model (dtype, library versions, use_cache) are left out.
_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rope_theta",
    "tie_word_embeddings",
)


def fingerprint(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (sha256 hex, the fields that went into it) of a Hugging Face `config.json`."""
    fields = {key: config[key] for key in _FIELDS if config.get(key) is not None}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return digest, fields


# Last parts of paths that say nothing of which model it is: Kaggle's versions, checkpoints.
_NUMBERED = re.compile(r"(checkpoint-)?\d+")


def short_name(name: str) -> str:
    """The last part of a model's name or path.

    `org/model`, `/models/model`, `.` inside of that folder, and the folders of a Hugging Face
    cache (`models--org--model/snapshots/<revision>`) all give `model`, and so do Windows' paths.
    Where the last part is a mere number (`/kaggle/input/gemma/pytorch/2b/1`, `run/checkpoint-500`),
    it is the whole path.
    """
    if "\\" in name:
        name = name.replace("\\", "/")
    if name.rstrip("/").rsplit("/", 1)[-1] in (".", ".."):
        name = str(Path(name).resolve())
    cached = re.search(r"models--(?:[^/]+--)?([^/]+?)/snapshots/[^/]+/?$", name)
    if cached:
        return cached.group(1)
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return name.rstrip("/") if _NUMBERED.fullmatch(last) else last


def read_base_model(path: Path, name: str | None = None) -> BaseModelInfo:
    """Describe the model in folder `path` (it must hold a `config.json`).

    Raises:
        StoreError: no readable `config.json` there.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{path}: found no config.json; expected the folder of a Hugging Face model"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise StoreError(f"{file}: found {type(config).__name__}, expected a JSON object")
    digest, fields = fingerprint(config)
    return BaseModelInfo(name=name or short_name(str(path)), fingerprint=digest, config=fields)


def check_base_model(
    stored: BaseModelInfo, served_name: str, served_config: dict[str, Any], alias: str | None = None
) -> None:
    """Refuse a store that belongs to another base model than the one that is served.

    Args:
        stored: the store's manifest entry.
        served_name: name or path of the served model.
        served_config: its `config.json` as a dict.
        alias: a name under which the user says that the served model is known.

    Raises:
        StoreError: a field of the config differs, or the name does.
    """
    # Only what both sides state is compared: another version of transformers may leave a default
    # out of config.json, or write it in.
    _, fields = fingerprint(served_config)
    differing = ", ".join(
        f"{key}: store {stored.config[key]!r}, served model {fields[key]!r}"
        for key in sorted(stored.config.keys() & fields.keys())
        if stored.config[key] != fields[key]
    )
    if differing:
        raise StoreError(
            f"the store was made for another base model ({stored.name}): "
            f"its config differs from that of {served_name} ({differing}). "
            "Serve the model that the adapters were trained on."
        )
    names = {short_name(served_name).lower()}
    if alias:
        names.add(short_name(alias).lower())
    if names.isdisjoint(short_name(name).lower() for name in (stored.name, *stored.other_names)):
        raise StoreError(
            f"the store was made for base model {stored.name!r}, but {served_name!r} is served. "
            "Serve that model; if this is the same model under another name, say so with "
            f"--store-base-model {stored.name}"
        )
