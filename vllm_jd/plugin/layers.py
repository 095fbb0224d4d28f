"""One wrapped linear layer of the model: its pools, filled from the store and PEFT adapters."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import (
    INT8_BLOCK,
    ROW_FIELDS,
    Int8Rows,
    ModulePools,
    backend,
    backend_name,
)
from vllm_jd.kernels.compiled import add_layer
from vllm_jd.kernels.packed import can_pack, pack
from vllm_jd.plugin.step import Step, copy_to
from vllm_jd.store import CLUSTER_FIELDS, ModuleInfo, Store


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
    ):
        self._name = name
        self._layer = layer
        self.slices = slices
        self._step = step
        self._max_loras, self._max_rank = max_loras, max_rank
        self._uncompressed: set[int] = set()
        self.adapted = any(item.column is not None for item in slices)
        """Whether the store has anything for this layer."""

        modules = [_module_of(store, item) for item in slices]
        # Decoding bases at each step would take the CPU longer than it saves in reading.
        to_pack = self.adapted and backend_name(device) == "cpu" and can_pack(dtype)
        cut = self._cut_all(store, modules, not to_pack and dtype == store.dtype)
        room = max_loras * max_rank
        like = {"dtype": dtype, "device": device}
        packed = None
        if to_pack:
            cut, packed = _pack(cut)
        basis_rows = sum(len(bases.v) for bases in cut)
        v_int8, u_int8 = _int8_rows(cut, device)
        v = torch.zeros(
            len(slices) * room + (0 if v_int8 else basis_rows), layer.input_size, **like
        )
        u = [
            torch.zeros(room + (0 if v_int8 else len(bases.u)), width, **like)
            for bases, width in zip(cut, layer.output_slices, strict=True)
        ]
        self.lines: list[torch.Tensor] = []
        """For each slice its clusters' rows: int32 `[clusters, 7]` (see `Slots`)."""
        free = torch.arange(max_loras, dtype=torch.int32) * max_rank
        self._free_rows = torch.zeros(max_loras, len(slices), 2, dtype=torch.int32)
        v_row = 0
        for s, (module, bases) in enumerate(zip(modules, cut, strict=True)):
            if v_int8 is None:
                v[v_row : v_row + len(bases.v)] = bases.v
                u[s][: len(bases.u)] = bases.u
            self.lines.append(_lines(module, bases.clusters, 0 if to_pack else v_row))
            v_row += len(bases.v)
            self._free_rows[:, s, 0] = basis_rows + s * room + free
            self._free_rows[:, s, 1] = len(bases.u) + free
        self._add_adapters = backend(device)
        if step.order is not None:
            self._add_adapters = functools.partial(self._add_adapters, order=step.order)
        scales = [bases.scales.to(**like).contiguous() for bases in cut]
        self._bases = {"v": v, "u": u, "scales": scales}
        self._bases |= {"v_int8": v_int8, "u_int8": u_int8, "packed": packed}
        _LAYERS[name] = self

    def attach(self, cores: torch.Tensor, rows: torch.Tensor) -> None:
        """Take the slots' cores `[slots, core_row]` and this layer's part of their rows, int32
        `[slots + max_loras, slices, K, 7]`. The last `max_loras` are for uncompressed adapters."""
        self._first_free = rows.shape[0] - self._max_loras
        rows[self._first_free :, :, 0, :2] = self._free_rows.to(rows.device)
        self.pools = ModulePools(cores=cores, rows=rows, **self._bases)
        self._number: int | None = None  # by which a compiled graph calls the C++ operator
        if self.adapted and self._step.state and backend_name(rows.device) == "cpu":
            self._number = add_layer(self.pools, self._step.state)
        if backend_name(rows.device) == "triton":
            # Before anything is recorded, and for every rank that a slot may come to have.
            from vllm_jd.kernels.triton.backend import prepare

            ranks = [int(lines[:, 2].max()) for lines in self.lines if len(lines)]
            prepare(self.pools, max([self._max_rank, *ranks]))

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
            v_start, u_start = self._free_rows[place, s].tolist()
            copy_to(self.pools.float_v(v_start, rank), a)
            copy_to(self.pools.float_u(s, u_start, rank), b.T)
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
        step = self._step
        if step.active and (self.adapted or self._uncompressed or step.recorded):
            self._add_adapters(y, x, self.pools, step.token_slots)

    def _cut_all(
        self, store: Store, modules: list[ModuleInfo | None], may_be_in_8_bits: bool
    ) -> list["_Cut"]:
        """This worker's part of the slices' bases: all in 8 bits, or none.

        In 8 bits where they may be, the store has them so, and the cut goes between blocks.
        """
        if store.manifest.quantised and may_be_in_8_bits and any(modules):
            cut = [self._cut_bases(store, module, s, True) for s, module in enumerate(modules)]
            found = [bases for bases in cut if bases is not None]
            if len(found) == len(cut):
                return found
        cut = [self._cut_bases(store, module, s, False) for s, module in enumerate(modules)]
        return [bases for bases in cut if bases is not None]

    def _cut_bases(
        self, store: Store, module: ModuleInfo | None, s: int, in_8_bits: bool
    ) -> "_Cut | None":
        """This worker's part of one module's bases; None where it cuts through a block."""
        layer = self._layer
        if module is None:
            v, u = torch.empty(0, layer.input_size), torch.empty(0, layer.output_slices[s])
            clusters = torch.empty(0, len(CLUSTER_FIELDS), dtype=torch.int32)
            if in_8_bits:
                return _Cut(_no_rows(v), _no_rows(u), u, clusters)
            return _Cut(v, u, u, clusters)
        scales, clusters = store.scales(module.name), store.clusters(module.name)
        if in_8_bits:
            v, u = store.codes(module.name)
            cut_v, cut_u = self._cut(s, v.codes, u.codes.T)
        else:
            bases = store.bases(module.name)
            v, u = bases.v, bases.u
            cut_v, cut_u = self._cut(s, v, u.T)
        found = (cut_u.shape[0], cut_v.shape[1])
        expected = (layer.output_slices[s], layer.input_size)
        if found != expected:
            raise ValueError(
                f"the store's module {module.name} is {module.d_out} × {module.d_in} (d_out × d_in)"
                f", the model's layer differs: {found} against {expected} on this worker; "
                "the store was made for another base model"
            )
        # A scale is cut as a column of B is; A only comes along.
        _, scales = self._cut(s, torch.empty(len(scales), module.d_in), scales.T)
        if not in_8_bits:
            return _Cut(cut_v, cut_u.T, scales.T, clusters)
        wide = [each.steps.repeat_interleave(INT8_BLOCK, dim=1) for each in (v, u)]
        wide_v, wide_u = self._cut(s, wide[0][:, : module.d_in], wide[1][:, : module.d_out].T)
        steps = [_narrow(wide_v), _narrow(wide_u.T)]
        if steps[0] is None or steps[1] is None:
            return None
        return _Cut(
            Int8Rows(cut_v.contiguous(), steps[0]),
            Int8Rows(cut_u.T.contiguous(), steps[1]),
            scales.T,
            clusters,
        )

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


@dataclass(frozen=True)
class _Cut:
    """A worker's part of one module's bases, as `Bases` has them, or with V and U in 8 bits."""

    v: torch.Tensor | Int8Rows
    u: torch.Tensor | Int8Rows
    scales: torch.Tensor
    clusters: torch.Tensor


def _pack(cut: list[_Cut]) -> tuple[list[_Cut], torch.Tensor]:
    """The slices' bases packed, and the slices without them; their clusters name places then."""
    v, u = ([getattr(bases, side).bfloat16() for bases in cut] for side in ("v", "u"))
    packed, starts = pack(v, u, [bases.clusters[:, :3] for bases in cut])
    empty = [
        _Cut(
            bases.v[:0],
            bases.u[:0],
            bases.scales,
            torch.cat([places, bases.clusters[:, 2:]], dim=1),
        )
        for bases, places in zip(cut, starts, strict=True)
    ]
    return empty, packed


def _int8_rows(
    cut: list[_Cut], device: torch.device
) -> tuple[Int8Rows | None, list[Int8Rows] | None]:
    """V's rows in 8 bits of all slices, and U's of each, or None where they are not."""
    v = [bases.v for bases in cut if isinstance(bases.v, Int8Rows)]
    u = [bases.u for bases in cut if isinstance(bases.u, Int8Rows)]
    if not v:
        return None, None
    codes, steps = (torch.cat([getattr(rows, field) for rows in v]) for field in ("codes", "steps"))
    return (
        Int8Rows(codes.to(device), steps.to(device)),
        [Int8Rows(rows.codes.to(device), rows.steps.to(device)) for rows in u],
    )


def _no_rows(like: torch.Tensor) -> Int8Rows:
    blocks = -(-like.shape[1] // INT8_BLOCK)
    return Int8Rows(like.to(torch.int8), torch.empty(0, blocks, dtype=torch.bfloat16))


def _narrow(wide: torch.Tensor) -> torch.Tensor | None:
    """Steps of blocks `[n, blocks]` from those of single numbers, or None where a block has two."""
    steps = wide[:, ::INT8_BLOCK].contiguous()
    again = steps.repeat_interleave(INT8_BLOCK, dim=1)[:, : wide.shape[1]]
    return steps if torch.equal(again, wide) else None


def _module_of(store: Store, item: Slice) -> ModuleInfo | None:
    return None if item.column is None else store.manifest.modules[item.column]


def _lines(module: ModuleInfo | None, clusters: torch.Tensor, v_row: int) -> torch.Tensor:
    """The rows of a module's clusters, whose V begin at `v_row` of the layer's: int32 `[p, 7]`."""
    lines = torch.zeros(len(clusters), len(ROW_FIELDS), dtype=torch.int32)
    if module is not None:
        lines[:, 0] = v_row + clusters[:, 0]
        lines[:, 1:3] = clusters[:, 1:3]
        lines[:, 4] = module.core_offset
        lines[:, 5:7] = clusters[:, 3:5]
    return lines
