"""What the quality study compares: ways to store a collection of n adapters."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_jd.compressor import Settings

SUITES = ("small", "full")


@dataclass(frozen=True)
class Cell:
    """A collection's size, and how it is stored.

    Args:
        n: adapters.
        settings: of the store.
        share: not by us, but by the package lorashare, in as many numbers as JD-Full of this rank
            has; the store has what it rebuilds.
    """

    n: int
    settings: Settings
    share: int = 0

    @property
    def label(self) -> str:
        """As in tables; no two cells of one n have the same."""
        s = self.settings
        if self.share:
            return f"share r{self.share}"
        words = [s.method]
        if s.rank and s.method != "none":
            words.append(f"r{s.rank}")
        if s.clusters > 1:
            words.append(f"c{s.clusters}")
        if s.has("matrices"):
            words.append(f"M{s.matrices}")
        if s.quantised:
            words.append(s.quantised)
        return " ".join(words)

    @property
    def file(self) -> str:
        """Of its result, below the results' folder."""
        return f"n{self.n}/{self.label.replace(' ', '-')}.json"


def cells(suite: str, n: int) -> list[Cell]:
    """The cells of a suite for n adapters, what says most first: a run may be stopped.

    Raises:
        ValueError: no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"found the suite {suite!r}, expected one of {', '.join(SUITES)}")
    found = [Cell(n, settings) for settings in (_few(n) if suite == "small" else _many(n))]
    if suite == "full":
        best = paper_rank(n)
        found.append(Cell(n, Settings(method="none"), share=best))
    return list({cell.label: cell for cell in found}.values())


def paper_rank(n: int) -> int:
    """The paper's rank of JD-Full for up to 100 adapters (§6.5), n/2 + 7, rounded up to even."""
    rank = n // 2 + 7
    return rank + rank % 2


def _few(n: int) -> Iterable[Settings]:
    best = paper_rank(n)
    return (
        Settings(method="svd", rank=1),
        Settings(rank=best),
        Settings(method="none"),  # LoRA again: how much answers change by themselves
        Settings(method="jd-diag", rank=32),
        Settings(method="svd", rank=1, store_dtype="int4"),
        Settings(method="ties"),
        Settings(rank=best, store_dtype="int8"),
        Settings(rank=best, store_dtype="int4"),
        Settings(rank=16, clusters=2),
        Settings(method="jd-diag", rank=16),
        _hydra(n),
        Settings(rank=8),
        Settings(method="svd", rank=2),
    )


def _many(n: int) -> Iterable[Settings]:
    return (
        *_few(n),
        Settings(rank=16),
        Settings(rank=32),
        Settings(rank=16, clusters=max(n // 4, 2)),
        Settings(method="jd-diag", rank=32, store_dtype="int4"),
        Settings(method="jd-diag", rank=32, store_dtype="int8"),
        Settings(method="svd", rank=4),
        Settings(method="task-arithmetic"),
        Settings(method="dare"),
        _hydra(1),
        _hydra(4),
        Settings(rank=24),
        Settings(rank=64),
        Settings(method="jd-diag", rank=64),
        Settings(rank=16, clusters=4),
        Settings(rank=16, clusters=2, store_dtype="int4"),
        Settings(method="svd", rank=2, store_dtype="int4"),
        _hydra(n // 2),
        Settings(rank=32, clusters=2),
        Settings(rank=8, clusters=4),
        Settings(method="svd", rank=8),
        Settings(method="svd", rank=1, store_dtype="int8"),
        Settings(method="none", store_dtype="int4"),
        *(
            Settings(rank=rank, clusters=max(n // of, 2), store_dtype="int4")
            for rank, of in ((16, 4), (16, 8), (32, 8), (32, 16), (64, 16), (24, 8))
        ),
        Settings(method="jd-diag", rank=64, store_dtype="int4"),
        Settings(method="svd", rank=3, store_dtype="int4"),
        Settings(method="svd", rank=4, store_dtype="int4"),
    )


def _hydra(matrices: int) -> Settings:
    # As in benchmarks/pareto.py: mean absolute errors take minutes a cell, and 100 steps do.
    return Settings(method="hydraopt", rank=16, matrices=matrices, distance="frobenius", steps=100)
