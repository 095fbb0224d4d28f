"""Memory in large pages, for what the CPU reads from many places: bases, and cores in slots.

With pages of 4 KiB nearly every core that a step reads is in another page, and where that lies has
to be looked up in memory, too.
"""

import mmap

import torch

from vllm_jd.kernels.cpu.layout import UNIT

_CHUNK = 64 << 20
_LARGE_PAGE = 2 << 20

_chunk: torch.Tensor | None = None  # what is left of the latest piece


def large_pages(size: int) -> torch.Tensor:
    """uint8 `[size]`, zeros, its address a multiple of 64, in large pages if the system has them.

    What is smaller than such a page shares it. What nobody writes to is not there.
    """
    global _chunk
    units = -(-size // UNIT) * UNIT
    if _chunk is None or len(_chunk) < units:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no large pages
        whole = mmap.mmap(-1, max(_CHUNK, units) + _LARGE_PAGE, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            whole.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(whole, dtype=torch.uint8)
        _chunk = memory[-memory.data_ptr() % _LARGE_PAGE :]
    taken, _chunk = _chunk[:size], _chunk[units:]
    return taken
