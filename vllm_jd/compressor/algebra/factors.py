"""The LoRA factors of many adapters for one module, concatenated along the rank."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch

_EXACT_NUMBERS = 1 << 19  # held as float64 at once


@dataclass(frozen=True)
class VeraFactors:
    """VeRA vectors of `n` adapters for one linear layer, over two projections that all share.

    The delta of adapter i is diag(lambda_b[i]) · B · diag(lambda_d[i]) · A (VeRA, Kopiczko et al.,
    2024, eq. 2); both vectors are 0 where it has none here.

    Args:
        lambda_d: float32 `[n, r]`, PEFT's `vera_lambda_d`.
        lambda_b: float32 `[n, d_out]`, PEFT's `vera_lambda_b`.
        projection_a: A, float32 `[r, d_in]`, PEFT's `vera_A` cut to the layer.
        projection_b: B, float32 `[d_out, r]`, PEFT's `vera_B` cut to the layer.
    """

    lambda_d: torch.Tensor
    lambda_b: torch.Tensor
    projection_a: torch.Tensor
    projection_b: torch.Tensor

    def to(self, device: str) -> "VeraFactors":
        """The same on another device."""
        return VeraFactors(*(getattr(self, item.name).to(device) for item in fields(self)))


@dataclass(frozen=True)
class ModuleFactors:
    """Factors of `n` adapters for one linear layer. Ranks may differ; rank 0 is "no factor here".

    `a` float32 `[R, d_in]` and `b` float32 `[R, d_out]`, R = Σ ranks, hold the rows of every
    lora_A and the columns of every lora_B (PEFT scale folded in): adapter i owns `ranks[i]`
    consecutive rows ρ of both, and its delta is Σ_ρ b_ρ a_ρᵀ. (Clusters may be judged by them in
    bfloat16.)
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor | None = None
    """float32 `[n]`, the PEFT scale that b has in it, where it is known."""
    vera: VeraFactors | None = None
    """The same adapters as VeRA vectors, if that is what they are. What `subset`, `scaled` and
    `minus` make of them are plain factors."""

    @staticmethod
    def of_vera(vera: VeraFactors, present: torch.Tensor) -> "ModuleFactors":
        """From VeRA vectors; `present` (bool `[n]`) says which adapters have some here.

        `a` and `b`, R·(d_in + d_out) numbers, are only made when they are asked for.
        """
        return _VeraModuleFactors(vera, present.long() * vera.lambda_d.shape[1])

    @classmethod
    def stack(
        cls,
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None],
        d_in: int,
        d_out: int,
        scales: list[float] | None = None,
    ) -> "ModuleFactors":
        """From one (A `[r, d_in]`, B `[d_out, r]`) an adapter, or None where it has none.

        `scales` are those that the Bs have in them already.
        """
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
        return cls(a, b, ranks, None if scales is None else torch.tensor(scales))

    def __len__(self) -> int:
        return self.ranks.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the layer's input."""
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the layer's output."""
        return self.b.shape[1]

    @cached_property
    def _owner(self) -> torch.Tensor:
        device = self.ranks.device
        return torch.repeat_interleave(torch.arange(len(self), device=device), self.ranks)

    @cached_property
    def _position(self) -> torch.Tensor:
        starts = self.ranks.cumsum(0) - self.ranks
        return torch.arange(len(self._owner), device=starts.device) - starts[self._owner]

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
            return padded.reshape(len(self._owner), -1)
        return padded[self._owner, self._position]

    def subset(self, adapters: torch.Tensor) -> "ModuleFactors":
        """The factors of the adapters with these indices (int64, ascending); views where these
        are consecutive."""
        if len(adapters) == len(self):
            return self
        scales = None if self.scales is None else self.scales[adapters]
        ranks = self.ranks[adapters]
        if len(adapters) and int(adapters[-1] - adapters[0]) == len(adapters) - 1:
            first = int(self.ranks[: int(adapters[0])].sum())
            own = slice(first, first + int(ranks.sum()))
            return ModuleFactors(self.a[own], self.b[own], ranks, scales)
        keep = torch.zeros(len(self), dtype=torch.bool, device=self.ranks.device)
        keep[adapters] = True
        rows = keep[self._owner].nonzero()[:, 0]
        a, b = (side.index_select(0, rows) for side in (self.a, self.b))
        return ModuleFactors(a, b, ranks, scales)

    def to(self, device: str) -> "ModuleFactors":
        """The same on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return ModuleFactors(self.a.to(device), self.b.to(device), self.ranks.to(device), scales)

    def minus(self, other: "ModuleFactors") -> "ModuleFactors":
        """The factors of B_iA_i − B'_iA'_i: the ranks add up, nothing is multiplied."""
        a = torch.cat([part.per_adapter(part.a) for part in (self, other)], dim=1)
        b = torch.cat([self.per_adapter(self.b), -other.per_adapter(other.b)], dim=1)
        width = a.shape[1]
        ranks = torch.full((len(self),), width, device=self.ranks.device)
        return ModuleFactors(a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2]), ranks)

    def squared_norms(self) -> torch.Tensor:
        """‖B_iA_i‖²_F, float64 `[n]`, from r×r Gram products alone; not to be changed."""
        return self._squared_norms

    @cached_property
    def _squared_norms(self) -> torch.Tensor:
        a, b = self.per_adapter(self.a), self.per_adapter(self.b)
        numbers = a.shape[1] * (a.shape[2] + b.shape[2])
        chunk = max(1, _EXACT_NUMBERS // max(numbers, 1))
        parts = []
        for first in range(0, len(self), chunk):
            x, y = a[first : first + chunk].double(), b[first : first + chunk].double()
            parts.append(((x @ x.mT) * (y @ y.mT)).sum((1, 2)))
        return torch.cat(parts) if parts else a.new_zeros(0, dtype=torch.float64)

    def normalised(self) -> tuple["ModuleFactors", torch.Tensor]:
        """Scale every adapter to ‖B_iA_i‖_F = 1 (Compress then Serve, §6.1).

        Returns the factors and the norms `[n]` float64; an adapter of norm 0 stays 0.
        """
        norms = self.squared_norms().clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
        return self.scaled(inverse), norms

    def scaled(self, factor: torch.Tensor) -> "ModuleFactors":
        """Adapter i times `factor[i]`."""
        return ModuleFactors(self.a, self.b * factor.float()[self._owner, None], self.ranks)


class _VeraModuleFactors(ModuleFactors):
    """`ModuleFactors` of VeRA vectors: rows of A, and of (diag(λ_b)·B·diag(λ_d))ᵀ."""

    def __init__(self, vera: VeraFactors, ranks: torch.Tensor):
        for name, value in {
            "vera": vera,
            "ranks": ranks,
            "scales": torch.ones(len(ranks), device=ranks.device),
        }.items():
            object.__setattr__(self, name, value)

    @cached_property
    def a(self) -> torch.Tensor:  # type: ignore[override]
        return self._whole.a

    @cached_property
    def b(self) -> torch.Tensor:  # type: ignore[override]
        return self._whole.b

    @cached_property
    def _whole(self) -> ModuleFactors:
        return self.subset(torch.arange(len(self), device=self.ranks.device))

    @property
    def d_in(self) -> int:
        return self.vera.projection_a.shape[1]

    @property
    def d_out(self) -> int:
        return self.vera.projection_b.shape[0]

    def subset(self, adapters: torch.Tensor) -> ModuleFactors:
        vera, ranks = self.vera, self.ranks[adapters]
        own = adapters[ranks > 0]
        left = vera.lambda_d[own][:, :, None] * vera.projection_b.T
        b = (left * vera.lambda_b[own][:, None]).flatten(0, 1)
        return ModuleFactors(vera.projection_a.repeat(len(own), 1), b, ranks, self.scales[adapters])

    def to(self, device: str) -> ModuleFactors:
        return _VeraModuleFactors(self.vera.to(device), self.ranks.to(device))

    def squared_norms(self) -> torch.Tensor:
        # Σ_o λ_b[o]² · ‖row o of B·diag(λ_d)·A‖²
        gram = self.vera.projection_a.double() @ self.vera.projection_a.double().T
        result = torch.zeros(len(self), dtype=torch.float64, device=self.ranks.device)
        for i, (d, b) in enumerate(zip(self.vera.lambda_d, self.vera.lambda_b, strict=True)):
            rows = self.vera.projection_b.double() * d.double()
            result[i] = ((rows @ gram) * rows).sum(1) @ b.double().square()
        return result
