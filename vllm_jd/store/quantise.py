"""int8 and 4-bit numbers in blocks of 32 that share a scale, as in GGUF's Q8_0 and Q4_0."""

from typing import Literal

import torch

from vllm_jd.row import BLOCK

Kind = Literal["int8", "int4"]

_LEVELS = {"int8": 127, "int4": 7}


def quantise(x: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the rows of a matrix to `kind`.

    A number of a block is scale · code, code an integer of −127 … 127 (int8) or −7 … 7 (int4).

    Args:
        x: `[n, width]`, finite.
        kind: of the codes.

    Returns:
        Codes, int8 `[n, width]` or uint8 `[n, ⌈width / 2⌉]` (two codes + 8 a byte, the first
        in the low half), and scales, bfloat16 `[n, ⌈width / 32⌉]`.
    """
    n, width = x.shape
    blocks = -(-width // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - width))
    padded = padded.view(n, blocks, BLOCK)
    levels = _LEVELS[kind]
    scales = (padded.abs().amax(dim=2) / levels).to(torch.bfloat16)
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, padded / steps, 0.0).round().clamp(-levels, levels)
    codes = codes.flatten(1)[:, :width].to(torch.int8)
    return (codes if kind == "int8" else _pack(codes)), scales


def dequantise(codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `quantise` up to its rounding: float32 `[n, width]`."""
    codes = unpack(codes, width)
    n, blocks = scales.shape
    padded = torch.nn.functional.pad(codes.float(), (0, blocks * BLOCK - width))
    blocked = padded.view(n, blocks, BLOCK) * scales.float()[..., None]
    return blocked.flatten(1)[:, :width]


def unpack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Codes of either kind as int8 `[n, width]`, one a byte."""
    return _unpack(codes)[:, :width] if codes.dtype is torch.uint8 else codes


def code_width(width: int, kind: Kind) -> int:
    """Columns of the codes of a matrix with `width` columns."""
    return width if kind == "int8" else -(-width // 2)


def scale_width(width: int) -> int:
    """Columns of the scales of a matrix with `width` columns."""
    return -(-width // BLOCK)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)) + 8
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    return pairs.to(torch.int8) - 8
