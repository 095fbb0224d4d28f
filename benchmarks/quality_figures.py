"""The quality study's figures 2 and 3 (the paper's): quality against what is saved, and lost."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from method_styles import STYLES
from quality_results import Result

from vllm_jd.evaluate.bootstrap import Interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Axis = tuple[str, Callable[[Result], float], str]
"""A label, what of a cell, and the scale."""


def draw(results: Sequence[Result], folder: Path) -> None:
    """figure2.png (against numbers saved, and bytes) and figure3.png (against the error)."""
    cells = [result for result in results if result.n]
    saved: Axis = ("parameter saved ratio", lambda cell: cell.raw["saved"], "linear")
    stored: Axis = (
        "bytes, share of the adapters'",
        lambda cell: cell.raw["bytes"] / cell.raw["adapter_bytes"],
        "log",
    )
    error: Axis = (
        "mean relative squared reconstruction error",
        lambda cell: float(cell.figures("error").mean()),
        "log",
    )
    _draw(cells, [saved, stored], folder / "figure2.png")
    near = [cell for cell in cells if "trained" not in cell.raw and error[1](cell) > 1e-6]
    _draw(near, [error], folder / "figure3.png")


def _draw(cells: Sequence[Result], lines: Sequence[Axis], file: Path) -> None:
    measures = [
        ("Rouge-L, share of LoRA's", lambda cell: cell.kept("rouge_l"), "linear"),
        ("loss − LoRA's (nats a token)", lambda cell: cell.added("loss"), "symlog"),
        ("answers that are LoRA's", lambda cell: cell.mean("agreement"), "linear"),
    ]
    sizes = sorted({cell.n for cell in cells})
    figure, rows = plt.subplots(
        len(lines),
        len(measures),
        figsize=(13, 0.8 + 3.8 * len(lines)),
        dpi=110,
        layout="constrained",
        squeeze=False,
    )
    for (label, x, x_scale), row in zip(lines, rows, strict=True):
        for axes, (title, measure, y_scale) in zip(row, measures, strict=True):
            for cell in cells:
                _point(axes, cell, x(cell), measure(cell), 4 + 2 * sizes.index(cell.n))
            if y_scale == "symlog":
                # What a merge loses is a hundred times what the others lose.
                axes.set_yscale("symlog", linthresh=0.05, linscale=1)
            axes.set_xscale(x_scale)
            axes.set_xlabel(label)
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    used = {_way(cell) for cell in cells}
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


def _way(cell: Result) -> str:
    """Its name in `STYLES`: SHARE's stores have what it rebuilds as it is."""
    if "trained" in cell.raw:
        return "cores trained"
    return "share" if cell.label.startswith("share") else cell.raw["settings"]["method"]


def _point(axes: Axes, cell: Result, x: float, y: Interval, size: float) -> None:
    colour, marker = STYLES[_way(cell)]
    hollow = cell.raw["settings"]["store_dtype"] in ("int8", "int4")
    axes.errorbar(
        x,
        y.value,
        yerr=[[y.value - y.low], [y.high - y.value]],
        color=colour,
        marker=marker,
        markersize=size,
        markerfacecolor="white" if hollow else colour,
        elinewidth=0.4,
        linestyle="none",
        alpha=0.8,
    )
