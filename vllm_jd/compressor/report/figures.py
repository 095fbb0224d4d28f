"""The figures of a report, drawn with matplotlib.

Every function takes plain numbers and returns a `Figure` of its own: no pyplot, no global state.
"Error" is the relative squared reconstruction error. Colours are Okabe and Ito's, which differ
for colour-blind eyes too, and markers or lines differ with them.
"""

from collections.abc import Sequence
from functools import cache
from io import BytesIO

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import blended_transform_factory
from rich.filesize import decimal as size_text

_SIZE = (3.55, 2.6)  # inches: a quarter of a screen of 1440 points
_DPI = 200
_TEXT, _SMALL = 7.5, 6.5  # points
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#56B4E9", _RED, "#000000")
_MARKERS = "os^Dv"
_LINES = ("-", "--", ":", "-.")
_GREY, _LIGHT = "#666666", "#D9D9D9"
_MOST_POINTS = 1000
_MOST_LABELS = 14

ERROR = "relative squared error"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def error_by_module(places: Sequence[tuple[str, int | None]], errors: np.ndarray) -> Figure:
    """A heat map, kinds × layers, of the mean errors `[m]` of modules at `places`."""
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    # Modules outside of the layers have a column of their own, before the first layer.
    layers = sorted({-1 if layer is None else layer for _, layer in places})
    column = {layer: i for i, layer in enumerate(layers)}
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), error in zip(places, errors, strict=True):
        grid[kinds.index(kind), column[-1 if layer is None else layer]] = error
    figure, axes = _figure()
    top = float(np.nanmax(grid)) if grid.size else 0.0
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=top or 1.0)
    axes.set_facecolor(_LIGHT)
    rows = _some(len(kinds))
    _ticks(axes.yaxis, rows, [_short(kinds[row], 14) for row in rows])
    columns = _some(len(layers), 10)
    _ticks(axes.xaxis, columns, [_layer(layers[at]) for at in columns])
    axes.set_xlabel("layer", fontsize=_TEXT)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label(f"mean {ERROR}", fontsize=_SMALL)
    bar.ax.tick_params(labelsize=_SMALL, length=2)
    bar.ax.yaxis.get_offset_text().set_fontsize(_SMALL)
    bar.outline.set_visible(False)
    return figure


def error_by_adapter(errors: np.ndarray, names: Sequence[str]) -> Figure:
    """The mean errors `[n]` of adapters, sorted, and the names of the three worst."""
    figure, axes = _figure()
    rank = np.unique(np.linspace(0, len(errors) - 1, min(len(errors), _MOST_POINTS)).round())
    rank = rank.astype(int)
    marker = "o" if len(errors) <= 60 else None
    axes.plot(rank + 1, np.sort(errors)[rank], color=_BLUE, lw=1.3, marker=marker, ms=2.2)
    worst = np.argsort(-errors, kind="stable")[:3]
    top = float(errors.max()) or 1.0
    top *= 1.12 + 0.09 * len(worst)
    axes.set_ylim(0, top)
    mean = float(errors.mean())
    axes.axhline(mean, color=_GREY, lw=0.7, ls=":")
    above = mean < 0.08 * top
    axes.annotate(
        f"mean {mean:.3g}", (0.99, mean), fontsize=_SMALL, color=_GREY,
        xycoords=blended_transform_factory(axes.transAxes, axes.transData),
        xytext=(0, 1.5 if above else -1.5), textcoords="offset points",
        ha="right", va="bottom" if above else "top",
    )  # fmt: skip
    lines = [f"{errors[row]:.3g}  {_short(names[row], 34)}" for row in worst]
    label = "largest:\n" if len(errors) > 1 else ""
    axes.text(
        0.02, 0.985, label + "\n".join(lines), fontsize=_SMALL, transform=axes.transAxes,
        va="top", parse_math=False,
    )  # fmt: skip
    axes.set_xlim(1 - 0.03 * len(errors) - 0.5, 1.03 * len(errors) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("adapters, from the smallest error to the largest", fontsize=_TEXT)
    axes.set_ylabel(f"mean {ERROR}", fontsize=_TEXT)
    return figure


def clusters(sizes: np.ndarray, errors: np.ndarray, *, differ: bool) -> Figure:
    """Sizes int `[m, k]` and mean errors `[m, k]` (NaN: empty) of k clusters in m modules.

    Means over the modules, with a line from the least to the most where they differ. With
    `differ`, modules have clusters of their own: each one's are taken from its largest on.
    """
    if differ:
        order = np.argsort(-sizes, axis=1, kind="stable")
        sizes = np.take_along_axis(sizes, order, axis=1)
        errors = np.take_along_axis(errors, order, axis=1)
    figure, (upper, lower) = _figure(2, sharex=True)
    at = np.arange(1, sizes.shape[1] + 1)
    for axes, numbers, colour in ((upper, sizes.astype(float), _BLUE), (lower, errors, _ORANGE)):
        known = np.where(np.isnan(numbers), 0, numbers)
        there = (~np.isnan(numbers)).sum(0)
        mean = known.sum(0) / np.maximum(there, 1)
        axes.bar(at, mean, color=colour, width=0.7 if len(at) < 60 else 1.0)
        least = np.where(np.isnan(numbers), np.inf, numbers).min(0)
        most = np.where(np.isnan(numbers), -np.inf, numbers).max(0)
        spread = (there > 0) & (most - least > 1e-6 * np.abs(most))
        axes.vlines(at[spread], least[spread], most[spread], color="black", lw=0.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=axes is upper))
    upper.set_ylabel("adapters", fontsize=_TEXT)
    lower.set_ylabel("mean error", fontsize=_TEXT)
    what = "cluster of a module, from the largest" if differ else "cluster"
    lower.set_xlabel(what, fontsize=_TEXT)
    columns = _some(len(at), 12)
    label = (lambda c: str(c + 1)) if differ else str
    _ticks(lower.xaxis, [c + 1 for c in columns], [label(c) for c in columns])
    lower.set_xlim(0.4, len(at) + 0.6)
    return figure


def adapter_map(points: np.ndarray, cluster: np.ndarray, share: np.ndarray) -> Figure:
    """Adapters `[s, 2]` in the plane, coloured by cluster `[s]`; `share` `[2]` of the variance."""
    figure, axes = _figure()
    size = 14 if len(points) <= 100 else 6
    found = np.unique(cluster)
    for c in found:
        own = cluster == c
        axes.scatter(
            *points[own].T, s=size, lw=0, alpha=0.8, label=f"cluster {c}",
            color=_COLOURS[c % len(_COLOURS)],
            marker=_MARKERS[c // len(_COLOURS) % len(_MARKERS)],
        )  # fmt: skip
    if 1 < len(found) <= 8:
        axes.legend(
            fontsize=_SMALL, frameon=False, ncols=min(4, len(found)), loc="lower center",
            bbox_to_anchor=(0.5, 1.0), handletextpad=0.1, columnspacing=1, borderpad=0,
        )  # fmt: skip
    axes.set_xlabel(f"first component ({100 * share[0]:.2g}% of the variance)", fontsize=_TEXT)
    axes.set_ylabel(f"second component ({100 * share[1]:.2g}%)", fontsize=_TEXT)
    axes.set_aspect("equal", adjustable="datalim")
    axes.locator_params(nbins=5)
    return figure


def spectra(energies: dict[str, np.ndarray], ranks: Sequence[int]) -> Figure:
    """Squared singular values by kind of module, each `[max rank]`, added up from the largest.

    `ranks` are those of the store; they are marked where they lie within the adapters' own.
    """
    figure, axes = _figure()
    widest = max(len(values) for values in energies.values())
    for i, (kind, values) in enumerate(energies.items()):
        axes.plot(
            np.arange(len(values) + 1), np.concatenate([[0], np.cumsum(values)]),
            _LINES[i // len(_COLOURS) % len(_LINES)], color=_COLOURS[i % len(_COLOURS)], lw=1.2,
            label=_short(kind, 18), marker="o" if widest <= 32 else None, ms=1.8,
        )  # fmt: skip
    inside = sorted({rank for rank in ranks if 0 < rank <= widest})
    if inside:
        axes.axvspan(inside[0], inside[-1], color=_GREY, lw=1, alpha=0.4)
        label = f"rank {inside[0]}" if len(inside) == 1 else f"ranks {inside[0]}–{inside[-1]}"
        right = inside[-1] > 0.6 * widest
        axes.annotate(
            label, (inside[0] if right else inside[-1], 0.02), fontsize=_SMALL, color=_GREY,
            xytext=(-3 if right else 3, 0), textcoords="offset points",
            ha="right" if right else "left",
        )  # fmt: skip
    if len(energies) <= 16:
        legend = axes.legend(
            fontsize=_SMALL, frameon=False, ncols=1 if len(energies) <= 8 else 2,
            loc="lower right", bbox_to_anchor=(1, 0.08),
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set_xlim(0, widest * 1.02)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("singular values kept of an adapter alone", fontsize=_TEXT)
    axes.set_ylabel("energy ‖·‖² kept, mean", fontsize=_TEXT)
    return figure


def bounds(
    places: Sequence[tuple[str, int | None]],
    at_least: np.ndarray,
    at_most: np.ndarray,
    reached: np.ndarray,
) -> Figure:
    """What the store reached in modules, `[m]`, between bounds on the best JD's error, `[m]`.

    `at_most` is NaN where it is not known.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    order = sorted(
        range(len(places)),
        key=lambda i: (kinds.index(places[i][0]), -1 if places[i][1] is None else places[i][1]),
    )
    gap = max(1.0, 0.04 * len(places))
    at = np.array([x + gap * kinds.index(places[i][0]) for x, i in enumerate(order)])
    at_least, at_most, reached = (values[order] for values in (at_least, at_most, reached))
    figure, axes = _figure()
    width = max(1.0, min(6.0, 120 / (at[-1] + 1)))
    known = ~np.isnan(at_most)
    axes.vlines(
        at[known], at_least[known], at_most[known], color="#9ECAE1", lw=width,
        label="the best JD's error lies here" if known.any() else None,
    )  # fmt: skip
    axes.scatter(
        at[~known], at_least[~known], s=14, marker="_", color=_BLUE, lw=1,
        label="no JD is better" if not known.all() else None,
    )  # fmt: skip
    axes.scatter(at, reached, s=max(4.0, 2 * width), color=_RED, lw=0, zorder=3, label="this store")
    middles = [
        float(np.mean([x for x, i in zip(at, order, strict=True) if places[i][0] == kind]))
        for kind in kinds
    ]
    shown = _some(len(kinds), 12)
    longest = max(len(_short(kinds[i], 14)) for i in shown)
    crowded = longest * len(shown) > 44
    _ticks(
        axes.xaxis,
        [middles[i] for i in shown],
        [_short(kinds[i], 14) for i in shown],
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
    )
    axes.tick_params(axis="x", length=0)
    top = float(np.nanmax([at_least, at_most, reached]))
    axes.set_ylim(0, (top or 1.0) * 1.25)
    axes.legend(
        fontsize=_SMALL, frameon=False, ncols=2, loc="upper left", columnspacing=1,
        handletextpad=0.5, borderpad=0,
    )  # fmt: skip
    axes.set_xlabel("modules by kind, and layers from the first to the last", fontsize=_TEXT)
    axes.set_ylabel(f"mean {ERROR}", fontsize=_TEXT)
    return figure


def sizes(sources: int, parts: dict[str, int]) -> Figure:
    """Bytes of the sources' files against those of the store, by what they hold."""
    total = sum(parts.values())
    figure, (upper, lower) = _figure(2)
    colours = [_GREY, _BLUE]
    # With an edge, so that a small store still shows.
    upper.barh(["sources", "store"], [sources, total], color=colours, ec=colours, height=0.62)
    saved = sources - total
    if saved > 0:
        upper.barh(
            ["store"], [saved], left=total, height=0.62, fill=False, ec=_GREY, ls=":", lw=0.8
        )
        text = f"{size_text(saved)} saved"
        if saved > 0.35 * sources:
            upper.text(total + saved / 2, 1, text, ha="center", va="center", fontsize=_SMALL)
    upper.invert_yaxis()
    upper.set_xlim(0, max(sources, total, 1) * 1.02)
    upper.xaxis.set_major_locator(MaxNLocator(4))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size_text(int(x))))
    left = 0
    for colour, (name, count) in zip((_BLUE, _ORANGE, _GREEN, _LIGHT), parts.items(), strict=True):
        share = count / max(total, 1)
        lower.barh(
            ["store"], [share], left=left, color=colour, height=0.62,
            label=f"{name} {size_text(count)}" if count else None,
        )  # fmt: skip
        left += share
    lower.set_xlim(0, 1.02)
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    lower.set_xlabel("share of the store's bytes", fontsize=_TEXT)
    lower.legend(
        fontsize=_SMALL, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.0),
        columnspacing=1, handlelength=1, borderpad=0,
    )  # fmt: skip
    return figure


def kept_by_adapter(
    kept: np.ndarray, rises: np.ndarray, names: Sequence[str], named: Sequence[int]
) -> Figure:
    """Of adapters, what share of Rouge-L each keeps, `[n]` (NaN: it has none to keep; not drawn),
    against the rise of its loss, nats a token `[n]`; those at the places `named` with their names.
    """
    figure, axes = _figure()
    near = 0.02  # within it the axis is linear: a loss may fall
    axes.set_xscale("symlog", linthresh=near, linscale=0.5)
    drawn = np.flatnonzero(~np.isnan(kept))
    others = [i for i in drawn if i not in named]
    size = 14 if len(drawn) <= 100 else 6
    axes.scatter(rises[others], kept[others], s=size, lw=0, alpha=0.7, color=_BLUE)
    worst = [i for i in named if not np.isnan(kept[i])]
    axes.scatter(rises[worst], kept[worst], s=size + 4, lw=0, color=_RED, marker="D")
    axes.axhline(1, color=_GREY, lw=0.7, ls=":")
    axes.axvline(0, color=_GREY, lw=0.7, ls=":")
    least, most = float(min(rises.min(), 0)), float(max(rises.max(), near))
    axes.set_xlim(min(1.3 * least, -near / 2), 1.6 * most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))
    shown = kept[drawn]
    apart = 0.06 * max(float(np.ptp(shown)) if len(shown) else 0.0, 0.1)
    free = np.inf
    for i in sorted(worst, key=lambda i: -kept[i]):  # names below each other, not on each other
        place = axes.transData.transform((rises[i], kept[i]))
        right = axes.transAxes.inverted().transform(place)[0] > 0.55
        free = min(kept[i], free - apart)
        axes.annotate(
            _short(names[i], 24), (rises[i], free), fontsize=_SMALL, parse_math=False,
            xytext=(-4 if right else 4, 0), textcoords="offset points",
            ha="right" if right else "left", va="center",
        )  # fmt: skip
    axes.set_xlabel("rise of the loss, nats a token", fontsize=_TEXT)
    axes.set_ylabel("Rouge-L, share of its own LoRA's", fontsize=_TEXT)
    return figure


def _figure(rows: int = 1, *, sharex: bool = False) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    made = figure.subplots(rows, sharex=sharex)
    for axes in np.atleast_1d(made):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=_SMALL, length=2.5)
        axes.yaxis.get_offset_text().set_fontsize(_SMALL)
    return figure, made


def _ticks(axis: Axis, at: Sequence[float], labels: Sequence[str], **style: object) -> None:
    axis.set_ticks(at, labels)
    for label in axis.get_ticklabels():
        label.set(parse_math=False, **style)


def _some(count: int, most: int = _MOST_LABELS) -> list[int]:
    """Evenly spaced indices below `count`, at most about `most`."""
    return list(range(0, count, max(1, -(-count // most))))


def _layer(layer: int) -> str:
    return "none" if layer < 0 else str(layer)


def _short(name: str, most: int) -> str:
    """A name for a figure: characters that its font lacks as boxes, and its middle left out."""
    known = _characters()
    name = "".join(c if ord(c) in known else "□" for c in name)
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-(most - half) :]}"


@cache
def _characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())
