"""What share of its work a compressed adapter is expected to keep, by the error alone.

Of the quality study's results (`quality.py run`): falling curves (isotonic) from a setting's mean
error to the share of LoRA's Rouge-L that it kept, and to the answers that stayed word for word. The
intervals are those of the curve when tasks are drawn again, each with all of its items. Of several
collections the largest counts, for its tasks are the most, and the others' among them. The file is
what `vllm-jd plan`, `--target-quality` and `--auto` go by:

    python benchmarks/quality_curve.py benchmarks/results/quality --out vllm_jd/data/quality.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from quality_predict import candidates
from quality_results import Result, load
from scipy.optimize import isotonic_regression

ERRORS = (
    *(0.0, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55),
    *(0.6, 0.65),
)
NOTHING_LOST = 50.0  # weight of the point at error 0, where nothing is lost


def main(
    results: Annotated[Path, typer.Argument(help="Folder of `quality.py run`.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    draws: Annotated[int, typer.Option(min=1, help="Of tasks, for the intervals.")] = 2000,
    seed: int = 0,
) -> None:
    content = curves(candidates(load(results)), draws, seed)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in content["points"]:
        print(row)


def curves(cells: Sequence[Result], draws: int, seed: int) -> dict[str, Any]:
    """The curves of the largest collection at the errors within those that were measured, with
    95 % intervals."""
    largest = max(cell.n for cell in cells)
    cells = [cell for cell in cells if cell.n == largest]
    most = max(float(cell.figures("error").mean()) for cell in cells)
    errors = [error for error in ERRORS if error <= most]
    tasks = len(cells[0].names)
    found = fit(cells, errors, np.arange(tasks))
    generator = np.random.default_rng(seed)
    drawn = [fit(cells, errors, generator.integers(0, tasks, tasks)) for _ in range(draws)]
    points = []
    for i, error in enumerate(errors):
        row: dict[str, Any] = {"error": error}
        for name, values in found.items():
            low, high = np.percentile([one[name][i] for one in drawn], [2.5, 97.5])
            # No setting is expected to beat what it was made of; the ends fall as the curves do.
            row[name] = [round(min(1.0, float(x)), 4) for x in (values[i], low, high)]
            before = points[-1][name] if points else row[name]
            row[name] = [min(pair) for pair in zip(row[name], before, strict=True)]
        points.append(row)
    return {
        "model": "SmolLM2-135M",
        "adapters": largest,
        "settings": len(cells),
        "points": points,
    }


def fit(
    cells: Sequence[Result], errors: Sequence[float], tasks: np.ndarray
) -> dict[str, np.ndarray]:
    """Falling curves at `errors`, of these adapters of the cells."""
    measured = np.array([cell.figures("error").mean() for cell in cells])
    kept: dict[str, list[float]] = {"rouge_l": [], "unchanged": []}
    for cell in cells:
        lora = cell.each_lora("rouge_l")[tasks].mean()
        kept["rouge_l"].append(float(cell.each("rouge_l")[tasks].mean() / lora))
        kept["unchanged"].append(float(cell.each("agreement")[tasks].mean()))
    order = np.argsort(measured)
    x = np.concatenate([[0.0], measured[order]])
    weights = np.concatenate([[NOTHING_LOST], np.ones(len(cells))])
    return {
        name: np.interp(
            errors,
            x,
            isotonic_regression(
                np.concatenate([[1.0], np.array(values)[order]]), weights=weights, increasing=False
            ).x,
        )
        for name, values in kept.items()
    }


if __name__ == "__main__":
    typer.run(main)
