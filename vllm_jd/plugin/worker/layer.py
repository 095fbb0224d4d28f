"""One wrapped linear layer of the model: its pools, and the slots in them."""

import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import ModulePools, backend, backend_name
from vllm_jd.kernels.cpu.operator import add_layer
from vllm_jd.kernels.embedding import look_up
from vllm_jd.kernels.tiles import places
from vllm_jd.kernels.triton.embedding import look_up as look_up_in_triton
from vllm_jd.plugin.engine.residency import Capacity, SlotClass
from vllm_jd.plugin.worker.bases import (
    Form,
    Part,
    PlainRows,
    Spans,
    Vectors,
    form_of,
    packs_bases,
    read_vectors,
)
from vllm_jd.plugin.worker.expert_names import expert_module
from vllm_jd.plugin.worker.sharded import OutputPart, Parallel, Shards
from vllm_jd.plugin.worker.step import Step, copy_to
from vllm_jd.store import ModuleInfo, Store


@dataclass(frozen=True)
class Slice:
    """One module of a layer, e.g. k of q, k, v.

    `name` is vLLM's name of the module (of experts, what stands for all of them); `module` what the
    store that the server started with says of it, or None where it has nothing for it; `outputs`
    how many outputs of the layer it is.
    """

    name: str
    module: ModuleInfo | None
    outputs: int = 1


_LAYERS: dict[str, "LayerPools"] = {}

_LIBRARY = torch.library.Library("vllm_jd", "FRAGMENT")
_LIBRARY.define("add_adapters(Tensor(a!) y, Tensor x, str layer) -> ()")


def _add_by_name(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    _LAYERS[layer].add(y, x)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("add_adapters", _add_by_name, _key)
_LIBRARY.impl("add_adapters", lambda y, x, layer: None, "Meta")


@dataclass(frozen=True)
class Target:
    """How rows of one slice in one product are made of a row of a store.

    Args:
        slice: which of the layer's slices.
        v: int64 `[slots]`, v_start by the slot of V; or `[K]`, by the adapter's row, where
            `v_fixed` says so.
        u: the same of U.
        scales: int64 `[slots]`, scale_row by the slot.
        v_fixed, u_fixed: whether those vectors are the same for all adapters.
        placed: whether V goes by the place of a row in its slot, in a blend's slot, too.
        cored: whether cores and scales belong to this product.
        worker, workers: of the rank this worker computes every `workers`-th, from `worker` on.
        expert: whose rows, of a layer of experts.
    """

    slice: int
    v: np.ndarray
    u: np.ndarray
    scales: np.ndarray
    v_fixed: bool = False
    u_fixed: bool = False
    placed: bool = False
    cored: bool = True
    worker: int = 0
    workers: int = 1
    expert: int = 0


class LayerPools:
    """The pools of one vLLM layer, and the basis slots in them.

    Stands in for the layer's punica wrapper. Of use once it has been given its core slots
    (`attach`).

    Args:
        name: vLLM's name of the layer. A compiled model finds its layers by it.
        layer: the vLLM LoRA layer, made for 0 adapters: it holds no weights of its own, but
            knows how factors are cut for tensor parallelism.
        slices: its modules, in the order of its outputs.
        store: that the server started with.
        capacity: how many slots there are.
        step: shared with all layers.
        dtype: of the pools.
        device: of the pools.
        sharded: how the workers share a layer that is fully sharded (see `sharded`), or None.
        compiled: whether it is in the part of the model that vLLM compiles.
        embedding: whether it is the model's embedding, whose input are numbers of tokens.
        experts: of a projection of a layer's experts how many there are (see `experts`); each has
            rows of its own, so that a slot of the kernels is that of a token's adapter times their
            number, plus the expert's. None: a plain layer.

    Raises:
        ValueError: a module of the store has another shape than the layer.
    """

    def __init__(
        self,
        name: str,
        layer: BaseLayerWithLoRA | Any,
        slices: list[Slice],
        store: Store,
        capacity: Capacity,
        *,
        step: Step,
        dtype: torch.dtype,
        device: torch.device,
        sharded: Parallel | None = None,
        compiled: bool = True,
        embedding: bool = False,
        experts: int | None = None,
    ):
        self.name = name
        self.slices = slices
        self.experts = experts
        self.compiled = compiled and experts is None
        self.embedding = embedding
        self._dtype = dtype
        self.each = experts or 1
        self.step = step
        """Shared with all layers."""
        self.adapted = any(item.module is not None for item in slices)
        """Whether the store has anything for this layer."""
        self._uploads: set[int] = set()  # slots of those that adapt it
        self.in_use = self.adapted
        """Whether any adapter that is there adapts this layer: the same on all workers."""
        outputs, d_in = _whole_outputs(layer)
        self._part = part = (OutputPart if sharded == "row" else Part)(
            layer, [item.outputs for item in slices], outputs
        )
        self.shapes = [(width, d_in) for width in part.whole]
        """(d_out, d_in) of each slice of the model's layer, of all workers together."""
        has = [item.module is not None for item in slices]
        for s, item in enumerate(slices):
            if item.module is not None:
                part.check(s, item.module)
        like = {"dtype": dtype, "device": device}
        classes = capacity.bases if self.adapted else dict.fromkeys(capacity.bases, ())
        uploads = capacity.uploads["v"]
        packs = sharded is None and experts is None and not embedding
        coded = self.adapted and _stays_coded(store, slices, part, dtype, device, packs)
        highest = max((c.rank for own in classes.values() for c in own), default=0)
        form = PlainRows
        if self.adapted:
            form = form_of(dtype, device, in_8_bits=coded, rank=highest, packs=packs)
        self._shards: Shards | None = None
        if sharded is None and not embedding:
            bases = form(part.d_in, part.widths, classes, has, experts=self.each, **like)
            self._products = [_Product(bases, uploads, step=step, experts=self.each, **like)]
        else:
            most = max((c.rank for c in classes["v"]), default=0)
            rows = store.manifest.rows
            ranks = [
                [max(most if has[s] else 0, uploads.rank if k == 0 else 0) for k in range(rows)]
                for s in range(len(slices))
            ]
            if embedding:  # of a blend any row may stand at any place
                ranks = [[max(ranks[0])] * max(rows, capacity.depth if capacity.long else 0)]
            shards = self._shards = Shards(sharded, layer.tp_rank, layer.tp_size, ranks)
            share = SlotClass(shards.share(uploads.rank), uploads.first, uploads.count)
            first, second = shards.split(classes)
            width = [shards.slice_width(s) for s in range(len(slices))]
            self._products = [
                (_LookUp if embedding else _Product)(
                    form(part.d_in, width, first, has, **like),
                    share,
                    step=step,
                    u=shards.units,
                    **like,
                ),
                _Product(
                    form(shards.z_width, part.widths, second, has, **like),
                    uploads,
                    step=step,
                    v=shards.picks,
                    **like,
                ),
            ]
        self.targets = self._make_targets(has)
        """What rows of this layer are made by, in the order of the pools' slices; where there are
        two products, those of the first, then those of the second."""
        _LAYERS[name] = self

    def _make_targets(self, has: Sequence[bool]) -> list[Target | None]:
        found: list[Target | None] = []
        shards = self._shards
        for p, expert in itertools.product(range(len(self._products)), range(self.each)):
            bases = self._products[p].bases
            v, u, scales = (bases.address(side, expert) for side in ("v", "u", "scales"))
            for s, adapted in enumerate(has):
                if not adapted:
                    found.append(None)
                elif shards is None:
                    found.append(Target(s, v[s], u[s], scales[s], expert=expert))
                elif p == 0:
                    fixed = self._products[p].first_u[s] + shards.place(s)
                    own = {"worker": shards.worker, "workers": shards.workers}
                    found.append(
                        Target(s, v[s], fixed, scales[s], u_fixed=True, cored=False, **own)
                    )
                else:
                    fixed = self._products[p].first_v[s] + shards.pick(s)
                    placed = self.embedding
                    found.append(Target(s, fixed, u[s], scales[s], v_fixed=True, placed=placed))
        return found

    @property
    def pools(self) -> ModulePools:
        """The pools; where there are two products, those of the second."""
        return self._products[-1].pools

    @property
    def rows(self) -> int:
        """How many slices of rows the layer has, of all its products and experts."""
        return len(self.targets)

    @functools.cached_property
    def names(self) -> list[str]:
        """What adapters call its modules: of experts those of the first, then of the next."""
        if self.experts is None:
            return [item.name for item in self.slices]
        return [
            expert_module(item.name, expert)
            for expert in range(self.experts)
            for item in self.slices
        ]

    def attach(
        self,
        cores: torch.Tensor,
        rows: torch.Tensor,
        core_steps: torch.Tensor | None = None,
        long_rows: torch.Tensor | None = None,
    ) -> None:
        """Take the cores `[core slots, core_row]` and this layer's part of the rows, int32
        `[core slots, self.rows, K, 7]`, and of the long ones. Cores that are codes come with their
        steps (see `ModulePools`). Rows of experts have to be contiguous."""
        n = len(self._products)
        if self.experts is not None:  # to the kernels, a slot for each adapter and expert
            rows, long_rows = (
                each if each is None else each.view(-1, len(self.slices), *each.shape[2:])
                for each in (rows, long_rows)
            )
        long = [None] * n if long_rows is None else long_rows.chunk(n, dim=1)
        for product, its, own in zip(self._products, rows.chunk(n, dim=1), long, strict=True):
            product.attach(cores, its, core_steps, own)
        self._number: int | None = None  # by which a compiled graph calls the C++ operator
        alone = self.adapted and self._shards is None and self.experts is None
        if alone and self.step.state and backend_name(rows.device) == "cpu":
            self._number = add_layer(self.pools, self.step.state)

    # --- basis slots ---

    def put(self, store: Store, side: str, s: int, module: ModuleInfo, spans: Spans) -> None:
        """Fill slots of slice `s` from the pool of a module; starts are those of the store.

        What lies between the first and the last vector is read at once.

        Raises:
            StoreError: it cannot be read. No slot has changed then.
        """
        first = int(spans.starts.min())
        last = int((spans.starts + spans.ranks).max())
        place = Place(self, s, module)
        spans = spans._replace(starts=spans.starts - first)
        spans, vectors = _read(store, [place], side, [first], last - first, spans)
        self._product_of(side).bases.put(side, s, spans, vectors)

    def takes(self, side: str, s: int, module: ModuleInfo) -> Hashable:
        """How slice `s` takes vectors of a module: equal where those of several layers may be read
        and prepared together (`put_alike`)."""
        form = self._product_of(side).bases
        columns = self._part.own_columns(s, side, module)
        own = None if columns is None else columns.numpy().tobytes()
        shards = self._shards if side == "v" else None
        share = None if shards is None else (shards.worker, shards.workers)
        return type(form), module.d_in if side == "v" else module.d_out, own, share

    def _product_of(self, side: str) -> "_Product":
        return self._products[0 if side == "v" else -1]

    def put_upload(
        self, side: str, slot: int, pairs: list[tuple[torch.Tensor, torch.Tensor] | None]
    ) -> None:
        """Fill one slot for uploads with A (`v`) or B (`u`) of each module.

        `pairs` gives (A `[r, d_in]`, B `[d_out, r]`) for each of `names`, or None. Ranks may
        differ.
        """
        for i, pair in enumerate(pairs):
            if pair is None:
                continue
            expert, s = divmod(i, len(self.slices))
            a, b = self._part.cut(s, *pair)
            if self._shards is not None:
                a = self._shards.share_of_adapter(a)
            self._product_of(side).put_upload(side, s, slot, a if side == "v" else b.T, expert)

    def upload_rows(self, slots: Mapping[str, int], ranks: list[int]) -> list[tuple[int, int, int]]:
        """(v_start, u_start, rank) of an upload in each of `targets`, by its basis slots and the
        rank of each module (0: not adapted)."""
        shards = self._shards
        rows = []
        for p, made in enumerate(self._products):
            for i, rank in enumerate(ranks):
                expert, s = divmod(i, len(self.slices))
                v, u = made.upload_address(s, slots, expert)
                if shards is not None and p == 0:
                    rank = shards.own(rank)
                rows.append((v, u, rank))
        return rows

    def note_upload(self, slot: int, present: bool) -> None:
        """Remember whether the upload in a core slot adapts this layer."""
        if present:
            self._uploads.add(slot)
        else:
            self._uploads.discard(slot)
        self.in_use = self.adapted or bool(self._uploads)

    # --- a step ---

    def add_lora_linear(
        self, y: torch.Tensor, x: torch.Tensor, *stock: Any, **stock_options: Any
    ) -> torch.Tensor:
        """Add every token's adapter to `y` in place: what vLLM's LoRA layers call.

        vLLM's own stacked weights, among the other arguments, are empty and not looked at. With two
        streams vLLM hands in zeros for `y` and adds them up itself.
        """
        if y.dtype != x.dtype:  # a router in float32, say
            delta = self.add_lora_linear(torch.zeros_like(y, dtype=x.dtype), x)
            return y.add_(delta)
        if torch.compiler.is_compiling():
            self._add_traced(y, x)
        else:
            self.add(y, x)
        return y

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of an embedding: add every token's adapter to `y` `[…, width]` in place.

        Args:
            y: what the model's table has for the tokens.
            ids: int `[…]`, their numbers, in the order of the step.
        """
        y_rows, ids = y.view(-1, y.shape[-1]), ids.reshape(-1)
        add = self._add_traced if torch.compiler.is_compiling() else self.add
        if y.dtype != self._dtype:
            delta = torch.zeros_like(y_rows, dtype=self._dtype)
            add(delta, ids)
            y_rows.add_(delta)
        else:
            add(y_rows, ids)
        return y

    def _add_traced(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """`add` as an operator in the graph of a model that is being compiled."""
        # What a step needs is decided when it runs, not when the model is traced. On CPU, a step
        # with an uncompressed adapter in any other layer is not run compiled.
        if self._number is not None:
            torch.ops.vllm_jd.add_adapters_cpu(y, x, self._number)
        elif self.adapted or not y.is_cpu:
            torch.ops.vllm_jd.add_adapters(y, x, self.name)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapter of each token of this step to `y` `[tokens, d_out]`, in place. x is the
        layer's input `[tokens, d_in]`, of an embedding int `[tokens]`."""
        # The same on all workers, as it must be where they wait for each other.
        if self.step.active and (self.in_use or self.step.recorded):
            if self._shards is None:
                self._products[0].add(y, x)
            else:
                self._add_sharded(y, x, self._shards)

    def add_pairs(
        self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None
    ) -> None:
        """Of a layer of experts: add to the output of each pair of a token and one of its experts
        what the token's adapter says of this expert, in place.

        Args:
            y: `[pairs, d_out]`, a token's pairs side by side.
            x: `[pairs, d_in]`, or `[tokens, d_in]` where the pairs of a token have one input: where
                its experts share V, V · x is made once then.
            slots: int32 `[pairs]`, the adapter's slot times the number of experts, plus the
                expert; −1: none.
            order: int32 `[places]`, see `Step.order`, or None.
        """
        if self.step.active and (self.in_use or self.step.recorded):
            self._products[0].add_pairs(y, x, slots, order)

    def _add_sharded(self, y: torch.Tensor, x: torch.Tensor, shards: Shards) -> None:
        first, second = self._products
        size = len(x), shards.width
        z = y.new_empty(size) if self.embedding else y.new_zeros(size)
        first.add(z, x)
        if isinstance(self._part, OutputPart):
            y = y[:, self._part.columns]
        second.add(y, shards.gather(z))


class Place(NamedTuple):
    """A slice of a layer, and the store's module that it takes vectors from."""

    layer: LayerPools
    slice: int
    module: ModuleInfo


def put_alike(
    store: Store, places: Sequence[Place], side: str, slot: int, firsts: Sequence[int], rank: int
) -> None:
    """Fill one slot, by the same number, of slices that take vectors alike (`LayerPools.takes`).

    Args:
        store: where to read them.
        places: the slices.
        side: `v`, `u` or `scales`.
        slot: which slot.
        firsts: the first vector for each place, in its module's pool.
        rank: how many vectors, of each.

    Raises:
        StoreError: they cannot be read. No slot has changed then.
    """
    n = len(places)
    spans = Spans(np.full(n, slot), np.arange(n) * rank, np.full(n, rank))
    spans, vectors = _read(store, places, side, firsts, rank, spans)
    own = int(spans.ranks[0])
    if not own:  # of a low rank a worker may have no share
        return
    bases = places[0].layer._product_of(side).bases.prepared(side, vectors, own)
    for (layer, s, _), basis in zip(places, bases, strict=True):
        layer._product_of(side).bases.place(side, s, slot, basis)


def _read(
    store: Store,
    places: Sequence[Place],
    side: str,
    firsts: Sequence[int],
    count: int,
    spans: Spans,
) -> tuple[Spans, Vectors]:
    """This worker's part of `count` vectors for each of places that are alike, and where in it the
    spans are that were given for all of them."""
    layer, s, module = places[0]
    vectors = read_vectors(
        store,
        [place.module.name for place in places],
        side,
        firsts,
        count,
        layer._part.own_columns(s, side, module),
        in_8_bits=layer._product_of(side).bases.in_8_bits,
    )
    if side == "v" and layer._shards is not None:
        return layer._shards.share_of(spans, vectors)
    return spans, vectors


class _Product:
    """One product of the kernels: the slots for stores, those for uploads behind them, and vectors
    that are the same for all.

    Args:
        bases: the slots for stores.
        uploads: the slots for uploads, with their room for each slice.
        step: whose tokens are computed.
        dtype: of the pools.
        device: of the pools.
        v: for each slice `[n, d_in]`, V of all adapters; None: each has its own.
        u: for each slice `[n, d_out]`, likewise.
        experts: for how many a slot for uploads has room; 1 of a plain layer.
    """

    def __init__(
        self,
        bases: Form,
        uploads: SlotClass,
        *,
        step: Step,
        dtype: torch.dtype,
        device: torch.device,
        v: list[torch.Tensor] | None = None,
        u: list[torch.Tensor] | None = None,
        experts: int = 1,
    ):
        self.bases, self._uploads, self._step = bases, uploads, step
        self._experts = experts
        like = {"dtype": dtype, "device": device}
        room = uploads.rank * uploads.count * experts
        slices = len(bases.u)
        d_in = bases.v.shape[1]
        own_v = v or [torch.zeros(room, d_in)] * slices
        own_u = u or [torch.zeros(room, rows.shape[1]) for rows in bases.u]
        coded_v = len(getattr(bases, "v_int8", ()))
        coded_u = [len(rows) for rows in getattr(bases, "u_int8", [()] * slices)]
        self._fixed = {"v": v is not None, "u": u is not None}
        sizes = np.array([len(rows) for rows in own_v])
        self.first_v = coded_v + len(bases.v) + np.cumsum(sizes) - sizes
        """For each slice the first of its V behind the slots for stores."""
        self.first_u = np.array(
            [n + len(rows) for n, rows in zip(coded_u, bases.u, strict=True)], dtype=np.int64
        )
        self._coded = {"v": [coded_v] * slices, "u": coded_u}
        self._pools = {
            "v": torch.cat([bases.v, *(rows.to(**like) for rows in own_v)]),
            "u": [
                torch.cat([rows, own.to(**like)]) for rows, own in zip(bases.u, own_u, strict=True)
            ],
            "scales": bases.scales if any(len(rows) for rows in bases.scales) else None,
            "v_int8": getattr(bases, "v_int8", None),
            "u_int8": getattr(bases, "u_int8", None),
            "packed": getattr(bases, "packed", None),
        }
        # The slots lie in the tensors that the kernels read.
        bases.v = self._pools["v"][: len(bases.v)]
        bases.u = [
            whole[: len(rows)] for whole, rows in zip(self._pools["u"], bases.u, strict=True)
        ]
        self._backend = backend(device)

    def attach(
        self,
        cores: torch.Tensor,
        rows: torch.Tensor,
        core_steps: torch.Tensor | None,
        long_rows: torch.Tensor | None,
    ) -> None:
        """See `LayerPools.attach`."""
        own = {"cores": cores, "rows": rows, "core_steps": core_steps, "long_rows": long_rows}
        self.pools = ModulePools(**own, **self._pools)
        self._make_ready()

    def _make_ready(self) -> None:
        """What the kernels need before anything is recorded, for every rank of a slot."""
        if backend_name(self.pools.device) == "triton":
            from vllm_jd.kernels.triton.backend import prepare

            prepare(self.pools, max([self._uploads.rank, self.bases.highest_rank]))

    def put_upload(
        self, side: str, s: int, slot: int, vectors: torch.Tensor, expert: int = 0
    ) -> None:
        """Fill the slot for uploads `slot` of slice `s`."""
        if self._fixed[side]:
            return
        first = self._address(side, s, slot, expert) - self._coded[side][s]
        pool = self._pools["v"] if side == "v" else self._pools["u"][s]
        copy_to(pool[first : first + len(vectors)], vectors)

    def upload_address(self, s: int, slots: Mapping[str, int], expert: int = 0) -> tuple[int, int]:
        """(v_start, u_start) of an upload by its slots."""
        v, u = (self._address(side, s, slots[side], expert) for side in ("v", "u"))
        return v, u

    def _address(self, side: str, s: int, slot: int, expert: int) -> int:
        first = int((self.first_v if side == "v" else self.first_u)[s])
        place = slot * self._experts + expert
        return first if self._fixed[side] else first + place * self._uploads.rank

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product for each token of the step to `y`, in place."""
        step = self._step
        if step.order is None:
            self._backend(y, x, self.pools, step.token_slots)
        else:
            order = step.order[: places(len(y))]
            self._backend(y, x, self.pools, step.token_slots, order=order)

    def add_pairs(
        self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, order: torch.Tensor | None
    ) -> None:
        """See `LayerPools.add_pairs`."""
        options = {} if order is None else {"order": order}
        fan = len(y) // len(x) if len(x) else 1
        self._backend(y, x, self.pools, slots, fan=fan, **options)


class _LookUp(_Product):
    """V · x of an embedding, whose U is not looked at: row k of a slot goes to place k of z."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        device = options["device"]
        self._look_up = look_up_in_triton if backend_name(device) == "triton" else look_up

    def _make_ready(self) -> None:
        """Nothing: the look-up has no plan."""

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Write z `[tokens, …]` of the step's tokens, whose numbers x has, int `[tokens]`."""
        self._look_up(y, x, self.pools, self._step.token_slots)


def _whole_outputs(layer: BaseLayerWithLoRA) -> tuple[list[int], int]:
    """The widths of the outputs of the model's layer, and that of its input, of all workers."""
    base = getattr(layer, "base_layer", None)
    if base is None or layer.tp_size == 1:
        return list(layer.output_slices), layer.input_size
    if hasattr(base, "total_num_kv_heads"):  # which workers may have copies of
        value = getattr(base, "v_head_size", base.head_size)
        heads = (base.total_num_heads, base.head_size), (base.total_num_kv_heads, base.head_size)
        widths = [n * size for n, size in (*heads, (base.total_num_kv_heads, value))]
    else:
        widths = list(getattr(base, "output_sizes", None) or [base.output_size])
    if len(layer.output_slices) == 1:
        widths = [sum(widths)]
    return widths, base.input_size


def _stays_coded(
    store: Store,
    slices: list[Slice],
    part: Part,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool,
) -> bool:
    """Whether a layer's bases stay in 8 bits: where the store has them so, this worker's part ends
    between blocks, and nothing would be rounded otherwise than by the store. In the pools, numbers
    of 8 bits are rounded to their dtype, but those that the CPU kernel takes packed are not."""
    if store.manifest.quantised is None:
        return False
    if dtype != store.dtype and not (packs and packs_bases(dtype, device)):
        return False
    return all(
        part.cuts_between_blocks(s, item.module)
        for s, item in enumerate(slices)
        if item.module is not None
    )
