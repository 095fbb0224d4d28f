"""One wrapped linear layer of the model: its pools, filled from the store and PEFT adapters."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import CORE_NONE, ROW_FIELDS, ModulePools, add_adapters
from vllm_jd.store import CLUSTER_FIELDS, Bases, ModuleInfo, Store

_SCALE_ROW = ROW_FIELDS.index("scale_row")


@dataclass
class Step:
    """What all layers of one model share, renewed before each step.

    `token_slots` int32: the slot of each token's adapter, −1 for none. `active`: whether any
    token has one.
    """

    token_slots: torch.Tensor
    active: bool = False


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

    Stands in for the layer's punica wrapper. Slots `0 … n-1` are the store's adapters in their
    order, `n … n+max_loras-1` are places for uncompressed ones.

    Args:
        name: vLLM's name of the layer. A compiled model finds its layers by it.
        layer: the vLLM LoRA layer, made for 0 adapters: it holds no weights of its own, but
            knows how factors are cut for tensor parallelism.
        slices: its outputs.
        store: the open store.
        cores: `[n, core_row]`, the resident cores of all modules.
        max_loras: how many uncompressed adapters there is room for.
        max_rank: highest rank of those.
        step: shared with all layers.

    Raises:
        ValueError: a module of the store has another shape than the layer.
    """

    def __init__(
        self,
        name: str,
        layer: BaseLayerWithLoRA,
        slices: list[Slice],
        store: Store,
        cores: torch.Tensor,
        *,
        max_loras: int,
        max_rank: int,
        step: Step,
    ):
        self._name = name
        self._layer = layer
        self.slices = slices
        self._step = step
        self._first_free = len(store)
        self._max_rank = max_rank
        self._uncompressed: set[int] = set()
        self._compressed = any(item.column is not None for item in slices)

        modules = [_module_of(store, item) for item in slices]
        cut = [self._cut_bases(store, module, s) for s, module in enumerate(modules)]
        room = max_loras * max_rank
        like = {"dtype": cores.dtype, "device": cores.device}
        basis_rows = sum(len(bases.v) for bases in cut)
        v = torch.zeros(basis_rows + len(slices) * room, layer.input_size, **like)
        u = [
            torch.zeros(len(bases.u) + room, width, **like)
            for bases, width in zip(cut, layer.output_slices, strict=True)
        ]
        rows = torch.zeros(
            len(store) + max_loras,
            len(slices),
            store.manifest.rows,
            len(ROW_FIELDS),
            dtype=torch.int32,
        )
        rows[..., _SCALE_ROW] = -1
        free = torch.arange(max_loras, dtype=torch.int32) * max_rank
        v_row = 0
        for s, (module, bases) in enumerate(zip(modules, cut, strict=True)):
            v[v_row : v_row + len(bases.v)] = bases.v
            u[s][: len(bases.u)] = bases.u
            if module is not None:
                column = store.module_index(module.name)
                rows[: len(store), s] = _store_rows(store, module, column, bases.clusters, v_row)
            v_row += len(bases.v)
            rows[len(store) :, s, 0, 0] = basis_rows + s * room + free
            rows[len(store) :, s, 0, 1] = len(bases.u) + free
        rows[len(store) :, :, 0, 3] = -1
        rows[len(store) :, :, 0, 5] = CORE_NONE
        scales = [bases.scales.to(**like).contiguous() for bases in cut]
        self.pools = ModulePools(v=v, u=u, cores=cores, rows=rows.to(cores.device), scales=scales)
        _LAYERS[name] = self

    def set_adapter(
        self, place: int, pairs: list[tuple[torch.Tensor, torch.Tensor] | None]
    ) -> None:
        """Put an uncompressed adapter into place `0 … max_loras-1`.

        `pairs` gives (A `[r, d_in]`, B `[d_out, r]`) for each slice, or None. Ranks may differ.
        """
        slot = self._first_free + place
        self.pools.rows[slot, :, 0, 2] = 0
        for s, pair in enumerate(pairs):
            if pair is None:
                continue
            a, b = self._cut(s, *pair)
            rank = a.shape[0]
            v_start, u_start = self.pools.rows[slot, s, 0, :2].tolist()
            self.pools.v[v_start : v_start + rank].copy_(a)
            self.pools.u[s][u_start : u_start + rank].copy_(b.T)
            self.pools.rows[slot, s, 0, 2] = rank
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

        vLLM's own stacked weights, among the other arguments, are empty and not looked at.
        """
        if torch.compiler.is_compiling():
            # What a step needs is decided when it runs, not when the model is traced.
            torch.ops.vllm_jd.add_adapters(y, x, self._name)
        else:
            self.add(y, x)
        return y

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapter of each token of this step to `y` `[tokens, d_out]`, in place."""
        if self._step.active and (self._compressed or self._uncompressed):
            add_adapters(y, x, self.pools, self._step.token_slots)

    def _cut_bases(self, store: Store, module: ModuleInfo | None, s: int) -> Bases:
        """This worker's part of a module's bases."""
        layer = self._layer
        if module is None:
            return Bases(
                u=torch.empty(0, layer.output_slices[s]),
                v=torch.empty(0, layer.input_size),
                scales=torch.empty(0, layer.output_slices[s]),
                clusters=torch.empty(0, len(CLUSTER_FIELDS), dtype=torch.int32),
            )
        bases = store.bases(module.name)
        v, b = self._cut(s, bases.v, bases.u.T)
        found = (b.shape[0], v.shape[1])
        expected = (layer.output_slices[s], layer.input_size)
        if found != expected:
            raise ValueError(
                f"the store's module {module.name} is {module.d_out} × {module.d_in} (d_out × d_in)"
                f", the model's layer differs: {found} against {expected} on this worker; "
                "the store was made for another base model"
            )
        # A scale is cut as a column of B is; A only comes along.
        _, scales = self._cut(s, bases.v[: len(bases.scales)], bases.scales.T)
        return Bases(u=b.T, v=v, scales=scales.T, clusters=bases.clusters)

    def _cut(self, s: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut A `[r, d_in]` and B `[d_out, r]` of slice `s` as vLLM does for this worker."""
        layer = self._layer
        if layer.tp_size == 1:
            return a, b
        if len(self.slices) == 1:
            return layer.slice_lora_a(a), layer.slice_lora_b(b)
        alone_a: list[torch.Tensor | None] = [None] * len(self.slices)
        alone_b = list(alone_a)
        alone_a[s], alone_b[s] = a, b
        return layer.slice_lora_a(alone_a)[s], layer.slice_lora_b(alone_b)[s]


def _module_of(store: Store, item: Slice) -> ModuleInfo | None:
    return None if item.column is None else store.manifest.modules[item.column]


def _store_rows(
    store: Store, module: ModuleInfo, column: int, clusters: torch.Tensor, v_row: int
) -> torch.Tensor:
    """Rows of indices of the store's adapters for one module: int32 `[n, K, 7]`."""
    chosen = store.cluster[:, column]
    lines = clusters[chosen.long().clamp_min(0)]
    rows = torch.zeros(*chosen.shape, len(ROW_FIELDS), dtype=torch.int32)
    rows[..., 0] = v_row + lines[..., 0]
    rows[..., 1:3] = lines[..., 1:3]
    rows[..., 3] = torch.arange(len(store), dtype=torch.int32)[:, None]
    rows[..., 4] = module.core_offset
    rows[..., 5:7] = lines[..., 3:5]
    rows[chosen < 0] = 0
    rows[..., _SCALE_ROW][chosen < 0] = -1
    return rows
