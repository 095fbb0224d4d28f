"""The figures of the throughput benchmark, from its JSON.

python benchmarks/throughput_figures.py out/throughput.json     # draws them again
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

COLOURS = {"base": "#444444", "merged": "#8c6d31", "jd": "#1f77b4", "stock": "#d62728"}
NAMES = {
    "base": "base model",
    "merged": "one adapter, merged",
    "jd": "vllm-jd",
    "stock": "vLLM LoRA",
}


def draw(content: dict[str, Any], out: Path) -> list[Path]:
    """Draw what there are figures for beside `out`; return the files.

    Args:
        content: the benchmark's JSON (the runs are not needed).
        out: the JSON file: `x.json` gives `x-figure1.png` and so on.
    """
    systems = {system["name"]: system for system in content["systems"]}
    files = []
    for name, figure in (
        ("figure1", _adapters(content, systems)),
        ("figure4", _rates(content, systems)),
        ("cells", _cells(content, systems)),
    ):
        if figure is not None:
            files.append(out.with_name(f"{out.stem}-{name}.png"))
            figure.savefig(files[-1], dpi=130)
            plt.close(figure)
    return files


def _adapters(content: dict[str, Any], systems: dict[str, Any]) -> Figure | None:
    """Figure 1: saturated throughput against the number of adapters."""
    saturated = [row for row in content["rows"] if row["concurrency"]]
    if not saturated:
        return None
    shape, most = saturated[0]["shape"], max(row["concurrency"] for row in saturated)
    found = [
        (systems[row["system"]], row)
        for row in saturated
        if row["shape"] == shape
        and row["concurrency"] == most
        and row["traffic"] in ("uniform", "none")
    ]
    counts = sorted({system["adapters"] for system, _ in found if system["adapters"]})
    if len(counts) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    levels = []
    for kind in ("base", "merged"):
        flat = [(s, r) for s, r in found if s["kind"] == kind and s["name"] in _shown(content)]
        for _, row in flat:
            rate = row["requests_per_second"]
            axes.axhline(rate, color=COLOURS[kind], linewidth=1.2, linestyle=(0, (4, 3)))
            levels.append((rate, f"{NAMES[kind]}  {rate:.2f}/s", COLOURS[kind]))
    for kind in ("jd", "stock"):
        line = sorted(
            (s["adapters"], r["requests_per_second"], r["ratio_to_base"])
            for s, r in found
            if s["kind"] == kind
        )
        if not line:
            continue
        axes.plot(*list(zip(*line, strict=True))[:2], "o-", color=COLOURS[kind], markersize=5)
        for n, rate, ratio in line:
            if ratio is not None:
                above = (0, 8) if kind == "stock" else (0, -15)
                axes.annotate(
                    f"×{ratio:.2f}", (n, rate), above, textcoords="offset points",
                    ha="center", fontsize=8, color=COLOURS[kind],
                )  # fmt: skip
        levels.append((line[-1][1], NAMES[kind], COLOURS[kind]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.12 * max(level for level, _, _ in levels))
    _label_ends(axes, levels)
    axes.set_xlabel("unique adapters, asked for uniformly at random")
    axes.set_ylabel("requests per second")
    _finish(axes, content, f"{most} requests at a time; × of the base model")
    return figure


def _rates(content: dict[str, Any], systems: dict[str, Any]) -> Figure | None:
    """Figure 4: what becomes of requests that arrive at random, against their rate."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    largest = {
        kind: max((s["adapters"] for s in systems.values() if s["kind"] == kind), default=0)
        for kind in COLOURS
    }
    for row in content["rows"]:
        system = systems[row["system"]]
        wanted = system["adapters"] == largest[system["kind"]] and row["system"] in _shown(content)
        if row["offered_requests_per_second"] and row["ttft_seconds"] and wanted:
            lines.setdefault(row["system"], []).append(
                (
                    row["offered_requests_per_second"],
                    row["requests_per_second"],
                    row["ttft_seconds"]["p50"],
                )
            )
    if not lines:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rates = sorted({point[0] for line in lines.values() for point in line})
    left.plot([0, rates[-1]], [0, rates[-1]], color="#bbbbbb", linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(
        "as many as come", (rates[-1] * 0.6, rates[-1] * 0.6), (-6, 6),
        textcoords="offset points", ha="right", fontsize=8, color="#888888",
    )  # fmt: skip
    ends: dict[Axes, list[tuple[float, str, str]]] = {left: [], right: []}
    for name, line in lines.items():
        system = systems[name]
        colour = COLOURS[system["kind"]]
        label = NAMES[system["kind"]]
        if system["adapters"]:
            label += f", {system['adapters']:,}"
        line.sort()
        offered, achieved, ttft = zip(*line, strict=True)
        for axes, values in ((left, achieved), (right, ttft)):
            axes.plot(offered, values, "o-", color=colour, markersize=4)
            ends[axes].append((values[-1], label, colour))
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Between powers of ten, 2 and 5 are enough.
    right.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    )
    left.set_ylim(0)
    left.set_xlim(0)
    for axes in (left, right):
        axes.set_xticks(rates)
        axes.set_xlabel("requests offered per second (Poisson)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _label_ends(axes, ends[axes])
    left.set_ylabel("requests answered per second")
    right.set_ylabel("time to first token, median (s)")
    _finish(left, content, "")
    _finish(right, content, "", with_machine=False)
    return figure


def _cells(content: dict[str, Any], systems: dict[str, Any]) -> Figure | None:
    """Throughput as a part of the base model's, over batch sizes: a panel for each shape."""
    found = [
        row
        for row in content["rows"]
        if row["concurrency"]
        and row["ratio_of_each_round"]
        and systems[row["system"]]["kind"] == "jd"
    ]
    concurrencies = sorted({row["concurrency"] for row in found})
    if len(concurrencies) < 2:
        return None
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    largest = max(systems[row["system"]]["adapters"] for row in found)
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(4.8 * len(shapes), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    looks = {"uniform": ("#1f77b4", "o"), "zipf": ("#2ca02c", "s"), "one": ("#ff7f0e", "D")}
    for axes, shape in zip(panels[0], shapes, strict=True):
        axes.axhline(1, color=COLOURS["base"], linewidth=1.2, linestyle=(0, (4, 3)))
        ends = []
        for traffic, (colour, marker) in looks.items():
            line = sorted(
                (row["concurrency"], row["ratio_to_base"], row["ratio_of_each_round"])
                for row in found
                if row["shape"] == shape
                and row["traffic"] == traffic
                and systems[row["system"]]["adapters"] == largest
            )
            if not line:
                continue
            axes.plot([c for c, _, _ in line], [r for _, r, _ in line], marker + "-", color=colour)
            for concurrency, _, each in line:
                axes.plot([concurrency] * len(each), each, "_", color=colour, alpha=0.6)
            label = "one adapter" if traffic == "one" else f"{largest:,}, {traffic}"
            ends.append((line[-1][1], label, colour))
        axes.set_xscale("log", base=2)
        axes.set_xticks(concurrencies, [f"{c}" for c in concurrencies])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("requests at a time")
        ratios = [ratio for row in found for ratio in row["ratio_of_each_round"]]
        axes.set_ylim(min(0.7, 0.95 * min(ratios)), max(1.1, 1.05 * max(ratios)))
        _label_ends(axes, ends)
        _finish(axes, content, shape, with_machine=axes is panels[0][0])
    panels[0][0].set_ylabel("requests per second, × of the base model")
    return figure


def _shown(content: dict[str, Any]) -> set[str]:
    """All systems but the slower base."""
    names = {system["name"] for system in content["systems"]}
    bases = {system["name"] for system in content["systems"] if system["kind"] == "base"}
    return names - bases | {content["base"]}


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right ends of lines, moved apart where they would cover each other."""
    axes.figure.draw_without_rendering()
    to_pixels, to_axes = axes.transData, axes.transAxes.inverted()
    wanted = [
        (to_axes.transform(to_pixels.transform((1, value)))[1], label, colour)
        for value, label, colour in sorted(ends)
    ]
    blocks: list[list[float]] = []  # heights of labels that would overlap, and so stand together
    for height, _, _ in wanted:
        block = [height]
        while blocks and _bottom(block) - _bottom(blocks[-1]) < _LINE * len(blocks[-1]):
            block = blocks.pop() + block
        blocks.append(block)
    placed = [_bottom(block) + _LINE * i for block in blocks for i in range(len(block))]
    for height, (_, label, colour) in zip(placed, wanted, strict=True):
        axes.text(
            1.015, height, label, transform=axes.transAxes, va="center", fontsize=9, color=colour
        )


_LINE = 0.055  # of a panel's height


def _bottom(block: list[float]) -> float:
    """Where the lowest label of a block stands, its middle being that of the lines' ends."""
    return sum(block) / len(block) - _LINE * (len(block) - 1) / 2


def _finish(axes: Axes, content: dict[str, Any], text: str, with_machine: bool = True) -> None:
    where = [f"{content['model']} on {content['machine']}"] if with_machine else []
    axes.set_title("\n".join([*where, text]).strip(), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)


def main(
    file: Annotated[Path, typer.Argument(help="JSON written by throughput.py.")],
) -> None:
    for path in draw(json.loads(file.read_text()), file):
        print(path)


if __name__ == "__main__":
    typer.run(main)
