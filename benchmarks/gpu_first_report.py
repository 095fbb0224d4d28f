"""What a run of `gpu_first.py` found, as the tables and the figure of docs/gpu-first.md.

    python benchmarks/gpu_first_report.py benchmarks/results/gpu-first-nvidia-h200.json

The tables are printed, as Markdown; the figure lies beside the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib import pyplot


def main(file: Path) -> None:
    """Print the tables of a result and draw its figure."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for table in (of_model(found["model"]), of_layers(found["limit"]), of_loops(found["cliff"])):
        print(*table, "", sep="\n")
    out = file.with_suffix(".png")
    draw(found, out)
    print(f"figure: {out}")


def in_order(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Decoding steps first, small ones first."""
    return sorted(batches, key=lambda one: (one["batch"][0], one["tokens"]))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def of_model(part: Mapping[str, Any]) -> list[str]:
    """Milliseconds of a step of the base, and how much of its speed each system keeps."""
    batches = in_order(part["batches"])
    names = [name for name in batches[0]["microseconds"] if name != "base"]
    rows = []
    for one in batches:
        base = one["microseconds"]["base"]["median"] / 1e3
        kept = [f"{one['of_base'][name]:.3f}" for name in names]
        rows.append([one["batch"], str(one["adapters"]), f"{base:.2f}", *kept])
    return markdown(["step", "adapters in it", "base, ms", *names], rows)


def of_layers(part: Mapping[str, Any]) -> list[str]:
    """Microseconds of each layer: ours, the base's product, vLLM's kernels."""
    rows = []
    for one in sorted(part["cells"], key=lambda one: (one["model"], one["layer"], one["tokens"])):
        times = {name: each["median"] for name, each in one["microseconds"].items()}
        rows.append(
            [
                *(f"{one['model']} {one['layer']}", str(one["tokens"]), f"{times['ours']:.1f}"),
                *(f"{one['achieved']:.0%}", f"{times['base']:.1f}", f"{times['stock']:.1f}"),
            ]
        )
    return markdown(["layer", "tokens", "ours, µs", "of the limit", "base", "vLLM"], rows)


def of_loops(part: Mapping[str, Any]) -> list[str]:
    """The closed loops of the step `cliff`."""
    rows = []
    for one in part.get("loops", []):
        first = one["first_token_ms"]
        rows.append(
            [
                *(str(one["adapters"]), one["system"], f"{one['tokens_per_second']:,.0f}"),
                *(f"{first['median']:.1f}", f"{first['p99']:.1f}"),
                f"{one['copies_per_step']:.2f}",
            ]
        )
    head = ["adapters in traffic", "system", "tokens/s", "first token, ms: median", "p99"]
    return markdown([*head, "copies a step"], rows)


def draw(found: Mapping[str, Any], out: Path) -> None:
    """How much of the base model's speed is kept, by step and system."""
    batches = in_order(found["model"]["batches"])
    names = {
        "ours": f"vllm-jd, {found['model']['setting']['adapters']:,} adapters",
        "ours, one adapter": "vllm-jd, one adapter for all",
        "vLLM, one adapter": "vLLM's kernels, one adapter",
        f"vLLM, {found['model']['setting']['equal_slots']} resident": (
            f"vLLM's kernels, {found['model']['setting']['equal_slots']} resident (equal memory)"
        ),
    }
    figure, axes = pyplot.subplots(figsize=(9, 4.8))
    width = 0.8 / len(names)
    for i, (name, label) in enumerate(names.items()):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(batches))]
        axes.bar(places, [one["of_base"].get(name, 0) for one in batches], width, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(batches)), [one["batch"] for one in batches])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("speed, by the base model's")
    axes.set_title(f"A step of Mistral-7B's architecture on {found['device']}, adapters on q, k, v")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
