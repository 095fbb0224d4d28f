"""Renumber a module's rows: where some go, or where others are put after them.

A row names vectors and scales by their places in the module's pools, an adapter names rows by
their places in the table. Whatever is cut out of the middle moves what comes after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_jd.row import RANK, SCALE_ROW, U_START, V_START

POOLS = ("U", "V", "scales")
"""A module's pools of vectors, as the files name them."""

_STARTS = ((V_START, "V"), (U_START, "U"), (SCALE_ROW, "scales"))


@dataclass(frozen=True)
class Kept:
    """Which rows (bool `[rows]`) and vectors (bool `[vectors]`, by pool) of a module stay."""

    rows: torch.Tensor
    vectors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, table: torch.Tensor, rows: torch.Tensor, counts: Mapping[str, int]) -> "Kept":
        """Rows, and the vectors that they use.

        Args:
            table: int `[rows, 5]`, or `[rows, experts, 5]`: all rows.
            rows: bool `[rows]`, those that stay.
            counts: how many vectors each pool has.
        """
        left = table[rows].flatten(0, -2).long()
        lengths = {"V": left[:, RANK], "U": left[:, RANK], "scales": (left[:, SCALE_ROW] >= 0)}
        vectors = {
            pool: _covered(left[:, column].clamp_min(0), lengths[pool].long(), counts[pool])
            for column, pool in _STARTS
        }
        return cls(rows, vectors)

    def chosen(self, chosen: torch.Tensor) -> torch.Tensor:
        """Where rows (−1: none; those that go: −1 too) are in the new table, int32."""
        places = torch.where(self.rows, self.rows.cumsum(0) - 1, -1).to(torch.int32)
        if not len(places):
            return torch.full_like(chosen, -1, dtype=torch.int32)
        return torch.where(chosen >= 0, places[chosen.clamp_min(0).long()], -1)

    def table(self, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rows `first …` of the old table as they are in the new one, int32."""
        kept = rows[self.rows[first : first + len(rows)]].clone()
        each = kept.view(-1, kept.shape[-1])
        each[each[:, RANK] == 0, :RANK] = 0  # an expert that has nothing points nowhere
        for column, pool in _STARTS:
            # The vectors of a row that stays all stay: its first is one that does.
            places = (self.vectors[pool].cumsum(0) - 1).to(torch.int32)
            used = (each[:, column] >= 0) & (each[:, RANK] > 0)
            each[used, column] = places[each[used, column].long()]
        return kept


def moved(rows: torch.Tensor, by: Mapping[str, int]) -> torch.Tensor:
    """Rows whose vectors come after so many others, by pool: int32, in the shape of `rows`."""
    result = rows.clone()
    each = result.view(-1, rows.shape[-1])
    for column, pool in _STARTS:
        each[(each[:, column] >= 0) & (each[:, RANK] > 0), column] += by[pool]
    return result


def moved_choice(chosen: torch.Tensor, by: int) -> torch.Tensor:
    """What adapters name (−1: none) where their rows come after so many others, int32."""
    return torch.where(chosen >= 0, chosen + by, -1).to(torch.int32)


def _covered(start: torch.Tensor, length: torch.Tensor, count: int) -> torch.Tensor:
    """Which of `count` vectors lie in one of the stretches: bool `[count]`."""
    edges = torch.zeros(count + 1, dtype=torch.int64)
    edges.index_add_(0, start, length.clamp_max(1))
    edges.index_add_(0, start + length, -length.clamp_max(1))
    return edges.cumsum(0)[:count] > 0
