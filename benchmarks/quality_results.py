"""The quality study's results, read back: series of items, and what they say beside LoRA."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_jd.evaluate.compared import Compared, with_agreement


@dataclass(frozen=True)
class Result(Compared):
    """What one way to store a collection of n adapters was measured to do.

    Args:
        n: adapters of the collection; 0 for the base model and LoRA, which do not depend on it.
        label: of the way.
        raw: the file.
    """

    n: int
    label: str
    raw: dict[str, Any]

    def figures(self, name: str) -> np.ndarray:
        """An error of `quality_errors.NAMES` of each adapter that was asked: float64 `[adapters]`;
        of the base model and LoRA there is none."""
        return np.array([self.raw["errors"][each][name] for each in self.names])


def load(folder: Path) -> list[Result]:
    """The base model, if it was asked, LoRA, and every cell, by n and bytes.

    Raises:
        ValueError: the folder has no results of LoRA.
    """
    plain = {
        who: json.loads((folder / f"{who}.json").read_text())
        for who in ("base", "lora")
        if (folder / f"{who}.json").exists()
    }
    if "lora" not in plain:
        raise ValueError(f"{folder}: found no lora.json, expected results of quality.py")
    lora = plain["lora"]["answers"]
    labels = {"base": "base", "lora": "LoRA"}
    found = [result(0, labels[who], raw["answers"], lora, raw) for who, raw in plain.items()]
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
        names,
        with_agreement([answers[name] for name in names], [lora[name] for name in names]),
        with_agreement([lora[name] for name in names], [lora[name] for name in names]),
        n,
        label,
        raw,
    )
