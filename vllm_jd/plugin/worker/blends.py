"""The blends that one worker knows: their cores are summed up as their slots are filled."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_jd.plugin.engine.blends import Chosen, Layout
from vllm_jd.plugin.engine.orders import MakeBlend
from vllm_jd.plugin.engine.residency import Adapter
from vllm_jd.plugin.worker.slots import Slots, StoreSource
from vllm_jd.plugin.worker.uploads import Uploads
from vllm_jd.row import (
    CORE_DIAGONAL,
    CORE_KIND,
    CORE_NONE,
    CORE_OFFSET,
    CORE_SLOT,
    RANK,
    Row,
)
from vllm_jd.store import Store
from vllm_jd.store.blend import merge, weighted


class _Known:
    """A blend, and where its cores lie."""

    def __init__(self, order: MakeBlend, layout: Layout):
        self.order, self.layout = order, layout
        self.slots: dict[int, int] = {}  # place → core slot


class Blends:
    """The blends of one worker.

    Args:
        slots: the worker's, which are filled.
        stores: source → the generations that it has open.
        uploads: those that it knows.
        upload_slots: source → side → the basis slot of each upload.
    """

    def __init__(
        self,
        slots: Slots,
        stores: Mapping[int, StoreSource],
        uploads: Uploads,
        upload_slots: Mapping[int, Mapping[str, int]],
    ):
        self._slots, self._stores = slots, stores
        self._uploads, self._upload_slots = uploads, upload_slots
        self._known: dict[int, _Known] = {}

    def __contains__(self, source: int) -> bool:
        return source in self._known

    def add(self, order: MakeBlend) -> None:
        """Take note of a blend, of parts that are known."""
        tables = {
            term.source: self._stores[term.source].tables
            for term in order.terms
            if term.source in self._stores
        }
        self._known[order.source] = _Known(order, Layout.of(order.terms, tables))

    def forget(self, source: int) -> None:
        """Give up its memory."""
        self._known.pop(source, None)

    def fill(self, what: Adapter, slot: int, *, rows_only: bool) -> None:
        """Fill a slot of a blend: number 0 is the blend, the others are its further cores.

        Raises:
            StoreError: a core cannot be read; what lies in the slot is not to be used.
            Exception: as `Uploads.get`.
        """
        known = self._known[what.source]
        if what.number:
            known.slots[what.number - 1] = slot
            self._fill_core(known, what.number - 1, slot)
            return
        if slot < self._slots.count:  # a core slot, with its only core
            known.slots = {0: slot}
            if not rows_only:
                self._fill_core(known, 0, slot)
        self._fill_rows(known, slot)

    def _fill_core(self, known: _Known, place: int, slot: int) -> None:
        layout = known.layout
        factor = layout.factors[place] if place < len(layout.factors) else 1.0
        for number, chosen in layout.chosen.items():
            own = place - layout.first_place[number]
            if 0 <= own <= int(chosen.places.max(initial=-1)):
                source = self._stores[number]
                core = self._core(known, source, chosen, own)
                self._slots.fill_blend_core(source, core, factor, slot)
                return
        self._slots.fill_blend_core(None, torch.empty(0), factor, slot)

    def _core(self, known: _Known, source: StoreSource, chosen: Chosen, place: int) -> torch.Tensor:
        """float32 `[core_row]`: the sums that lie in one place of those of a generation."""
        store, order = source.store, known.order
        modules = store.manifest.modules
        if order.blend.way != "linear":  # of one cluster: its only place, of all parts
            cores = _cores_of(store, chosen.numbers)
            whole = torch.zeros(store.manifest.core_row)
            for column, module in enumerate(modules):
                row = Row(*source.tables.rows[chosen.rows[column, 0]].tolist())
                size = row.core_size if row.rank else 0  # without what fills it up
                for expert in range(module.each if size else 0):
                    first = module.core_offset + expert * module.expert_core
                    its, name = slice(first, first + size), module.layer(expert)
                    part = cores[:, its]
                    whole[its] = merge(part, chosen.weights, order.blend, order.whose, name)
            return whole
        here = chosen.users & (chosen.places == place)[:, :, None]  # [m, R, parts]
        some = here.any(axis=(0, 1))  # the parts of other clusters have nothing here
        cores = _cores_of(store, np.array(chosen.numbers)[some].tolist())
        weights = torch.tensor(chosen.weights, dtype=torch.float32)[torch.from_numpy(some)]
        coefficients = torch.from_numpy(here[..., some].any(axis=1).T.copy()) * weights[:, None]
        if bool((coefficients == weights[:, None]).all()):
            return weights @ cores
        column_of = torch.full((store.manifest.core_row,), len(modules))
        for column, module in enumerate(modules):
            column_of[module.core_offset : module.core_offset + module.core_size] = column
        return weighted(cores, coefficients, column_of)

    def _fill_rows(self, known: _Known, slot: int) -> None:
        layout, rows, keyed = known.layout, [], None
        for number, chosen in layout.chosen.items():
            source = self._stores[number]
            there = source.columns[:, None] >= 0
            of_targets = np.where(there, chosen.rows[source.columns], 0)
            places = np.where(there, chosen.places[source.columns], -1)
            first = layout.first_place[number]
            core_slots = np.array([known.slots.get(first + p, -1) for p in range(layout.cores)])
            where = core_slots[np.maximum(places, 0)] if layout.cores else places
            its = self._slots.rows_at(source, of_targets[None], where[None])[0]
            self._weigh(known, its, chosen.factors[source.columns])
            rows.append(its)
            keyed = (chosen.rows, source) if keyed is None else keyed
        uploads = []
        for number, weight in layout.uploads:
            upload = self._uploads.get(number)
            its = self._slots.upload_rows(upload, self._upload_slots[number])[:, None]
            self._weigh(known, its, np.float32(weight))
            rows.append(its)
            uploads.append(upload)
        chosen_rows, source = keyed or (None, None)
        self._slots.fill_blend(np.concatenate(rows, axis=1), slot, uploads, chosen_rows, source)

    def _weigh(self, known: _Known, rows: np.ndarray, factors: np.ndarray) -> None:
        """Multiply those of rows `[targets, n, 7]` that have no core by their weights."""
        factors = np.broadcast_to(factors, rows.shape[:2])
        coreless = (rows[..., RANK] > 0) & (rows[..., CORE_KIND] == CORE_NONE)
        rows[coreless & (factors == 0), RANK] = 0
        for place, factor in enumerate(known.layout.factors):
            its = coreless & (factors == np.float32(factor))
            rows[its, CORE_KIND] = CORE_DIAGONAL
            rows[its, CORE_SLOT] = known.slots.get(place, -1)
            rows[its, CORE_OFFSET] = self._slots.tail


def _cores_of(store: Store, numbers: Sequence[int]) -> torch.Tensor:
    """The cores of some adapters: float32 `[adapters, core_row]`."""
    return torch.cat([store.cores(n, n + 1) for n in numbers]).float()
