"""Read PEFT LoRA adapters: check all of them, then give out their factors module by module.

Only headers and positions are kept in memory; the numbers stay in the files.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
    modified_ns: int = 0


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
        scales = []
        for adapter in self._adapters:
            pair = adapter.tensors.get(module)
            scales.append(adapter.config.scale_of(module))
            if pair is None:
                pairs.append(None)
                continue
            a, b = (_read(adapter, pair[side]) for side in "AB")
            pairs.append((a, b * scales[-1]))
        return ModuleFactors.stack(pairs, *self.shapes[module], scales)


def find_adapters(paths: Iterable[Path]) -> list[Path]:
    """The adapter folders among `paths` and directly or deeper inside of them.

    Raises:
        AdapterError: a path does not exist, or holds no adapter.
    """
    folders: dict[Path, list[Path]] = {}  # where it really is → as it was found
    faults = []
    for path in paths:
        if not path.is_dir():
            what = "not a folder" if path.exists() else "no such folder"
            faults.append(f"{path}: {what}; expected an adapter folder, or a folder of them")
            continue
        found = _adapter_folders(path.absolute())
        if not found:
            faults.append(f"{path}: found no {CONFIG_FILE} in it or below")
        for real, folder in found.items():
            folders.setdefault(real, []).append(folder)
    if faults:
        raise AdapterError(faults)
    # One adapter found by two names keeps its own, whatever the order of the paths.
    return [
        min(same, key=lambda folder: (folder.name != real.name, folder.name))
        for real, same in folders.items()
    ]


def _adapter_folders(path: Path) -> dict[Path, Path]:
    """The adapter folders in `path` or below, links followed: where it really is → as found."""
    # A weights file alone is a damaged adapter, to be named rather than passed over.
    marks = {CONFIG_FILE, WEIGHTS_FILE, *_PICKLED}
    seen = set()
    found = {}
    for folder, below, files in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        if not marks.isdisjoint(files) or not marks.isdisjoint(below):
            found[real] = Path(folder)
            below.clear()  # a trainer's checkpoints of this adapter, not more adapters
    return found


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
    adapters.sort(key=lambda adapter: adapter.name)
    faults += _check_together(adapters, base_model)
    if faults:
        raise AdapterError(faults)
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    return PeftCollection(adapters, base_model or next(filter(None, named), "unknown"))


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
    with (adapter.folder / WEIGHTS_FILE).open("rb") as file:
        adapter.modified_ns = os.fstat(file.fileno()).st_mtime_ns
        data = bytearray(file.read())
    digest.update(data)
    adapter.sha256, adapter.bytes = digest.hexdigest(), len(data)
    faults = []
    sides: dict[str, set[str]] = {}
    for key, tensor in _parse_header(data).items():
        match = _KEY.fullmatch(key)
        if not match:
            faults.append(f"{WEIGHTS_FILE}: tensor {key!r} is no LoRA factor of a linear layer")
            continue
        sides.setdefault(match["module"], set()).add(match["side"])
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            faults.append(f"{key}: found shape {list(tensor.shape)}, expected a matrix")
            continue
        values = torch.frombuffer(
            data, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=tensor.offset
        )
        values = values.float()
        bad = int((~values.isfinite()).sum())
        if bad:
            faults.append(f"{key}: found NaN or infinity in {bad:,} of {values.numel():,} numbers")
        scale = adapter.config.scale_of(match["module"])
        if match["side"] == "B" and not bad and not bool((values * scale).isfinite().all()):
            faults.append(f"{key}: too large once scaled by α/r = {scale:g} (of {CONFIG_FILE})")
        adapter.tensors.setdefault(match["module"], {})[match["side"]] = tensor
    if not adapter.tensors and not faults:
        faults.append(f"{WEIGHTS_FILE} holds no LoRA factors")
    for module, pair in list(adapter.tensors.items()):
        missing = {"A", "B"} - sides[module]
        if missing:
            faults.append(f"{module}: lora_{missing.pop()} is missing")
        elif len(pair) < 2:
            pass  # the other one's shape was refused above
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
    spans = []
    for key, info in header.items():
        if key == "__metadata__":
            continue
        key.encode()  # half of a surrogate pair is a ValueError
        entry = info if isinstance(info, dict) else {}
        dtype, shape, span = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(span)):
            raise ValueError(f"{key}: malformed header entry {str(info)[:200]}")
        if dtype not in _DTYPES:
            raise ValueError(f"{key}: found dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if len(span) != 2 or span[1] - span[0] != expected:
            raise ValueError(
                f"{key}: found data_offsets {span}, expected {expected:,} bytes for {dtype} {shape}"
            )
        spans.append(span)
        tensors[key] = _Tensor(8 + size + span[0], _DTYPES[dtype], tuple(shape))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"the header leaves a gap or an overlap at byte {first:,} of the data")
        end = last
    if 8 + size + end != len(data):
        raise ValueError(
            f"found {len(data):,} bytes, the header describes {8 + size + end:,}; truncated?"
        )
    return tensors


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


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


def _read(adapter: _Adapter, tensor: _Tensor) -> torch.Tensor:
    """One tensor's numbers as float32."""
    file = adapter.folder / WEIGHTS_FILE
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    try:
        with file.open("rb") as handle:
            found = os.fstat(handle.fileno())
            handle.seek(tensor.offset)
            data = bytearray(handle.read(size))
    except OSError as error:
        raise AdapterError([f"{file}: cannot be read any more: {error}"]) from None
    if (found.st_size, found.st_mtime_ns) != (adapter.bytes, adapter.modified_ns):
        raise AdapterError([f"{file}: changed while it was being compressed"])
    return torch.frombuffer(data, dtype=tensor.dtype).float().view(tensor.shape)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
