"""Read PEFT adapters, LoRA or VeRA: check all, then give out their factors module by module.

Only headers and positions are kept in memory; the numbers stay in the files.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import AdapterError, few
from vllm_jd.compressor.read import hub
from vllm_jd.compressor.read.base_layers import misfits, told
from vllm_jd.compressor.read.beside import words_beside
from vllm_jd.compressor.read.experts import expert_counts, read_experts, split_fused
from vllm_jd.compressor.read.find import find_adapters, named_folder, names_of, split_name
from vllm_jd.compressor.read.folder import read_folder
from vllm_jd.compressor.read.initial import Initial, initial_of
from vllm_jd.compressor.read.peft_config import VeraConfig
from vllm_jd.compressor.read.together import (
    check_bases,
    check_layers,
    check_names,
    name_alike,
    other_names,
)
from vllm_jd.compressor.read.towers import Towers, settle_towers
from vllm_jd.compressor.read.vera import input_widths, vera_factors
from vllm_jd.compressor.read.weights import Adapter, read_alike, read_tensor
from vllm_jd.store import Manifest, read_base_model

UNKNOWN_BASE = "unknown"  # what a collection has for adapters that name no base model
_AT_ONCE = 16  # adapters that a thread checks before it hands them over
_BLOCK = 256  # adapters whose numbers are converted at once


class Collection(Protocol):
    """What the compressor needs of its input: adapters in a fixed order, factors on demand.

    It may also have `sources`, `method`, `base_names`, `experts` and `embeddings`, as
    `PeftCollection` has: see `sources_of`, `method_of`, `base_names_of`, `experts_in`,
    `embeddings_in`.
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
        """All adapters' factors for one module, in the order of `names`; of E experts those of
        all of them, of adapter i's expert e at i · E + e."""
        ...


def sources_of(collection: Collection) -> list[str | None]:
    """Where each adapter came from, None where that is not known."""
    return getattr(collection, "sources", None) or [None] * len(collection.names)


def method_of(collection: Collection) -> str:
    """PEFT's type of the adapters, `LORA` or `VERA`."""
    return getattr(collection, "method", "LORA")


def base_names_of(collection: Collection) -> list[str]:
    """What adapters call the base model, where that is not `base_model`."""
    return getattr(collection, "base_names", None) or []


def experts_in(collection: Collection) -> Mapping[str, int]:
    """Module → how many experts it has, of those that are of experts."""
    return getattr(collection, "experts", {})


def experts_of(collection: Collection, module: str) -> int:
    """How many experts a module has; 0: it is a plain linear layer."""
    return experts_in(collection).get(module, 0)


def embeddings_in(collection: Collection) -> frozenset[str]:
    """The modules that are tables of embeddings: d_in is the size of the vocabulary, and a token's
    input is 1 at its own number."""
    return getattr(collection, "embeddings", frozenset())


class PeftCollection:
    """PEFT adapters on disk, in the order of their names. A `Collection`.

    All are LoRA adapters, or all are VeRA adapters over the same two projections.

    Args:
        adapters: checked, at least one.
        base_model: the name of their base model.
        shapes: module → (d_in, d_out).
        experts: module → how many, of those that are of experts.
        initial: what training took from the base model's layers, where it is to be given back.
    """

    def __init__(
        self,
        adapters: list[Adapter],
        base_model: str,
        shapes: dict[str, tuple[int, int]],
        experts: Mapping[str, int] = MappingProxyType({}),
        initial: Mapping[tuple[str, str], Initial] = MappingProxyType({}),
    ):
        self._adapters, self._initial = adapters, initial
        self.base_model = base_model
        self.base_names = other_names(adapters, base_model)
        self.method = "VERA" if isinstance(adapters[0].config, VeraConfig) else "LORA"
        self.names = [adapter.name for adapter in adapters]
        self.sources = [adapter.source for adapter in adapters]
        self.source_sha256 = [adapter.sha256 for adapter in adapters]
        self.source_bytes = [adapter.bytes for adapter in adapters]
        self.shapes = {module: shapes[module] for module in sorted(shapes, key=_natural)}
        self.experts = {module: count for module, count in experts.items() if module in shapes}
        found = {module for adapter in adapters for module in adapter.embeddings}
        self.embeddings = frozenset(found & shapes.keys())
        self.factor_bytes = 4 * sum(
            adapter.rank(module) * sum(shapes[module]) * (1 + ((adapter.init, module) in initial))
            for adapter in adapters
            for module in adapter.modules
        )

    def renamed(self, names: Iterable[tuple[str, str]]) -> "PeftCollection":
        """Some of the adapters by other names: (name here, name there), in that order. One may
        have several there.

        Raises:
            KeyError: no such adapter.
        """
        known = {adapter.name: adapter for adapter in self._adapters}
        chosen = [replace(known[here], name=there) for here, there in names]
        used = {module for adapter in chosen for module in adapter.modules}
        shapes = {module: shape for module, shape in self.shapes.items() if module in used}
        return PeftCollection(chosen, self.base_model, shapes, self.experts)

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module: float32, PEFT's scale folded into B.

        Raises:
            AdapterError: a file changed since it was checked.
        """
        if self.method == "VERA":
            return vera_factors(self._adapters, module, *self.shapes[module])
        if module in self.experts:
            return self._of_experts(module)
        return self._lora(module)

    def _of_experts(self, module: str) -> ModuleFactors:
        count = self.experts[module]
        ranks = torch.zeros(len(self._adapters), count, dtype=torch.int64)
        scales = torch.ones(len(self._adapters), count)
        for i, adapter in enumerate(self._adapters):
            if own := adapter.experts.get(module):
                ranks[i, : len(own.ranks)] = torch.tensor(own.ranks)
                scales[i, : len(own.ranks)] = torch.tensor(own.scales)
        d_in, d_out = self.shapes[module]
        a, b = (torch.empty(int(ranks.sum()), width) for width in (d_in, d_out))
        row = 0
        for adapter in self._adapters:
            for pair in read_experts(adapter, module) if module in adapter.experts else ():
                if pair is not None:
                    rank = len(pair[0])
                    a[row : row + rank], b[row : row + rank] = pair[0], pair[1].T
                    row += rank
        return ModuleFactors(a, b, ranks.flatten(), scales.flatten())

    def _lora(self, module: str) -> ModuleFactors:
        if any((adapter.init, module) in self._initial for adapter in self._adapters):
            return self._given_back(module)
        scales = torch.tensor(
            [
                adapter.config.scale_of(adapter.spelled.get(module, module))
                for adapter in self._adapters
            ]
        )
        ranks = torch.zeros(len(self._adapters), dtype=torch.int64)
        alike: dict[Any, list[int]] = {}  # types and shapes of A and B → whose they are
        for i, adapter in enumerate(self._adapters):
            if pair := adapter.tensors.get(module):
                ranks[i] = pair["A"].shape[0]
                kind = tuple(replace(pair[side], offset=0) for side in "AB")
                alike.setdefault(kind, []).append(i)
        d_in, d_out = self.shapes[module]
        a = torch.empty(int(ranks.sum()), d_in)
        b = torch.empty(int(ranks.sum()), d_out)
        starts = ranks.cumsum(0) - ranks
        for members in alike.values():
            for first in range(0, len(members), _BLOCK):
                some = members[first : first + _BLOCK]
                wanted = [
                    (adapter, [adapter.tensors[module][side] for side in "AB"])
                    for adapter in map(self._adapters.__getitem__, some)
                ]
                found_a, found_b = read_alike(wanted)
                rows = (starts[some, None] + torch.arange(found_a.shape[1])).flatten()
                a.index_copy_(0, rows, found_a.flatten(0, 1))
                found_b *= scales[some, None, None]
                b.index_copy_(0, rows, found_b.mT.flatten(0, 1))
        return ModuleFactors(a, b, ranks, scales)

    def _given_back(self, module: str) -> ModuleFactors:
        """The same where some are given back what training took: their ranks grow."""
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        scales = []
        for adapter in self._adapters:
            pair = adapter.tensors.get(module)
            scales.append(adapter.config.scale_of(adapter.spelled.get(module, module)))
            if pair is None:
                pairs.append(None)
                continue
            a, b = (read_tensor(adapter, pair[side]) for side in "AB")
            b *= scales[-1]
            taken = self._initial.get((adapter.init, module))
            pairs.append((a, b) if taken is None else taken.given_back(a, b, scales[-1]))
        return ModuleFactors.stack(pairs, *self.shapes[module], scales)


def read_adapters(
    sources: Iterable[Path | str],
    *,
    base_model: str | None = None,
    base_config: Mapping[str, Any] | None = None,
    base_folder: Path | None = None,
    base_names: Iterable[str] = (),
    same_base: bool = False,
    towers: Towers = "keep",
    convert: bool = False,
    convert_cache: Path | None = None,
    modules: Iterable[str] = (),
    on_fetch: Callable[[int, int], None] = lambda done, total: None,
    on_skip: Callable[[str], None] = lambda what: None,
    on_note: Callable[[str], None] = lambda what: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_convert: Callable[[int, int], None] = lambda done, total: None,
) -> PeftCollection:
    """Check every adapter of `sources` (headers, shapes, every number) and open the collection.

    Args:
        sources: adapter folders and folders of them; a text may also be `NAME=PATH`, an adapter's
            folder and its name, or name repositories or collections of the Hugging Face Hub (see
            `vllm_jd.compressor.read.hub`). The order does not matter.
        base_model: name that the adapters must carry; default: that of most of them.
        base_config: `config.json` of the base model, of which VeRA adapters may need the widths;
            default: that of the folder that `base_model` or the adapters name, if it is one.
        base_folder: the base model's, if it is known: its chat template and tokens are compared
            with the adapters', and `convert` needs its weights.
        base_names: other names of `base_model` that adapters may carry.
        same_base: adapters may carry any name. Their layers must have the shapes that the others'
            and the base model's config say.
        towers: what to do with modules of vision and audio towers, which are not served; those of
            `modules` are kept in any case.
        convert: make plain LoRA adapters of those that changed the base model's weights in a way
            that follows from these (`vllm_jd.compressor.read.initial`).
        convert_cache: a folder in which what takes long of it is kept.
        modules: names that a store has for the layers of this base model. What the adapters call
            these layers otherwise gets these names; see `vllm_jd.compressor.read.names`.
        on_fetch: called with (repositories fetched, repositories).
        on_skip: called with a sentence for each item of a Hub collection that is no adapter.
        on_note: called with sentences about adapters that are taken, or were left out.
        on_progress: called with (adapters checked, adapters).
        on_convert: called with (layers of the base model done, layers).

    Raises:
        AdapterError: listing all faults of all adapters.
        StoreError: the base model's config.json cannot be read.
        ValueError: `same_base` without `base_model`, or `convert` without `base_folder`.
    """
    if same_base and base_model is None:
        raise ValueError("same_base: expected base_model, the name that the store is to have")
    if convert and base_folder is None:
        raise ValueError("convert: expected base_folder, the folder of the base model")
    faults: list[str] = []
    adapters = []
    found = find_sources(sources, on_fetch, on_skip, on_note)
    for i, (adapter, wrong) in enumerate(_read_all(found, convert)):
        folder, _, source = found[i]
        faults += [f"{f'{source} ({folder})' if source else folder}: {fault}" for fault in wrong]
        if adapter is not None:
            adapters.append(adapter)
        on_progress(i + 1, len(found))
    adapters.sort(key=lambda adapter: adapter.name)
    split_fused(adapters, modules)
    faults += name_alike(adapters, modules)
    faults += check_names(adapters)
    if not same_base:
        faults += check_bases(adapters, base_model, base_names)
    faults += check_layers(adapters)
    if faults:
        raise AdapterError(faults)
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    base_model = base_model or next(filter(None, named), UNKNOWN_BASE)
    config = base_config or _base_config(base_model)
    counts, faults = expert_counts(adapters, config)
    if faults:
        raise AdapterError(faults)
    shapes = _shapes(adapters, config)
    modules = {*modules}
    settle_towers(adapters, shapes, config, modules, towers)
    shapes = {m: shape for m, shape in shapes.items() if any(m in a.modules for a in adapters)}
    if same_base:
        _check_same_base(shapes, config)
    initial = {}
    if convert:
        initial = initial_of(adapters, shapes, base_folder, convert_cache, on_convert)
    if base_folder is None and (Path(base_model) / "config.json").is_file():
        base_folder = Path(base_model)
    for note in _notes(adapters) + words_beside(adapters, base_folder):
        on_note(note)
    return PeftCollection(adapters, base_model, shapes, counts, initial)


def read_for_store(sources: Iterable[Path | str], manifest: Manifest) -> PeftCollection:
    """`read_adapters` for what is to go into a store: of its base model, by any of the names that
    its user said are this model's, with its names for the layers, and without modules of towers
    that it has not.

    Raises:
        AdapterError: listing all faults of all adapters.
    """
    base = manifest.base_model
    return read_adapters(
        sources,
        base_model=base.name,
        base_config=base.config or None,
        base_names=base.names,
        towers="leave-out",
        same_base=base.name == UNKNOWN_BASE,  # whose name nothing can be compared with
        modules=[module.name for module in manifest.modules],
    )


Found = tuple[Path, str, str | None]
"""Folder, name, and source of one of the Hub."""


def find_sources(
    sources: Iterable[Path | str],
    on_fetch: Callable[[int, int], None] = lambda done, total: None,
    on_skip: Callable[[str], None] = lambda what: None,
    on_note: Callable[[str], None] = lambda what: None,
) -> list[Found]:
    """The adapters that sources mean, unread, by the names that a store gives them. Arguments are
    as those of `read_adapters`.

    Raises:
        AdapterError: listing the sources that are no adapters.
    """
    texts, paths, named = [], [], []
    for source in sources:
        name, text = split_name(source) if isinstance(source, str) else (None, source)
        if name is not None:
            named.append((name, str(text)))
        elif isinstance(text, str) and hub.is_hub_source(text):
            texts.append(text)
        else:
            paths.append(Path(text))
    if not texts and not paths and not named:
        raise AdapterError(["no adapters were given; expected folders or names of the Hub"])
    faults: list[str] = []
    given: list[Found] = []
    for name, text in named:
        try:
            given.append(_named(name, text, on_fetch))
        except AdapterError as error:
            faults += error.faults
    folders: list[Path] = []
    try:
        folders = find_adapters(paths, on_note)
    except AdapterError as error:
        faults += error.faults
    if faults:
        raise AdapterError(faults)
    fetched = hub.fetch(texts, on_progress=on_fetch, on_skip=on_skip) if texts else []
    given += [(source.folder, source.name, source.address) for source in fetched]
    there = {folder.resolve() for folder, _, _ in given}
    folders = [folder for folder in folders if folder.resolve() not in there]
    names = names_of(folders, [name for _, name, _ in given])
    return [*((f, n, None) for f, n in zip(folders, names, strict=True)), *given]


def _named(name: str, text: str, on_fetch: Callable[[int, int], None]) -> Found:
    """The one adapter that `NAME=PATH` means."""
    if not hub.is_hub_source(text):
        return named_folder(name, Path(text).expanduser()), name, None
    fetched = hub.fetch([text], on_progress=on_fetch)
    if len(fetched) != 1:
        raise AdapterError(
            [
                f"{name}={text}: found {len(fetched)} adapters "
                f"({', '.join(source.name for source in fetched[:3])}, …), expected one: name each "
                f"by its own folder, such as {name}={fetched[0].address}"
            ]
        )
    return fetched[0].folder, name, fetched[0].address


def _notes(adapters: list[Adapter]) -> list[str]:
    """What is to be known of adapters: a line for each kind."""
    names: dict[str, list[str]] = {}
    for adapter in adapters:
        for note in adapter.notes:
            names.setdefault(note, []).append(adapter.name)
    return [f"{few(same)}: {note}" for note, same in names.items()]


def _check_same_base(shapes: dict[str, tuple[int, int]], config: Mapping[str, Any]) -> None:
    found = misfits(((module, *shape) for module, shape in shapes.items()), config)
    wrong = told(misfit for misfit in found if misfit.of_another_model)
    if wrong:
        raise AdapterError(
            [f"these are not adapters of one base model (--same-base): {line}" for line in wrong]
        )


def _base_config(name: str) -> Mapping[str, Any]:
    folder = Path(name)
    return read_base_model(folder).config if (folder / "config.json").is_file() else {}


def _read_all(found: list[Found], convert: bool) -> Iterator[tuple[Adapter | None, list[str]]]:
    """`read_folder` of each, in order, by as many threads as torch has."""

    def read(first: int) -> list[tuple[Adapter | None, list[str]]]:
        return [read_folder(*each, convert=convert) for each in found[first : first + _AT_ONCE]]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for some in pool.map(read, range(0, len(found), _AT_ONCE)):
            yield from some


def _shapes(adapters: list[Adapter], base_config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module → (d_in, d_out).

    Raises:
        AdapterError: VeRA adapters whose layers' d_in cannot be told.
    """
    found = {module: adapter.shape(module) for adapter in adapters for module in adapter.modules}
    if not isinstance(adapters[0].config, VeraConfig):
        return {module: (d_in, d_out) for module, (d_out, d_in) in found.items()}
    widths = input_widths(list(found), adapters[0].projections["A"].shape[1], base_config)
    return {module: (widths[module], d_out) for module, (d_out,) in found.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
