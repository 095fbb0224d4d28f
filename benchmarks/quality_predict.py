"""Which figure that costs nothing tells what compression takes from an adapter's work?

Of the quality study's results (`quality.py run`), the figures of `quality_errors.py` are ranked
against what was lost: the rise of the loss, the drop of Rouge-L, and the answers that changed; over
cells (means of their adapters), and over pairs of a cell and an adapter. Tasks are parted by the
seed: the figure that ranks best, and a curve from it to the loss (isotonic), are found on two
thirds of them and judged on the rest. And over the adapters of one cell, all of them: does a figure
tell which of them suffer? One command:

    python benchmarks/quality_predict.py benchmarks/results/quality --out out/predict.json
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from quality_errors import NAMES
from quality_results import Result, load
from quality_tables import table
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

LOSSES = ("loss", "rouge_l", "agreement")
OVER = ("cells", "pairs")


def main(
    results: Annotated[Path, typer.Argument(help="Folder of `quality.py run`.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    splits: Annotated[int, typer.Option(min=1, help="Ways to part the tasks.")] = 20,
    seed: int = 0,
) -> None:
    cells = candidates(load(results))
    found = study(cells, splits, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(markdown(found))


def candidates(results: Sequence[Result]) -> list[Result]:
    """The cells that one would choose among: lossy, and better than storing nothing, whose error
    is 1. The others would be ranked right by anything; trained cores are no longer near what their
    error is of."""
    return [
        r
        for r in results
        if r.n and "trained" not in r.raw and 1e-6 < r.figures("error").mean() < 1
    ]


def lost(result: Result) -> dict[str, np.ndarray]:
    """What each adapter lost, the more the higher: float64 `[adapters]` each."""
    return {
        "loss": result.each("loss") - result.each_lora("loss"),
        "rouge_l": result.each_lora("rouge_l") - result.each("rouge_l"),
        "agreement": 1 - result.each("agreement"),
    }


def study(cells: Sequence[Result], splits: int, seed: int) -> dict[str, Any]:
    """Rank correlations and calibration, the means over several ways to part the tasks."""
    names = sorted({name for cell in cells for name in cell.names})
    rng = random.Random(seed)
    parts = []
    for _ in range(splits):
        fitted = set(rng.sample(names, round(2 * len(names) / 3)))
        parts.append((fitted, set(names) - fitted))
    ranks: dict[str, Any] = {}
    for what in LOSSES:
        ranks[what] = {}
        for figure in NAMES:
            each = [[correlations(cells, what, figure, tasks) for tasks in part] for part in parts]
            ranks[what][figure] = {
                over: {
                    "fitted": spread([one[0][over] for one in each]),
                    "rest": spread([one[1][over] for one in each]),
                }
                for over in OVER
            } | {"adapters": within(cells, what, figure)}
    return {
        "cells": len(cells),
        "pairs": sum(len(cell.names) for cell in cells),
        "tasks": len(names),
        "splits": splits,
        "seed": seed,
        "ranks": ranks,
        "calibration": calibration(cells, parts),
    }


def points(
    cells: Sequence[Result], what: str, figure: str, tasks: set[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each cell (the figure, what was lost) of those of its adapters that are of these tasks."""
    found = []
    for cell in cells:
        kept = np.array([name in tasks for name in cell.names])
        if kept.any():
            found.append((cell.figures(figure)[kept], lost(cell)[what][kept]))
    return found


def correlations(
    cells: Sequence[Result], what: str, figure: str, tasks: set[str]
) -> dict[str, float]:
    """Spearman's, over cells, and over pairs of a cell and an adapter. Collections of different
    sizes are not compared with each other, for their tasks differ: of several sizes the mean, each
    counting by its cells."""
    found: dict[str, list[float]] = {over: [] for over in OVER}
    weights = []
    for n in sorted({cell.n for cell in cells}):
        each = points([cell for cell in cells if cell.n == n], what, figure, tasks)
        if len(each) < 3:
            continue
        weights.append(len(each))
        means = np.array([[x.mean(), y.mean()] for x, y in each])
        pairs = np.array([np.concatenate(side) for side in zip(*each, strict=True)])
        found["cells"].append(rank_correlation(*means.T))
        found["pairs"].append(rank_correlation(*pairs))
    return {over: float(np.average(values, weights=weights)) for over, values in found.items()}


def within(cells: Sequence[Result], what: str, figure: str) -> dict[str, float]:
    """Spearman's over the adapters of each cell: the mean over cells, lowest and highest."""
    each = [rank_correlation(cell.figures(figure), lost(cell)[what]) for cell in cells]
    return spread(each)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's; 0 where one of the two never changes, and so tells nothing."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(spearmanr(x, y).statistic)


def calibration(
    cells: Sequence[Result], parts: Sequence[tuple[set[str], set[str]]]
) -> dict[str, Any]:
    """How far off a cell's rise of the loss is, in nats, by a rising curve of each figure that was
    fitted to the cells' means over the other tasks: the mean absolute difference; and by the mean
    of these, without any figure."""
    found: dict[str, list[float]] = {name: [] for name in (*NAMES, "nothing")}
    for fitted, rest in parts:
        for name in NAMES:
            known, new = (
                np.array([[x.mean(), y.mean()] for x, y in points(cells, "loss", name, tasks)])
                for tasks in (fitted, rest)
            )
            order = known[:, 0].argsort()
            curve = isotonic_regression(known[order, 1]).x
            told = np.interp(new[:, 0], known[order, 0], curve)
            found[name].append(float(np.abs(told - new[:, 1]).mean()))
        found["nothing"].append(float(np.abs(new[:, 1] - known[:, 1].mean()).mean()))
    return {name: spread(each) for name, each in found.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "low": round(float(np.min(values)), 4),
        "high": round(float(np.max(values)), 4),
    }


def markdown(found: dict[str, Any]) -> str:
    """The study's table: of what was not fitted to, and of all for the adapters of a cell."""
    ranks = found["ranks"]
    head = ["figure"]
    head += [f"{what}, {over}" for what in LOSSES for over in (*OVER, "adapters")]
    head += ["off by, nats"]
    shown = "{mean:.2f} ({low:.2f} – {high:.2f})"
    lines = []
    for figure in NAMES:
        line = [figure]
        for what in LOSSES:
            each = ranks[what][figure]
            line += [shown.format(**each[over]["rest"]) for over in OVER]
            line.append(shown.format(**each["adapters"]))
        lines.append([*line, f"{found['calibration'][figure]['mean']:.3f}"])
    empty = [""] * (len(head) - 2)
    lines.append(["nothing", *empty, f"{found['calibration']['nothing']['mean']:.3f}"])
    return table(head, lines)


if __name__ == "__main__":
    typer.run(main)
