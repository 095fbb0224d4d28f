"""Read PEFT adapters, LoRA or VeRA: check all, then give out their factors module by module.

Only headers and positions are kept in memory; the numbers stay in the files.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read import hub
from vllm_jd.compressor.read.faults import TensorFault, folded
from vllm_jd.compressor.read.names import one_name_a_layer
from vllm_jd.compressor.read.peft_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraConfig,
    VeraConfig,
    parse_config,
)
from vllm_jd.compressor.read.vera import (
    check_projections,
    index_vera,
    input_widths,
    vera_factors,
)
from vllm_jd.compressor.read.weights import (
    Adapter,
    Tensor,
    finite_values,
    parse_header,
    read_tensor,
)
from vllm_jd.store import read_base_model, short_name

_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What PEFT saves beside an adapter of the output layer: a copy of the base model's.
_BASE_WEIGHT = re.compile(r".*\.(lm_head|embed_tokens)\.base_layer\.weight")
_EMBEDDING_KEY = re.compile(r".*\.lora_embedding_[AB]")


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


class PeftCollection:
    """PEFT adapters on disk, in the order of their names. A `Collection`.

    All are LoRA adapters, or all are VeRA adapters over the same two projections.

    Args:
        adapters: checked, at least one.
        base_model: the name of their base model.
        shapes: module → (d_in, d_out).
    """

    def __init__(
        self, adapters: list[Adapter], base_model: str, shapes: dict[str, tuple[int, int]]
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
            adapter.rank(module) * sum(shapes[module])
            for adapter in adapters
            for module in adapter.tensors
        )

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module: float32, PEFT's scale folded into B.

        Raises:
            AdapterError: a file changed since it was checked.
        """
        if self.method == "VERA":
            return vera_factors(self._adapters, module, *self.shapes[module])
        return self._lora(module)

    def _lora(self, module: str) -> ModuleFactors:
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        scales = []
        for adapter in self._adapters:
            pair = adapter.tensors.get(module)
            scales.append(adapter.config.scale_of(adapter.spelled.get(module, module)))
            if pair is None:
                pairs.append(None)
                continue
            a, b = (read_tensor(adapter, pair[side]) for side in "AB")
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
    modules: Iterable[str] = (),
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
        modules: names that a store has for the layers of this base model. What the adapters call
            these layers otherwise gets these names; see `vllm_jd.compressor.read.names`.
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
    faults += _name_alike(adapters, modules)
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


def _check_adapter(folder: Path, name: str, source: str | None) -> tuple[Adapter | None, list[str]]:
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
    adapter = Adapter(name, folder, config, source)
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


def _index_weights(adapter: Adapter, digest: "hashlib._Hash") -> list[str | TensorFault]:
    """Fill in the adapter's tensors, hash and size; return what is wrong with its weights."""
    with (adapter.folder / WEIGHTS_FILE).open("rb") as file:
        adapter.modified_ns = os.fstat(file.fileno()).st_mtime_ns
        data = bytearray(file.read())
    digest.update(data)
    adapter.sha256, adapter.bytes = digest.hexdigest(), len(data)
    header = parse_header(data)
    if isinstance(adapter.config, VeraConfig):
        return index_vera(adapter, adapter.config, header, data)
    assert isinstance(adapter.config, LoraConfig)
    return _index_lora(adapter, adapter.config, header, data)


def _index_lora(
    adapter: Adapter, config: LoraConfig, header: dict[str, Tensor], data: bytearray
) -> list[str | TensorFault]:
    faults: list[str | TensorFault] = []
    sides: dict[str, set[str]] = {}
    for key, tensor in header.items():
        if _BASE_WEIGHT.fullmatch(key):
            continue
        match = _LORA_KEY.fullmatch(key)
        if not match:
            what = "found a tensor that is no LoRA factor of a linear layer"
            if _EMBEDDING_KEY.fullmatch(key):
                what += ", but of an embedding; train without it among target_modules"
            faults.append(TensorFault(key, what, WEIGHTS_FILE))
            continue
        sides.setdefault(match["module"], set()).add(match["side"])
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            what = f"found shape {list(tensor.shape)}, expected a matrix"
            faults.append(TensorFault(key, what))
            continue
        values, bad = finite_values(key, tensor, data)
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


def _check_together(adapters: list[Adapter], base_model: str | None) -> list[str]:
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
    faults += check_projections(adapters)
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


def _name_alike(adapters: list[Adapter], known: Iterable[str]) -> list[str]:
    """Give each layer one name in all adapters; return what stands against it."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for adapter in adapters:
        for module in adapter.tensors:
            shapes.setdefault(module, set()).add(adapter.shape(module))
    modules = [(adapter.label, adapter.tensors) for adapter in adapters]
    names, faults = one_name_a_layer(modules, shapes, known)
    if names and not faults:
        for adapter in adapters:
            adapter.rename(names)
    return faults


def _check_names(adapters: list[Adapter]) -> list[str]:
    faults = []
    by_name: dict[str, list[Adapter]] = {}
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


def _shapes(adapters: list[Adapter], base_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module → (d_in, d_out).

    Raises:
        AdapterError: VeRA adapters whose layers' d_in cannot be told.
    """
    found = {module: adapter.shape(module) for adapter in adapters for module in adapter.tensors}
    if not isinstance(adapters[0].config, VeraConfig):
        return {module: (d_in, d_out) for module, (d_out, d_in) in found.items()}
    widths = input_widths(list(found), adapters[0].projections["A"].shape[1], base_config)
    return {module: (widths[module], d_out) for module, (d_out,) in found.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
