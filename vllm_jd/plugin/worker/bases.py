"""The store's bases of one layer: this worker's part of them, in the form that its pools take.

There are several forms, and `formed` says which is taken when. All bases of a layer are in one.
"""

from dataclasses import dataclass, replace

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from vllm_jd.kernels import Int8Rows, backend_name
from vllm_jd.kernels.cpu.packed import MAX_INT8_RANK, can_pack, pack
from vllm_jd.row import BLOCK, RANK, ROW_FIELDS, STORED_FIELDS, V_START
from vllm_jd.store import ModuleInfo, Store


class Part:
    """Which part of a layer's factors this worker holds: as vLLM cuts an adapter's own.

    Args:
        layer: vLLM's LoRA layer.
        n_slices: how many outputs it has.
    """

    def __init__(self, layer: BaseLayerWithLoRA, n_slices: int):
        self._layer, self._n_slices = layer, n_slices
        self.d_in: int = layer.input_size
        """Width of the layer's input here."""
        self.widths: tuple[int, ...] = tuple(layer.output_slices)
        """Width of each output here."""

    def cut(self, s: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of A `[r, d_in]` and B `[d_out, r]` of slice `s`."""
        layer = self._layer
        if layer.tp_size == 1:
            return a, b
        if self._n_slices == 1:
            return layer.slice_lora_a(a), layer.slice_lora_b(b)
        alone_a: list[torch.Tensor | None] = [None] * self._n_slices
        alone_b = list(alone_a)
        alone_a[s], alone_b[s] = a, b
        return layer.slice_lora_a(alone_a)[s], layer.slice_lora_b(alone_b)[s]


@dataclass(frozen=True)
class SliceBases:
    """A worker's part of one module's bases, as `vllm_jd.store.Bases` has them, or with V and U in
    8 bits."""

    v: torch.Tensor | Int8Rows
    u: torch.Tensor | Int8Rows
    scales: torch.Tensor
    clusters: torch.Tensor


@dataclass(frozen=True)
class LayerBases:
    """All bases of a layer, in one form: what `ModulePools` takes, without places for uploads.

    Args:
        v: for each slice `[v_rows, d_in]`, to be rows of the pools; none in another form. They
            are not yet in the pools' dtype, nor on their device.
        u: for each slice `[u_rows, d_out]`, likewise.
        scales: for each slice `[scale_rows, d_out]`.
        lines: for each slice its clusters' rows, int32 `[clusters, 7]` (see `Slots`): the V of
            all slices lie one after the other.
        v_int8: V of all slices in 8 bits.
        u_int8: U of each slice in 8 bits.
        packed: V and U of all slices as the CPU kernel takes them.
    """

    v: list[torch.Tensor]
    u: list[torch.Tensor]
    scales: list[torch.Tensor]
    lines: list[torch.Tensor]
    v_int8: Int8Rows | None = None
    u_int8: list[Int8Rows] | None = None
    packed: torch.Tensor | None = None


def formed(slices: list[SliceBases], *, dtype: torch.dtype, device: torch.device) -> LayerBases:
    """A layer's bases in the form that suits the device: packed for the CPU kernel, in 8 bits, or
    rows of the pools' dtype.

    Args:
        slices: of each slice of the layer, as `cut_bases` gives them.
        dtype: of the pools.
        device: of the pools.
    """
    if _packs(dtype, device) and any(len(bases.clusters) for bases in slices):
        return _packed(slices, dtype, device)
    if all(isinstance(bases.v, Int8Rows) for bases in slices):
        return _in_8_bits(slices, dtype, device)
    return _rows(slices, dtype, device)


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    return backend_name(device) == "cpu" and can_pack(dtype)


# --- the forms ---


def _rows(slices: list[SliceBases], dtype: torch.dtype, device: torch.device) -> LayerBases:
    return LayerBases(
        [bases.v for bases in slices],
        [bases.u for bases in slices],
        [bases.scales.to(device, dtype).contiguous() for bases in slices],
        _lines(slices),
    )


def _in_8_bits(slices: list[SliceBases], dtype: torch.dtype, device: torch.device) -> LayerBases:
    codes, steps = (
        torch.cat([getattr(bases.v, field) for bases in slices]) for field in ("codes", "steps")
    )
    return replace(
        _rows([_without_rows(bases) for bases in slices], dtype, device),
        lines=_lines(slices),
        v_int8=Int8Rows(codes.to(device), steps.to(device)),
        u_int8=[Int8Rows(bases.u.codes.to(device), bases.u.steps.to(device)) for bases in slices],
    )


def _packed(slices: list[SliceBases], dtype: torch.dtype, device: torch.device) -> LayerBases:
    v, u = ([getattr(bases, side) for bases in slices] for side in ("v", "u"))
    rank = max(int(bases.clusters[:, RANK].max()) for bases in slices if len(bases.clusters))
    if rank > MAX_INT8_RANK or not all(isinstance(rows, Int8Rows) for rows in v + u):
        v, u = [_numbers(rows, dtype) for rows in v], [_numbers(rows, dtype) for rows in u]
    packed, places = pack(v, u, [bases.clusters[:, : RANK + 1] for bases in slices])
    named = [
        replace(_without_rows(bases), clusters=torch.cat([starts, bases.clusters[:, RANK:]], dim=1))
        for bases, starts in zip(slices, places, strict=True)
    ]
    return replace(_rows(named, dtype, device), packed=packed)


def _numbers(rows: torch.Tensor | Int8Rows, dtype: torch.dtype) -> torch.Tensor:
    return rows.decode(dtype) if isinstance(rows, Int8Rows) else rows.to(dtype)


def _without_rows(bases: SliceBases) -> SliceBases:
    v, u = (torch.empty(0, rows.shape[1]) for rows in (bases.v, bases.u))
    return replace(bases, v=v, u=u)


def _lines(slices: list[SliceBases]) -> list[torch.Tensor]:
    lines = []
    v_row = 0
    for bases in slices:
        each = torch.zeros(len(bases.clusters), len(ROW_FIELDS), dtype=torch.int32)
        each[:, : len(STORED_FIELDS)] = bases.clusters
        each[:, V_START] += v_row
        lines.append(each)
        v_row += len(bases.v)
    return lines


# --- the part ---


def cut_bases(
    store: Store,
    modules: list[ModuleInfo | None],
    part: Part,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[SliceBases]:
    """This worker's part of the slices' bases: all in 8 bits, or none.

    In 8 bits where the store has them so, the cut goes between blocks, and nothing would be rounded
    otherwise than by the store: in the pools, numbers of 8 bits are rounded to their dtype, but
    those that the CPU kernel takes packed are not.

    Args:
        store: the open store.
        modules: of each slice of the layer; None where the store has nothing for it.
        part: which part.
        dtype: of the pools.
        device: of the pools.

    Raises:
        ValueError: a module of the store has another shape than the layer.
    """
    in_8_bits = _packs(dtype, device) or dtype == store.dtype
    if store.manifest.quantised and in_8_bits and any(modules):
        cut = [_cut(store, module, s, part, True) for s, module in enumerate(modules)]
        found = [bases for bases in cut if bases is not None]
        if len(found) == len(cut):
            return found
    cut = [_cut(store, module, s, part, False) for s, module in enumerate(modules)]
    return [bases for bases in cut if bases is not None]


def _cut(
    store: Store, module: ModuleInfo | None, s: int, part: Part, in_8_bits: bool
) -> SliceBases | None:
    """This worker's part of one module's bases; None where it cuts through a block."""
    if module is None:
        v, u = torch.empty(0, part.d_in), torch.empty(0, part.widths[s])
        clusters = torch.empty(0, len(STORED_FIELDS), dtype=torch.int32)
        if in_8_bits:
            return SliceBases(_no_rows(v), _no_rows(u), u, clusters)
        return SliceBases(v, u, u, clusters)
    scales, clusters = store.scales(module.name), store.rows(module.name)
    if in_8_bits:
        v, u = store.codes(module.name)
        cut_v, cut_u = part.cut(s, v.codes, u.codes.T)
    else:
        bases = store.bases(module.name)
        v, u = bases.v, bases.u
        cut_v, cut_u = part.cut(s, v, u.T)
    found, expected = (cut_u.shape[0], cut_v.shape[1]), (part.widths[s], part.d_in)
    if found != expected:
        raise ValueError(
            f"the store's module {module.name} is {module.d_out} × {module.d_in} (d_out × d_in)"
            f", the model's layer differs: {found} against {expected} on this worker; "
            "the store was made for another base model"
        )
    # A scale is cut as a column of B is; A only comes along.
    _, scales = part.cut(s, torch.empty(len(scales), module.d_in), scales.T)
    if not in_8_bits:
        return SliceBases(cut_v, cut_u.T, scales.T, clusters)
    wide = [each.steps.repeat_interleave(BLOCK, dim=1) for each in (v, u)]
    wide_v, wide_u = part.cut(s, wide[0][:, : module.d_in], wide[1][:, : module.d_out].T)
    steps = [_narrow(wide_v), _narrow(wide_u.T)]
    if steps[0] is None or steps[1] is None:
        return None
    return SliceBases(
        Int8Rows(cut_v.contiguous(), steps[0]),
        Int8Rows(cut_u.T.contiguous(), steps[1]),
        scales.T,
        clusters,
    )


def _no_rows(like: torch.Tensor) -> Int8Rows:
    blocks = -(-like.shape[1] // BLOCK)
    return Int8Rows(like.to(torch.int8), torch.empty(0, blocks, dtype=torch.bfloat16))


def _narrow(wide: torch.Tensor) -> torch.Tensor | None:
    """Steps of blocks `[n, blocks]` from those of single numbers, or None where a block has two."""
    steps = wide[:, ::BLOCK].contiguous()
    again = steps.repeat_interleave(BLOCK, dim=1)[:, : wide.shape[1]]
    return steps if torch.equal(again, wide) else None
