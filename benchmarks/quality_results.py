"""The quality study's results, read back: series of items, and what they say beside LoRA."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bootstrap
import numpy as np
from bootstrap import Interval

METRICS = ("rouge_l", "rouge_1", "exact", "loss", "agreement")
RELATIVE = ("rouge_l", "rouge_1", "exact")
"""Of these the share of LoRA's says most; of the loss the difference, agreement is relative."""

Series = list[list[float]]


@dataclass(frozen=True)
class Result:
    """What one way to store a collection of n adapters was measured to do.

    Args:
        n: adapters of the collection; 0 for the base model and LoRA, which do not depend on it.
        label: of the way.
        names: the adapters that were asked.
        values: metric → of each of these, its items' values.
        lora: the same of the adapters as they are.
        raw: the file.
    """

    n: int
    label: str
    names: list[str]
    values: dict[str, Series]
    lora: dict[str, Series]
    raw: dict[str, Any]

    def mean(self, metric: str) -> Interval:
        """The mean over tasks."""
        return bootstrap.interval([self.values[metric]], bootstrap.mean)

    def kept(self, metric: str) -> Interval:
        """The mean over tasks as a share of LoRA's."""
        return bootstrap.interval([self.values[metric], self.lora[metric]], bootstrap.ratio)

    def added(self, metric: str) -> Interval:
        """The mean over tasks minus LoRA's."""
        return bootstrap.interval([self.values[metric], self.lora[metric]], bootstrap.difference)

    def each(self, metric: str) -> np.ndarray:
        """Of each adapter the mean, float64 `[adapters]`."""
        return np.array([np.mean(items) for items in self.values[metric]])

    def each_lora(self, metric: str) -> np.ndarray:
        """The same of the adapters as they are."""
        return np.array([np.mean(items) for items in self.lora[metric]])

    def worst_kept(self, metric: str) -> tuple[float, str]:
        """The smallest share of LoRA's that an adapter keeps, and its name. Adapters that score
        nothing themselves are left out."""
        ours, theirs = self.each(metric), self.each_lora(metric)
        shares = np.where(theirs > 0, ours / np.where(theirs > 0, theirs, 1), np.inf)
        worst = int(shares.argmin())
        return float(shares[worst]), self.names[worst]

    def worst_added(self) -> tuple[float, str]:
        """The most that an adapter's loss rises, in nats a token, and its name."""
        added = self.each("loss") - self.each_lora("loss")
        worst = int(added.argmax())
        return float(added[worst]), self.names[worst]

    def figures(self, name: str) -> np.ndarray:
        """An error of `quality_errors.NAMES` of each adapter that was asked: float64 `[adapters]`;
        of the base model and LoRA there is none."""
        return np.array([self.raw["errors"][each][name] for each in self.names])


def load(folder: Path) -> list[Result]:
    """The base model, LoRA, and every cell, by n and bytes.

    Raises:
        ValueError: the folder has no results of the base model and LoRA.
    """
    plain = {}
    for who in ("base", "lora"):
        file = folder / f"{who}.json"
        if not file.exists():
            raise ValueError(f"{folder}: found no {who}.json, expected results of quality.py run")
        plain[who] = json.loads(file.read_text())
    lora = plain["lora"]["answers"]
    found = [
        result(0, "base", plain["base"]["answers"], lora, plain["base"]),
        result(0, "LoRA", lora, lora, plain["lora"]),
    ]
    cells = [
        json.loads(file.read_text())
        for file in folder.glob("n*/*.json")
        if not file.name.endswith(".alone.json")
    ]
    cells.sort(key=lambda cell: (cell["n"], cell["bytes"]))
    found += [result(cell["n"], cell["label"], cell["answers"], lora, cell) for cell in cells]
    return found


def result(
    n: int, label: str, answers: dict[str, Any], lora: dict[str, Any], raw: dict[str, Any]
) -> Result:
    """From the series as the files have them."""
    names = [name for name in answers if name in lora]
    return Result(
        n,
        label,
        names,
        with_agreement([answers[name] for name in names], [lora[name] for name in names]),
        with_agreement([lora[name] for name in names], [lora[name] for name in names]),
        raw,
    )


def with_agreement(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> dict[str, Series]:
    """Metric → series; `agreement` is 1 where an item's answer is LoRA's word for word."""
    found = {metric: [each[metric] for each in ours] for metric in METRICS if metric in ours[0]}
    found["agreement"] = [
        [float(a == b) for a, b in zip(one["said"], other["said"], strict=True)]
        for one, other in zip(ours, theirs, strict=True)
    ]
    return found
