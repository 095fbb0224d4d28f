"""Turn adapters of a store back into PEFT adapters."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_jd.compressor.change.export_experts import ExpertTensors, take_experts
from vllm_jd.compressor.errors import few
from vllm_jd.compressor.read.peft_config import CONFIG_FILE, WEIGHTS_FILE
from vllm_jd.store import Store
from vllm_jd.store.files import sha256_file
from vllm_jd.store.reader import MANIFEST

_LONGEST = 255  # bytes of a file's name, on all common file systems
_UNSAFE = re.compile(r"[%/\\\x00-\x1f\x7f]|^\.")
_PARTIAL = ".partial-"
ORIGIN_FILE = "export.json"
"""Beside an exported adapter: of which adapter and generation it was made. Written last."""


def export_adapter(store: Store, name: str, out: Path) -> Path:
    """Write a PEFT LoRA adapter whose deltas equal those of `name` in the store.

    Its factors are A = Vᵀ and B = U·Σ, in float32, with alpha = r (scale 1). A VeRA adapter becomes
    a LoRA adapter of its rank, in which λ_b and λ_d are multiplied out. Experts are written in the
    form in which they came, layers of their own or PEFT's stacks, all of one rank. `export.json`
    beside them has the adapter's name and the sha256 of the generation's manifest.

    Args:
        store: the open store.
        name: the adapter.
        out: the folder to write; made if it is not there.

    Returns:
        `out`.

    Raises:
        KeyError: the store has no such adapter.
        FileExistsError: `out` holds something already.
    """
    store.index(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: already there and not an empty folder; choose another --out")
    _write(store, name, out, _digest(store))
    return out


@dataclass(frozen=True)
class Exported:
    """One adapter that is there now."""

    name: str
    folder: Path
    written: bool
    """False: an earlier export of the same generation had written it."""


def export_adapters(
    store: Store,
    names: Iterable[str],
    out: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Exported]:
    """Write each of `names` as `export_adapter` does, into the folder `folder_name(name)` of `out`.

    A folder appears in one rename, so that one that is there is complete: where an earlier export
    of the same generation left it, it is kept and not written again. Whatever a killed export
    left half-written (`.partial-…`) is deleted: one export at a time may write to `out`. One
    adapter is in memory at a time.

    Args:
        store: the open store.
        names: adapters; one that is named twice is written once.
        out: the folder of the folders; made if it is not there.
        on_progress: called with (adapters done, adapters).

    Raises:
        KeyError: the store has no such adapter. Nothing was written.
        FileExistsError: something else lies where an adapter would go. Nothing was written.
        OSError: a file cannot be written. Adapters written before stay.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        store.index(name)
    targets = {name: out / folder_name(name) for name in names}
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: already there and not a folder; choose another --out")
    there = {name for name, folder in targets.items() if os.path.lexists(folder)}
    digest = _digest(store)
    others = [
        folder
        for name, folder in targets.items()
        if name in there and not _is_export(folder, _origin(digest, name))
    ]
    if others:
        raise FileExistsError(
            f"{few(others)}: already there, and not exported from "
            f"generation {store.generation} of {store.path}; nothing was written. Remove what is "
            "there or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
    for done, name in enumerate(names):
        on_progress(done, len(names))
        if name not in there:
            _write_whole(store, name, targets[name], digest)
    on_progress(len(names), len(names))
    return [Exported(name, targets[name], name not in there) for name in names]


def write_lora(
    out: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    base_model: str,
    embeddings: Container[str] = (),
    experts: ExpertTensors | None = None,
) -> None:
    """Write a PEFT LoRA adapter of scale 1.

    Args:
        out: its folder, made if it is not there.
        factors: module → (B `[d_out, r]`, A `[r, d_in]`).
        base_model: what the config calls it.
        embeddings: modules that are tables of embeddings.
        experts: what there is of experts beside.

    Raises:
        OSError: it cannot be written.
    """
    experts = experts or ExpertTensors()
    ranks = {module: b.shape[1] for module, (b, _) in factors.items()}
    # Of experts PEFT looks at no pattern: theirs is the rank of the config.
    rank = experts.rank or max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: r for module, r in ranks.items() if r != rank},
        "target_modules": sorted([*ranks, *experts.layers]),
        "target_parameters": sorted(experts.parameters) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for module, (b, a) in factors.items():
        key = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        tensors[f"base_model.model.{module}.{key.format('A')}"] = a.contiguous()
        tensors[f"base_model.model.{module}.{key.format('B')}"] = b.contiguous()
    tensors |= {f"base_model.model.{key}": tensor for key, tensor in experts.tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write(store: Store, name: str, out: Path, digest: str) -> None:
    factors = store.factors(name)
    experts = take_experts(store, factors)
    base_model = store.manifest.base_model.name
    write_lora(out, factors, base_model, embeddings_of(store), experts)
    (out / ORIGIN_FILE).write_text(_origin(digest, name), encoding="utf-8")


def embeddings_of(store: Store) -> set[str]:
    """The modules that are tables of embeddings."""
    return {info.name for info in store.manifest.modules if info.embedding}


def _write_whole(store: Store, name: str, folder: Path, digest: str) -> None:
    """Write an adapter so that `folder` is there once it is complete."""
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
    try:
        _write(store, name, partial / "adapter", digest)
        (partial / "adapter").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_name(name: str) -> str:
    """The name of the folder that the adapter `name` is exported to: no two names have the same.

    Names that can be a folder's are themselves. Slashes, backslashes, percent signs, control
    characters and a leading dot are written as in URLs, `%2F` for a slash; what is longer than
    255 bytes then is cut and ends in `%-` and 32 digits of its sha256.
    """
    safe = _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", name) or "%"
    encoded = safe.encode()
    if len(encoded) <= _LONGEST:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{encoded[: _LONGEST - 34].decode(errors='ignore')}%-{digest}"


def _digest(store: Store) -> str:
    """Of a generation: its manifest has the sha256 of every file."""
    return sha256_file(store.folder / MANIFEST)


def _origin(digest: str, name: str) -> str:
    origin = {"adapter": name, "manifest_sha256": digest}
    return json.dumps(origin, indent=2, ensure_ascii=False) + "\n"


def _is_export(folder: Path, origin: str) -> bool:
    """Whether a complete adapter of this origin lies in `folder`."""
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt"):  # as long as its header says
            pass
        found = (folder / ORIGIN_FILE).read_text(encoding="utf-8")
        return found == origin and (folder / CONFIG_FILE).is_file()
    except (OSError, ValueError, SafetensorError):
        return False
