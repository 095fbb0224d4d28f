"""The core slots of one worker, and what it knows of the sources that fill them.

A core slot is a row of `cores` and of `rows` (`vllm_jd.kernels.pools`), the index that a step's
tokens carry. Which adapter lies in which slot, and which basis, the engine decides
(`vllm_jd.plugin.engine.residency`); here its orders are carried out.

The cores of a quantised store stay codes, which the kernels decode (`keeps_codes`): two to four
times as many slots take the same memory.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.lora.lora_model import LoRAModel

from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.tiles import keys_of
from vllm_jd.plugin.engine.residency import Capacity
from vllm_jd.plugin.engine.tables import SIDES, Tables
from vllm_jd.plugin.worker.bases import Spans, goes_up_by_one
from vllm_jd.plugin.worker.layer import LayerPools, Place, Target, put_alike
from vllm_jd.plugin.worker.step import copy_to, to_device
from vllm_jd.row import (
    BLOCK,
    CORE_KIND,
    CORE_NONE,
    CORE_OFFSET,
    CORE_SLOT,
    RANK,
    ROW_FIELDS,
    SCALE_ROW,
    U_START,
    V_START,
)
from vllm_jd.store import Store, StoreError
from vllm_jd.store.quantise import Kind, code_width, quantise, scale_width

_READ = 1024  # adapters whose cores are read at once
_ROWS = 1 << 20  # rows that are made at once
_ALONE = 1 << 30  # groups from here on are those of one slot


def keeps_codes(store: Store, dtype: torch.dtype) -> bool:
    """Whether the slots of a model of `dtype` hold a store's cores as codes. In another dtype than
    the store's they would be rounded once, and the store's own numbers are rounded twice."""
    return store.manifest.quantised is not None and dtype == store.dtype


@dataclass
class StoreSource:
    """A generation of a store, as one worker reads it.

    Args:
        store: the open store.
        tables: of it.
        columns: for each of the worker's targets the store's module, or −1.
        offsets: for each of these where its core (of experts: its expert's) begins in what a core
            slot holds.
        held: which blocks of a core row that is, see `_held`.
        places: the slices of layers that the store has something for.
        modules: int64 `[places]`, the store's module of each.
        alike: side → the places that take their vectors alike, known once a basis was paged in.
        slots: side → int32 `[bases]`, the slot of each basis, −1 for none.
    """

    store: Store
    tables: Tables
    columns: np.ndarray
    offsets: np.ndarray
    held: torch.Tensor | None
    places: Sequence[Place]
    modules: np.ndarray
    slots: dict[str, np.ndarray]
    alike: dict[str, list[np.ndarray]] = field(default_factory=dict)


class Slots:
    """The slots of one worker's model, shared by all layers.

    Args:
        store: that the server starts with.
        tables: of it.
        layers: the worker's, which are given their part of these.
        capacity: how many slots there are.
        dtype: of the model.
        device: of cores and rows.

    Attributes:
        cores, core_steps: as in `ModulePools`; codes with their steps where `keeps_codes` says so,
            else numbers of `dtype`, and None.
        rows: int32 `[core slots, slices, K, 7]`, of all plain layers; layers of experts have theirs
            for themselves.
        long_rows: int32 `[long slots, slices, K', 7]`, or None; these slots are counted on.
        keys: int64 `[all slots]`, by which tiles take tokens (`kernels.tiles`): slots of one
            cluster are of one group.
        eager: bool `[all slots]`: whether an upload lies there that adapts layers for which the
            store has nothing, so that what vLLM has compiled of them knows no adapters.
    """

    def __init__(
        self,
        store: Store,
        tables: Tables,
        layers: Sequence[LayerPools],
        capacity: Capacity,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        plain = [layer for layer in layers if layer.experts is None]
        self._layers = [*plain, *(layer for layer in layers if layer.experts is not None)]
        self._capacity = capacity
        self.count = capacity.cores + capacity.blends
        self._targets: list[tuple[LayerPools, Target | None]] = [
            (layer, target) for layer in self._layers for target in layer.targets
        ]
        self._experts = np.array([0 if t is None else t.expert for _, t in self._targets])
        """int64 `[targets]`: whose rows they are."""
        firsts: list[int] = []
        for layer in self._layers:
            start = len(firsts)
            firsts += [
                start + (t.slice if t is not None and t.expert else i)
                for i, t in enumerate(layer.targets)
            ]
        self._firsts = np.array(firsts)
        """int64 `[targets]`: the same slice's for the first expert."""
        self._kind: Kind | None = store.manifest.quantised if keeps_codes(store, dtype) else None
        self._modules = [module.name for module in store.manifest.modules]
        first = self._source(store, tables)
        cores, steps = self._cores_of(first, 0, 0)
        own = cores.shape[1] if steps is None else steps.shape[1] * BLOCK
        self.tail = own
        """Where the numbers behind the cores of a slot begin."""
        width = own + capacity.tail if capacity.tail else cores.shape[1]
        if self._kind and capacity.tail:
            width = code_width(width, self._kind)
        self.cores = _zeros((self.count, width), cores.dtype if self._kind else dtype, device)
        self.core_steps = None
        if steps is not None:
            shape = self.count, scale_width(own + capacity.tail)
            self.core_steps = _zeros(shape, steps.dtype, device)
        self._depth = store.manifest.rows
        self.rows, self.long_rows = self._new_rows(sum(layer.rows for layer in plain), device)
        self._row_parts = [(0, self.rows, self.long_rows)]
        self.keys = np.zeros(self.count + capacity.long, dtype=np.int64)
        self.eager = np.zeros(self.count + capacity.long, dtype=bool)
        self._with_uploads: set[int] = set()
        self._addresses = self._stacked()
        start = 0
        for layer in self._layers:
            its = slice(start, start + layer.rows)
            if layer.experts is None:
                rows = self.rows[:, its]
                long = None if self.long_rows is None else self.long_rows[:, its]
            else:
                rows, long = self._new_rows(layer.rows, device)
                self._row_parts.append((start, rows, long))
            layer.attach(self.cores, rows, self.core_steps, long)
            start += layer.rows
        self.first = first

    def _new_rows(
        self, slices: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of so many slices: int32 `[core slots, slices, K, 7]`, and the long ones."""
        room = self._capacity
        rows = _zeros((self.count, slices, self._depth, len(ROW_FIELDS)), torch.int32, device)
        if not room.long:
            return rows, None
        return rows, _zeros((room.long, slices, room.depth, len(ROW_FIELDS)), torch.int32, device)

    def _stacked(self) -> dict[str, np.ndarray]:
        """Side → int64 `[targets, slots or K]`, the addresses of all targets, and whether each is
        fixed: bool `[targets]`."""
        stacked: dict[str, np.ndarray] = {}
        targets = [target for _, target in self._targets]
        for side in SIDES:
            found = [np.full(1, -1) if t is None else getattr(t, side) for t in targets]
            width = max((len(each) for each in found), default=1)
            table = np.full((len(found), max(1, width)), -1, dtype=np.int64)
            for i, each in enumerate(found):
                table[i, : len(each)] = each
            stacked[side] = table
        for name in ("v_fixed", "u_fixed", "cored", "placed"):
            stacked[name] = np.array([t is not None and getattr(t, name) for t in targets])
        stacked["worker"] = np.array([0 if t is None else t.worker for t in targets])
        stacked["workers"] = np.array([1 if t is None else t.workers for t in targets])
        return stacked

    @property
    def nbytes(self) -> int:
        """Bytes of all cores."""
        return self.cores.nbytes + (0 if self.core_steps is None else self.core_steps.nbytes)

    # --- sources ---

    def begin(self) -> StoreSource:
        """Fill the slots as `EngineAdapters` takes it: all bases that there are slots for, by
        rank and in order, and all cores, or neither where not all fit. Returns the source."""
        source = self.first
        if not self._capacity.whole:
            return source
        taken = {
            side: {(c.wide, c.rank): iter(range(c.first, c.first + c.count)) for c in classes}
            for side, classes in self._capacity.bases.items()
        }
        for side, ranks in source.tables.ranks.items():
            kinds = source.tables.kinds(side)
            for basis in np.flatnonzero(ranks).tolist():
                source.slots[side][basis] = next(taken[side][kinds[basis]])
            self._fill_bases(source, side, np.flatnonzero(ranks))
        n = len(source.store)
        if n + self._capacity.uploads["v"].count <= self._capacity.cores:
            for first in range(0, n, _READ):
                last = min(first + _READ, n)
                self.fill_adapters(source, list(range(first, last)), list(range(first, last)))
        return source

    def source(self, store: Store) -> StoreSource:
        """Another generation, none of whose bases has a slot yet."""
        return self._source(store, Tables(store))

    def _source(self, store: Store, tables: Tables) -> StoreSource:
        columns = np.full(len(self._targets), -1, dtype=np.int64)
        known = {module.name: i for i, module in enumerate(store.manifest.modules)}
        infos = store.manifest.modules
        for i, (layer, target) in enumerate(self._targets):
            if target is not None:
                column = known.get(layer.slices[target.slice].module.name, -1)
                if column >= 0 and target.expert < infos[column].each:
                    columns[i] = column
        offsets, held = _held(store, columns.tolist(), BLOCK if self._kind else 1)
        starts = np.array([offsets.get(int(column), 0) for column in columns], dtype=np.int64)
        own = np.array([module.expert_core for module in infos], dtype=np.int64)
        starts += np.where(columns < 0, 0, own[columns]) * self._experts
        slots = {
            side: np.full(len(ranks), -1, dtype=np.int32) for side, ranks in tables.ranks.items()
        }
        modules: dict[tuple[LayerPools, int], int] = {}  # a slice may have two targets
        for (layer, target), column in zip(self._targets, columns.tolist(), strict=True):
            if column >= 0:
                modules[layer, target.slice] = column
        places = [Place(*key, store.manifest.modules[column]) for key, column in modules.items()]
        numbers = np.array(list(modules.values()), dtype=np.int64)
        return StoreSource(store, tables, columns, starts, held, places, numbers, slots)

    # --- orders ---

    def fill_basis(self, source: StoreSource, side: str, basis: int, slot: int) -> None:
        """Put a basis of a store into a slot.

        Raises:
            StoreError: it cannot be read; what lies in the slot now is not to be used.
        """
        source.slots[side][source.slots[side] == slot] = -1
        source.slots[side][basis] = slot
        number = np.array([basis])
        wide = bool(source.tables.wide[side][basis])
        try:
            starts, ranks = source.tables.spans(side, source.modules, number)
            if wide:
                for p, place in enumerate(source.places):
                    if place.layer.experts is not None:
                        self._put(source, side, p, number)
                        ranks[p] = 0
            for group in _alike(source, side):
                for rank in np.unique(ranks[group]).tolist():
                    some = group[ranks[group] == rank]
                    places = [source.places[p] for p in some.tolist()]
                    if rank:
                        firsts = starts[some].tolist()
                        put_alike(source.store, places, side, slot, firsts, rank)
        except BaseException:
            source.slots[side][basis] = -1
            raise

    def _fill_bases(self, source: StoreSource, side: str, bases: np.ndarray) -> None:
        """Put bases into their slots, all of one module at once: as they lie in the files."""
        for p in range(len(source.places)):
            self._put(source, side, p, bases)

    def _put(self, source: StoreSource, side: str, place: int, bases: np.ndarray) -> None:
        """Put bases into the slots of one place; of those that are wide each expert's vectors."""
        layer, s, module = source.places[place]
        experts = np.arange(module.each).repeat(len(bases))
        bases = np.tile(bases, module.each)
        some = source.tables.wide[side][bases] | (experts == 0)
        bases, experts = bases[some], experts[some]
        column = int(source.modules[place])
        starts, ranks = source.tables.spans(side, column, bases, experts)
        some = ranks > 0
        if some.any():
            slots = source.slots[side][bases[some]].astype(np.int64)
            spans = Spans(slots, starts[some], ranks[some], experts[some])
            layer.put(source.store, side, s, module, spans)

    def fill_adapters(
        self,
        source: StoreSource,
        adapters: Sequence[int],
        slots: Sequence[int],
        *,
        rows_only: bool = False,
    ) -> None:
        """Put adapters of a store into core slots, whose bases lie in theirs already.

        Raises:
            StoreError: a core cannot be read; what lies in the slots is not to be used.
        """
        # On all workers, even on one that cannot read: which layers are in use they must agree on.
        for slot in self._with_uploads.intersection(slots):
            self.note_uploads((), slot)
        if source.store.manifest.core_row and not rows_only:
            for slot, first, last in _runs(slots, adapters):
                cores, steps = self._cores_of(source, first, last)
                if len(cores) != last - first:
                    raise StoreError(
                        f"{source.store.folder}: found {len(cores)} cores of adapters "
                        f"{first} … {last - 1}, expected {last - first}"
                    )
                self._put_cores(slot, 0, cores, steps)
        index = torch.tensor(list(slots))
        at_once = max(1, _ROWS // max(1, len(self._targets) * self._depth))
        for i in range(0, len(slots), at_once):
            some = slice(i, i + at_once)
            rows = self._rows_of(source, adapters[some], slots[some])
            self._set_rows(index[some], torch.from_numpy(rows))
        chosen = source.tables.chosen(adapters)
        self._set_keys(source, chosen, index.numpy())

    def _set_keys(self, source: StoreSource, rows: np.ndarray, slots: np.ndarray) -> None:
        """Have slots stand by the first basis among their rows, int64 `[slots, …]`."""
        bases = source.tables.bases["v"][rows].reshape(len(rows), -1)
        firsts = np.where(bases < 0, np.iinfo(np.int32).max, bases).min(axis=1)
        self.keys[slots] = keys_of(firsts, slots)

    def _put_cores(
        self, slot: int, first: int, cores: torch.Tensor, steps: torch.Tensor | None
    ) -> None:
        """Put what slots hold (`_cores_of`) into those from `slot` on, from number `first` on."""
        place = code_width(first, self._kind) if self._kind else first
        copy_to(self.cores[slot : slot + len(cores), place : place + cores.shape[1]], cores)
        if self.core_steps is not None and steps is not None:
            place = first // BLOCK
            copy_to(
                self.core_steps[slot : slot + len(steps), place : place + steps.shape[1]], steps
            )

    def _rows_of(
        self, source: StoreSource, adapters: Sequence[int], slots: Sequence[int]
    ) -> np.ndarray:
        """int32 `[adapters, targets, K, 7]`."""
        chosen = source.tables.chosen(adapters)
        number = np.where(source.columns[:, None] < 0, 0, chosen[:, source.columns])
        own = np.asarray(slots, dtype=np.int64)[:, None, None]
        rows = np.zeros((*number.shape[:2], self._depth, len(ROW_FIELDS)), dtype=np.int32)
        rows[..., SCALE_ROW] = rows[..., CORE_SLOT] = -1
        rows[:, :, : number.shape[2]] = self.rows_at(source, number, own)
        return rows

    def rows_at(
        self, source: StoreSource, number: np.ndarray, core_slots: np.ndarray
    ) -> np.ndarray:
        """Rows of a generation as the pools have them: int32 `[b, targets, K, 7]`.

        Args:
            source: the generation.
            number: int64 `[b, targets, K]`, which rows (`Tables.rows`); 0: an unused one. Of
                experts the first one's.
            core_slots: int64, where their cores lie; of a shape that fits.
        """
        tables, at = source.tables, self._addresses
        number = np.where(number > 0, number + self._experts[None, :, None], 0)
        given = tables.rows[number].astype(np.int64)  # [b, T, K, 5]
        used = given[..., RANK] > 0
        depth = given.shape[2]
        out = np.zeros((*number.shape, len(ROW_FIELDS)), dtype=np.int64)
        out[..., SCALE_ROW] = -1
        target = np.arange(len(self._targets))[None, :, None]
        for side, column in (("v", V_START), ("u", U_START)):
            basis = tables.bases[side][number]
            slot = np.maximum(_pick(source.slots[side], basis), 0)
            fixed = np.broadcast_to(at[f"{side}_fixed"][None, :, None], slot.shape)
            # What is the same for all adapters goes by the row's place among the adapter's.
            where = np.where(fixed, np.arange(depth), slot)
            # What experts share lies where the first one's does.
            wide = _pick(tables.wide[side], basis) > 0
            whose = np.where(wide, target, self._firsts[None, :, None])
            address = at[side][whose, np.minimum(where, at[side].shape[1] - 1)]
            out[..., column] = np.where(used, address, 0)
        workers, worker = (at[name][None, :, None] for name in ("workers", "worker"))
        rank = (given[..., RANK] + workers - 1 - worker) // workers
        out[..., RANK] = np.where(used, rank, 0)
        cored = used & at["cored"][None, :, None]
        out[..., CORE_KIND] = np.where(cored, given[..., CORE_KIND], CORE_NONE)
        has_core = cored & (given[..., CORE_KIND] != CORE_NONE)
        out[..., CORE_SLOT] = np.where(has_core, core_slots, -1)
        out[..., CORE_OFFSET] = np.where(has_core, source.offsets[None, :, None], 0)
        scales = tables.bases["scales"][number]
        scaled = cored & (scales >= 0)
        if scaled.any():
            slot = np.maximum(_pick(source.slots["scales"], scales), 0)
            out[..., SCALE_ROW] = np.where(scaled, at["scales"][target, slot], -1)
        return out.astype(np.int32)

    def _set_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        for start, short, long in self._row_parts:
            its = rows[:, start : start + short.shape[1]]
            if long is not None and int(index[0]) >= self.count:
                copy_to(long[int(index[0]) - self.count], its[0])
            elif goes_up_by_one(index):
                copy_to(short[int(index[0]) : int(index[0]) + len(index)], its)
            else:
                short[to_device(index, short.device)] = to_device(its, short.device)

    def fill_upload_basis(self, upload: LoRAModel, side: str, slot: int) -> None:
        """Put A (`v`) or B (`u`) of an upload into a slot for uploads."""
        for layer in self._layers:
            pairs = _pairs(layer, upload)
            if any(pair is not None for pair in pairs):
                layer.put_upload(side, slot, pairs)

    def fill_upload(self, upload: LoRAModel, slot: int, slots: Mapping[str, int]) -> None:
        """Put the rows of an upload into a core slot.

        Args:
            upload: its factors.
            slot: the core slot.
            slots: side → its basis slot.
        """
        rows = np.zeros((len(self._targets), self._depth, len(ROW_FIELDS)), dtype=np.int32)
        rows[..., SCALE_ROW] = rows[..., CORE_SLOT] = -1
        rows[..., CORE_KIND] = CORE_NONE
        rows[:, 0] = self.upload_rows(upload, slots)
        self._set_rows(torch.tensor([slot]), torch.from_numpy(rows)[None])
        self.note_uploads([upload], slot)
        self.keys[slot] = _key_alone(slot)

    def upload_rows(self, upload: LoRAModel, slots: Mapping[str, int]) -> np.ndarray:
        """The rows of an upload, by its basis slots: int32 `[targets, 7]`."""
        rows = np.zeros((len(self._targets), len(ROW_FIELDS)), dtype=np.int32)
        rows[:, SCALE_ROW] = rows[:, CORE_SLOT] = -1
        i = 0
        for layer in self._layers:
            ranks = [0 if pair is None else len(pair[0]) for pair in _pairs(layer, upload)]
            for v, u, rank in layer.upload_rows(slots, ranks):
                rows[i, [V_START, U_START, RANK]] = (v, u, rank) if rank else 0
                i += 1
        return rows

    def note_uploads(self, uploads: Sequence[LoRAModel], slot: int) -> None:
        """Have the layers remember which of them the uploads in a slot adapt."""
        if not uploads and slot not in self._with_uploads:
            return
        self.eager[slot] = False
        for layer in self._layers:
            present = any(pair is not None for each in uploads for pair in _pairs(layer, each))
            layer.note_upload(slot, present)
            self.eager[slot] |= present and layer.compiled and not layer.adapted
        (self._with_uploads.add if uploads else self._with_uploads.discard)(slot)

    # --- blends ---

    def fill_blend_core(
        self, source: StoreSource | None, numbers: torch.Tensor, factor: float, slot: int
    ) -> None:
        """Put a core of a blend into a slot, rounded as the slots are.

        Args:
            source: the generation whose core it is; None: there is none.
            numbers: float32 `[core_row]` of that generation.
            factor: what rows without a core are multiplied by, behind it.
            slot: the core slot.
        """
        if source is not None:
            if self._kind is None:
                its = numbers if source.held is None else numbers[source.held]
                self._put_cores(slot, 0, its[None], None)
            else:
                codes = self._held_codes(source, *quantise(numbers[None], self._kind))
                self._put_cores(slot, 0, *codes)
        tail = torch.full((1, self._capacity.tail), factor)
        self._put_cores(
            slot, self.tail, *((tail, None) if self._kind is None else quantise(tail, self._kind))
        )

    def fill_blend(
        self,
        rows: np.ndarray,
        slot: int,
        uploads: Sequence[LoRAModel],
        keyed: np.ndarray | None,
        source: StoreSource | None,
    ) -> None:
        """Put the rows of a blend into a core slot or a long one.

        Args:
            rows: int32 `[targets, n, 7]`.
            slot: the slot.
            uploads: those among its parts.
            keyed: int64 `[m, n]`, the rows of one generation, by which it stands beside others.
            source: the generation, or None: it is made of uploads alone.
        """
        depth = self._depth if slot < self.count else self._capacity.depth
        whole = np.zeros((len(self._targets), depth, len(ROW_FIELDS)), dtype=np.int32)
        whole[..., SCALE_ROW] = whole[..., CORE_SLOT] = -1
        # Those that are used come first: no call looks at more than it must.
        order = np.argsort(rows[..., RANK] <= 0, axis=1, kind="stable")
        rows = np.take_along_axis(rows, order[..., None], axis=1)[:, :depth]
        whole[:, : rows.shape[1]] = rows
        placed = self._addresses["placed"]
        if placed.any():
            whole[placed, :, V_START] = self._addresses["v"][placed, :depth]
        self._set_rows(torch.tensor([slot]), torch.from_numpy(whole)[None])
        self.note_uploads(uploads, slot)
        if source is None:
            self.keys[slot] = _key_alone(slot)
        else:
            self._set_keys(source, keyed[None], np.array([slot]))

    def _cores_of(
        self, source: StoreSource, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What slots hold of adapters `first … last-1`: cores and None, or codes and steps."""
        held = source.held
        if self._kind is None:
            cores = source.store.cores(first, last)
            return cores if held is None else cores[:, held], None
        return self._held_codes(source, *source.store.core_codes(first, last))

    def _held_codes(
        self, source: StoreSource, codes: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if source.held is None:
            return codes, steps
        width = code_width(BLOCK, self._kind)
        columns = (source.held[:, None] * width + torch.arange(width)).flatten()
        return codes[:, columns[columns < codes.shape[1]]], steps[:, source.held]


def _key_alone(slot: int) -> int:
    """The key of a slot that reads its bases with nobody."""
    return int(keys_of(np.array(_ALONE + slot), np.array(slot)))


def _alike(source: StoreSource, side: str) -> list[np.ndarray]:
    """The places that take their vectors alike: int64 each."""
    if side not in source.alike:
        found: dict[Hashable, list[int]] = {}
        for p, (layer, s, module) in enumerate(source.places):
            found.setdefault(layer.takes(side, s, module), []).append(p)
        source.alike[side] = [np.array(each) for each in found.values()]
    return source.alike[side]


def _pick(slots: np.ndarray, bases: np.ndarray) -> np.ndarray:
    """The slot of each basis, −1 where there is no basis."""
    if not len(slots):
        return np.full(bases.shape, -1, dtype=np.int64)
    return np.where(bases < 0, -1, slots[np.maximum(bases, 0)]).astype(np.int64)


def _pairs(layer: LayerPools, upload: LoRAModel) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(A, B) of an upload for each module of a layer (`LayerPools.names`), or None."""
    found = [upload.get_lora(name) for name in layer.names]
    return [None if lora is None else (lora.lora_a, lora.lora_b) for lora in found]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return large_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _held(
    store: Store, columns: Sequence[int], block: int
) -> tuple[dict[int, int], torch.Tensor | None]:
    """What of a core row one worker needs: of a pipeline's stage, the modules of its own layers.

    Returns:
        Where the core of each module begins then, by its column, and which blocks of `block`
        entries of the row it holds (int64), or None: all of them.
    """
    modules = store.manifest.modules
    used = sorted({column for column in columns if column >= 0})
    if len(used) == len(modules):
        return {column: modules[column].core_offset for column in used}, None
    first = [modules[column].core_offset // block for column in used]
    ranges = [
        torch.arange(begin, -(-(module.core_offset + module.core_size) // block))
        for begin, module in zip(first, (modules[column] for column in used), strict=True)
    ]
    held = torch.cat([torch.empty(0, dtype=torch.long), *ranges]).unique()
    places = torch.searchsorted(held, torch.tensor(first, dtype=torch.long)).tolist()
    offsets = {
        column: place * block + modules[column].core_offset % block
        for column, place in zip(used, places, strict=True)
    }
    return offsets, held


def _runs(slots: Sequence[int], adapters: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(first slot, first adapter, last adapter + 1) where both go up by one together."""
    runs: list[tuple[int, int, int]] = []
    for slot, adapter in zip(slots, adapters, strict=True):
        if runs and runs[-1][2] == adapter and runs[-1][0] + adapter - runs[-1][1] == slot:
            runs[-1] = (*runs[-1][:2], adapter + 1)
        else:
            runs.append((slot, adapter, adapter + 1))
    return runs
