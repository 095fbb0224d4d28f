"""The CPU backend: calls of the C++ kernel, and the structures that it is handed."""

import ctypes
from typing import Any

import torch

from vllm_jd.kernels import reference
from vllm_jd.kernels.cpu.build import loaded_library
from vllm_jd.kernels.pools import ModulePools, check_call

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_available() -> bool:
    """Whether the kernel is there, building it if need be. Logs one warning where it is not."""
    return loaded_library() is not None


def isa() -> str:
    """Instruction set the kernel was compiled for, or `none` where it is not available."""
    library = loaded_library()
    return library.jd_isa().decode() if library else "none"


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor, fan: int = 1
) -> None:
    """Add to each token's output what its adapter contributes; y is changed in place.

    Semantics, shapes and errors: `vllm_jd.kernels.reference.add_adapters`, which also does the work
    where no kernel could be built. A token's result is the same bits in every batch and with every
    number of threads.
    """
    library = loaded_library()
    if library is None:
        return reference.add_adapters(y, x, pools, token_slots, fan)
    handle = _handle(pools)
    # A step's layers are called alike: what was found good is not looked at again.
    call = (x.shape, y.shape, x.stride(), y.stride(), x.dtype, y.dtype, x.is_cpu, y.is_cpu)
    call += (token_slots.shape, token_slots.stride(), token_slots.dtype, token_slots.is_cpu, fan)
    if call != handle.good_call:
        check_call(y, x, pools, token_slots, fan)
        _check_row("y", y)
        _check_row("x", x)
        _check_row("token_slots", token_slots[None])
        handle.good_call = call
    failed = library.jd_add_adapters(
        handle.address,
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        token_slots.data_ptr(),
        y.shape[0],
        fan,
        torch.get_num_threads(),
    )
    if failed:
        raise IndexError(library.jd_error().decode())


def _check_row(name: str, matrix: torch.Tensor) -> None:
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")


class _Slice(ctypes.Structure):
    """`SliceData` of pools.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "scales", "u_codes", "u_steps")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("u_rows", "u_stride", "u_code_rows", "d_out", "first_column"),
                *("scale_rows", "scale_stride"),
            )
        ),
    ]


class _Pools(ctypes.Structure):
    """`PoolsData` of pools.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("v", "v_codes", "v_steps", "packed")),
        *((name, ctypes.c_void_p) for name in ("cores", "rows")),
        ("slices", ctypes.POINTER(_Slice)),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("v_rows", "v_stride", "v_code_rows", "d_in"),
                "packed_bytes",
                *("core_slots", "core_stride", "core_length"),
                *("slots", "slot_stride", "n_slices", "rows_per_slice", "element"),
                *("packed_in_8_bits", "core_bits"),
            )
        ),
        ("core_steps", ctypes.c_void_p),
        ("core_steps_stride", ctypes.c_int64),
        ("long_rows", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("long_slots", "long_slot_stride", "long_rows_per_slice")
        ),
    ]


class _Handle:
    """`PoolsData` of pools.h for one ModulePools, kept with what it points to."""

    def __init__(self, pools: ModulePools) -> None:
        if pools.device.type != "cpu" or pools.dtype not in ELEMENTS:
            raise ValueError(
                f"the CPU kernel takes {', '.join(map(str, ELEMENTS))} on cpu, "
                f"not {pools.dtype} on {pools.device}"
            )
        self.slices = (_Slice * len(pools.u))()
        column = 0
        for entry, u in zip(self.slices, pools.u, strict=True):
            rows, width = u.shape
            entry.u, entry.u_rows, entry.u_stride = u.data_ptr(), rows, u.stride(0)
            entry.d_out, entry.first_column = width, column
            column += width
        for entry, scales in zip(self.slices, pools.scales or [], strict=False):
            entry.scales, entry.scale_rows = scales.data_ptr(), scales.shape[0]
            entry.scale_stride = scales.stride(0)
        for entry, rows in zip(self.slices, pools.u_int8 or [], strict=False):
            entry.u_codes, entry.u_steps = rows.codes.data_ptr(), rows.steps.data_ptr()
            entry.u_code_rows = len(rows)
        v_int8, packed = pools.v_int8, pools.packed
        self.data = _Pools(
            v=pools.v.data_ptr(),
            v_codes=v_int8.codes.data_ptr() if v_int8 else None,
            v_steps=v_int8.steps.data_ptr() if v_int8 else None,
            v_code_rows=len(v_int8 or ()),
            packed=packed.data_ptr() if packed is not None else None,
            packed_bytes=packed.nbytes if packed is not None else 0,
            cores=pools.cores.data_ptr(),
            rows=pools.rows.data_ptr(),
            slices=self.slices,
            v_rows=pools.v.shape[0],
            v_stride=pools.v.stride(0),
            d_in=pools.d_in,
            core_slots=pools.cores.shape[0],
            core_stride=pools.cores.stride(0),
            core_length=pools.core_length,
            slots=pools.rows.shape[0],
            slot_stride=pools.rows.stride(0),
            n_slices=len(pools.u),
            rows_per_slice=pools.rows.shape[2],
            element=ELEMENTS[pools.dtype],
            packed_in_8_bits=packed is not None and packed.dtype == torch.uint8,
            core_bits=pools.core_bits,
        )
        if pools.core_steps is not None:
            self.data.core_steps = pools.core_steps.data_ptr()
            self.data.core_steps_stride = pools.core_steps.stride(0)
        if pools.long_rows is not None:
            self.data.long_rows = pools.long_rows.data_ptr()
            self.data.long_slots = pools.long_rows.shape[0]
            self.data.long_slot_stride = pools.long_rows.stride(0)
            self.data.long_rows_per_slice = pools.long_rows.shape[2]
        self.address = ctypes.addressof(self.data)
        self.good_call: tuple[Any, ...] = ()
        """Shapes, strides and types of the latest call that was checked."""


def address_of(pools: ModulePools) -> int:
    """Where the kernel finds what it has to know of these pools, as long as they are there."""
    return _handle(pools).address


def _handle(pools: ModulePools) -> _Handle:
    handle = pools.handles.get("cpu")
    if handle is None:
        handle = pools.handles["cpu"] = _Handle(pools)
    return handle
