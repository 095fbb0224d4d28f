"""The LoRA factors of many adapters for one module, concatenated along the rank."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ModuleFactors:
    """Factors of `n` adapters for one linear layer. Ranks may differ; rank 0 is "no factor here".

    `a` float32 `[R, d_in]` and `b` float32 `[R, d_out]`, R = Σ ranks, hold the rows of every
    lora_A and the columns of every lora_B (PEFT scale folded in): adapter i owns `ranks[i]`
    consecutive rows ρ of both, and its delta is Σ_ρ b_ρ a_ρᵀ.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def stack(
        cls, pairs: list[tuple[torch.Tensor, torch.Tensor] | None], d_in: int, d_out: int
    ) -> "ModuleFactors":
        """From one (A `[r, d_in]`, B `[d_out, r]`) an adapter, or None where it has none."""
        ranks = torch.tensor([0 if pair is None else pair[0].shape[0] for pair in pairs])
        a = torch.empty(int(ranks.sum()), d_in)
        b = torch.empty(int(ranks.sum()), d_out)
        row = 0
        for pair in pairs:
            if pair is not None:
                rank = pair[0].shape[0]
                a[row : row + rank] = pair[0]
                b[row : row + rank] = pair[1].T
                row += rank
        return cls(a, b, ranks)

    def __len__(self) -> int:
        return self.ranks.shape[0]

    @cached_property
    def _owner(self) -> torch.Tensor:
        return torch.repeat_interleave(torch.arange(len(self)), self.ranks)

    @cached_property
    def _position(self) -> torch.Tensor:
        starts = self.ranks.cumsum(0) - self.ranks
        return torch.arange(self.a.shape[0]) - starts[self._owner]

    @cached_property
    def _uniform(self) -> int:
        """The rank if all adapters have the same, else 0."""
        first = int(self.ranks[0]) if len(self) else 0
        return first if bool((self.ranks == first).all()) else 0

    def per_adapter(self, rows: torch.Tensor) -> torch.Tensor:
        """`[R, q]` → `[n, max rank, q]`, zero where an adapter has fewer rows."""
        if self._uniform:
            return rows.view(len(self), self._uniform, -1)
        width = int(self.ranks.max()) if len(self) else 0
        padded = rows.new_zeros(len(self), width, rows.shape[1])
        padded[self._owner, self._position] = rows
        return padded

    def per_row(self, padded: torch.Tensor) -> torch.Tensor:
        """Inverse of `per_adapter`."""
        if self._uniform:
            return padded.reshape(self.a.shape[0], -1)
        return padded[self._owner, self._position]

    def subset(self, adapters: torch.Tensor) -> "ModuleFactors":
        """The factors of the adapters with these indices (int64, ascending)."""
        keep = torch.zeros(len(self), dtype=torch.bool)
        keep[adapters] = True
        rows = keep[self._owner]
        return ModuleFactors(self.a[rows], self.b[rows], self.ranks[adapters])

    def squared_norms(self) -> torch.Tensor:
        """‖B_iA_i‖²_F, float64 `[n]`, from r×r Gram products alone."""
        a, b = self.per_adapter(self.a).double(), self.per_adapter(self.b).double()
        return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))

    def normalised(self) -> tuple["ModuleFactors", torch.Tensor]:
        """Scale every adapter to ‖B_iA_i‖_F = 1 (Compress then Serve, §6.1).

        Returns the factors and the norms `[n]` float64; an adapter of norm 0 stays 0.
        """
        norms = self.squared_norms().clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
        b = self.b * inverse.float()[self._owner, None]
        return ModuleFactors(self.a, b, self.ranks), norms
