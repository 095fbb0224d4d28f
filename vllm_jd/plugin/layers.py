"""One wrapped linear layer of the model: its pools, filled from the store and PEFT adapters."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import ROW_FIELDS, ModulePools, add_adapters
from vllm_jd.store import ModuleInfo, Store


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
        basis_rows = [0 if module is None else module.clusters * module.rank for module in modules]
        room = max_loras * max_rank
        like = {"dtype": cores.dtype, "device": cores.device}
        v = torch.zeros(sum(basis_rows) + len(slices) * room, layer.input_size, **like)
        u = [
            torch.zeros(count + room, width, **like)
            for count, width in zip(basis_rows, layer.output_slices, strict=True)
        ]
        rows = torch.zeros(
            len(store) + max_loras, len(slices), 1, len(ROW_FIELDS), dtype=torch.int32
        )
        free = torch.arange(max_loras, dtype=torch.int32) * max_rank
        v_row = 0
        for s, (module, count) in enumerate(zip(modules, basis_rows, strict=True)):
            if module is not None:
                column = store.module_index(module.name)
                bases_v, bases_u = self._cut_bases(store, module, s)
                v[v_row : v_row + count] = bases_v
                u[s][:count] = bases_u
                rows[: len(store), s, 0] = _store_rows(store, module, column, v_row)
            v_row += count
            rows[len(store) :, s, 0, 0] = sum(basis_rows) + s * room + free
            rows[len(store) :, s, 0, 1] = count + free
        rows[len(store) :, :, 0, 3] = -1
        self.pools = ModulePools(v=v, u=u, cores=cores, rows=rows.to(cores.device))
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

    def _cut_bases(
        self, store: Store, module: ModuleInfo, s: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of a module's V and U: `[clusters * rank, d]`, rows are vectors."""
        u, v = store.bases(module.name)
        v, b = self._cut(s, v.flatten(0, 1), u.flatten(0, 1).T)
        found = (b.shape[0], v.shape[1])
        expected = (self._layer.output_slices[s], self._layer.input_size)
        if found != expected:
            raise ValueError(
                f"the store's module {module.name} is {module.d_out} × {module.d_in} (d_out × d_in)"
                f", the model's layer differs: {found} against {expected} on this worker; "
                "the store was made for another base model"
            )
        return v, b.T

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


def _store_rows(store: Store, module: ModuleInfo, column: int, v_row: int) -> torch.Tensor:
    """Rows of indices of the store's adapters for one module: int32 `[n, 5]`."""
    cluster = store.cluster[:, column]
    rows = torch.zeros(len(store), len(ROW_FIELDS), dtype=torch.int32)
    rows[:, 0] = v_row + cluster * module.rank
    rows[:, 1] = cluster * module.rank
    rows[:, 2] = module.rank
    rows[:, 3] = torch.arange(len(store), dtype=torch.int32)
    rows[:, 4] = module.core_offset
    rows[cluster < 0] = 0
    return rows
