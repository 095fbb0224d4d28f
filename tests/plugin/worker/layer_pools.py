"""LayerPools with their slots, as the worker's manager makes them, and a residency of their own."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.residency import Adapter, Basis, Residency
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.worker.layer import LayerPools
from vllm_jd.plugin.worker.slots import Slots, keeps_codes


class OneLayer(LayerPools):
    """A layer into which a test puts uploads: place i is the core slot behind the store's."""

    def set_adapter(self, place, pairs):
        """(A, B) of each slice, or None."""
        loras = {
            item.name: None if pair is None else SimpleNamespace(lora_a=pair[0], lora_b=pair[1])
            for item, pair in zip(self.slices, pairs, strict=True)
        }
        upload = SimpleNamespace(get_lora=loras.get)
        for side in ("v", "u"):
            self.slots.fill_upload_basis(upload, side, place)
        slot = self.slots.count_of_store + place
        self.slots.fill_upload(upload, slot, {"v": place, "u": place})

    def clear_adapter(self, place):
        self.set_adapter(place, [None] * len(self.slices))


class SlotsOfOneLayer(Slots):
    """Slots, and who has them: what the engine decides for all workers."""

    def __init__(self, store, tables, layers, capacity, *, uploads, **like):
        super().__init__(store, tables, layers, capacity, **like)
        self.count_of_store = self.count - uploads
        self.source = self.begin()
        self.residency = Residency(replace(capacity, cores=self.count_of_store))
        self.reads = 0
        self._held = []
        self.paged = self.count_of_store < len(store)
        everything = {
            side: [self._basis(side, b) for b, rank in enumerate(ranks) if rank]
            for side, ranks in tables.ranks.items()
        }
        for bases in everything.values():
            self.residency.begin_bases(bases)
        if not self.paged:
            for i in range(len(store)):
                self.residency.begin(Adapter(1, i), self._parts(i)[0])

    def _basis(self, side, b):
        tables = self.source.tables
        return Basis(1, side, b, bool(tables.wide[side][b])), int(tables.ranks[side][b])

    def _parts(self, adapter):
        pairs = [
            self._basis(side, b)
            for side, numbers in self.source.tables.bases_of(adapter).items()
            for b in numbers
        ]
        return tuple(basis for basis, _ in pairs), tuple(rank for _, rank in pairs)

    def take(self, adapters):
        """The slots of one step's adapters, who hold them until the next."""
        for adapter in self._held:
            self.residency.release(Adapter(1, adapter))
        held, taken = [], {}
        for adapter in dict.fromkeys(adapters):
            found = self.residency.acquire(Adapter(1, adapter), *self._parts(adapter))
            if found is None:
                break
            held.append(adapter)
            slot, fills = found
            taken[adapter] = slot
            for fill in fills:
                if isinstance(fill.what, Adapter):
                    number = [fill.what.number]
                    self.fill_adapters(self.source, number, [slot], rows_only=fill.rows_only)
                    self.reads += not fill.rows_only
                else:
                    self.fill_basis(self.source, fill.what.side, fill.what.number, fill.slot)
        self._held = held
        return taken

    def resident(self, adapter):
        return self.residency.resident(Adapter(1, adapter))


def layer_pools(
    store, layer, slices, step, *, max_loras, max_rank, count=None, dtype=torch.float32, **options
):
    """(LayerPools of one layer, its Slots), `count` of them for the store (all that it has)."""
    like = {"dtype": dtype, "device": torch.device("cpu")}
    tables = Tables(store)
    config = PluginConfig(
        store=str(store.path), max_loras=max_loras, core_slots=count or len(store)
    )
    capacity = capacity_of(
        store,
        tables,
        config,
        max_num_seqs=1,
        max_lora_rank=max_rank,
        in_codes=keeps_codes(store, dtype),
    )
    pools = OneLayer(slices[0].name, layer, slices, store, capacity, step=step, **like, **options)
    pools.slots = SlotsOfOneLayer(store, tables, [pools], capacity, uploads=max_loras, **like)
    return pools, pools.slots
