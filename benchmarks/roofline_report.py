"""The roofline model's figures: the numbers as JSON, tables for docs/roofline.md, a figure.

Nothing here is measured; `roofline.py` has the model. One command:

    python benchmarks/roofline_report.py --out out/roofline.json
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from roofline import (
    BATCHES,
    CONCURRENCY,
    SETTINGS,
    VLLM_VERSION,
    Gpu,
    cell,
    figure1,
    predictions,
    rows_or_tiles,
    sensitivity,
)
from servers import FIGURE_1

from vllm_jd.kernels.triton.plan import DEFAULT

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; figure and table go beside it.")],
) -> None:
    """Compute the model: bytes, arithmetic, launches and times. Nothing is measured."""
    gpu = Gpu()
    cells = [
        cell(setting, batch, adapters, gpu)
        for setting in SETTINGS
        for adapters in FIGURE_1
        for batch in BATCHES
    ]
    head = {
        "what": "a model, not a measurement",
        "date": date.today().isoformat(),
        "versions": {"vllm-jd": version("vllm-jd"), "vllm": VLLM_VERSION},
        "assumptions": asdict(gpu),
        "configuration": DEFAULT.name,
        "rows_or_tiles": rows_or_tiles(),
        "sensitivity": sensitivity(),
        "figure1": figure1(cells, SETTINGS[0], CONCURRENCY),
        "predictions": predictions(cells, gpu),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_rounded(c), separators=(",", ":")) for c in cells)
    text = json.dumps(_rounded(head), indent=2, ensure_ascii=False).removesuffix("\n}")
    out.write_text(f'{text},\n  "cells": [\n{lines}\n  ]\n}}\n')
    out.with_suffix(".md").write_text(markdown(head, cells))
    draw(head, cells, out.with_suffix(".png"))
    _print(cells)


def _rounded(value: Any) -> Any:
    """Five digits: more would say more than the model knows."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _of(cells: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [c for c in cells if all(c[key] == value for key, value in wanted.items())]


COLUMNS = (
    "step",
    "base, ms",
    "launches a layer",
    "HBM, MB",
    "scratch, MB",
    "GFLOP",
    "adapters, ms",
    "of it launches",
    "of the step",
    "vLLM, all resident, ms",
    "specialised",
    "rate, equal memory",
)


def _cells_of(c: dict[str, Any]) -> list[str]:
    ours = c["ours"]
    return [
        f"{c['phase']} {c['tokens']:,}",
        f"{1e3 * c['base_seconds']:.2f}",
        str(len(ours["kernels_per_layer"])),
        f"{ours['hbm_bytes'] / 1e6:,.0f}",
        f"{ours['scratch_bytes'] / 1e6:,.0f}",
        f"{ours['flops'] / 1e9:,.1f}",
        f"{1e3 * ours['seconds']:.2f}",
        f"{1e3 * ours['seconds_by_bound']['launches']:.2f}",
        f"{100 * ours['share']:.1f} %",
        f"{1e3 * c['stock_all_resident']['seconds']:.2f}",
        f"{1e3 * c['stock_specialised']['seconds']:.2f}",
        f"{c['ours']['rate']:.2f} : {c['stock_equal_memory']['rate']:.2f}",
    ]


def markdown(head: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/roofline.md: the largest number of adapters, Figure 1, and what the first
    run must show."""
    most = max(c["adapters"] for c in cells)
    lines = ["## Roofline (a model, not a measurement)"]
    for setting in SETTINGS:
        lines += ["", f"**{setting.name}**, {most:,} adapters, a step on each GPU:", ""]
        rows = [_cells_of(c) for c in _of(cells, setting=setting.name, adapters=most)]
        lines += _table(COLUMNS, rows)
    lines += ["", f"Requests a second, {SETTINGS[0].name}, {CONCURRENCY} at a time:", ""]
    columns = ("adapters", "base", "ours", "vLLM, equal memory", "ours of base", "ours of vLLM")
    rows = [
        [
            f"{row['adapters']:,}",
            *(f"{row[name]:.0f}" for name in ("base", "ours", "stock_equal_memory")),
            f"{row['ours'] / row['base']:.2f}",
            f"{row['ours_to_stock']:.2f}",
        ]
        for row in head["figure1"]
    ]
    lines += _table(columns, rows)
    lines += ["", "A program for each token (rows), or for 16 tokens (tiles):", ""]
    rows = [
        [str(row["tokens"]), f"{row['rows']:.1f}", f"{row['tiles']:.1f}", row["plan"]]
        for row in head["rows_or_tiles"]
    ]
    lines += _table(("tokens", "rows, µs", "tiles, µs", "the plan has"), rows)
    lines += ["", "What the first run must show:", ""]
    columns = ("what", "model", "confirmed by", "else refuted")
    rows = [
        [
            p["what"],
            f"{p['model']:.1f} {p['unit']}",
            f"{p['low']:.1f} – {p['high']:.1f} {p['unit']}",
            p["refutes"],
        ]
        for p in head["predictions"]
    ]
    return "\n".join([*lines, *_table(columns, rows)]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _print(cells: Sequence[dict[str, Any]]) -> None:
    most = max(c["adapters"] for c in cells)
    screen = Console(width=None if sys.stdout.isatty() else 150)
    screen.print(f"A MODEL, NOT A MEASUREMENT: H100, {most:,} adapters, a step on each GPU")
    for setting in SETTINGS:
        table = Table(*COLUMNS, box=box.SIMPLE_HEAD, title=setting.name, title_justify="left")
        for c in _of(cells, setting=setting.name, adapters=most):
            table.add_row(*_cells_of(c))
        screen.print(table)


# --- the figure ---

SHOWN = (SETTINGS[0], SETTINGS[1], SETTINGS[5])
PARTS = {
    "launches": "#9aa5b1",
    "latency": "#c7a0d8",
    "memory": "#1f77b4",
    "L2": "#7fb8e0",
    "programs": "#d9a441",
    "tensor cores": "#2ca02c",
}
LINES = {
    "ours": ("vllm-jd", "#1f77b4", "o-"),
    "stock_equal_memory": ("vLLM LoRA, equal memory", "#d62728", "s-"),
    "stock_specialised": ("vLLM LoRA, all resident, specialised", "#8c6d31", "D--"),
    "stock_all_resident": ("vLLM LoRA, all resident", "#e39a9a", "v--"),
}


def draw(head: dict[str, Any], cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Above: what a decoding step's adapters take, and why. Below: tokens a second against the
    number of adapters."""
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(15, 8.6), layout="constrained")
    most = max(c["adapters"] for c in cells)
    for column, setting in enumerate(SHOWN):
        mine = _of(cells, setting=setting.name, phase="decode")
        _draw_step(axes[0][column], _of(mine, adapters=most))
        _draw_rates(axes[1][column], _of(mine, requests=CONCURRENCY))
        axes[0][column].set_title(setting.name, fontsize=11, loc="left")
    axes[0][0].set_ylabel(f"added to the base model's step, %\n({most:,} adapters)")
    axes[1][0].set_ylabel(f"tokens a second, of the base model's\n({CONCURRENCY} requests)")
    for row in axes:
        named = {}
        for place in row:
            named |= dict(zip(*reversed(place.get_legend_handles_labels()), strict=True))
        row[-1].legend(
            named.values(), named.keys(), fontsize=9, frameon=False, loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
    for place in axes.flat:
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", color="#eeeeee", linewidth=0.8)
        place.set_axisbelow(True)
    gpu = head["assumptions"]
    guesses = ", ".join(
        f"{gpu[key] * 1e9:g} ns a {what}"
        for key, what in (
            ("launch_seconds", "launch"),
            ("round_seconds", "dependent read"),
            ("program_seconds", "program"),
        )
    )
    figure.suptitle(
        f"A model, not a measurement. H100 SXM: {gpu['bytes_per_second'] / 1e12:g} TB/s, "
        f"{gpu['flops_per_second'] / 1e12:g} TFLOP/s; guessed: {guesses}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_step(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    bottom = [0.0] * len(cells)
    places = [place - 0.1 for place in range(len(cells))]
    for part, colour in PARTS.items():
        heights = [
            100 * c["ours"]["seconds_by_bound"].get(part, 0) / c["base_seconds"] for c in cells
        ]
        if not any(heights):
            continue
        axes.bar(places, heights, 0.5, bottom, color=colour, label=f"vllm-jd: {part}")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    top = 1.5 * max(bottom)
    for place, height in zip(places, bottom, strict=True):
        axes.annotate(
            f"{height:.1f}", (place, height), (0, 3), textcoords="offset points", ha="center",
            fontsize=9,
        )  # fmt: skip
    name, colour, _ = LINES["stock_specialised"]
    for place, c in enumerate(cells):
        other = 100 * c["stock_specialised"]["seconds"] / c["base_seconds"]
        inside = other < 0.95 * top
        height = other if inside else 0.95 * top
        label = name if place == 0 else None
        axes.plot(place + 0.32, height, "D" if inside else "^", color=colour, ms=5, label=label)
        if not inside:
            axes.annotate(
                f"{other:.0f}", (place + 0.32, height), (-5, -4), textcoords="offset points",
                ha="right", fontsize=9, color=colour,
            )  # fmt: skip
    axes.set_xticks(range(len(cells)), [str(c["requests"]) for c in cells])
    axes.set_xlabel("requests in the step")
    axes.set_ylim(0, top)


def _draw_rates(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    axes.axhline(1, color="#444444", linewidth=1.2, linestyle=(0, (4, 3)), label="base model")
    counts = [c["adapters"] for c in cells]
    for system, (name, colour, look) in LINES.items():
        rates = [c[system]["rate"] for c in cells]
        axes.plot(counts, rates, look, color=colour, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{n:,}" for n in counts], fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.06)
    axes.set_xlabel("adapters")


if __name__ == "__main__":
    typer.run(main)
