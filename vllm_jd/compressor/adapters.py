"""Read PEFT LoRA adapters: check all of them, then give out their factors module by module.

Only headers and positions are kept in memory; the numbers stay in the files.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import ValidationError

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.factors import ModuleFactors
from vllm_jd.compressor.peft_config import PeftConfig, describe
from vllm_jd.store import short_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000


class Collection(Protocol):
    """What the compressor needs of its input: adapters in a fixed order, factors on demand."""

    names: list[str]
    shapes: dict[str, tuple[int, int]]
    """Module → (d_in, d_out), in the order of the model."""
    base_model: str
    source_sha256: list[str]
    source_bytes: list[int]
    factor_bytes: int
    """Size of all factors as float32: what holding every module at once would take."""

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module, in the order of `names`."""
        ...


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies in a safetensors file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class _Adapter:
    name: str
    folder: Path
    config: PeftConfig
    tensors: dict[str, dict[str, _Tensor]] = field(default_factory=dict)
    sha256: str = ""
    bytes: int = 0


class PeftCollection:
    """PEFT adapters on disk, in the order of their names. A `Collection`."""

    def __init__(self, adapters: list[_Adapter], base_model: str):
        self._adapters = adapters
        self.base_model = base_model
        self.names = [adapter.name for adapter in adapters]
        self.source_sha256 = [adapter.sha256 for adapter in adapters]
        self.source_bytes = [adapter.bytes for adapter in adapters]
        shapes = {}
        elements = 0
        for adapter in adapters:
            for module, pair in adapter.tensors.items():
                (rank, d_in), d_out = pair["A"].shape, pair["B"].shape[0]
                shapes[module] = (d_in, d_out)
                elements += rank * (d_in + d_out)
        self.shapes = {module: shapes[module] for module in sorted(shapes, key=_natural)}
        self.factor_bytes = 4 * elements

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module: float32, PEFT's scale folded into B.

        Raises:
            AdapterError: a file changed since it was checked.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for adapter in self._adapters:
            pair = adapter.tensors.get(module)
            if pair is None:
                pairs.append(None)
                continue
            a, b = (_read(adapter.folder / WEIGHTS_FILE, pair[side]) for side in "AB")
            pairs.append((a, b * adapter.config.scale_of(module)))
        return ModuleFactors.stack(pairs, *self.shapes[module])


def find_adapters(paths: Iterable[Path]) -> list[Path]:
    """The adapter folders among `paths` and directly or deeper inside of them.

    Raises:
        AdapterError: a path does not exist, or holds no adapter.
    """
    folders: dict[Path, Path] = {}  # where it really is → as the user named it
    faults = []
    for path in paths:
        if not path.is_dir():
            what = "not a folder" if path.exists() else "no such folder"
            faults.append(f"{path}: {what}; expected an adapter folder, or a folder of them")
            continue
        # A weights file alone is a damaged adapter, to be named rather than passed over.
        marks = (CONFIG_FILE, WEIGHTS_FILE, *_PICKLED)
        found = {file.parent.absolute() for mark in marks for file in path.rglob(mark)}
        if not found:
            faults.append(f"{path}: found no {CONFIG_FILE} in it or below")
        for folder in sorted(found):
            folders.setdefault(folder.resolve(), folder)
    if faults:
        raise AdapterError(faults)
    return list(folders.values())


def read_adapters(
    paths: Iterable[Path],
    *,
    base_model: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PeftCollection:
    """Check every adapter below `paths` (headers, shapes, every number) and open the collection.

    Args:
        paths: adapter folders and folders of them; the order does not matter.
        base_model: name that the adapters must carry; default: that of most of them.
        on_progress: called with (adapters checked, adapters).

    Raises:
        AdapterError: listing all faults of all adapters.
    """
    folders = find_adapters(paths)
    faults: list[str] = []
    adapters = []
    for i, folder in enumerate(folders):
        adapter, found = _check_adapter(folder)
        faults += [f"{folder}: {fault}" for fault in found]
        if adapter is not None:
            adapters.append(adapter)
        on_progress(i + 1, len(folders))
    faults += _check_together(adapters, base_model)
    if faults:
        raise AdapterError(faults)
    adapters.sort(key=lambda adapter: adapter.name)
    name = base_model or adapters[0].config.base_model_name_or_path or "unknown"
    return PeftCollection(adapters, name)


def _check_adapter(folder: Path) -> tuple[_Adapter | None, list[str]]:
    file = folder / CONFIG_FILE
    try:
        raw = file.read_bytes()
        config = PeftConfig.model_validate(json.loads(raw))
    except ValidationError as error:
        return None, describe(error)
    except FileNotFoundError:
        return None, [f"{CONFIG_FILE} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{CONFIG_FILE} cannot be read as JSON: {error}"]
    faults = config.faults()
    named = folder.name not in ("", "..")
    adapter = _Adapter(folder.name if named else folder.resolve().name, folder, config)
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in adapter.name):
        faults.append(f"the name {adapter.name!r} has control or undecodable characters")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = [name for name in _PICKLED if (folder / name).exists()]
        if pickled:
            faults.append(
                f"found only {pickled[0]}, a pickle, which is never loaded; expected "
                f"{WEIGHTS_FILE}: save it again with PEFT's save_pretrained(…, "
                "safe_serialization=True)"
            )
        else:
            faults.append(f"{WEIGHTS_FILE} is missing")
        return adapter, faults
    try:
        faults += _index_weights(adapter, hashlib.sha256(raw))
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{WEIGHTS_FILE} cannot be read: {error}")
    return adapter, faults


def _index_weights(adapter: _Adapter, digest: "hashlib._Hash") -> list[str]:
    """Fill in the adapter's tensors, hash and size; return what is wrong with its weights."""
    data = bytearray((adapter.folder / WEIGHTS_FILE).stat().st_size)
    with (adapter.folder / WEIGHTS_FILE).open("rb") as file:
        file.readinto(data)
    digest.update(data)
    adapter.sha256, adapter.bytes = digest.hexdigest(), len(data)
    faults = []
    for key, tensor in _parse_header(data).items():
        match = _KEY.fullmatch(key)
        if not match:
            faults.append(f"{WEIGHTS_FILE}: tensor {key!r} is no LoRA factor of a linear layer")
            continue
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            faults.append(f"{key}: found shape {list(tensor.shape)}, expected a matrix")
            continue
        values = torch.frombuffer(
            data, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=tensor.offset
        )
        bad = int((~torch.isfinite(values.float())).sum())
        if bad:
            faults.append(f"{key}: found NaN or infinity in {bad:,} of {values.numel():,} numbers")
        adapter.tensors.setdefault(match["module"], {})[match["side"]] = tensor
    if not adapter.tensors and not faults:
        faults.append(f"{WEIGHTS_FILE} holds no LoRA factors")
    for module, pair in list(adapter.tensors.items()):
        missing = {"A", "B"} - pair.keys()
        if missing:
            faults.append(f"{module}: lora_{missing.pop()} is missing")
        elif pair["A"].shape[0] != pair["B"].shape[1]:
            faults.append(
                f"{module}: lora_A is {list(pair['A'].shape)} and lora_B "
                f"{list(pair['B'].shape)}; expected [r, d_in] and [d_out, r] of one rank"
            )
        elif pair["A"].shape[0] != adapter.config.rank_of(module):
            faults.append(
                f"{module}: found rank {pair['A'].shape[0]}, {CONFIG_FILE} says "
                f"{adapter.config.rank_of(module)}"
            )
        else:
            continue
        del adapter.tensors[module]
    return faults


def _parse_header(data: bytearray) -> dict[str, _Tensor]:
    """The tensors of a safetensors file: bounds, sizes and dtypes checked.

    Raises:
        ValueError: truncated or malformed.
    """
    if len(data) < 8:
        raise ValueError(f"found {len(data)} bytes, expected a safetensors header; truncated?")
    (size,) = struct.unpack("<Q", data[:8])
    if size > _MAX_HEADER or 8 + size > len(data):
        raise ValueError(
            f"the header says {size:,} bytes, the file has {len(data) - 8:,} after it; truncated?"
        )
    header = json.loads(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    tensors = {}
    end = 0
    for key, info in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = info["dtype"], info["shape"], info["data_offsets"]
            shape = tuple(int(size) for size in shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{key}: malformed header entry {info!r}") from None
        if dtype not in _DTYPES:
            raise ValueError(f"{key}: found dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if first < 0 or min(shape, default=0) < 0 or last - first != expected:
            raise ValueError(f"{key}: {last - first} bytes for {dtype} {list(shape)}")
        end = max(end, last)
        tensors[key] = _Tensor(8 + size + first, _DTYPES[dtype], shape)
    if 8 + size + end > len(data):
        raise ValueError(
            f"found {len(data):,} bytes, the header describes {8 + size + end:,}; truncated?"
        )
    return tensors


def _check_together(adapters: list[_Adapter], base_model: str | None) -> list[str]:
    """Faults that only show when adapters are compared with each other."""
    faults = []
    by_name: dict[str, list[_Adapter]] = {}
    for adapter in adapters:
        by_name.setdefault(adapter.name, []).append(adapter)
    for name, same in by_name.items():
        if len(same) > 1:
            where = ", ".join(str(adapter.folder) for adapter in same)
            faults.append(f"the name {name!r} is used by {len(same)} adapters: {where}; rename")
    bases = Counter(
        short_name(adapter.config.base_model_name_or_path)
        for adapter in adapters
        if adapter.config.base_model_name_or_path
    )
    if bases:
        expected = short_name(base_model) if base_model else bases.most_common(1)[0][0]
        for adapter in adapters:
            found = adapter.config.base_model_name_or_path
            if found and short_name(found).lower() != expected.lower():
                faults.append(
                    f"{adapter.folder}: trained on base model {found!r}, expected {expected!r}"
                    + (" (of --base-model)" if base_model else " (as most of the others)")
                )
    shapes: dict[str, Counter[tuple[int, int]]] = {}
    for adapter in adapters:
        for module, pair in adapter.tensors.items():
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            shapes.setdefault(module, Counter())[shape] += 1
    for adapter in adapters:
        for module, pair in adapter.tensors.items():
            shape = (pair["B"].shape[0], pair["A"].shape[1])
            usual = shapes[module].most_common(1)[0][0]
            if shape != usual:
                faults.append(
                    f"{adapter.folder}: {module}: adapts a layer of {list(shape)} "
                    f"(d_out, d_in), {list(usual)} in most of the others"
                )
    return faults


def _read(file: Path, tensor: _Tensor) -> torch.Tensor:
    """One tensor's numbers as float32."""
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    try:
        with file.open("rb") as handle:
            handle.seek(tensor.offset)
            data = bytearray(handle.read(size))
    except OSError as error:
        raise AdapterError([f"{file}: cannot be read any more: {error}"]) from None
    if len(data) != size:
        raise AdapterError([f"{file}: became shorter while it was being compressed"])
    return torch.frombuffer(data, dtype=tensor.dtype).float().view(tensor.shape)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
