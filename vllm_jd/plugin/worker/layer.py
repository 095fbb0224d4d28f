"""One wrapped linear layer of the model: its pools, filled from the store and PEFT adapters."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import ModulePools, backend, backend_name
from vllm_jd.kernels.cpu.operator import add_layer
from vllm_jd.plugin.worker.bases import LayerBases, Part, cut_bases, formed
from vllm_jd.plugin.worker.sharded import OutputPart, Parallel, Shards, highest_ranks, places_of
from vllm_jd.plugin.worker.step import Step, copy_to
from vllm_jd.row import RANK, U_START
from vllm_jd.store import ModuleInfo, Store


@dataclass(frozen=True)
class Slice:
    """One output of a layer, e.g. k of q, k, v.

    `name` is vLLM's name of the module; `column` its place in the store's module list, or None
    where the store has nothing for it.
    """

    name: str
    column: int | None


_LAYERS: dict[str, "LayerPools"] = {}

_LIBRARY = torch.library.Library("vllm_jd", "FRAGMENT")
_LIBRARY.define("add_adapters(Tensor(a!) y, Tensor x, str layer) -> ()")


def _add_by_name(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    _LAYERS[layer].add(y, x)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("add_adapters", _add_by_name, _key)
_LIBRARY.impl("add_adapters", lambda y, x, layer: None, "Meta")


class LayerPools:
    """Bases, rows of indices and uncompressed factors of one vLLM layer.

    Stands in for the layer's punica wrapper. Of use once it has been given its slots (`attach`).

    Args:
        name: vLLM's name of the layer. A compiled model finds its layers by it.
        layer: the vLLM LoRA layer, made for 0 adapters: it holds no weights of its own, but
            knows how factors are cut for tensor parallelism.
        slices: its outputs.
        store: the open store.
        max_loras: how many uncompressed adapters there is room for.
        max_rank: highest rank of those.
        step: shared with all layers.
        dtype: of the pools.
        device: of the pools.
        sharded: how the workers share a layer that is fully sharded (see `sharded`), or None.

    Raises:
        ValueError: a module of the store has another shape than the layer.
    """

    def __init__(
        self,
        name: str,
        layer: BaseLayerWithLoRA,
        slices: list[Slice],
        store: Store,
        *,
        max_loras: int,
        max_rank: int,
        step: Step,
        dtype: torch.dtype,
        device: torch.device,
        sharded: Parallel | None = None,
    ):
        self._name = name
        self.slices = slices
        self._step = step
        self._uncompressed: set[int] = set()
        self.adapted = any(item.column is not None for item in slices)
        """Whether the store has anything for this layer."""

        like = {"dtype": dtype, "device": device}
        room = {"max_loras": max_loras, "max_rank": max_rank, "step": step} | like
        self._part = (OutputPart if sharded == "row" else Part)(layer, len(slices))
        modules = [_module_of(store, item) for item in slices]
        bases = cut_bases(store, modules, self._part, **like)
        self._shards: Shards | None = None
        if sharded is None:
            self._products = [_Product(formed(bases, **like), **room)]
        else:
            places = [places_of(store, item.column) for item in slices]
            ranks = highest_ranks(bases, places, store.manifest.rows, max_rank)
            shards = self._shards = Shards(sharded, layer.tp_rank, layer.tp_size, ranks)
            own = shards.share(max_rank)
            first, second = (formed(each, **like) for each in shards.split(bases, places))
            self._products = [
                _Product(first, **room | {"max_rank": own}, u=shards.units(own)),
                _Product(second, **room, v=shards.picks(max_rank)),
            ]
        self.columns = [item.column for item in slices] * len(self._products)
        """The store's module, or None, that each of `lines` belongs to."""
        self.lines = [lines for product in self._products for lines in product.lines]
        """For each slice (where there are two products: of the first, then again of the second)
        its clusters' rows: int32 `[clusters, 7]` (see `Slots`)."""
        _LAYERS[name] = self

    @property
    def pools(self) -> ModulePools:
        """The pools; where there are two products, those of the second."""
        return self._products[-1].pools

    def attach(
        self, cores: torch.Tensor, rows: torch.Tensor, core_steps: torch.Tensor | None = None
    ) -> None:
        """Take the slots' cores `[slots, core_row]` and this layer's part of their rows, int32
        `[slots + max_loras, len(lines), K, 7]`. The last `max_loras` are for uncompressed
        adapters. Cores that are codes come with their steps (see `ModulePools`)."""
        parts = rows.chunk(len(self._products), dim=1)
        for product, its in zip(self._products, parts, strict=True):
            product.attach(cores, its, core_steps)
        self._number: int | None = None  # by which a compiled graph calls the C++ operator
        alone = self.adapted and self._shards is None
        if alone and self._step.state and backend_name(rows.device) == "cpu":
            self._number = add_layer(self.pools, self._step.state)

    def set_adapter(
        self, place: int, pairs: list[tuple[torch.Tensor, torch.Tensor] | None]
    ) -> None:
        """Put an uncompressed adapter into place `0 … max_loras-1`.

        `pairs` gives (A `[r, d_in]`, B `[d_out, r]`) for each slice, or None. Ranks may differ.
        """
        cut = [pair and self._part.cut(s, *pair) for s, pair in enumerate(pairs)]
        parts = [cut] if self._shards is None else self._shards.split_adapter(cut)
        for product, its in zip(self._products, parts, strict=True):
            product.set_adapter(place, its)
        if any(pair is not None for pair in pairs):
            self._uncompressed.add(place)
        else:
            self._uncompressed.discard(place)

    def clear_adapter(self, place: int) -> None:
        """Empty a place."""
        self.set_adapter(place, [None] * len(self.slices))

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
            # What a step needs is decided when it runs, not when the model is traced. On CPU, a
            # step with an uncompressed adapter in any other layer is not run compiled.
            if self._number is not None:
                torch.ops.vllm_jd.add_adapters_cpu(y, x, self._number)
            elif self.adapted or not y.is_cpu:
                torch.ops.vllm_jd.add_adapters(y, x, self._name)
        else:
            self.add(y, x)
        return y

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapter of each token of this step to `y` `[tokens, d_out]`, in place."""
        # The same on all workers, as it must be where they wait for each other.
        if self._step.active and (self.adapted or self._uncompressed or self._step.recorded):
            if self._shards is None:
                self._products[0].add(y, x)
            else:
                self._add_sharded(y, x, self._shards)

    def _add_sharded(self, y: torch.Tensor, x: torch.Tensor, shards: Shards) -> None:
        first, second = self._products
        z = x.new_zeros(len(x), shards.width)
        first.add(z, x)
        if isinstance(self._part, OutputPart):
            y = y[:, self._part.columns]
        second.add(y, shards.gather(z))


class _Product:
    """One product of the kernels: bases, with places for uncompressed adapters behind them.

    Args:
        bases: of the store.
        max_loras: how many places.
        max_rank: rows of each place, for each slice.
        step: whose tokens are computed.
        dtype: of the pools.
        device: of the pools.
        v: for each slice `[max_rank, d_in]`, V of all uncompressed adapters; None: each has its
            own.
        u: for each slice `[max_rank, d_out]`, likewise.
    """

    def __init__(
        self,
        bases: LayerBases,
        *,
        max_loras: int,
        max_rank: int,
        step: Step,
        dtype: torch.dtype,
        device: torch.device,
        v: list[torch.Tensor] | None = None,
        u: list[torch.Tensor] | None = None,
    ):
        self.lines = bases.lines
        self._max_loras, self._max_rank, self._step = max_loras, max_rank, step
        places = torch.arange(max_loras, dtype=torch.int32)
        v_free, u_free = (places * (0 if given else max_rank) for given in (v, u))
        none = torch.zeros(())
        v = v or [none.expand(max_loras * max_rank, rows.shape[1]) for rows in bases.v]
        u = u or [none.expand(max_loras * max_rank, rows.shape[1]) for rows in bases.u]
        like = {"dtype": dtype, "device": device}
        self._pools = {
            "v": _joined([*bases.v, *v], **like),
            "u": [_joined(parts, **like) for parts in zip(bases.u, u, strict=True)],
            "scales": bases.scales,
            "v_int8": bases.v_int8,
            "u_int8": bases.u_int8,
            "packed": bases.packed,
        }
        self._free_rows = torch.zeros(max_loras, len(u), 2, dtype=torch.int32)
        first_v = len(bases.v_int8 or ()) + sum(map(len, bases.v))
        for s, rows in enumerate(bases.u):
            first_u = len(bases.u_int8[s] if bases.u_int8 else ()) + len(rows)
            self._free_rows[:, s, 0] = first_v + v_free
            self._free_rows[:, s, 1] = first_u + u_free
            first_v += len(v[s])
        self._add_adapters = backend(device)
        if step.order is not None:
            self._add_adapters = functools.partial(self._add_adapters, order=step.order)

    def attach(
        self, cores: torch.Tensor, rows: torch.Tensor, core_steps: torch.Tensor | None
    ) -> None:
        """See `LayerPools.attach`."""
        self._first_free = rows.shape[0] - self._max_loras
        rows[self._first_free :, :, 0, : U_START + 1] = self._free_rows.to(rows.device)
        self.pools = ModulePools(cores=cores, rows=rows, core_steps=core_steps, **self._pools)
        if backend_name(rows.device) == "triton":
            # Before anything is recorded, and for every rank that a slot may come to have.
            from vllm_jd.kernels.triton.backend import prepare

            ranks = [int(lines[:, RANK].max()) for lines in self.lines if len(lines)]
            prepare(self.pools, max([self._max_rank, *ranks]))

    def set_adapter(
        self, place: int, pairs: list[tuple[torch.Tensor | None, torch.Tensor | None] | None]
    ) -> None:
        """See `LayerPools.set_adapter`. None in a pair: what all have there."""
        slot = self._first_free + place
        self.pools.rows[slot, :, 0, RANK] = 0
        for s, pair in enumerate(pairs):
            if pair is None:
                continue
            a, b = pair
            rank = len(a) if a is not None else b.shape[1]
            v_start, u_start = self._free_rows[place, s].tolist()
            if a is not None:
                copy_to(self.pools.float_v(v_start, rank), a)
            if b is not None:
                copy_to(self.pools.float_u(s, u_start, rank), b.T)
            self.pools.rows[slot, s, 0, RANK] = rank

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product for each token of the step to `y`, in place."""
        self._add_adapters(y, x, self.pools, self._step.token_slots)


def _joined(
    parts: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Rows one after the other; no part is copied to the device but into its place."""
    sizes = [len(rows) for rows in parts]
    joined = torch.empty(sum(sizes), parts[0].shape[1], dtype=dtype, device=device)
    for target, rows in zip(joined.split(sizes), parts, strict=True):
        target.copy_(rows)
    return joined


def _module_of(store: Store, item: Slice) -> ModuleInfo | None:
    return None if item.column is None else store.manifest.modules[item.column]
