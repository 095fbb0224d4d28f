"""One module's vectors and the table of the rows that use them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, Row


class Codes(NamedTuple):
    """Vectors in 8 bits: entry c of vector i is steps[i, c // 32] · codes[i, c], rounded to the
    store's dtype. `codes` int8 `[n, width]`, `steps` bfloat16 `[n, ⌈width / 32⌉]`."""

    codes: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True)
class Bases:
    """What the adapters of one module choose from.

    `u` `[u_vectors, d_out]`, `v` `[v_vectors, d_in]` and `scales` `[scale_rows, d_out]` are pools
    of vectors. An entry of `rows`, int32 `[rows, 5]` (`STORED_FIELDS`), is one product (see
    `vllm_jd.row`); of a module of experts it is `[rows, experts, 5]`, a product for each expert.
    An adapter that is kept as it was has rows of its own. An adapter adds up the products of its
    rows; at most one of those has a core.
    """

    u: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor
    rows: torch.Tensor

    def factors(
        self, row: int, core: torch.Tensor, expert: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B `[d_out, rank]`, A `[rank, d_in]`) of one row's product, float32.

        Args:
            row: its number.
            core: the adapter's core of this module, of all experts, flat; not looked at where
                there is none.
            expert: whose product, of a module of experts.
        """
        each = self.rows[row].view(-1, self.rows.shape[-1])
        found = Row(*each[expert].tolist())
        rank = found.rank
        own = len(core) // len(each)
        core = core[expert * own : (expert + 1) * own]
        b = self.u[found.u_start : found.u_start + rank].float().T
        if found.core_kind == CORE_FULL:
            b = b @ core[: rank * rank].float().view(rank, rank)
        elif found.core_kind == CORE_DIAGONAL:
            b = b * core[:rank].float()
        if found.scale_row >= 0:
            b = b * self.scales[found.scale_row].float()[:, None]
        return b, self.v[found.v_start : found.v_start + rank].float()
