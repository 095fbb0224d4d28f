"""How packed bases lie in memory: the numbers that `packed.py` and the kernel have in common.

The kernel takes them from here, through the header that `build.py` makes. What they mean is told
where they are used: `packed.py`, and in C++ `layout.h`.
"""

UNIT = 64
"""Bytes: a line of the caches. A packed basis begins at a multiple of it."""
GROUP = 8
"""In bfloat16: rows of V that lie side by side,"""
V_COLUMNS = 32
"""so many columns of each,"""
SIDE = 64
"""and columns of U that lie together, of all its rows."""
LANES = 16
"""In 8 bits: rows of V, and steps, that lie side by side."""
MAX_INT8_RANK = 512
"""In 8 bits: the largest rank. Sums of so many products fit 32 bits."""
