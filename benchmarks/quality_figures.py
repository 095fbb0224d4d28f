"""The quality study's figures 2 and 3 (the paper's): quality against what is saved, and lost."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from quality_results import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "jd-full": ("#0072B2", "o"),
    "jd-diag": ("#009E73", "s"),
    "svd": ("#D55E00", "^"),
    "hydraopt": ("#CC79A7", "P"),
    "ties": ("#999999", "v"),
    "task-arithmetic": ("#999999", "<"),
    "dare": ("#999999", ">"),
    "none": ("#555555", "D"),
}


def draw(results: Sequence[Result], folder: Path) -> None:
    """figure2.png (against numbers saved) and figure3.png (against the error) in a folder."""
    cells = [result for result in results if result.n]
    _draw(
        cells,
        lambda cell: cell.raw["saved"],
        "parameter saved ratio",
        folder / "figure2.png",
    )
    _draw(
        cells,
        lambda cell: float(cell.figures("error").mean()),
        "mean relative squared reconstruction error",
        folder / "figure3.png",
    )


def _draw(cells: Sequence[Result], x: Callable[[Result], float], label: str, file: Path) -> None:
    measures = [
        ("Rouge-L, share of LoRA's", lambda cell: cell.kept("rouge_l")),
        ("loss − LoRA's (nats a token)", lambda cell: cell.added("loss")),
        ("answers that are LoRA's", lambda cell: cell.mean("agreement")),
    ]
    sizes = sorted({cell.n for cell in cells})
    figure, rows = plt.subplots(
        1, len(measures), figsize=(13, 4.4), dpi=130, layout="constrained", squeeze=False
    )
    for axes, (title, measure) in zip(rows[0], measures, strict=True):
        for cell in cells:
            colour, marker = STYLES[cell.raw["settings"]["method"]]
            value = measure(cell)
            # The larger the collection, the larger the mark; quantised ones are hollow.
            hollow = cell.raw["settings"]["store_dtype"] in ("int8", "int4")
            axes.errorbar(
                x(cell),
                value.value,
                yerr=[[value.value - value.low], [value.high - value.value]],
                color=colour,
                marker=marker,
                markersize=4 + 2 * sizes.index(cell.n),
                markerfacecolor="white" if hollow else colour,
                elinewidth=0.5,
                linestyle="none",
                alpha=0.8,
            )
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    used = {cell.raw["settings"]["method"] for cell in cells}
    for method, (colour, marker) in STYLES.items():
        if method in used:
            rows[0][0].plot([], [], color=colour, marker=marker, linestyle="none", label=method)
    rows[0][0].legend(frameon=False, fontsize=8, loc="lower left")
    of = ", ".join(str(n) for n in sizes)
    figure.suptitle(
        f"SmolLM2-135M, collections of {of} adapters (larger marks: more adapters; hollow: int8 or "
        "int4); bars are 95 % intervals over tasks and items",
        fontsize=9,
    )
    figure.savefig(file)
    plt.close(figure)
