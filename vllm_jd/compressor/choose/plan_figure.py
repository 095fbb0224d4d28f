"""The trade-off between bytes and error, drawn."""

from collections.abc import Sequence
from pathlib import Path

from vllm_jd.compressor.choose.plan import Candidate
from vllm_jd.compressor.errors import CompressorError

_COLOURS = {"jd-full": "#0072B2", "jd-diag": "#009E73", "svd": "#D55E00", "none": "#555555"}
_MARKERS = {"jd-full": "o", "jd-diag": "s", "svd": "^", "none": "D"}


def draw_plan(
    candidates: Sequence[Candidate], file: Path, *, target: float, chosen: Candidate | None
) -> None:
    """Draw candidates by size and error, the best of them joined, to a PNG (or what the name of
    `file` says).

    Raises:
        CompressorError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise CompressorError(
            "figures need matplotlib, which is not installed: pip install 'vllm-jd[report]'"
        ) from None
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for method, colour in _COLOURS.items():
        points = [c for c in candidates if c.settings.method == method]
        if not points:
            continue
        shared = {"color": colour, "marker": _MARKERS[method], "linestyle": "none"}
        for best in (True, False):
            some = [c for c in points if c.best == best]
            axes.errorbar(
                [c.bytes / 1e6 for c in some],
                [c.error for c in some],
                yerr=[c.spread for c in some] if best else None,
                alpha=1 if best else 0.35,
                markersize=6 if best else 4,
                elinewidth=0.8,
                label=method if best else None,
                **shared,
            )
    front = [c for c in candidates if c.best]
    axes.plot([c.bytes / 1e6 for c in front], [c.error for c in front], color="#bbbbbb", zorder=0)
    axes.axhline(target, color="#888888", linestyle=":", linewidth=1)
    axes.text(
        0.995,
        target,
        f"target {target:.3g}",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        color="#666666",
        fontsize=8,
    )
    if chosen is not None:
        axes.annotate(
            chosen.label,
            (chosen.bytes / 1e6, chosen.error),
            xytext=(12, 18),
            textcoords="offset points",
            fontweight="bold",
            arrowprops={"arrowstyle": "->", "color": "#333333"},
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size of the store (MB)")
    axes.set_ylabel("relative squared reconstruction error")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="line: best at its size; bars: between modules")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise CompressorError(f"{file}: cannot be written: {error}") from None
