"""The dispatcher of the Triton backend: what it keeps of the pools, and the launches of a call."""

import functools
import os
from types import ModuleType

import torch

from vllm_jd.kernels import reference
from vllm_jd.kernels.pools import ModulePools, check_call
from vllm_jd.kernels.triton import plan, tuning
from vllm_jd.kernels.triton.plan import Config, Launch, LayerShape, Plan
from vllm_jd.row import RANK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes of a pointer, and numbers of a stride or width, that allow the widest loads."""


def add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    pools: ModulePools,
    token_slots: torch.Tensor,
    order: torch.Tensor | None = None,
    fan: int = 1,
) -> None:
    """Add to each token's output what its adapter contributes; y is changed in place.

    For each token t of slot token_slots[t] >= 0, each slice and each row of rank > 0:

        y[t, slice] += scale ∘ (Uᵀ · core · V · x[t // fan])

    with the fields of `ModulePools.rows`. Sums are float32, y is rounded once; a token of slot -1
    keeps its y bit by bit. Compress then Serve, Listing 1; the grouping is Punica's.

    Nothing is copied to or from the host, and neither grids nor the addresses of the pools depend
    on what the tensors hold: one CUDA graph of a number of tokens serves any adapters. The first
    call for pools writes a small table: it must come before the capture (`prepare`). The same
    tensors give the same bits in every run.

    Args:
        y: [n_tokens, sum of d_out], changed in place; contiguous in its last dimension.
        x: [n_tokens / fan, d_in], contiguous in its last dimension.
        pools: of the dtype and on the device of x and y; bfloat16, float16 or float32.
        token_slots: int32 [>= n_tokens]; -1: no adapter.
        order: int32 [places], the tokens in the order in which tiles of 16 or 64 take them, -1
            where a place is left empty (`tiles.pack`): each token that has an adapter once, those
            of one cluster side by side. None: as they come. The result is the same with any
            order; the time is not. With fan > 1 it has to keep the tokens of one input side by
            side.
        fan: how many neighbouring tokens have one input: the pairs of a token and its experts.
            V · x is made once for neighbours of them that share V.

    Raises:
        ValueError: a shape, dtype or stride does not fit, or the tensors are on CPU without
            TRITON_INTERPRET=1.
        IndexError: on CPU tensors, as the reference; y is unchanged. On a GPU indices are not
            looked at, for that would wait for the device: the caller answers for them. There, a
            row of a higher rank than the pools were prepared for makes its token's y NaN.
        RuntimeError: a graph is being captured, and the pools were not prepared before.
    """
    check_call(y, x, pools, token_slots, fan)
    n_tokens = y.shape[0]
    for name, matrix in (("y", y), ("x", x), ("token_slots", token_slots[None])):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
    if order is not None:
        _check_order(order, token_slots, fan)
    if n_tokens == 0 or (order is not None and len(order) == 0):
        return
    handle = _handle(pools)
    if x.is_cpu:
        _check_content(n_tokens, pools, token_slots, order, fan, handle)
    handle.run(y, x, pools, token_slots, order, fan)


def prepare(
    pools: ModulePools, max_rank: int | None = None, config: Config | None = None
) -> LayerShape:
    """Make ready what calls for these pools need; returns the shape that their plans are made of.

    Args:
        pools: as for `add_adapters`.
        max_rank: the largest rank that a row will ever have. None: that of the rows as they are
            now, which waits for the device.
        config: of the launches. None: what the table of this GPU says (`tuning`), or the default.

    Raises:
        ValueError: the pools' dtype has no kernel, max_rank is not positive, or the table of this
            GPU cannot be read.
        RuntimeError: a graph is being captured.
    """
    before = pools.handles.get("triton")
    handle = pools.handles["triton"] = _Handle(pools, max_rank, config)
    if before is not None and before.entries == handle.entries:
        # Graphs that were captured read the table where it is.
        handle.table = before.table
    return handle.shape


def plan_of(pools: ModulePools, n_tokens: int, fan: int = 1, places: int | None = None) -> Plan:
    """The launches of a call with n_tokens tokens, in so many places of an order; None: without
    one. Raises as `prepare`."""
    return _handle(pools).plan(n_tokens, fan, places)


def uses_pdl(device: torch.device) -> bool:
    """Whether kernels start while those before them end (programmatic dependent launch): where the
    GPU has it (Hopper and later), unless the environment variable VLLM_JD_PDL is 0."""
    if device.type != "cuda" or os.environ.get("VLLM_JD_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def _handle(pools: ModulePools) -> "_Handle":
    handle = pools.handles.get("triton")
    if handle is None:
        prepare(pools)
        handle = pools.handles["triton"]
    return handle


@functools.cache
def _kernels() -> ModuleType:
    """The module of kernels: imported late, for Triton need not be there."""
    from vllm_jd.kernels.triton import kernels

    return kernels


class _Handle:
    """What the launches for one ModulePools need besides its tensors."""

    def __init__(
        self, pools: ModulePools, max_rank: int | None, config: Config | None = None
    ) -> None:
        if pools.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"the Triton kernels take {known}, not {pools.dtype}")
        if pools.packed is not None:
            raise ValueError("packed bases are for the CPU kernel, not for Triton's")
        if pools.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, but these pools have not been used before: call "
                "vllm_jd.kernels.triton.backend.prepare(pools, max_rank) first"
            )
        self.kernels = _kernels()
        if pools.device.type == "cpu" and not self.kernels.INTERPRET:
            raise ValueError(
                "the Triton kernels run on CPU tensors in Triton's interpreter only: set "
                "TRITON_INTERPRET=1 before Triton is imported"
            )
        if max_rank is None:
            tables = [table for table in (pools.rows, pools.long_rows) if table is not None]
            ranks = [int(table[..., RANK].max()) for table in tables if table.numel()]
            max_rank = max([1, *ranks])
        self.shape = LayerShape(
            d_in=pools.d_in,
            widths=tuple(u.shape[1] for u in pools.u),
            depth=pools.rows.shape[2],
            max_rank=max_rank,
            element_size=pools.v.element_size(),
            int8=pools.v_int8 is not None or pools.u_int8 is not None,
            scales=pools.scales is not None,
            core_bits=pools.core_bits,
            long_depth=0 if pools.long_rows is None else pools.long_rows.shape[2],
        )
        self._config = config
        self._tuned: tuple[tuning.Entry, ...] = ()
        if config is None and pools.device.type == "cuda":
            name = torch.cuda.get_device_name(pools.device)
            table = tuning.read_table(tuning.table_path(name))
            self._tuned = tuning.of_layer(table, self.shape)
        self.pdl = uses_pdl(pools.device)
        self.entries, self.aligned = _table(pools)
        self.table = torch.tensor(self.entries, dtype=torch.int64, device=pools.device)

    def plan(self, n_tokens: int, fan: int = 1, places: int | None = None) -> Plan:
        """The launches of a call with n_tokens tokens, `fan` of each input, in so many places."""
        config = tuning.choose(self._tuned, n_tokens) if self._config is None else self._config
        return plan.plan(self.shape, n_tokens, config, fan, places)

    def run(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pools: ModulePools,
        token_slots: torch.Tensor,
        order: torch.Tensor | None,
        fan: int,
    ) -> None:
        places = y.shape[0] if order is None else len(order)
        made = self.plan(y.shape[0], fan, places)
        # From torch's allocator: memory of this stream, and of the graph that is being captured,
        # which keeps it as long as it lives. A buffer of our own could be in use on two streams.
        z = torch.empty(made.z_shape, dtype=torch.float32, device=x.device)
        h = z if made.h_shape is None else z.new_empty(made.h_shape)
        in_8_bits = pools.v_int8
        core_steps = pools.v if pools.core_steps is None else pools.core_steps
        long_rows = pools.rows if pools.long_rows is None else pools.long_rows
        common = {
            "x": x,
            "slots": token_slots,
            "order": token_slots if order is None else order,
            "rows": pools.rows,
            "cores": pools.cores,
            "core_steps": core_steps,
            "n_tokens": y.shape[0],
            "n_places": places,
            "n_rows": self.shape.scratch_rows,
            "chunks": self.shape.chunks,
            "splits": made.splits,
            "split_stride": z.stride(0),
            "slot_stride": pools.rows.stride(0),
            "core_stride": pools.cores.stride(0),
            "step_stride": core_steps.stride(0),
            "long_rows": long_rows,
            "n_slots": pools.rows.shape[0],
            "depth": self.shape.depth,
            "long_depth": self.shape.long_depth,
            "long_stride": long_rows.stride(0),
            "HAS_ORDER": order is not None,
            "PDL": self.pdl,
        }
        shrink = {
            "z": z,
            "v": pools.v,
            "codes": pools.v if in_8_bits is None else in_8_bits.codes,
            "steps": pools.v if in_8_bits is None else in_8_bits.steps,
            "d_in": self.shape.d_in,
            "split_width": made.split_width,
            "x_stride": x.stride(0),
            "v_stride": pools.v.stride(0),
            "n_int8": len(in_8_bits or ()),
        }
        block = made.launches[-1].constants["BLOCK_N"]
        blocks = [plan.cdiv(width, block) for width in (*self.shape.widths, 0)]
        expand = {
            "blocks_0": blocks[0],
            "blocks_1": blocks[1],
            "y": y,
            "h": h,
            "table": self.table,
            "n_slices": len(pools.u),
            "y_stride": y.stride(0),
            "ALIGNED": self.aligned,
        }
        mix = {"z": z, "h": h}
        of_stage = {"shrink": shrink, "mix": mix, "expand": expand}
        for one in made.launches:
            arguments = common | of_stage[one.kernel.split("_")[0]]
            self._launch(one, arguments)

    def _launch(self, one: Launch, arguments: dict[str, object]) -> None:
        kernel = getattr(self.kernels, one.kernel)
        named = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        kernel[one.grid](**named, **one.constants, **one.options, launch_pdl=self.pdl)


def _table(pools: ModulePools) -> tuple[list[list[int]], bool]:
    """([n_slices, fields] for the kernels' SLICE, whether all of it allows wide loads)."""
    entries = []
    aligned = True
    column = 0
    for s, u in enumerate(pools.u):
        scales = None if pools.scales is None else pools.scales[s]
        in_8_bits = None if pools.u_int8 is None else pools.u_int8[s]
        pointers = [u.data_ptr(), 0, 0, 0]
        strides = [u.stride(0), 0]
        if scales is not None:
            pointers[1], strides[1] = scales.data_ptr(), scales.stride(0)
        if in_8_bits is not None:
            pointers[2:] = in_8_bits.codes.data_ptr(), in_8_bits.steps.data_ptr()
        width = u.shape[1]
        entry = [pointers[0], strides[0], width, column, pointers[1], strides[1], *pointers[2:]]
        entries.append([*entry, len(in_8_bits or ())])
        numbers = (*pointers[:3], *strides, width, column)
        aligned = aligned and all(number % ALIGNMENT == 0 for number in numbers)
        column += width
    return entries, aligned


def _check_order(order: torch.Tensor, token_slots: torch.Tensor, fan: int) -> None:
    if order.dtype != torch.int32 or order.dim() != 1 or len(order) % fan:
        raise ValueError(
            f"order must be int32 [places], a multiple of {fan}, got {order.dtype} "
            f"{tuple(order.shape)}"
        )
    if order.device != token_slots.device or not order.is_contiguous():
        raise ValueError(f"order must be contiguous on {token_slots.device}, as token_slots is")


def _check_content(
    n_tokens: int,
    pools: ModulePools,
    token_slots: torch.Tensor,
    order: torch.Tensor | None,
    fan: int,
    handle: _Handle,
) -> None:
    """What no kernel looks at, where looking costs nothing: the interpreter's tensors."""
    slots = token_slots[:n_tokens]
    slots = slots[slots >= 0].unique().long()
    if slots.numel() > 0:
        if int(slots.max()) >= pools.slots:
            raise IndexError(f"token_slots has {int(slots.max())} of {pools.slots} slots")
        rows = pools.rows_at(slots)
        reference.check_rows(rows, pools)
        rank = int(rows[..., RANK].max())
        if rank > handle.shape.max_rank:
            raise IndexError(
                f"a row has rank {rank}, but the pools were prepared for {handle.shape.max_rank}"
            )
    if order is None:
        return
    used = order[order >= 0].long()
    counts = torch.bincount(used, minlength=n_tokens)
    if len(counts) > n_tokens or int(counts.max()) > 1:
        raise IndexError(f"order has a token twice, or one beyond the {n_tokens} that there are")
    missing = torch.nonzero((counts == 0) & (token_slots[:n_tokens] >= 0)).flatten()
    if len(missing):
        raise IndexError(f"order lacks token {int(missing[0])}, which has an adapter")
    inputs = order.view(-1, fan)
    inputs = torch.where(inputs < 0, -1, inputs // fan)
    if not torch.equal(inputs, inputs[:, :1].expand_as(inputs)):
        raise IndexError(f"order takes the {fan} tokens of an input apart")
