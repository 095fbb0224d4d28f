"""The adapter table, `adapters.safetensors`: its arrays, and the texts packed into two of them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vllm_jd.store.errors import StoreError
from vllm_jd.store.manifest import Manifest

_TABLE_DTYPES = {
    "names": torch.uint8,
    "name_offsets": torch.int64,
    "cluster": torch.int32,
    "rank": torch.int32,
    "norm": torch.float32,
    "error": torch.float32,
    "source_sha256": torch.uint8,
    "source_bytes": torch.int64,
}
_OPTIONAL = {
    "exact_error": torch.float32,
    "sources": torch.uint8,
    "source_offsets": torch.int64,
}


def read_table(file: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The arrays of the adapter table in a file, by their names there; memory-mapped.

    Raises:
        StoreError: one is missing, or of another type or shape than the manifest says.
    """
    n, m = manifest.adapters, len(manifest.modules)
    per_module = ("rank", "norm", "error", "exact_error")
    shapes = dict.fromkeys(per_module, (n, m)) | {"cluster": (n, m, manifest.rows)}
    shapes |= {"name_offsets": (n + 1,), "source_sha256": (n, 32), "source_bytes": (n,)}
    shapes["source_offsets"] = (n + 1,)
    try:
        with safe_open(file, framework="pt") as tensors:
            optional = _OPTIONAL.keys() & tensors.keys()
            table = {key: tensors.get_tensor(key) for key in _TABLE_DTYPES.keys() | optional}
    except SafetensorError as error:
        raise StoreError(f"{file}: not a readable adapter table: {error}") from None
    for key in table:
        dtype = (_TABLE_DTYPES | _OPTIONAL)[key]
        shape = tuple(table[key].shape)
        if table[key].dtype != dtype or shape != shapes.get(key, shape):
            raise StoreError(
                f"{file}: {key}: found {table[key].dtype} {list(shape)}, "
                f"expected {dtype} {list(shapes.get(key, shape))}"
            )
    return table


def read_names(file: Path, table: dict[str, torch.Tensor]) -> list[str]:
    """The adapters' names.

    Raises:
        StoreError: they are damaged, or one is there twice.
    """
    names = _texts(file, table["names"], table["name_offsets"], "name")
    if len(set(names)) != len(names):
        raise StoreError(f"{file}: found a repeated name, expected each once")
    return names


def read_sources(file: Path, table: dict[str, torch.Tensor]) -> list[str | None]:
    """Where each adapter was fetched from; None, an empty text in the file: not known.

    Raises:
        StoreError: they are damaged.
    """
    pair = [table.get(key) for key in ("sources", "source_offsets")]
    if pair[0] is None and pair[1] is None:
        return [None] * len(table["rank"])
    if pair[0] is None or pair[1] is None:
        raise StoreError(
            f"{file}: found one of sources and source_offsets, expected both or none; "
            "the store is damaged, compress again"
        )
    return [text or None for text in _texts(file, *pair, "source")]


def packed(texts: Sequence[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """(UTF-8 bytes of all, int64 `[n + 1]` where each begins and ends); None is an empty text."""
    encoded = [(text or "").encode() for text in texts]
    lengths = torch.tensor([0, *map(len, encoded)], dtype=torch.int64)
    data = np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8)
    return torch.from_numpy(data), lengths.cumsum(0)


def _texts(file: Path, data: torch.Tensor, offsets: torch.Tensor, what: str) -> list[str]:
    text = data.numpy().tobytes()
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(text) or any(a > b for a, b in pairwise(bounds)):
        raise StoreError(
            f"{file}: {what}_offsets: found offsets that leave the {what}s' {len(text)} bytes, "
            f"expected ascending ones from 0 to {len(text)}"
        )
    try:
        return [text[a:b].decode() for a, b in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise StoreError(f"{file}: a {what} is not UTF-8: {error}") from None
