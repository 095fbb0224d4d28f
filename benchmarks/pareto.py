"""Size against error of all methods on real adapters: the Pareto front.

Every store is compressed with the command's own function, every adapter exported from it as a PEFT
folder, and the error computed from those folders in float64: what the store says of itself is not
asked. Beside them the package lorashare (SHARE) and the paper's algorithm as a plain loop. Prints
JSON, draws a figure; what is in the JSON already is not run again. One command:

    python benchmarks/pareto.py ADAPTERS --out out/pareto.json
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import baselines
import machine
import matplotlib
import torch
import typer
from method_styles import STYLES
from rebuilt import pairs_of
from rich.console import Console
from rich.progress import track

from vllm_jd.compressor import PeftCollection, Settings, export_adapter, read_adapters
from vllm_jd.compressor.report.summary import sizes
from vllm_jd.compressor.run.compress import compress

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

console = Console(stderr=True)

SETTINGS = [
    *(Settings(method="svd", rank=r) for r in (1, 2, 4)),
    *(Settings(rank=r, clusters=c) for c in (1, 2, 4) for r in (8, 16, 32)),
    Settings(rank=64),
    *(Settings(method="jd-diag", rank=r) for r in (16, 32, 64, 96)),
    *(Settings(method="jd-diag", rank=32, clusters=c) for c in (2, 4)),
    *(Settings(rank=r, store_dtype=t) for r in (16, 32) for t in ("int8", "int4")),
    *(Settings(method="jd-diag", rank=64, store_dtype=t) for t in ("int8", "int4")),
    *(Settings(method="svd", rank=1, store_dtype=t) for t in ("int8", "int4")),
    Settings(method="hydraopt", rank=8, matrices=5, distance="frobenius", steps=100),
    Settings(method="ties"),
    Settings(method="task-arithmetic"),
    Settings(method="dare"),
    Settings(method="none", store_dtype="int4"),
]
SHARE_AS_RANKS = (16, 32, 64)
PLAIN_RANKS = (16, 32)


@dataclass(frozen=True)
class Point:
    """One system: numbers stored, bytes on disk, mean relative squared error."""

    label: str
    kind: str
    parameters: int
    bytes: int
    error: float


def main(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT adapter folders.")],
    out: Annotated[Path, typer.Option(help="JSON; the figure goes beside it.")],
) -> None:
    collection = read_adapters(adapters)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Whole runs take an hour: a stopped one goes on, if it was of the same adapters.
    of = {"adapters": len(collection.names), "adapter_bytes": sum(collection.source_bytes)}
    found = json.loads(out.read_text()) if out.exists() else {}
    same = found.items() >= of.items()
    points = [Point(**point) for point in found["points"]] if same else []

    def save() -> dict:
        result = of | {
            "date": date.today().isoformat(),
            "machine": machine.describe(),
            "versions": {name: version(name) for name in ("torch", "vllm-jd")},
            "points": [vars(point) for point in sorted(points, key=lambda point: point.bytes)],
        }
        out.write_text(json.dumps(result, indent=2) + "\n")
        _draw(points, len(collection.names), out.with_suffix(".png"))
        return result

    if not any(point.kind == "plain" for point in points):
        points += _baselines(
            {module: pairs_of(collection.factors(module)) for module in collection.shapes}
        )
        save()
    done = {point.label for point in points}
    for settings in track(SETTINGS, "our methods", console=console):
        room = not settings.has("matrices") or settings.matrices <= len(collection.names)
        if room and _label(settings) not in done:
            points.append(_ours(collection, settings))
            save()
    print(json.dumps(save(), indent=2))


def _ours(collection: PeftCollection, settings: Settings) -> Point:
    folder = Path(tempfile.mkdtemp())
    try:
        store = compress(collection, folder / "store", settings)
        exported = [export_adapter(store, name, folder / "out" / name) for name in store.names]
        error = _error(collection, read_adapters(exported))
        found = sizes(store)
    finally:
        shutil.rmtree(folder)
    return Point(
        _label(settings), settings.method, found.store_parameters, found.store_bytes, error
    )


def _label(settings: Settings) -> str:
    words = [settings.method]
    if settings.method in ("jd-full", "jd-diag", "svd", "hydraopt"):
        words.append(f"r{settings.rank}")
    if settings.clusters > 1:
        words.append(f"{settings.clusters} clusters")
    if settings.method == "hydraopt":
        words.append(f"M={settings.matrices}")
    if settings.quantised:
        words.append(settings.quantised)
    return " ".join(words)


def _error(collection: PeftCollection, exported: PeftCollection) -> float:
    """Mean over adapters and modules of ‖D − D̂‖² / ‖D‖², from the two collections' files."""
    row = {name: i for i, name in enumerate(exported.names)}
    order = torch.tensor([row[name] for name in collection.names])
    errors = []
    for module in collection.shapes:
        real, found = collection.factors(module), exported.factors(module)
        a, b = (found.per_adapter(rows)[order] for rows in (found.a, found.b))
        x = torch.cat([real.per_adapter(real.a), a], dim=1).double()
        y = torch.cat([real.per_adapter(real.b), -b], dim=1).double()
        lost = ((x @ x.mT) * (y @ y.mT)).sum((1, 2))
        present = real.ranks > 0
        errors.append((lost / real.squared_norms())[present])
    return float(torch.cat(errors).mean())


def _baselines(pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> list[Point]:
    points = []
    for rank in PLAIN_RANKS:
        fits = {module: baselines.plain_jd(_normalised(of), rank) for module, of in pairs.items()}
        errors, numbers = [], 0
        for module, (u, v, cores) in fits.items():
            numbers += u.numel() + v.numel() + sum(core.numel() for core in cores)
            for (a, b), core in zip(_normalised(pairs[module]), cores, strict=True):
                delta = b.double() @ a.double()
                if delta.any():
                    lost = delta - u.double() @ core.double() @ v.double().T
                    errors.append(float(lost.square().sum() / delta.square().sum()))
        error = sum(errors) / len(errors)
        points.append(Point(f"plain JD r{rank}", "plain", numbers, 2 * numbers, error))
    for rank in SHARE_AS_RANKS:
        budget = sum(
            rank * sum(of[0][0].shape[1:] + of[0][1].shape[:1]) + len(of) * rank * rank
            for of in pairs.values()
        )
        try:
            fit = baselines.lorashare(pairs, budget)
        except baselines.MissingPackage as missing:
            console.print(f"left out: {missing}")
            break
        found = baselines.report(fit, pairs)
        points.append(
            # It stores float32; as 16-bit numbers, as ours are.
            Point(
                f"SHARE k={found.components}",
                "share",
                found.parameters,
                2 * found.parameters,
                found.error,
            )
        )
    return points


def _normalised(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every adapter at ‖BA‖_F = 1, as the paper has it."""
    return [(a, b / (b @ a).norm().clamp_min(1e-30)) for a, b in pairs]


def _draw(points: list[Point], adapters: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=150, layout="constrained")
    for kind, (colour, marker) in STYLES.items():
        some = [point for point in points if point.kind == kind]
        if not some:
            continue
        # What does worse than storing nothing at all is drawn at the edge.
        axes.scatter(
            [point.bytes / 1e6 for point in some],
            [min(point.error, 1.05) for point in some],
            color=colour,
            marker=marker,
            label=kind,
            zorder=2,
        )
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bytes, point.error)):
        if point.error < min((other.error for other in front), default=1.0):
            front.append(point)
    axes.plot([p.bytes / 1e6 for p in front], [p.error for p in front], color="#bbbbbb", zorder=1)
    for i, point in enumerate(front):
        axes.annotate(
            point.label,
            (point.bytes / 1e6, point.error),
            xytext=(3, 5) if i % 2 else (-12, -12),
            textcoords="offset points",
            fontsize=6.5,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.02, 1.08)
    axes.set_xlabel("bytes stored (MB)")
    axes.set_ylabel("mean relative squared reconstruction error")
    axes.set_title(f"{adapters} adapters; errors from exported PEFT folders", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
