"""The basis slots of one layer on one worker: which numbers lie where in its pools.

There are three forms: rows of the pools' dtype, rows in 8 bits, and packed for the CPU kernel. All
slots for stores of one layer are in one form, in which the device reads fastest what the store that
the server started with has; those for uploads are always rows of the pools' dtype.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import PACKED, Int8Rows, backend_name
from vllm_jd.kernels.cpu.layout import MAX_INT8_RANK, UNIT
from vllm_jd.kernels.cpu.memory import large_pages
from vllm_jd.kernels.cpu.packed import can_pack, pack_vectors, packed_units
from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.engine.tables import POOLS
from vllm_jd.plugin.worker.step import copy_to
from vllm_jd.row import BLOCK
from vllm_jd.store import ModuleInfo, Store

Vectors = torch.Tensor | Int8Rows
"""Basis vectors as rows: numbers `[n, width]`, or the same in 8 bits."""


class Part:
    """Which part of a layer's factors this worker holds: as vLLM cuts an adapter's own.

    Args:
        layer: vLLM's LoRA layer.
        outputs: how many of the layer's outputs each slice is, in their order.
        whole: the width of each output of all workers together.
    """

    def __init__(self, layer: BaseLayerWithLoRA, outputs: Sequence[int], whole: Sequence[int]):
        self._layer, self._widths = layer, list(whole)
        ends = np.cumsum(outputs)
        self._outputs = [slice(end - n, end) for end, n in zip(ends, outputs, strict=True)]
        self.d_in: int = layer.input_size
        """Width of the layer's input here."""
        self.widths = tuple(sum(layer.output_slices[its]) for its in self._outputs)
        """Width of each slice here."""
        self.whole = tuple(sum(self._widths[its]) for its in self._outputs)
        """Width of each slice of all workers together."""

    def cut(self, s: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of A `[r, d_in]` and B `[d_out, r]` of slice `s`."""
        layer, its = self._layer, self._outputs[s]
        if layer.tp_size == 1:
            return a, b
        n = len(self._widths)
        if n == 1:
            return layer.slice_lora_a(a), layer.slice_lora_b(b)
        pieces: Sequence[torch.Tensor] = [b]
        if its.stop - its.start > 1:
            if len(b) != self.whole[s]:
                return a, b[:0]  # nothing of one that has another width: it is not this layer's
            pieces = b.split(self._widths[its])
        alone_a: list[torch.Tensor | None] = [None] * n
        alone_b = list(alone_a)
        alone_a[its], alone_b[its] = [a] * len(pieces), pieces
        cut_a, cut_b = layer.slice_lora_a(alone_a), layer.slice_lora_b(alone_b)
        return cut_a[its.start], torch.cat(cut_b[its])

    def own_columns(self, s: int, side: str, module: ModuleInfo) -> torch.Tensor | None:
        """Which numbers of a vector of V (`v`), U or an output scale this worker has: int64, or
        None: all of them."""
        if self._layer.tp_size == 1:
            return None
        every = torch.arange(module.d_in if side == "v" else module.d_out)
        if side == "v":
            own = self.cut(s, every[None], every.new_empty(module.d_out, 1))[0][0]
        else:
            own = self.cut(s, every.new_empty(1, module.d_in), every[:, None])[1][:, 0]
        return None if torch.equal(own, every) else own

    def check(self, s: int, module: ModuleInfo) -> None:
        """Raises ValueError where a module has another shape than the layer."""
        v, u = torch.empty(1, module.d_in), torch.empty(module.d_out, 1)
        cut_v, cut_u = self.cut(s, v, u)
        found, expected = (cut_u.shape[0], cut_v.shape[1]), (self.widths[s], self.d_in)
        if found != expected:
            raise ValueError(
                f"the store's module {module.name} is {module.d_out} × {module.d_in} (d_out × "
                f"d_in), the model's layer differs: {found} against {expected} on this worker; "
                "the store was made for another base model"
            )

    def cuts_between_blocks(self, s: int, module: ModuleInfo) -> bool:
        """Whether this worker's columns are whole blocks of numbers in 8 bits."""
        for side in ("v", "u"):
            columns = self.own_columns(s, side, module)
            if columns is not None:
                blocks = columns // BLOCK
                if not torch.equal(blocks, blocks[::BLOCK].repeat_interleave(BLOCK)[: len(blocks)]):
                    return False
        return True


def read_vectors(
    store: Store,
    modules: Sequence[str],
    side: str,
    firsts: Sequence[int],
    count: int,
    columns: torch.Tensor | None,
    *,
    in_8_bits: bool,
) -> Vectors:
    """A worker's part of the same number of vectors of each of several modules.

    Args:
        store: where to read them.
        modules: whose they are; their vectors are equally long.
        side: `v`, `u` or `scales`.
        firsts: the first of each module.
        count: how many of each.
        columns: which numbers of a vector (`Part.own_columns`).
        in_8_bits: as codes and steps, of a quantised store; of scales never.

    Returns:
        `[modules · count, width]`, module after module.

    Raises:
        StoreError: they cannot be read.
    """
    pool = POOLS[side]
    if not in_8_bits or side == "scales":
        rows = store.vectors_of(modules, pool, firsts, count)
        return rows if columns is None else rows[:, columns]
    codes, steps = store.vector_codes_of(modules, pool, firsts, count)
    if columns is not None:
        codes, steps = codes[:, columns], steps[:, columns[::BLOCK] // BLOCK]
    return Int8Rows(codes.contiguous(), steps.contiguous())


def take(rows: Vectors, index: np.ndarray) -> Vectors:
    """The vectors of these numbers, in this order."""
    chosen = torch.from_numpy(index)
    if isinstance(rows, Int8Rows):
        return Int8Rows(rows.codes[chosen], rows.steps[chosen])
    return rows[chosen]


class Spans(NamedTuple):
    """Runs of vectors, by what is to go where: numpy int64 `[n]` each.

    `slots`: the slots to fill; `starts`: the first vector of each, in what is given along;
    `ranks`: how many vectors; `experts`: whose of a slot, one number: the same of all.
    """

    slots: np.ndarray
    starts: np.ndarray
    ranks: np.ndarray
    experts: np.ndarray | int = 0


class Form(Protocol):
    """How the slots for stores lie in memory."""

    def address(self, side: str, expert: int = 0) -> np.ndarray:
        """Side → int64 `[slices, slots]`: what rows of an expert say of each slot, −1 where a slice
        has none."""

    def put(self, side: str, s: int, spans: Spans, vectors: Vectors) -> None:
        """Fill slots of slice `s`."""

    def prepared(self, side: str, vectors: Vectors, rank: int) -> Sequence[Any]:
        """Bases as they are to lie in a slot each, here or in a layer that is alike.

        Args:
            side: what they are of.
            vectors: `[bases · rank, width]`, basis after basis.
            rank: of each of them, 1 or more.
        """

    def place(self, side: str, s: int, slot: int, basis: Any) -> None:
        """Fill one slot of slice `s` with what was `prepared`."""


def form_of(
    dtype: torch.dtype, device: torch.device, *, in_8_bits: bool, rank: int, packs: bool = True
) -> type["Form"]:
    """The form that suits the device.

    Args:
        dtype: of the pools.
        device: of the pools.
        in_8_bits: whether all of the layer's bases are there in 8 bits.
        rank: the highest rank.
        packs: whether they may be packed.
    """
    if packs and packs_bases(dtype, device):
        return PackedInt8 if in_8_bits and rank <= MAX_INT8_RANK else PackedRows
    return CodedRows if in_8_bits else PlainRows


def packs_bases(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether bases of stores are packed on this device."""
    return backend_name(device) == "cpu" and can_pack(dtype)


class _Layout:
    """What the forms have in common: whose slots there are, and where in rows of vectors.

    Args:
        d_in: width of the layer's input.
        widths: of each output.
        classes: side → the slots for stores (`Capacity.bases`).
        adapted: which slices have any.
        dtype: of the pools.
        device: of the pools.
        experts: for how many a wide slot has room; 1 of a plain layer.
    """

    in_8_bits = False

    def __init__(
        self,
        d_in: int,
        widths: Sequence[int],
        classes: Mapping[str, Sequence[SlotClass]],
        adapted: Sequence[bool],
        *,
        dtype: torch.dtype,
        device: torch.device,
        experts: int = 1,
    ):
        self._d_in, self._widths, self._adapted = d_in, widths, adapted
        self._classes = classes
        self._like = {"dtype": dtype, "device": device}
        self.highest_rank = max((c.rank for own in classes.values() for c in own), default=0)
        """Of any basis that has a slot."""
        self._vectors = dict.fromkeys(classes, 0)
        self._starts: dict[str, np.ndarray] = {}
        """Side → int64 `[experts, slots]`, where in a slice's vectors those of each slot begin."""
        for side, own in classes.items():
            parts = [np.zeros((experts, 0), dtype=np.int64)]
            for c in own:
                each = c.rank * (experts if c.wide else 1)
                place = c.rank * np.arange(experts)[:, None] if c.wide else np.zeros((experts, 1))
                parts.append(self._vectors[side] + each * np.arange(c.count) + place)
                self._vectors[side] += each * c.count
            self._starts[side] = np.concatenate(parts, axis=1).astype(np.int64)
        self.scales = [
            torch.zeros(self._vectors["scales"] if has else 0, width, **self._like)
            for has, width in zip(adapted, widths, strict=True)
        ]

    def vectors(self, side: str, s: int) -> int:
        """How many vectors slice `s` has room for."""
        return self._vectors[side] if self._adapted[s] else 0

    def address(self, side: str, expert: int = 0) -> np.ndarray:
        """See `Form`. V of all slices lie one after the other, U and scales each for itself."""
        starts = self._starts[side][expert]
        return np.stack(
            [
                starts + self._first(side, s) if has else np.full_like(starts, -1)
                for s, has in enumerate(self._adapted)
            ]
        )

    def _first(self, side: str, s: int) -> int:
        """Where among the vectors of one pool those of slice `s` begin."""
        return sum(self.vectors("v", before) for before in range(s)) if side == "v" else 0

    def prepared(self, side: str, vectors: Vectors, rank: int) -> Sequence[Any]:
        """See `Form`."""
        if isinstance(vectors, Int8Rows):
            vectors = vectors.decode(self._like["dtype"])
        return _on_the_way(vectors.to(self._like["dtype"]), self._like["device"]).split(rank)

    def place(self, side: str, s: int, slot: int, basis: Any) -> None:
        """See `Form`."""
        pool = {"v": self.v, "u": self.u[s], "scales": self.scales[s]}[side]
        _place_rows(pool, self._first(side, s) + int(self._starts[side][0, slot]), basis)

    def _put_scales(self, s: int, spans: Spans, rows: torch.Tensor) -> None:
        target = torch.from_numpy(self._starts["scales"][0, spans.slots]).to(self._like["device"])
        chosen = rows[torch.from_numpy(spans.starts)]
        self.scales[s][target] = chosen.to(**self._like)

    def _places(self, side: str, s: int, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
        """Where vectors go to, and where they come from: int64 `[vectors]` each."""
        first = self._starts[side][spans.experts, spans.slots] + self._first(side, s)
        target = _runs(first, spans.ranks)
        return torch.from_numpy(target), torch.from_numpy(_runs(spans.starts, spans.ranks))


class PlainRows(_Layout):
    """Rows of the pools' dtype."""

    def __init__(self, *args: object, **like: object):
        super().__init__(*args, **like)
        slices = range(len(self._widths))
        self.v = torch.zeros(sum(self.vectors("v", s) for s in slices), self._d_in, **self._like)
        self.u = [torch.zeros(self.vectors("u", s), self._widths[s], **self._like) for s in slices]

    def put(self, side: str, s: int, spans: Spans, vectors: Vectors) -> None:
        """See `Form`."""
        if side == "scales":
            return self._put_scales(s, spans, vectors)
        target, source = self._places(side, s, spans)
        if isinstance(vectors, Int8Rows):
            vectors = vectors.decode(self._like["dtype"])
        pool = self.v if side == "v" else self.u[s]
        _copy_rows(pool, target, vectors, source)
        return None


class CodedRows(_Layout):
    """Rows in 8 bits."""

    in_8_bits = True

    def __init__(self, *args: object, **like: object):
        super().__init__(*args, **like)
        slices = range(len(self._widths))
        self.v = torch.zeros(0, self._d_in, **self._like)
        self.u = [torch.zeros(0, width, **self._like) for width in self._widths]
        self.v_int8 = self._rows(sum(self.vectors("v", s) for s in slices), self._d_in)
        self.u_int8 = [self._rows(self.vectors("u", s), self._widths[s]) for s in slices]

    def _rows(self, n: int, width: int) -> Int8Rows:
        device = self._like["device"]
        return Int8Rows(
            torch.zeros(n, width, dtype=torch.int8, device=device),
            torch.zeros(n, -(-width // BLOCK), dtype=torch.bfloat16, device=device),
        )

    def put(self, side: str, s: int, spans: Spans, vectors: Vectors) -> None:
        """See `Form`."""
        if side == "scales":
            return self._put_scales(s, spans, vectors)
        target, source = self._places(side, s, spans)
        pool = self.v_int8 if side == "v" else self.u_int8[s]
        _copy_rows(pool.codes, target, vectors.codes, source)
        _copy_rows(pool.steps, target, vectors.steps, source)
        return None

    def prepared(self, side: str, vectors: Vectors, rank: int) -> Sequence[Any]:
        """See `Form`."""
        if side == "scales":
            return super().prepared(side, vectors, rank)
        codes, steps = (
            _on_the_way(part, self._like["device"]).split(rank)
            for part in (vectors.codes, vectors.steps)
        )
        return list(zip(codes, steps, strict=True))

    def place(self, side: str, s: int, slot: int, basis: Any) -> None:
        """See `Form`."""
        if side == "scales":
            return super().place(side, s, slot, basis)
        pool = self.v_int8 if side == "v" else self.u_int8[s]
        first = self._first(side, s) + int(self._starts[side][0, slot])
        for part, own in zip((pool.codes, pool.steps), basis, strict=True):
            _place_rows(part, first, own)
        return None


class PackedRows(_Layout):
    """Packed for the CPU kernel (`vllm_jd.kernels.cpu.packed`): all that one slot of V and the slot
    of U with the same number have of the layer, slice after slice, so that a cluster is read in
    one stream."""

    def __init__(self, *args: object, **like: object):
        super().__init__(*args, **like)
        self.v = torch.zeros(0, self._d_in, **self._like)
        self.u = [torch.zeros(0, width, **self._like) for width in self._widths]
        self._units: dict[str, np.ndarray] = {
            side: np.full((len(self._widths), self._starts[side].shape[1]), -1, dtype=np.int64)
            for side in ("v", "u")
        }
        self.packed = large_pages(self._place() * UNIT)
        self._room = self.packed.numpy()
        if not self.in_8_bits:
            self.packed = self.packed.view(torch.bfloat16)

    def _place(self) -> int:
        """Say where every slot lies, in units; how many units there are."""
        end = 0
        together = [tuple(c) for c in self._classes["v"]] == [tuple(c) for c in self._classes["u"]]
        for sides in [("v", "u")] if together else [("v",), ("u",)]:
            for each in self._classes[sides[0]]:
                cell = 0
                for s, has in enumerate(self._adapted):
                    for side in sides if has else ():
                        places = end + cell + np.arange(each.count) * self._cell(each.rank, sides)
                        self._units[side][s, each.first : each.first + each.count] = places
                        cell += self._size(side, s, each.rank)
                end += each.count * self._cell(each.rank, sides)
        return end

    def _cell(self, rank: int, sides: Sequence[str]) -> int:
        return sum(
            self._size(side, s, rank)
            for s, has in enumerate(self._adapted)
            for side in (sides if has else ())
        )

    def _size(self, side: str, s: int, rank: int) -> int:
        width = self._d_in if side == "v" else self._widths[s]
        return packed_units(side, rank, width, in_8_bits=self.in_8_bits)

    def address(self, side: str, expert: int = 0) -> np.ndarray:
        """See `Form`. Layers of experts are never packed."""
        if side == "scales":
            return super().address(side)
        units = self._units[side]
        return np.where(units < 0, -1, units + PACKED)

    def put(self, side: str, s: int, spans: Spans, vectors: Vectors) -> None:
        """See `Form`. Vectors of one rank are packed together."""
        if side == "scales":
            return self._put_scales(s, spans, vectors)
        for rank in np.unique(spans.ranks).tolist():
            of_rank = spans.ranks == rank
            some = take(vectors, _runs(spans.starts[of_rank], spans.ranks[of_rank]))
            bases = self.prepared(side, some, rank)
            for slot, basis in zip(spans.slots[of_rank].tolist(), bases, strict=True):
                self.place(side, s, slot, basis)
        return None

    def prepared(self, side: str, vectors: Vectors, rank: int) -> Sequence[Any]:
        """See `Form`."""
        if side == "scales":
            return super().prepared(side, vectors, rank)
        if isinstance(vectors, Int8Rows) and not self.in_8_bits:
            vectors = vectors.decode(torch.bfloat16)
        return pack_vectors(side, vectors, rank).numpy()

    def place(self, side: str, s: int, slot: int, basis: Any) -> None:
        """See `Form`."""
        if side == "scales":
            return super().place(side, s, slot, basis)
        first = int(self._units[side][s, slot]) * UNIT
        self._room[first : first + len(basis)] = basis
        return None


class PackedInt8(PackedRows):
    """The same in 8 bits."""

    in_8_bits = True


def _runs(starts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """start, start + 1, … start + rank − 1 of each, one after the other: int64."""
    ends = np.cumsum(ranks)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - ranks, ranks)
    return np.repeat(starts, ranks) + within


def goes_up_by_one(index: torch.Tensor) -> bool:
    """Whether an index is one run: n, n + 1, n + 2, …"""
    return len(index) > 0 and bool((index.diff() == 1).all())


def _on_the_way(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows from where many copies to `device` may read: for a GPU, page-locked all at once."""
    return rows.contiguous().pin_memory() if device.type == "cuda" else rows


def _place_rows(pool: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    copy_to(pool[first : first + len(rows)], rows)


def _copy_rows(
    pool: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, source: torch.Tensor
) -> None:
    """pool[target] = rows[source]; runs that go on are copied without an index."""
    if goes_up_by_one(target):
        first = int(target[0])
        copy_to(pool[first : first + len(target)], rows[source])
        return
    chosen = rows[source].to(pool.dtype)
    if pool.device.type == "cuda":
        chosen, target = chosen.pin_memory(), target.pin_memory()
    pool[target.to(pool.device, non_blocking=True)] = chosen.to(pool.device, non_blocking=True)
