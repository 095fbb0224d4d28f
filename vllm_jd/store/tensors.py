"""A safetensors file that stays open: read some of its tensors' entries, whole or not at all.

Its header is read once. After that the file may be renamed or deleted: its bytes stay there for as
long as it is open. Nothing is mapped, so that a disk that fails or a file that was cut short is an
error message, not the end of the process.
"""

import json
import math
import os
import weakref
from pathlib import Path

import torch

from vllm_jd.store.errors import StoreError

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""What a file holds: name → (type as safetensors names it, shape)."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_BYTES = 100_000_000  # the most that safetensors allows
_READ_BYTES = 1 << 30  # at once: the system takes a little less than 2 GiB


class TensorFile:
    """An open file.

    Args:
        path: the file.

    Attributes:
        path: the same.
        tensors: what is in it, in the order of the header.

    Raises:
        StoreError: it cannot be read, or is no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error}") from None
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self.tensors, self._offsets = self._header()

    def close(self) -> None:
        """Give up the file. Harmless when done twice."""
        self._descriptor = -1
        self._close()

    def read(
        self, key: str, first: int = 0, last: int | None = None, *, whose: str = ""
    ) -> torch.Tensor:
        """Entries `first … last - 1` (all) of a tensor along its first dimension.

        Args:
            key: the tensor.
            first: of its entries.
            last: one more than the last of them; None: to the end.
            whose: what to say beside the tensor's name where it cannot be read.

        Raises:
            KeyError: no such tensor.
            StoreError: the file was closed, cannot be read, or ends before.
        """
        dtype, shape = self.tensors[key]
        count, *rest = shape or (1,)
        last = count if last is None else min(last, count)
        first = min(first, last)
        step = math.prod(rest) * _DTYPES[dtype].itemsize
        result = torch.empty((last - first, *rest) if shape else (), dtype=_DTYPES[dtype])
        if result.numel():
            into = memoryview(result.view(-1).view(torch.uint8).numpy())
            self._fill(into, self._offsets[key] + first * step, f"{key}{whose}")
        return result

    def read_into(self, into: memoryview, key: str, first: int) -> None:
        """Fill `into` (bytes) with a tensor's entries from number `first` on.

        Raises: as `read`.
        """
        dtype, (_, *rest) = self.tensors[key]
        step = math.prod(rest) * _DTYPES[dtype].itemsize
        self._fill(into, self._offsets[key] + first * step, key)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor's numbers.

        Raises:
            KeyError: no such tensor.
        """
        return _DTYPES[self.tensors[key][0]]

    def prefetch(self, key: str, first: int, last: int) -> None:
        """Have the operating system fetch entries `first … last - 1`, without waiting for them.

        Does nothing where the system takes no such advice (macOS), nor on a closed file.
        """
        if self._descriptor < 0 or not hasattr(os, "posix_fadvise"):
            return
        dtype, (_, *rest) = self.tensors[key]
        step = math.prod(rest) * _DTYPES[dtype].itemsize
        begin, size = self._offsets[key] + first * step, (last - first) * step
        os.posix_fadvise(self._descriptor, begin, size, os.POSIX_FADV_WILLNEED)

    def _fill(self, into: memoryview, offset: int, what: str) -> None:
        if self._descriptor < 0:
            raise StoreError(f"{self.path}: {what}: asked for after the store was closed")
        done = 0
        while done < len(into):
            try:
                part = into[done : done + _READ_BYTES]
                count = os.preadv(self._descriptor, [part], offset + done)
            except OSError as error:
                raise StoreError(f"{self.path}: {what}: cannot be read: {error}") from None
            if not count:
                raise StoreError(
                    f"{self.path}: {what}: found {done:,} bytes, expected {len(into):,}; the file "
                    "was cut short (restore it, or compress again)"
                )
            done += count

    def _header(self) -> tuple[Tensors, dict[str, int]]:
        try:
            total = os.fstat(self._descriptor).st_size
            begin = bytearray(8)
            self._fill(memoryview(begin), 0, "header")
            size = int.from_bytes(begin, "little")
            if size > min(total - 8, _HEADER_BYTES):
                raise ValueError(f"a header of {size:,} bytes in a file of {total:,}")
            text = bytearray(size)
            self._fill(memoryview(text), 8, "header")
            header = json.loads(text)
            tensors, offsets = {}, {}
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
                start, end = map(int, entry["data_offsets"])
                room = 0 <= start <= end <= total - 8 - size and min(shape, default=0) >= 0
                if not room or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
                    raise ValueError(f"{key}: {dtype} {list(shape)} in bytes {start} to {end}")
                tensors[key], offsets[key] = (dtype, shape), 8 + size + start
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise StoreError(
                f"{self.path}: not a readable safetensors file: {type(error).__name__}: {error}"
            ) from None
        return tensors, offsets
