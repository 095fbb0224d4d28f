"""How many modules may be in work at once, in the memory that there is.

A layer's experts are one module, and their factors are the largest that there are: of 64 adapters
of rank 32 for 128 experts of 2048 × 768, 3 GB.
"""

import math
from pathlib import Path

from vllm_jd.compressor.read.adapters import Collection, experts_of

WORKING = 4
"""What compressing a module holds at most, in sizes of its factors (as float32), themselves among
it. Measured: 2.2 to 3.9 (docs/compress.md)."""

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def modules_at_once(collection: Collection) -> int | None:
    """How many modules of a collection fit into memory while they are compressed, 1 or more, as
    if all adapters had the same ranks everywhere; None where it cannot be told."""
    available = available_bytes()
    sizes = [
        max(1, experts_of(collection, module)) * sum(shape)
        for module, shape in collection.shapes.items()
    ]
    if available is None or not sizes:
        return None
    largest = collection.factor_bytes * max(sizes) / sum(sizes)
    return max(1, math.floor(available / max(1, WORKING * largest)))


def available_bytes() -> int | None:
    """Memory that is to be had, of the machine and of this container; None where neither says."""
    found = [size for size in (_of_machine(), _of_container()) if size is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _of_container() -> int | None:
    try:
        most, used = ((_GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return max(0, int(most) - int(used))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
