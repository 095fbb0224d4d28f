"""Which rows, cores and weights a blend is made of: the same on the engine and on its workers.

In each module a blend has the rows of its parts, each once. A row with a core gets the sum of its
parts' cores, w_i Σ_i; its *place* says which of the blend's core slots holds it: within a cluster
all lie in one. A row without a core (an upload, what is kept) gets its weight, as a diagonal that
all modules share, at the end of a core slot; there is one of those for each weight other than 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.row import CORE_KIND, CORE_NONE, RANK


class Term(NamedTuple):
    """A part: of which source, its number there, and its weight."""

    source: int
    number: int
    weight: float


@dataclass(frozen=True)
class Chosen:
    """The rows of those parts of a blend that are of one generation.

    Args:
        numbers: of the parts, as the generation has them.
        weights: theirs.
        rows: int64 `[m, R]`, the rows of each module as `Tables` numbers them; 0: none.
        users: bool `[m, R, parts]`, whose row each is.
        places: int64 `[m, R]`, which core slot of the blend has the row's core; −1: it has none.
        factors: float32 `[m, R]`, the sum of the weights of a row without a core.
    """

    numbers: tuple[int, ...]
    weights: tuple[float, ...]
    rows: np.ndarray
    users: np.ndarray
    places: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(cls, tables: Tables, numbers: Sequence[int], weights: Sequence[float]) -> "Chosen":
        """The rows of some adapters of a generation with weights."""
        chosen = tables.chosen(numbers)  # [parts, m, K]
        parts, m, depth = chosen.shape
        ordered = np.sort(chosen.transpose(1, 0, 2).reshape(m, parts * depth), axis=1)
        first = ordered > 0
        first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        where, place = np.nonzero(first)
        at = (np.cumsum(first, axis=1) - 1)[where, place]
        rows = np.zeros((m, int(first.sum(axis=1).max(initial=0))), dtype=np.int64)
        rows[where, at] = ordered[where, place]
        users = (chosen.transpose(1, 0, 2)[:, None] == rows[:, :, None, None]).any(axis=3)
        users &= rows[:, :, None] > 0
        cored = (rows > 0) & (tables.rows[rows, CORE_KIND] != CORE_NONE)
        places = np.where(cored, np.cumsum(cored, axis=1) - 1, -1)
        factors = (users * np.asarray(weights, dtype=np.float64)).sum(axis=2)
        factors = np.where((rows > 0) & ~cored, factors, 1.0).astype(np.float32)
        return cls(tuple(numbers), tuple(weights), rows, users, places, factors)

    def in_one_cluster(self, tables: Tables) -> bool:
        """Whether the parts share all of their rows, and each of these has a core."""
        alone = self.rows.shape[1] <= 1 and bool((self.places[self.rows > 0] == 0).all())
        return alone and bool((tables.rows[self.rows[self.rows > 0], RANK] > 0).all())


@dataclass(frozen=True)
class Layout:
    """What a blend is made of.

    Args:
        chosen: generation (its source's number) → its parts' rows.
        uploads: (source's number, weight) of each part that is an upload.
        first_place: generation → where its places begin among the blend's.
        factors: the weights other than 1 of rows without a core, each once, float32.
        cores: how many core slots it takes.
        rows: the most rows that it may have in a module.
    """

    chosen: Mapping[int, Chosen]
    uploads: tuple[tuple[int, float], ...]
    first_place: Mapping[int, int]
    factors: tuple[float, ...]
    cores: int
    rows: int

    @classmethod
    def of(cls, terms: Sequence[Term], tables: Mapping[int, Tables]) -> "Layout":
        """Lay out a blend; sources that have no tables are uploads."""
        chosen: dict[int, Chosen] = {}
        first_place: dict[int, int] = {}
        factors: dict[float, None] = {}  # a set in order
        places = rows = 0
        for source in dict.fromkeys(term.source for term in terms if term.source in tables):
            own = [term for term in terms if term.source == source]
            its = chosen[source] = Chosen.of(
                tables[source], [term.number for term in own], [term.weight for term in own]
            )
            first_place[source] = places
            places += int(its.places.max(initial=-1)) + 1
            rows += its.rows.shape[1]
            factors |= dict.fromkeys(np.unique(its.factors).tolist())
        uploads = tuple((t.source, t.weight) for t in terms if t.source not in tables)
        factors |= dict.fromkeys(float(np.float32(weight)) for _, weight in uploads)
        kept = tuple(factor for factor in factors if factor not in (0.0, 1.0))
        cores = max(places, len(kept))
        return cls(chosen, uploads, first_place, kept, cores, rows + len(uploads))
