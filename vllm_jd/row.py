"""The row: the one product of which everything that is served consists.

What adapter i adds to the output of a linear layer is a sum of a few rows, each

    Δy = scale ∘ (U · Σ · V · x)

with V `[rank, d_in]` and U `[d_out, rank]` cut from pools of basis vectors, a core Σ (rank × rank,
a diagonal, or none: the identity) and a scale of the output's elements, or none. A row is the
numbers that pick these. Whoever shares bases has rows with the same starts; "uncompressed" is a
row whose bases nobody shares.

A store keeps a table of each module's rows (`STORED_FIELDS`), int32 `[rows, 5]`. In a server's
pools (`vllm_jd.kernels.pools`) a row has two fields more: where the core of one adapter lies.
"""

from typing import NamedTuple

CORE_NONE, CORE_FULL, CORE_DIAGONAL = range(3)
"""Kinds of core: the identity; rank · rank entries, row-major; the rank entries of a diagonal."""

BLOCK = 32
"""How many neighbouring numbers share one step where they are codes of 8 or 4 bits."""


class Row(NamedTuple):
    """One row.

    Args:
        v_start: of the pool of V, its first basis vector.
        u_start: of the pool of U, its first basis vector.
        rank: how many vectors of each; 0: an unused row, whose other fields say nothing.
        core_kind: `CORE_NONE`, `CORE_FULL` or `CORE_DIAGONAL`.
        scale_row: of the pool of scales, or −1 for none.
        core_slot: which row of the pool of cores; −1 where there is none.
        core_offset: from which entry of that row on the core stands.
    """

    v_start: int
    u_start: int
    rank: int
    core_kind: int = CORE_NONE
    scale_row: int = -1
    core_slot: int = -1
    core_offset: int = 0

    @property
    def core_size(self) -> int:
        """Entries of its core."""
        return {CORE_NONE: 0, CORE_FULL: self.rank**2, CORE_DIAGONAL: self.rank}[self.core_kind]


ROW_FIELDS = Row._fields
STORED_FIELDS = ROW_FIELDS[:5]
"""The fields of a row in a store: those of `ROW_FIELDS` that do not depend on the adapter."""

V_START, U_START, RANK, CORE_KIND, SCALE_ROW, CORE_SLOT, CORE_OFFSET = range(len(ROW_FIELDS))
"""The columns of tables of rows."""
