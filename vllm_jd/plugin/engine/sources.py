"""What references name: a generation of a store, an upload, or a blend of such."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.utils import get_adapter_absolute_path

from vllm_jd.plugin.api.requests import upload_digest
from vllm_jd.plugin.engine.blends import Layout, Term
from vllm_jd.plugin.engine.residency import Basis
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.store import Store
from vllm_jd.store.blend import Blend

_REMEMBERED = 1 << 16  # adapters of a source whose bases are kept in mind


class AdapterUnavailable(Exception):
    """A request's adapter cannot be had; the message says why. Its request fails, nobody else."""


@dataclass(frozen=True)
class Made:
    """What a blend is made of."""

    terms: tuple[Term, ...]
    layout: Layout
    own_rows: int
    """How many rows a core slot has room for."""

    @property
    def cores(self) -> int:
        """How many core slots it takes beside a long slot; 0: a core slot is all it needs."""
        layout = self.layout
        alone = layout.cores <= 1 and layout.rows <= self.own_rows
        return 0 if alone else max(1, layout.cores)


@dataclass
class Source:
    """What references name: a generation of a store, an upload (without store), or a blend."""

    number: int
    key: str
    """By which it is found: folder and generation, or an upload's digest."""
    identity: str
    """Of its numbers."""
    store: Store | None = None
    tables: Tables | None = None
    path: str = ""
    """A store's folder."""
    paths: set[str] = field(default_factory=set)
    """The folders that an upload was found in."""
    held: int = 0
    """How many requests, waiting or running, have references to it, and how often it has slots."""
    retired: bool = False
    """Whether a later generation is served instead, or an upload was unloaded."""
    bases: OrderedDict[int, tuple[tuple[Basis, ...], tuple[int, ...]]] = field(
        default_factory=OrderedDict
    )
    made: Made | None = None
    """Of a blend."""
    uploads: tuple[bool, ...] = ()
    """Of a blend, which of its bases are an upload's."""

    @property
    def needs(self) -> dict[str, Any]:
        """Which kinds of slots its adapters need, as `Residency.acquire` takes it."""
        if self.made is not None:
            return {"upload": self.uploads, "cores": self.made.cores}
        return {"upload": self.store is None}

    def whose(self, number: int) -> str:
        """By what the numbers of one of its adapters are known, for ever."""
        return (
            self.identity if self.store is None else f"{self.identity}/{self.store.names[number]}"
        )

    def basis(self, side: str, number: int) -> tuple[Basis, int]:
        """One of a generation's bases, and its rank."""
        wide, rank = bool(self.tables.wide[side][number]), int(self.tables.ranks[side][number])
        return Basis(self.number, side, number, wide), rank

    def parts(self, number: int) -> tuple[tuple[Basis, ...], tuple[int, ...]]:
        """The bases of one of its adapters, and the rank of each."""
        found = self.bases.get(number)
        if found is None:
            if self.tables is None:
                bases = [Basis(self.number, side, 0) for side in ("v", "u")]
                found = tuple(bases), (1, 1)
            else:
                pairs = [
                    self.basis(side, b)
                    for side, numbers in self.tables.bases_of(number).items()
                    for b in numbers
                ]
                found = tuple(b for b, _ in pairs), tuple(rank for _, rank in pairs)
            self.bases[number] = found
            if len(self.bases) > _REMEMBERED:
                self.bases.popitem(last=False)
        return found


def store_key(path: Path, generation: int) -> str:
    """By which a generation of a store is found."""
    return f"{path}@{generation}"


def number_in(source: Source, name: str) -> int:
    """The number of a store's adapter. Raises AdapterUnavailable where there is none."""
    if name not in source.store:
        raise AdapterUnavailable(f"the store {source.path} has {source.store.unknown(name)}")
    return source.store.index(name)


def read_digest(name: str, path: str) -> str:
    """The digest of an uploaded folder. Raises AdapterUnavailable where it cannot be read."""
    try:
        return upload_digest(Path(get_adapter_absolute_path(path)))
    except OSError as error:
        raise AdapterUnavailable(f"adapter {name!r} cannot be read from {path}: {error}") from error


def blend_identity(blend: Blend, found: Iterable[tuple[Source, int, float]]) -> str:
    """By what a blend of these parts is known, in whichever order they were named."""
    parts = sorted((source.whose(number), weight.hex()) for source, number, weight in found)
    how = blend.way, blend.density, blend.sign, blend.seed
    return f"blend:{hashlib.sha256(repr((parts, how)).encode()).hexdigest()}"
