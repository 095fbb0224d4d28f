"""What a generation's adapters choose, in numbers that the engine and its workers agree on.

A *basis* is what adapters of one cluster share: of every module one run of vectors of V, of U, or
one output scale. The engine decides which bases and which cores lie in which slots
(`vllm_jd.plugin.engine.residency`), the workers put them there (`vllm_jd.plugin.worker.slots`);
both number them as here.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from vllm_jd.row import RANK, SCALE_ROW, STORED_FIELDS, U_START, V_START
from vllm_jd.store import Store
from vllm_jd.store.reader import Pool

SIDES = {"v": V_START, "u": U_START, "scales": SCALE_ROW}
"""The kinds of basis, and the field of a row that says where each lies in its pool."""

POOLS: dict[str, Pool] = {"v": "V", "u": "U", "scales": "scales"}
"""The same kinds, as stores name their pools."""


class Tables:
    """The rows of all modules of one generation, and which bases they are made of.

    Bases are numbered on each side. First come the shared ones, in the order in which the modules'
    tables name them, so that with one cluster for all modules of an adapter number c is cluster c
    of every module; then, for each adapter, those of its rows that are in no cluster. Where these
    have the same vectors, they are one basis, the first adapter's.

    A row of a module of experts is one row for each of them, which are numbered side by side; the
    number of the first stands for all. They are of one basis.

    Args:
        store: the open generation.

    Attributes:
        rows: int32 `[1 + all rows, 5]` (`STORED_FIELDS`); number 0 is an unused row.
        bases: side → int32 `[1 + all rows]`, the basis of each row, −1 for none.
        ranks: side → int32 `[bases]`, the highest rank that a basis has in any module, 0 where
            there is none of that number. Of scales it is 1.
        wide: side → bool `[bases]`, whether in a basis experts have vectors of their own.
        each: int64 `[m]`, how many experts a module has; 1 of a plain one.
    """

    def __init__(self, store: Store):
        self._store = store
        modules = store.manifest.modules
        self.each = np.array([module.each for module in modules], dtype=np.int64)
        fields = len(STORED_FIELDS)
        tables = [
            store.rows(module.name).numpy().reshape(-1, module.each, fields) for module in modules
        ]
        sizes = [len(table) for table in tables]
        self.first = 1 + np.cumsum([0, *(self.each * sizes)])[:-1]
        """int64 `[m]`: the number of each module's first row."""
        unused = np.zeros((1, fields), dtype=np.int32)
        unused[:, SCALE_ROW] = -1
        flat = [table.reshape(-1, fields) for table in tables]
        self.rows = np.concatenate([unused, *flat]).astype(np.int32)
        self._shared = [module.shared for module in modules]
        owners = [self._owners(column, size) for column, size in enumerate(sizes)]
        wide = [_differ(table) for table in tables]
        tables = [_of_all(table) for table in tables]
        self.bases: dict[str, np.ndarray] = {}
        self.ranks: dict[str, np.ndarray] = {}
        self.wide: dict[str, np.ndarray] = {}
        for side, field in SIDES.items():
            numbers = [
                _distinct(table[:shared, field])
                for table, shared in zip(tables, self._shared, strict=True)
            ]
            common = max((int(each.max(initial=-1)) + 1 for each in numbers), default=0)
            found = [np.full(1, -1, dtype=np.int64)]
            for table, shared, own, each, experts in zip(
                tables, self._shared, owners, numbers, self.each, strict=True
            ):
                alone = table[shared:]
                private = np.full(len(alone), -1, dtype=np.int64)
                has = (alone[:, field] >= 0) & (alone[:, RANK] > 0)
                private[has] = common + _of_first(alone[has, field], own[has])
                found.append(np.concatenate([each, private]).repeat(experts))
            bases = self.bases[side] = np.concatenate(found).astype(np.int32)
            ranks = np.zeros(int(bases.max(initial=-1)) + 1, dtype=np.int32)
            used = bases >= 0
            np.maximum.at(ranks, bases[used], self.rows[used, RANK] if side != "scales" else 1)
            self.ranks[side] = ranks
            self.wide[side] = np.zeros(len(ranks), dtype=bool)
            if side != "scales":
                differ = np.concatenate([[False], *wide])
                self.wide[side][bases[used & differ]] = True

    def kinds(self, side: str) -> list[tuple[bool, int]]:
        """(whether it is wide, its rank) of each basis: by this they go to slots."""
        return list(zip(self.wide[side].tolist(), self.ranks[side].tolist(), strict=True))

    def _owners(self, column: int, size: int) -> np.ndarray:
        """Who has each row of a module that is not shared: int64 `[size − shared]`, the adapter,
        or n · k + the adapter of its k-th row."""
        shared, n = self._shared[column], len(self._store)
        owners = np.zeros(size - shared, dtype=np.int64)
        if len(owners):
            chosen = self._store.chosen[:, column].numpy()
            adapters, places = np.nonzero(chosen >= shared)
            owners[chosen[adapters, places] - shared] = places * n + adapters
        return owners

    def chosen(self, adapters: Sequence[int]) -> np.ndarray:
        """The rows of these adapters: int64 `[adapters, m, K]`, 0 where there is none; of experts
        the first one's."""
        index = np.asarray(adapters, dtype=np.int64)
        chosen = self._chosen[index].astype(np.int64)
        return np.where(chosen < 0, 0, chosen * self.each[:, None] + self.first[:, None])

    @cached_property
    def _chosen(self) -> np.ndarray:
        return self._store.chosen.numpy()

    def bases_of(self, adapter: int) -> dict[str, tuple[int, ...]]:
        """Side → the bases that an adapter is made of."""
        chosen = self.chosen([adapter]).reshape(-1)
        found = {}
        for side, bases in self.bases.items():
            numbers = np.unique(bases[chosen])
            found[side] = tuple(numbers[numbers >= 0].tolist())
        return found

    def spans(
        self,
        side: str,
        columns: np.ndarray | int,
        bases: np.ndarray,
        experts: np.ndarray | int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where bases lie in the pools of modules: the first vector and how many.

        Args:
            side: of `SIDES`.
            columns: int, which module of each basis; one number: the same of all.
            bases: int64 `[n]`; one basis for all columns may be given alone.
            experts: int, for which expert; one number: the same of all.

        Returns:
            int64 `[n]` each, 0 and 0 where the module has nothing of one.
        """
        columns, bases, experts = np.broadcast_arrays(columns, bases, experts)
        starts = np.zeros(bases.shape, dtype=np.int64)
        ranks = np.zeros(bases.shape, dtype=np.int64)
        rows = np.zeros(bases.shape, dtype=np.int64)
        common, n = self._common[side], len(self._store)
        shared = bases < common
        rows[shared] = self._rows_of_shared[side][columns[shared], bases[shared]]
        # Who has a private basis says where its row is.
        own, where = bases[~shared] - common, columns[~shared]
        if len(own):
            chosen = self._chosen[own % n, where, own // n].astype(np.int64)
            private = chosen >= np.asarray(self._shared)[where]
            number = chosen * self.each[where] + self.first[where]
            rows[~shared] = np.where(private, number, 0)
        rows = np.where(rows > 0, rows + experts, 0)
        found = (rows > 0) & (self.rows[rows, SIDES[side]] >= 0)
        starts[found] = self.rows[rows[found], SIDES[side]]
        ranks[found] = self.rows[rows[found], RANK] if side != "scales" else 1
        return starts, ranks

    def prefetch(self, side: str, basis: int) -> None:
        """Have the operating system fetch a basis of all modules, without waiting for it."""
        modules = self._store.manifest.modules
        for column, each in enumerate(self.each.tolist()):
            starts, ranks = self.spans(side, column, np.array([basis]), np.arange(each))
            used = ranks > 0
            if used.any():
                first, last = int(starts[used].min()), int((starts + ranks)[used].max())
                self._store.prefetch_vectors(modules[column].name, POOLS[side], first, last)

    @cached_property
    def _rows_of_shared(self) -> dict[str, np.ndarray]:
        """Side → int64 `[m, shared bases]`: a row of each module that has the most of a basis, 0
        where it has nothing of one."""
        found = {}
        for side, bases in self.bases.items():
            table = found[side] = np.zeros((len(self.first), self._common[side]), dtype=np.int64)
            for column, (first, shared) in enumerate(zip(self.first, self._shared, strict=True)):
                rows = first + np.arange(shared) * self.each[column]
                rows = rows[bases[rows] >= 0]
                # Of several rows the one that is written last stands: that of the highest rank.
                rows = rows[np.argsort(self.rows[rows, RANK], kind="stable")]
                table[column, bases[rows]] = rows
        return found

    @cached_property
    def _common(self) -> dict[str, int]:
        """Side → how many bases are shared."""
        counts = dict.fromkeys(SIDES, 0)
        for side, bases in self.bases.items():
            for first, shared, each in zip(self.first, self._shared, self.each, strict=True):
                counts[side] = max(
                    counts[side], int(bases[first : first + shared * each].max(initial=-1)) + 1
                )
        return counts


def _differ(table: np.ndarray) -> np.ndarray:
    """Whether a row's vectors are not the same for all experts: of a table `[rows, experts, 5]`
    bool `[rows · experts]`."""
    fields = table[..., [V_START, U_START, RANK]]
    return (fields != fields[:, :1]).any(axis=(1, 2)).repeat(table.shape[1])


def _of_all(table: np.ndarray) -> np.ndarray:
    """One row for all experts: that of the first who has one, with the highest rank of any. Of a
    table `[rows, experts, 5]` `[rows, 5]`."""
    has = table[..., RANK] > 0
    found = table[np.arange(len(table)), has.argmax(axis=1)].copy()
    found[:, RANK] = table[..., RANK].max(axis=1)
    return found


def _of_first(starts: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """For each row the owner of the first one with the same start: adapters that are not in a
    cluster may share vectors all the same (VeRA)."""
    _, first, which = np.unique(starts, return_index=True, return_inverse=True)
    return owners[first][which]


def _distinct(starts: np.ndarray) -> np.ndarray:
    """Numbers of distinct starts in the order of their first appearance, −1 where negative."""
    numbers: dict[int, int] = {}
    return np.array(
        [-1 if start < 0 else numbers.setdefault(start, len(numbers)) for start in starts.tolist()],
        dtype=np.int64,
    )
