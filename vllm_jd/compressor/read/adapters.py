"""Read PEFT adapters, LoRA or VeRA: check all, then give out their factors module by module.

Only headers and positions are kept in memory; the numbers stay in the files.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors, VeraFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read import hub
from vllm_jd.compressor.read.faults import TensorFault, folded
from vllm_jd.compressor.read.peft_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraConfig,
    PeftConfig,
    VeraConfig,
    parse_config,
)
from vllm_jd.store import read_base_model, short_name

_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_VERA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.vera_lambda_(?P<side>[bd])")
_PROJECTIONS = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
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
    """What the compressor needs of its input: adapters in a fixed order, factors on demand.

    It may also have `sources` and `method`, as `PeftCollection` has: see `sources_of`, `method_of`.
    """

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


def sources_of(collection: Collection) -> list[str | None]:
    """Where each adapter came from, None where that is not known."""
    return getattr(collection, "sources", None) or [None] * len(collection.names)


def method_of(collection: Collection) -> str:
    """PEFT's type of the adapters, `LORA` or `VERA`."""
    return getattr(collection, "method", "LORA")


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
    source: str | None = None
    """Of the Hub: `org/name@commit`."""
    tensors: dict[str, dict[str, _Tensor]] = field(default_factory=dict)
    """Module → A and B of LoRA, or d and b of VeRA."""
    projections: dict[str, _Tensor] = field(default_factory=dict)
    """VeRA's A and B."""
    projections_sha256: str = ""
    sha256: str = ""
    bytes: int = 0
    modified_ns: int = 0

    @property
    def label(self) -> str:
        """What faults call it."""
        return f"{self.source} ({self.folder})" if self.source else str(self.folder)

    def shape(self, module: str) -> tuple[int, ...]:
        """(d_out, d_in) of an adapted layer; of VeRA only (d_out,), its files say no more."""
        pair = self.tensors[module]
        if isinstance(self.config, VeraConfig):
            return pair["b"].shape
        return (pair["B"].shape[0], pair["A"].shape[1])


class PeftCollection:
    """PEFT adapters on disk, in the order of their names. A `Collection`.

    All are LoRA adapters, or all are VeRA adapters over the same two projections.

    Args:
        adapters: checked, at least one.
        base_model: the name of their base model.
        shapes: module → (d_in, d_out).
    """

    def __init__(
        self, adapters: list[_Adapter], base_model: str, shapes: dict[str, tuple[int, int]]
    ):
        self._adapters = adapters
        self.base_model = base_model
        self.method = "VERA" if isinstance(adapters[0].config, VeraConfig) else "LORA"
        self.names = [adapter.name for adapter in adapters]
        self.sources = [adapter.source for adapter in adapters]
        self.source_sha256 = [adapter.sha256 for adapter in adapters]
        self.source_bytes = [adapter.bytes for adapter in adapters]
        self.shapes = {module: shapes[module] for module in sorted(shapes, key=_natural)}
        self.factor_bytes = 4 * sum(
            adapter.config.rank_of(module) * sum(shapes[module])
            for adapter in adapters
            for module in adapter.tensors
        )

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module: float32, PEFT's scale folded into B.

        Raises:
            AdapterError: a file changed since it was checked.
        """
        return self._vera(module) if self.method == "VERA" else self._lora(module)

    def _lora(self, module: str) -> ModuleFactors:
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

    def _vera(self, module: str) -> ModuleFactors:
        d_in, d_out = self.shapes[module]
        first = self._adapters[0]
        a, b = (_read(first, first.projections[side]) for side in "AB")
        lambda_d = torch.zeros(len(self.names), a.shape[0])
        lambda_b = torch.zeros(len(self.names), d_out)
        present = torch.zeros(len(self.names), dtype=torch.bool)
        for i, adapter in enumerate(self._adapters):
            pair = adapter.tensors.get(module)
            if pair is not None:
                lambda_d[i], lambda_b[i] = (_read(adapter, pair[side]) for side in "db")
                present[i] = True
        # As PEFT cuts them: every layer takes the first rows and columns that it needs.
        vera = VeraFactors(lambda_d, lambda_b, a[:, :d_in].contiguous(), b[:d_out].contiguous())
        return ModuleFactors.of_vera(vera, present)


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
            fault = f"{path}: {what}; expected an adapter folder, or a folder of them"
            if not path.exists() and hub.has_hub_form(str(path)):
                fault += f" (if it is a repository of the Hub: hf://{path})"
            faults.append(fault)
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
    sources: Iterable[Path | str],
    *,
    base_model: str | None = None,
    base_config: Mapping[str, Any] | None = None,
    on_fetch: Callable[[int, int], None] = lambda done, total: None,
    on_skip: Callable[[str], None] = lambda what: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PeftCollection:
    """Check every adapter of `sources` (headers, shapes, every number) and open the collection.

    Args:
        sources: adapter folders and folders of them; a text may also name repositories or
            collections of the Hugging Face Hub (see `vllm_jd.compressor.read.hub`). The order
            does not matter.
        base_model: name that the adapters must carry; default: that of most of them.
        base_config: `config.json` of the base model, of which VeRA adapters may need the widths;
            default: that of the folder that `base_model` or the adapters name, if it is one.
        on_fetch: called with (repositories fetched, repositories).
        on_skip: called with a sentence for each item of a Hub collection that is no adapter.
        on_progress: called with (adapters checked, adapters).

    Raises:
        AdapterError: listing all faults of all adapters.
        StoreError: the base model's config.json cannot be read.
    """
    texts: list[str] = []
    paths = []
    for source in sources:
        if isinstance(source, str) and hub.is_hub_source(source):
            texts.append(source)
        else:
            paths.append(Path(source))
    if not texts and not paths:
        raise AdapterError(["no adapters were given; expected folders or names of the Hub"])
    folders = find_adapters(paths)
    fetched = hub.fetch(texts, on_progress=on_fetch, on_skip=on_skip) if texts else []
    found = [(folder, _local_name(folder), None) for folder in folders]
    found += [(source.folder, source.name, source.address) for source in fetched]
    faults: list[str] = []
    adapters = []
    for i, (folder, name, source) in enumerate(found):
        adapter, wrong = _check_adapter(folder, name, source)
        faults += [f"{f'{source} ({folder})' if source else folder}: {fault}" for fault in wrong]
        if adapter is not None:
            adapters.append(adapter)
        on_progress(i + 1, len(found))
    adapters.sort(key=lambda adapter: adapter.name)
    faults += _check_together(adapters, base_model)
    if faults:
        raise AdapterError(faults)
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    base_model = base_model or next(filter(None, named), "unknown")
    shapes = _shapes(adapters, base_config or _base_config(base_model))
    return PeftCollection(adapters, base_model, shapes)


def _local_name(folder: Path) -> str:
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _base_config(name: str) -> Mapping[str, Any]:
    folder = Path(name)
    return read_base_model(folder).config if (folder / "config.json").is_file() else {}


def _check_adapter(
    folder: Path, name: str, source: str | None
) -> tuple[_Adapter | None, list[str]]:
    file = folder / CONFIG_FILE
    try:
        raw = file.read_bytes()
        config = parse_config(json.loads(raw))
    except AdapterError as error:
        return None, error.faults
    except FileNotFoundError:
        return None, [f"{CONFIG_FILE} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{CONFIG_FILE} cannot be read as JSON: {error}"]
    faults: list[str | TensorFault] = [*config.faults()]
    adapter = _Adapter(name, folder, config, source)
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
        return adapter, folded(faults)
    try:
        faults += _index_weights(adapter, hashlib.sha256(raw))
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{WEIGHTS_FILE} cannot be read: {error}")
    return adapter, folded(faults)


def _index_weights(adapter: _Adapter, digest: "hashlib._Hash") -> list[str | TensorFault]:
    """Fill in the adapter's tensors, hash and size; return what is wrong with its weights."""
    with (adapter.folder / WEIGHTS_FILE).open("rb") as file:
        adapter.modified_ns = os.fstat(file.fileno()).st_mtime_ns
        data = bytearray(file.read())
    digest.update(data)
    adapter.sha256, adapter.bytes = digest.hexdigest(), len(data)
    header = _parse_header(data)
    if isinstance(adapter.config, VeraConfig):
        return _index_vera(adapter, adapter.config, header, data)
    assert isinstance(adapter.config, LoraConfig)
    return _index_lora(adapter, adapter.config, header, data)


def _index_lora(
    adapter: _Adapter, config: LoraConfig, header: dict[str, _Tensor], data: bytearray
) -> list[str | TensorFault]:
    faults: list[str | TensorFault] = []
    sides: dict[str, set[str]] = {}
    for key, tensor in header.items():
        match = _LORA_KEY.fullmatch(key)
        if not match:
            what = "found a tensor that is no LoRA factor of a linear layer"
            faults.append(TensorFault(key, what, WEIGHTS_FILE))
            continue
        sides.setdefault(match["module"], set()).add(match["side"])
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            what = f"found shape {list(tensor.shape)}, expected a matrix"
            faults.append(TensorFault(key, what))
            continue
        values, bad = _finite_values(key, tensor, data)
        faults += bad
        scale = config.scale_of(match["module"])
        if match["side"] == "B" and not bad and not bool((values * scale).isfinite().all()):
            what = f"too large once scaled by α/r = {scale:g} (of {CONFIG_FILE})"
            faults.append(TensorFault(key, what))
        adapter.tensors.setdefault(match["module"], {})[match["side"]] = tensor
    if not adapter.tensors and not faults:
        faults.append(f"{WEIGHTS_FILE} holds no LoRA factors")
    for module, pair in list(adapter.tensors.items()):
        missing = {"A", "B"} - sides[module]
        if missing:
            faults.append(TensorFault(module, f"lora_{missing.pop()} is missing"))
        elif len(pair) < 2:
            pass  # the other one's shape was refused above
        elif pair["A"].shape[0] != pair["B"].shape[1]:
            what = (
                f"lora_A is {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}; expected "
                "[r, d_in] and [d_out, r] of one rank"
            )
            faults.append(TensorFault(module, what))
        elif pair["A"].shape[0] != config.rank_of(module):
            rank = config.rank_of(module)
            what = f"found rank {pair['A'].shape[0]}, {CONFIG_FILE} says {rank}"
            faults.append(TensorFault(module, what))
        else:
            continue
        del adapter.tensors[module]
    return faults


def _index_vera(
    adapter: _Adapter, config: VeraConfig, header: dict[str, _Tensor], data: bytearray
) -> list[str | TensorFault]:
    missing = [key for key in _PROJECTIONS if key not in header]
    if missing:
        # PEFT draws them again from projection_prng_key, in the size of the widest layers, which
        # only the base model knows, and warns that another machine may draw other numbers.
        return [
            f"{WEIGHTS_FILE} holds no {' and no '.join(missing)}: it was saved with "
            "save_projection=False; load it with PEFT where it was trained, set "
            "save_projection=True in its config, and save it again"
        ]
    faults: list[str | TensorFault] = []
    largest: dict[str, float] = {}  # tensor → its largest magnitude

    def check(key: str, tensor: _Tensor) -> torch.Tensor:
        values, bad = _finite_values(key, tensor, data)
        faults.extend(bad)
        largest[key] = 0.0 if bad else float(values.abs().max())
        return values

    digest = hashlib.sha256()
    for key, side in _PROJECTIONS.items():
        tensor = header.pop(key)
        rank = tensor.shape["AB".index(side)] if len(tensor.shape) == 2 else None
        if rank != config.r or 0 in tensor.shape:
            expected = f"[{config.r}, d_in]" if side == "A" else f"[d_out, {config.r}]"
            what = f"found shape {list(tensor.shape)}, expected {expected}"
            faults.append(TensorFault(key, what))
            continue
        adapter.projections[side] = tensor
        digest.update(repr(tensor.shape).encode() + check(key, tensor).numpy().tobytes())
    if faults:
        return faults
    adapter.projections_sha256 = digest.hexdigest()
    widest = adapter.projections["B"].shape[0]
    found: dict[str, dict[str, _Tensor]] = {}
    for key, tensor in header.items():
        match = _VERA_KEY.fullmatch(key)
        if not match:
            what = "found a tensor that is no VeRA vector of a linear layer"
            faults.append(TensorFault(key, what, WEIGHTS_FILE))
            continue
        found.setdefault(match["module"], {})[match["side"]] = tensor
        length = tensor.shape[0] if len(tensor.shape) == 1 else 0
        if length == config.r if match["side"] == "d" else 0 < length <= widest:
            check(key, tensor)
            continue
        expected = f"[{config.r}]" if match["side"] == "d" else f"[d_out] of at most {widest}"
        what = f"found shape {list(tensor.shape)}, expected {expected}"
        faults.append(TensorFault(key, what))
    if not found and not faults:
        faults.append(f"{WEIGHTS_FILE} holds no VeRA vectors")
    for module, pair in found.items():
        for side in sorted({"b", "d"} - pair.keys()):
            faults.append(TensorFault(module, f"vera_lambda_{side} is missing"))
        keys = [f"base_model.model.{module}.vera_lambda_{side}" for side in "bd"]
        if not largest.keys() >= set(keys):
            continue
        # What becomes one side's factor must be a float32 number too.
        size = largest["base_model.vera_B"] * largest[keys[0]] * largest[keys[1]]
        if size > torch.finfo(torch.float32).max:
            what = "vera_lambda_b · vera_B · vera_lambda_d is too large"
            faults.append(TensorFault(module, what))
            continue
        adapter.tensors[module] = pair
    return faults


def _finite_values(
    key: str, tensor: _Tensor, data: bytearray
) -> tuple[torch.Tensor, list[TensorFault]]:
    """A tensor's numbers as float32, flat, and what is wrong with them."""
    values = torch.frombuffer(
        data, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=tensor.offset
    ).float()
    bad = int((~values.isfinite()).sum())
    if not bad:
        return values, []
    what = f"found NaN or infinity in {bad:,} of {values.numel():,} numbers"
    return values, [TensorFault(key, what)]


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
    faults = _check_names(adapters)
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
                    f"{adapter.label}: trained on base model {found!r}, expected {expected!r}"
                    + (" (of --base-model)" if base_model else " (as most of the others)")
                )
    methods = Counter(adapter.config.METHOD for adapter in adapters)
    if len(methods) > 1:
        usual = methods.most_common(1)[0][0]
        return faults + [
            f"{adapter.label}: a {adapter.config.METHOD} adapter, most of the others are {usual} "
            "adapters; compress the two into stores of their own"
            for adapter in adapters
            if usual != adapter.config.METHOD
        ]
    faults += _check_projections(adapters)
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for adapter in adapters:
        for module in adapter.tensors:
            shapes.setdefault(module, Counter())[adapter.shape(module)] += 1
    for adapter in adapters:
        odd = []
        for module in adapter.tensors:
            shape = adapter.shape(module)
            usual_shape = shapes[module].most_common(1)[0][0]
            if shape != usual_shape:
                what = (
                    f"adapts a layer of {list(shape)} "
                    f"({'d_out, d_in' if len(shape) == 2 else 'd_out'}), "
                    f"{list(usual_shape)} in most of the others"
                )
                odd.append(TensorFault(module, what))
        faults += [f"{adapter.label}: {fault}" for fault in folded(odd)]
    return faults


def _check_names(adapters: list[_Adapter]) -> list[str]:
    faults = []
    by_name: dict[str, list[_Adapter]] = {}
    for adapter in adapters:
        by_name.setdefault(adapter.name, []).append(adapter)
    for name, same in by_name.items():
        if len(same) == 1:
            continue
        where = ", ".join(sorted(adapter.source or str(adapter.folder) for adapter in same))
        # Those of the Hub have names of their own among themselves, which nobody can change.
        mend = "rename all but one of the folders"
        if any(adapter.source for adapter in same):
            local = ", ".join(str(adapter.folder) for adapter in same if not adapter.source)
            mend = f"rename {local}, or leave out all but one"
        faults.append(f"the name {name!r} is used by {len(same)} adapters: {where}; {mend}")
    return faults


def _check_projections(adapters: list[_Adapter]) -> list[str]:
    """Faults where VeRA adapters do not have the same A and B."""
    vera = [adapter for adapter in adapters if adapter.projections_sha256]
    if not vera:
        return []
    digests = Counter(adapter.projections_sha256 for adapter in vera)
    usual = digests.most_common(1)[0][0]
    like = next(adapter for adapter in vera if adapter.projections_sha256 == usual)

    def described(adapter: _Adapter) -> str:
        a, b = (list(adapter.projections[side].shape) for side in "AB")
        assert isinstance(adapter.config, VeraConfig)
        return f"vera_A {a}, vera_B {b} of projection_prng_key {adapter.config.projection_prng_key}"

    return [
        f"{adapter.label}: found {described(adapter)}; most of the others have "
        f"{described(like)}"
        + (", of other numbers" if described(adapter) == described(like) else "")
        + "; compress adapters over other projections into a store of their own"
        for adapter in vera
        if adapter.projections_sha256 != usual
    ]


def _shapes(adapters: list[_Adapter], base_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module → (d_in, d_out).

    Raises:
        AdapterError: VeRA adapters whose layers' d_in cannot be told.
    """
    found = {module: adapter.shape(module) for adapter in adapters for module in adapter.tensors}
    if not isinstance(adapters[0].config, VeraConfig):
        return {module: (d_in, d_out) for module, (d_out, d_in) in found.items()}
    widths = _input_widths(list(found), adapters[0].projections["A"].shape[1], base_config)
    return {module: (widths[module], d_out) for module, (d_out,) in found.items()}


# Which layers read the hidden state, in the models that vLLM names so; the others do not.
_READ_HIDDEN = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")} | {
    f"mlp.{name}_proj" for name in ("gate", "up", "gate_up")
}


def _input_widths(modules: Sequence[str], widest: int, config: Mapping[str, Any]) -> dict[str, int]:
    """d_in of VeRA's modules, of which the widest has as many columns as vera_A.

    Raises:
        AdapterError: they cannot be told.
    """
    kinds = {module: ".".join(module.split(".")[-2:]) for module in modules}
    if len(set(kinds.values())) == 1 or _READ_HIDDEN.issuperset(kinds.values()):
        return dict.fromkeys(modules, widest)
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    known = dict.fromkeys(_READ_HIDDEN, hidden)
    known["mlp.down_proj"] = config.get("intermediate_size")
    if hidden and heads:
        known["self_attn.o_proj"] = (config.get("head_dim") or hidden // heads) * heads
    widths = {module: known.get(kind) for module, kind in kinds.items()}
    unknown = sorted({kinds[module] for module, width in widths.items() if not width})
    if unknown and not config:
        raise AdapterError(
            [
                "VeRA adapters do not say how wide the inputs of their layers are, and these "
                f"adapt several kinds ({', '.join(sorted(set(kinds.values())))}); give "
                "--base-model the folder of the base model, whose config.json says it"
            ]
        )
    if unknown:
        raise AdapterError(
            [
                "VeRA adapters do not say how wide the inputs of their layers are, and the base "
                f"model's config.json does not say it of {', '.join(unknown)}; only adapters of "
                f"{', '.join(sorted(known))} can be read together, or of one kind of layer"
            ]
        )
    if max(widths.values()) != widest:
        raise AdapterError(
            [
                f"vera_A has {widest} columns, but the widest of the adapted layers takes "
                f"{max(widths.values())} by the base model's config.json; expected the config of "
                "the model that the adapters were trained on"
            ]
        )
    return widths


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
