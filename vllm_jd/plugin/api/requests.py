"""How an adapter is named in vLLM's LoRARequest, so that its path says whose numbers are meant."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_jd.compressor.read.folder import WEIGHTS_FILES
from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.store import Store
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.files import sha256_files

_STORE = "vllm-jd:"
_UPLOAD = re.compile(r"vllm-jd-upload:([0-9a-f]{64}):(.*)", re.DOTALL)
_WEIGHTS = (*WEIGHTS_FILES, "adapter_model.bin", "adapter_model.pt")


def store_path(store: Path | str, generation: int) -> str:
    """The `lora_path` of every adapter in a generation of a store, however its path is spelled."""
    return f"{_STORE}{Path(store).resolve()}@{generation}"


def parse_store_path(path: str) -> tuple[Path, int] | None:
    """(the store's folder, its generation) of a `lora_path`, or None: it names no store.

    However the folder is spelled, the same one is the same.

    Raises:
        ValueError: it names one, but no generation of it.
    """
    if not path.startswith(_STORE):
        return None
    folder, _, generation = path.removeprefix(_STORE).rpartition("@")
    if not folder or not generation.isdecimal():
        raise ValueError(
            f"found the adapter path {path!r}, expected {_STORE}FOLDER@GENERATION of a store"
        )
    return Path(folder).resolve(), int(generation)


def generation_of(request: LoRARequest) -> int | None:
    """The generation of the store that a request asks for; None: it asks for another adapter."""
    if not is_store_request(request):
        return None
    number = request.lora_path.rpartition("@")[2]
    return int(number) if number.isdecimal() else None


def is_store_request(request: LoRARequest) -> bool:
    """Whether the request asks for a compressed adapter (rather than a PEFT folder)."""
    return request.lora_path.startswith(_STORE)


def upload_path(digest: str, path: str) -> str:
    """The `lora_path` of an uploaded folder with the digest of its files."""
    return f"vllm-jd-upload:{digest}:{path}"


def upload_request(name: str, digest: str, folder: str, number: int) -> LoRARequest:
    """The LoRARequest for an uncompressed adapter.

    Args:
        name: of it.
        digest: of its files (`upload_digest`).
        folder: where they are.
        number: vLLM's id, which no other adapter of the engine has.
    """
    return LoRARequest(name, number, upload_path(digest, folder))


def split_upload_path(path: str) -> tuple[str | None, str]:
    """(digest, folder) of the `lora_path` of an upload; None: the path alone was given."""
    match = _UPLOAD.fullmatch(path)
    return (match[1], match[2]) if match else (None, path)


def upload_digest(folder: Path) -> str:
    """sha256 of what an adapter's folder says: its configuration and its weights. A store that it
    is compressed into has it as `source_sha256`.

    Raises:
        OSError: they cannot be read.
    """
    weights = [folder / name for name in _WEIGHTS if (folder / name).exists()]
    if not weights:
        raise FileNotFoundError(f"found none of {', '.join(_WEIGHTS)} in {folder}")
    # Which of several is read depends on the configuration.
    return sha256_files(folder / "adapter_config.json", *weights)


def adapter_request(
    store: Store, adapter: str | Mapping[str | Path, float], **how: Any
) -> LoRARequest:
    """The LoRARequest for a compressed adapter, or for a blend, for
    `vllm.LLM.generate(…, lora_request=…)`.

    Args:
        store: the open store.
        adapter: the name of one of its adapters; or of each part of a blend its weight: a part is
            an adapter of the store by its name, or the folder (a `Path`) of an uncompressed one.
        how: `way`, `density`, `sign` and `seed` of a blend, see `vllm_jd.store.blend.Blend`.

    Raises:
        KeyError: the store has no adapter of that name.
        BlendError: the blend cannot be.
        OSError: a folder cannot be read.
    """
    here = store_path(store.path, store.generation)
    if isinstance(adapter, str):
        return LoRARequest(adapter, store.index(adapter) + 1, here)
    paths, weights = {}, {}
    for part, weight in adapter.items():
        if isinstance(part, Path):
            paths[str(part)] = upload_path(upload_digest(part), str(part.absolute()))
        else:
            store.index(part)
            paths[part] = here
        weights[str(part)] = weight
    blend = of_mapping(weights, **how)
    return blend_request(" ".join(f"{w:g}*{part}" for part, w in weights.items()), blend, paths)
