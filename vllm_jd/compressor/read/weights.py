"""One adapter's weights file: where its tensors lie, and their numbers."""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.faults import TensorFault
from vllm_jd.compressor.read.peft_config import (
    WEIGHTS_FILE,
    LoraConfig,
    PeftConfig,
    VeraConfig,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000
_HEADERS = 8  # parsed ones that are kept: adapters of one origin have the same

NEVER_TRAINED = "changes nothing: one factor of each layer is all zeros, as before training"
"""A note on an adapter."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a safetensors file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool = False
    """A matrix that the file has the other way round than `shape` says (MLX)."""

    @property
    def turned(self) -> "Tensor":
        """The same matrix, of which the file has the transpose."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


@dataclass(frozen=True)
class Experts:
    """What an adapter has of one projection of all experts of a layer.

    Args:
        a: where lora_A lies: of each expert, None where the adapter lacks it; or (`in_one`) one
            tensor for all of them, in a shape of those in `vllm_jd.compressor.read.experts`.
        b: the same of lora_B.
        shape: (d_out, d_in) of an expert's layer.
        ranks: of each expert; 0: the adapter lacks it.
        scales: PEFT's, of each.
        turned: what the file has as lora_A is B, and the other way round.
        half: 0 or 1: of B, its first or second half alone.
    """

    a: tuple[Tensor | None, ...]
    b: tuple[Tensor | None, ...]
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    in_one: bool = False
    turned: bool = False
    half: int | None = None


@dataclass
class Adapter:
    """One adapter's folder, and what its files hold; filled in while they are checked."""

    name: str
    folder: Path
    config: PeftConfig
    source: str | None = None
    """Of the Hub: `org/name@commit`."""
    file: str = WEIGHTS_FILE
    """The name of its weights."""
    notes: list[str] = field(default_factory=list)
    """What its user should know of it, though it is taken: sentences that go on after its name."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Module → A and B of LoRA, or d and b of VeRA."""
    experts: dict[str, Experts] = field(default_factory=dict)
    """Module of experts → what it has of them."""
    embeddings: set[str] = field(default_factory=set)
    """Modules that are tables of embeddings: of a token, V · x is a column of V."""
    spelled: dict[str, str] = field(default_factory=dict)
    """Module → its name in the adapter's own files, where that is another."""
    projections: dict[str, Tensor] = field(default_factory=dict)
    """VeRA's A and B."""
    projections_sha256: str = ""
    sha256: str = ""
    bytes: int = 0
    modified_ns: int = 0

    @property
    def label(self) -> str:
        """What faults call it."""
        return f"{self.source} ({self.folder})" if self.source else str(self.folder)

    @property
    def init(self) -> str:
        """By which starting values its training changed the base model's weights; "" if it did
        not."""
        return (isinstance(self.config, LoraConfig) and self.config.base_change) or ""

    @property
    def modules(self) -> list[str]:
        """All that it adapts."""
        return [*self.tensors, *self.experts]

    def rename(self, names: Mapping[str, str]) -> None:
        """Give modules other names than their files do."""
        self.spelled = {name: own for own, name in names.items() if own in self.tensors}
        self.tensors = {names.get(own, own): pair for own, pair in self.tensors.items()}
        self.experts = {names.get(own, own): experts for own, experts in self.experts.items()}
        self.embeddings = {names.get(own, own) for own in self.embeddings}

    def rank(self, module: str) -> int:
        """Rank of a module, of experts the sum of theirs: patterns in the config go by the names
        in the files."""
        if module in self.experts:
            return sum(self.experts[module].ranks)
        return self.config.rank_of(self.spelled.get(module, module))

    def shape(self, module: str) -> tuple[int, ...]:
        """(d_out, d_in) of an adapted layer, or of one of a module's experts; of VeRA only
        (d_out,), its files say no more."""
        if module in self.experts:
            return self.experts[module].shape
        pair = self.tensors[module]
        if isinstance(self.config, VeraConfig):
            return pair["b"].shape
        return (pair["B"].shape[0], pair["A"].shape[1])


def finite_values(
    key: str, tensor: Tensor, data: bytearray
) -> tuple[torch.Tensor, list[TensorFault]]:
    """A tensor's numbers as float32, flat, and what is wrong with them."""
    values = torch.frombuffer(
        data, dtype=tensor.dtype, count=math.prod(tensor.shape), offset=tensor.offset
    ).float()
    bad = int((~values.isfinite()).sum())
    if not bad:
        return values, []
    what = f"found NaN or infinity in {bad:,} of {values.numel():,} numbers"
    return values, [TensorFault(key, what)]


def largest_magnitude(header: Mapping[str, Tensor], data: bytearray) -> float:
    """The largest of all numbers' magnitudes as float32; NaN or infinity if there is one, or if
    the tensors are of several types, which only `finite_values` tells apart."""
    types = {tensor.dtype for tensor in header.values()}
    if len(types) != 1:
        return math.nan
    (dtype,) = types
    first = min(tensor.offset for tensor in header.values())  # from there on without a gap
    if first == len(data):
        return 0.0
    # Whatever the type, magnitudes are in the order of the bits without the sign, NaN at the end.
    bits = np.frombuffer(data, f"<i{dtype.itemsize}", offset=first)
    sign = 1 << 8 * dtype.itemsize - 1
    negative = int(bits.view(f"<u{dtype.itemsize}").max()) - sign
    largest = max(int(bits.max()), negative)
    found = torch.from_numpy(np.array([largest], bits.dtype)).view(dtype)
    return float(found.float())


def parse_header(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file: bounds, sizes and dtypes checked.

    Raises:
        ValueError: truncated or malformed.
    """
    if len(data) < 8:
        raise ValueError(f"found {len(data)} bytes, expected a safetensors header; truncated?")
    (size,) = struct.unpack("<Q", data[:8])
    if size > _MAX_HEADER or 8 + size > len(data):
        raise ValueError(
            f"the header says {size:,} bytes, the file has {len(data) - 8:,} after it; truncated?"
        )
    return dict(_parsed(bytes(data[8 : 8 + size]), len(data)))


@lru_cache(_HEADERS)
def _parsed(text: bytes, length: int) -> Mapping[str, Tensor]:
    """The tensors of a file of so many bytes that begins with this header; not to be changed."""
    header = json.loads(text)
    size = len(text)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    tensors = {}
    spans = []
    for key, info in header.items():
        if key == "__metadata__":
            continue
        key.encode()  # half of a surrogate pair is a ValueError
        entry = info if isinstance(info, dict) else {}
        dtype, shape, span = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(span)):
            raise ValueError(f"{key}: malformed header entry {str(info)[:200]}")
        if dtype not in _DTYPES:
            raise ValueError(f"{key}: found dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if len(span) != 2 or span[1] - span[0] != expected:
            raise ValueError(
                f"{key}: found data_offsets {span}, expected {expected:,} bytes for {dtype} {shape}"
            )
        spans.append(span)
        tensors[key] = Tensor(8 + size + span[0], _DTYPES[dtype], tuple(shape))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"the header leaves a gap or an overlap at byte {first:,} of the data")
        end = last
    if 8 + size + end != length:
        raise ValueError(
            f"found {length:,} bytes, the header describes {8 + size + end:,}; truncated?"
        )
    return tensors


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_tensor(adapter: Adapter, tensor: Tensor) -> torch.Tensor:
    """One tensor's numbers as float32."""
    (found,) = read_alike([(adapter, (tensor,))])
    return found[0]


def read_alike(wanted: Sequence[tuple[Adapter, Sequence[Tensor]]]) -> list[torch.Tensor]:
    """The numbers of some tensors of several adapters, which all have them in the same types and
    shapes: for each of the tensors float32 `[adapters, *shape]`.

    Raises:
        AdapterError: a file changed since it was checked.
    """
    like = wanted[0][1]
    shapes = [each.shape[::-1] if each.transposed else each.shape for each in like]
    found = [
        torch.empty(len(wanted), *shape, dtype=each.dtype)
        for shape, each in zip(shapes, like, strict=True)
    ]
    targets = [each.flatten(1).view(torch.uint8).numpy() for each in found]
    for i, (adapter, tensors) in enumerate(wanted):
        file = f"{adapter.folder}/{adapter.file}"
        try:
            handle = os.open(file, os.O_RDONLY)
            try:
                now = os.fstat(handle)
                same = (now.st_size, now.st_mtime_ns) == (adapter.bytes, adapter.modified_ns)
                for target, tensor in zip(targets, tensors, strict=True):
                    same &= os.preadv(handle, [target[i]], tensor.offset) == target.shape[1]
            finally:
                os.close(handle)
        except OSError as error:
            raise AdapterError([f"{file}: cannot be read any more: {error}"]) from None
        if not same:
            raise AdapterError([f"{file}: changed while it was being read"])
    return [
        numbers.float().mT.contiguous() if each.transposed else numbers.float()
        for numbers, each in zip(found, like, strict=True)
    ]
