"""The data of one wrapped linear layer: pools of basis vectors, cores, and rows of indices."""

import functools
from dataclasses import dataclass, field

import torch

from vllm_jd.row import BLOCK, ROW_FIELDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKED = 1 << 30
"""From here on, the index of a basis is its place in `ModulePools.packed`: in units of 64 bytes
(`cpu.layout.UNIT`)."""
CODE_BITS = {torch.int8: 8, torch.uint8: 4}
"""Bits of one code in `ModulePools.cores`, by its dtype."""


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """Basis vectors in 8 bits: entry c of row i is steps[i, c // 32] · codes[i, c].

    The product counts rounded to the dtype of the pools that the rows belong to: the numbers are
    those of `decode(dtype)`, whoever computes them.

    Args:
        codes: int8 [n, width].
        steps: bfloat16 [n, ⌈width / 32⌉].

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; names it.
    """

    codes: torch.Tensor
    steps: torch.Tensor

    def __post_init__(self) -> None:
        for name, tensor, dtype in (
            ("codes", self.codes, torch.int8),
            ("steps", self.steps, torch.bfloat16),
        ):
            if tensor.dim() != 2 or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be {dtype} of 2 dimensions, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        expected = (self.codes.shape[0], -(-self.codes.shape[1] // BLOCK))
        if tuple(self.steps.shape) != expected:
            raise ValueError(
                f"steps must be {list(expected)} for codes of {list(self.codes.shape)}, "
                f"got {list(self.steps.shape)}"
            )
        if self.codes.device != self.steps.device:
            raise ValueError(f"codes are on {self.codes.device}, but steps on {self.steps.device}")

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """[n, width]."""
        return self.codes.shape

    def decode(self, dtype: torch.dtype, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `first … last-1` (default: all) as numbers of `dtype`: [rows, width]."""
        codes, steps = self.codes[first:last], self.steps[first:last].float()
        wide = steps.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
        return (codes.float() * wide).to(dtype)


@dataclass(frozen=True, eq=False)
class ModulePools:
    """What one layer of `n_slices` slices sharing one input (q, k, v; gate, up; o) computes with.

    A slot is an adapter's place in `rows`, or behind those in `long_rows`. Each of its up to K rows
    for a slice adds one product scale ∘ (U · core · V) to that slice's output (see
    `vllm_jd.kernels.add_adapters`).

    Args:
        v: [v_rows, d_in], basis vectors of V as rows, of all slices; lora_A of adapters that are
            served uncompressed lie here too.
        u: for each slice [u_rows, d_out], basis vectors of U as rows (U transposed); lora_B
            transposed of uncompressed adapters.
        cores: [core_slots, row_length], an adapter's cores of all modules in one row, or one core
            of a blend in each module; behind these there may be a diagonal for rows that have no
            core of their own. One tensor serves all layers. With `core_steps` they are codes: int8
            [core_slots, row_length], or uint8 [core_slots, ⌈row_length / 2⌉], two codes + 8 a byte,
            the first in the low half.
        rows: int32 [slots, n_slices, K, 7], the fields `ROW_FIELDS`; a slot's part is contiguous,
            so that it may be cut from the rows of a whole model. rank 0: an unused row, whose
            other fields are not looked at. core_kind says what lies in row core_slot of `cores`
            from core_offset on: `CORE_FULL` rank * rank entries, row-major; `CORE_DIAGONAL` the
            rank entries of a diagonal; `CORE_NONE` nothing (the identity), and core_slot and
            core_offset are not looked at. scale_row: row of `scales` of the slice, or -1 for none.
        long_rows: int32 [long_slots, n_slices, K', 7], the same for the slots behind those of
            `rows`, which may have more of them, K' >= K, with cores in several core slots. A call
            that has none of those slots is not slowed down by them. None: there are no such slots.
        scales: for each slice [scale_rows, d_out], factors of the output's elements (VeRA's
            lambda_b, for one). None: no row has a scale.
        v_int8: further rows of V, in 8 bits. With n of them, indices 0 … n-1 are theirs, and n is
            the first row of `v`. A basis lies in one of the two as a whole.
        u_int8: for each slice the same for `u`. None, as for `v_int8`: no such rows.
        packed: bfloat16 [n], bases of V and U outside of all these, in the order in which the CPU
            kernel reads them (cpu/packed.py). Rows name them by indices from `PACKED` on. Those of
            one slot and slice are all packed, or none. Only the CPU kernel of a processor with
            AVX512-BF16 takes them, with pools of bfloat16. uint8 [n]: the same in 8 bits. Their
            products steps · codes are not rounded then; instead x, and core · V · x times a step of
            U, count rounded to 16 bits, with a power of two as step that 32 neighbours share.
        core_steps: bfloat16 [core_slots, ⌈row_length / 32⌉]: entry i of a row of cores is
            core_steps[i // 32] · code[i], the product in float32 and then rounded to the dtype of
            the pools, as in `Int8Rows`. None: `cores` holds the entries themselves.

    `v`, `u`, `cores` and `scales` share one dtype of float32, bfloat16, float16 (float64 in the
    reference only), but for codes, and are contiguous in their last dimension. The owner may
    change the contents of all tensors in place between calls, but neither the tensors themselves
    nor where their data lies: backends keep the addresses.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit; names it.
    """

    v: torch.Tensor
    u: list[torch.Tensor]
    cores: torch.Tensor
    rows: torch.Tensor
    scales: list[torch.Tensor] | None = None
    v_int8: Int8Rows | None = None
    u_int8: list[Int8Rows] | None = None
    packed: torch.Tensor | None = None
    core_steps: torch.Tensor | None = None
    long_rows: torch.Tensor | None = None
    handles: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    """What a backend keeps for these pools from call to call, by the backend's name."""

    def __post_init__(self) -> None:
        if not self.u:
            raise ValueError("u needs one tensor for each slice, got none")
        coded = self.core_steps is not None
        matrices = {"v": self.v, "cores": self.cores}
        if coded:
            matrices["core_steps"] = self.core_steps
        matrices |= {f"u[{s}]": u for s, u in enumerate(self.u)}
        matrices |= {f"scales[{s}]": scales for s, scales in enumerate(self.scales or [])}
        for name, tensor in matrices.items():
            if tensor.dim() != 2:
                raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
            if tensor.dtype != self.v.dtype and not (coded and name.startswith("core")):
                hint = "; codes need core_steps" if tensor.dtype in CODE_BITS else ""
                raise ValueError(f"{name} is {tensor.dtype}, but v is {self.v.dtype}{hint}")
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                raise ValueError(f"{name} must be contiguous in its last dimension")
            if tensor.device != self.v.device:
                raise ValueError(f"{name} is on {tensor.device}, but v is on {self.v.device}")
        if self.v.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"dtype must be one of {known}, not {self.v.dtype}")
        self._check_scales()
        self._check_int8()
        self._check_codes_of_cores()
        self._check_packed()
        self._check_rows()

    def _check_scales(self) -> None:
        if self.scales is None:
            return
        if len(self.scales) != len(self.u):
            raise ValueError(
                f"scales has {len(self.scales)} tensors for {len(self.u)} slices; "
                "give one for each slice, or None"
            )
        for s, (scales, u) in enumerate(zip(self.scales, self.u, strict=True)):
            if scales.shape[1] != u.shape[1]:
                raise ValueError(
                    f"scales[{s}] must be [scale_rows, {u.shape[1]}] as u[{s}] is wide, "
                    f"got {tuple(scales.shape)}"
                )

    def _check_int8(self) -> None:
        if self.u_int8 is not None and len(self.u_int8) != len(self.u):
            raise ValueError(
                f"u_int8 has {len(self.u_int8)} entries for {len(self.u)} slices; "
                "give one for each slice, or None"
            )
        pairs = [("v", self.v_int8, self.v)]
        pairs += [
            (f"u[{s}]", rows, u)
            for s, (rows, u) in enumerate(zip(self.u_int8 or [], self.u, strict=False))
        ]
        for name, rows, floats in pairs:
            if rows is None:
                continue
            if rows.codes.shape[1] != floats.shape[1]:
                raise ValueError(
                    f"int8 rows of {name} are {rows.codes.shape[1]} wide, the others "
                    f"{floats.shape[1]}"
                )
            if rows.codes.device != self.v.device:
                raise ValueError(
                    f"int8 rows of {name} are on {rows.codes.device}, but v is on {self.v.device}"
                )

    def _check_codes_of_cores(self) -> None:
        steps = self.core_steps
        if steps is None:
            return
        if self.cores.dtype not in CODE_BITS:
            raise ValueError(
                f"cores must be {' or '.join(map(str, CODE_BITS))} where there are core_steps, "
                f"got {self.cores.dtype}"
            )
        expected = (self.cores.shape[0], -(-self.core_length // BLOCK))
        if steps.dtype != torch.bfloat16 or tuple(steps.shape) != expected:
            raise ValueError(
                f"core_steps must be torch.bfloat16 {list(expected)} for cores of "
                f"{self.cores.dtype} {list(self.cores.shape)}, got {steps.dtype} "
                f"{list(steps.shape)}"
            )

    def _check_packed(self) -> None:
        packed = self.packed
        if packed is None:
            return
        known = packed.dtype in (torch.bfloat16, torch.uint8)
        if not known or packed.dim() != 1 or packed.data_ptr() % 64:
            raise ValueError(
                "packed must be bfloat16 or uint8 [n] at an address that is a multiple of 64, got "
                f"{packed.dtype} {tuple(packed.shape)} at {packed.data_ptr():#x}"
            )

    def _check_rows(self) -> None:
        for name, rows in (("rows", self.rows), ("long_rows", self.long_rows)):
            if rows is None:
                continue
            if rows.dim() != 4 or rows.shape[1] != len(self.u) or rows.shape[3] != len(ROW_FIELDS):
                raise ValueError(
                    f"{name} must be [slots, {len(self.u)} slices, K, {len(ROW_FIELDS)}], "
                    f"got {tuple(rows.shape)}"
                )
            if rows.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {rows.dtype}")
            if rows.device != self.v.device:
                raise ValueError(f"{name} is on {rows.device}, but v is on {self.v.device}")
            if rows.shape[0] and not rows[0].is_contiguous():
                raise ValueError(f"{name} must be contiguous within a slot")
        if self.long_rows is not None and self.long_rows.shape[2] < self.rows.shape[2]:
            raise ValueError(
                f"long_rows must have at least the {self.rows.shape[2]} rows of the other slots, "
                f"got {self.long_rows.shape[2]}"
            )

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Type of the bases and cores, and of a call's x and y."""
        return self.v.dtype

    @functools.cached_property
    def device(self) -> torch.device:
        """Where all tensors lie."""
        return self.v.device

    @functools.cached_property
    def core_bits(self) -> int:
        """Bits of one code of a core, 8 or 4; 0 where `cores` holds the entries themselves."""
        return 0 if self.core_steps is None else CODE_BITS[self.cores.dtype]

    @functools.cached_property
    def core_length(self) -> int:
        """Entries of a row of cores (in 4 bits, of an odd row, one more)."""
        width = self.cores.shape[1]
        return 2 * width if self.core_bits == 4 else width

    @property
    def slots(self) -> int:
        """How many slots there are, those of `long_rows` among them."""
        return self.rows.shape[0] + (0 if self.long_rows is None else self.long_rows.shape[0])

    @property
    def depth(self) -> int:
        """The most rows that a slot may have for a slice."""
        return max(self.rows.shape[2], 0 if self.long_rows is None else self.long_rows.shape[2])

    def rows_at(self, slots: torch.Tensor) -> torch.Tensor:
        """The rows of slots, int64 [n]: int32 [n, n_slices, depth, 7]. Where a slot has
        room for fewer, the others are unused (rank 0)."""
        if self.long_rows is None:
            return self.rows[slots]
        n, n_slices, _, fields = self.rows.shape
        found = self.rows.new_zeros(len(slots), n_slices, self.depth, fields)
        is_long = slots >= n
        found[~is_long, :, : self.rows.shape[2]] = self.rows[slots[~is_long]]
        found[is_long, :, : self.long_rows.shape[2]] = self.long_rows[slots[is_long] - n]
        return found

    def v_rows(self) -> int:
        """Rows of V that an index may name: those in 8 bits and the others."""
        return len(self.v_int8 or ()) + self.v.shape[0]

    def u_rows(self, s: int) -> int:
        """The same for U of slice s."""
        return len(self.u_int8[s] if self.u_int8 else ()) + self.u[s].shape[0]

    def float_v(self, start: int, rank: int) -> torch.Tensor:
        """Rows of V from index `start` on, which are not in 8 bits: a view [rank, d_in]."""
        first = start - len(self.v_int8 or ())
        return self.v[first : first + rank]

    def float_u(self, s: int, start: int, rank: int) -> torch.Tensor:
        """The same of U of slice s: a view [rank, d_out]."""
        first = start - len(self.u_int8[s] if self.u_int8 else ())
        return self.u[s][first : first + rank]

    @functools.cached_property
    def d_in(self) -> int:
        """Width of the layer's input."""
        return self.v.shape[1]

    @functools.cached_property
    def d_out(self) -> int:
        """Width of the layer's output: all slices side by side."""
        return sum(u.shape[1] for u in self.u)


def check_call(
    y: torch.Tensor, x: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor, fan: int = 1
) -> None:
    """Raise ValueError where the tensors of a call do not fit each other or the pools."""
    if not y.device == x.device == token_slots.device == pools.device:
        raise ValueError(
            f"y is on {y.device}, x on {x.device}, token_slots on {token_slots.device}, "
            f"but the pools are on {pools.device}"
        )
    if x.dim() != 2 or x.shape[1] != pools.d_in:
        raise ValueError(f"x must be [n_tokens, {pools.d_in}], got {tuple(x.shape)}")
    if fan < 1:
        raise ValueError(f"fan must be 1 or more tokens of one input, got {fan}")
    n_tokens = x.shape[0] * fan
    if y.dim() != 2 or y.shape[0] != n_tokens or y.shape[1] != pools.d_out:
        raise ValueError(f"y must be [{n_tokens}, {pools.d_out}], got {tuple(y.shape)}")
    if x.dtype != pools.dtype or y.dtype != pools.dtype:
        raise ValueError(f"x is {x.dtype} and y {y.dtype}, but the pools are {pools.dtype}")
    if token_slots.dtype != torch.int32 or token_slots.dim() != 1:
        raise ValueError(
            f"token_slots must be int32 [n_tokens], got {token_slots.dtype} "
            f"{tuple(token_slots.shape)}"
        )
    if token_slots.shape[0] < n_tokens:
        raise ValueError(f"token_slots has {token_slots.shape[0]} entries for {n_tokens} tokens")
