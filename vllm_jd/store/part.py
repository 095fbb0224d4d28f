"""One module of a store in the making: what all its adapters have in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_jd.store.files import fsync
from vllm_jd.store.renumber import POOLS, Kept, moved, moved_choice


@dataclass(frozen=True)
class Matrix:
    """Numbers as a store has them.

    Args:
        data: `[n, width]` of the store's dtype; or codes, as `quantise` gives them.
        steps: of the codes, bfloat16 `[n, ⌈width / 32⌉]`; None where `data` are the numbers.
    """

    data: torch.Tensor
    steps: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: slice | torch.Tensor) -> "Matrix":
        """Some of its `n` entries."""
        return Matrix(self.data[index], None if self.steps is None else self.steps[index])

    @classmethod
    def cat(cls, parts: Sequence["Matrix"], dim: int = 0) -> "Matrix":
        """Matrices of one kind, one after the other; side by side (`dim` 1) only where each ends
        with a whole block of codes."""
        data = torch.cat([part.data for part in parts], dim)
        steps = [part.steps for part in parts if part.steps is not None]
        return cls(data, torch.cat(steps, dim) if steps else None)

    def without(self, index: torch.Tensor) -> "Matrix":
        """The same with zeros as the entries `index`."""
        data = self.data.clone()
        data[index] = 0
        steps = None
        if self.steps is not None:
            steps = self.steps.clone()
            steps[index] = 0
        return Matrix(data, steps)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file, by their names there."""
        if self.steps is None:
            return {name: self.data}
        return {name: self.data, f"{name}.steps": self.steps}


@dataclass(frozen=True)
class ModulePart:
    """What a store keeps of one module, of `n` adapters.

    Args:
        u: vectors `[u_vectors, d_out]`.
        v: vectors `[v_vectors, d_in]`.
        scales: `[scale_rows, d_out]`.
        rows: int32 `[rows, 5]` (`vllm_jd.row.STORED_FIELDS`), of experts `[rows, experts, 5]`:
            the shared ones, then those of one adapter each.
        cores: `[n, core_size]`, 0 where an adapter has none.
        chosen: int32 `[n, K]`, the rows that each adapter adds up; −1: none.
        rank: int32 `[n]`, of the adapter's own factors, of experts their sum; 0: it lacks the
            module.
        norm: float32 `[n]`, ‖BA‖_F.
        error: float32 `[n]`, ‖BA − B̂Â‖²_F / ‖BA‖²_F, squared, of what is stored.
        shared: how many rows are shared.
        shared_rank: the rank of these; 0 if there are none.
        core_size: numbers of one adapter's core, with what fills its last block of codes.
        exact_error: the same as `error` before numbers are quantised; None where they are not.
    """

    u: Matrix
    v: Matrix
    scales: Matrix
    rows: torch.Tensor
    cores: Matrix
    chosen: torch.Tensor
    rank: torch.Tensor
    norm: torch.Tensor
    error: torch.Tensor
    shared: int
    shared_rank: int
    core_size: int
    exact_error: torch.Tensor | None = None

    @property
    def pools(self) -> dict[str, Matrix]:
        """The vectors, by pool as the files name them."""
        return {"U": self.u, "V": self.v, "scales": self.scales}

    @property
    def counts(self) -> dict[str, int]:
        """How many vectors each pool has."""
        return {pool: len(vectors) for pool, vectors in self.pools.items()}

    def without_private(self, adapters: torch.Tensor) -> "ModulePart":
        """The same, in which some adapters (int64, their indices) have no rows of their own."""
        own = self.chosen[adapters]
        stay = torch.ones(len(self.rows), dtype=torch.bool)
        stay[own[own >= self.shared].long()] = False
        if bool(stay.all()):
            return self
        kept = Kept.of(self.rows, stay, self.counts)
        return replace(
            self,
            u=self.u[kept.vectors["U"]],
            v=self.v[kept.vectors["V"]],
            scales=self.scales[kept.vectors["scales"]],
            rows=kept.table(self.rows),
            chosen=kept.chosen(self.chosen),
        )

    def with_kept(self, kept: "ModulePart", adapters: torch.Tensor) -> "ModulePart":
        """The same, in which some adapters (int64, their indices) are kept as they are.

        Args:
            kept: those adapters, each with one row of its own and no core.
            adapters: their indices here.
        """
        chosen = self.chosen.clone()
        chosen[adapters] = -1
        chosen[adapters, 0] = moved_choice(kept.chosen[:, 0], len(self.rows))

        def errors(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> torch.Tensor | None:
            if mine is None:
                return None
            mine = mine.clone()
            mine[adapters] = torch.zeros(1) if theirs is None else theirs
            return mine

        return replace(
            self,
            u=Matrix.cat([self.u, kept.u]),
            v=Matrix.cat([self.v, kept.v]),
            scales=Matrix.cat([self.scales, kept.scales]),
            rows=torch.cat([self.rows, moved(kept.rows, self.counts)]),
            cores=self.cores.without(adapters) if len(self.cores) else self.cores,
            chosen=chosen,
            error=errors(self.error, kept.error),
            exact_error=errors(self.exact_error, kept.exact_error),
        )

    def save(self, file: Path) -> None:
        """Write it to a file whole or not at all, so that a kill leaves no half of it."""
        tensors = {
            "clusters": self.rows,
            "cluster": self.chosen,
            "rank": self.rank,
            "norm": self.norm,
            "error": self.error,
            "shape": torch.tensor([self.shared, self.shared_rank, self.core_size]),
        }
        for name, matrix in (self.pools | {"cores": self.cores}).items():
            tensors |= matrix.tensors(name)
        if self.exact_error is not None:
            tensors["exact_error"] = self.exact_error
        save_tensors(tensors, file)

    @classmethod
    def load(cls, file: Path, cores: slice = slice(None)) -> "ModulePart":
        """Read what `save` wrote, memory-mapped; of the cores those of some adapters only."""
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())

            def optional(name: str) -> torch.Tensor | None:
                return tensors.get_tensor(name) if name in names else None

            u, v, scales = (
                Matrix(tensors.get_tensor(pool), optional(f"{pool}.steps")) for pool in POOLS
            )
            shared, shared_rank, core_size = tensors.get_tensor("shape").tolist()
            return cls(
                u=u,
                v=v,
                scales=scales,
                rows=tensors.get_tensor("clusters"),
                cores=_cores(tensors, names, cores),
                chosen=tensors.get_tensor("cluster"),
                rank=tensors.get_tensor("rank"),
                norm=tensors.get_tensor("norm"),
                error=tensors.get_tensor("error"),
                shared=shared,
                shared_rank=shared_rank,
                core_size=core_size,
                exact_error=optional("exact_error"),
            )


def load_cores(file: Path, first: int, last: int) -> Matrix:
    """The cores of adapters `first … last - 1` in a part that was saved."""
    with safe_open(file, framework="pt") as tensors:
        return _cores(tensors, set(tensors.keys()), slice(first, last))


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file so that a reader sees the whole of it or nothing."""
    temporary = file.with_suffix(".tmp")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    fsync(temporary)
    temporary.replace(file)


def _cores(tensors: safe_open, names: set[str], at: slice) -> Matrix:
    steps = tensors.get_slice("cores.steps")[at] if "cores.steps" in names else None
    return Matrix(tensors.get_slice("cores")[at], steps)
