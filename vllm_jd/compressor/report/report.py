"""A page about a store for people: key numbers, figures and the worst adapters and modules."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.filesize import decimal as size_text

from vllm_jd.compressor.errors import CompressorError
from vllm_jd.compressor.report.page import page, picture, table, tiles
from vllm_jd.compressor.report.report_data import (
    ReportData,
    adapter_map,
    byte_parts,
    cluster_numbers,
    places,
    shared_clusters,
)
from vllm_jd.compressor.report.summary import rank_text, store_summary
from vllm_jd.store import Store

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.figure import Figure

    _Drawn = tuple[Figure | None, str]
    """A figure, or None, and a line about it or why there is none."""

_WORST_ADAPTERS, _WORST_MODULES = 10, 5
_NEEDS_SOURCES = (
    "Needs the adapters that the store was made of: "
    "`vllm-jd report STORE --out HTML --adapters ADAPTERS`, or `--report HTML` of "
    "`vllm-jd compress`."
)
_LOSSY = 0.6  # Compress then Serve, §6.5


class ReportError(CompressorError):
    """A report that cannot be made; the message says what to do."""


def write_report(store: Store, out: Path, *, extra: ReportData | None = None) -> list[Path]:
    """Write a self-contained page about a store, and its figures as PNG files beside it.

    Args:
        store: the store.
        out: the page, `<stem>.html`; the figures go to the folder `<stem>-figures`. Files of
            these names are replaced.
        extra: spectra and bounds, from `vllm_jd.compressor.report.report_data.collect`; without
            them the page says how to get them.

    Returns:
        The files written, the page first.

    Raises:
        ReportError: matplotlib is missing, `out` is no `.html` file or cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"{out}: expected a file name that ends in .html")
    summary = store_summary(store)
    cards = _cards(store, summary, extra)
    folder = out.with_name(f"{out.stem}-figures")
    written = [out]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for card in cards:
            file = folder / f"{card.name}.png"
            if card.png is None:
                file.unlink(missing_ok=True)  # of an earlier report
            else:
                file.write_bytes(card.png)
                written.append(file)
        out.write_text(_page(summary, cards), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{out}: cannot be written: {error}") from None
    return written


@dataclass(frozen=True)
class _Card:
    """One figure of the page: its PNG and a line below it, or no PNG and why there is none."""

    name: str
    title: str
    png: bytes | None
    text: str


def _cards(store: Store, summary: dict[str, Any], extra: ReportData | None) -> list[_Card]:
    try:
        from vllm_jd.compressor.report import figures
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ReportError(
            "a report needs matplotlib, which is not installed: pip install 'vllm-jd[report]'"
        ) from None
    shared = shared_clusters(store)
    drawn = [
        ("modules", "Error by module", _modules(figures, summary)),
        ("adapters", "Error by adapter", _adapters(figures, store, summary)),
        ("clusters", "Clusters", _clusters(figures, store, shared, summary)),
        ("map", "Map of the adapters", _map(figures, store, shared)),
        ("spectra", "Spectra of the sources", _spectra(figures, extra, summary)),
        ("bounds", "Error against what a JD could reach", _bounds(figures, extra, summary)),
        ("bytes", "Bytes", _bytes(figures, store, summary)),
    ]
    return [
        _Card(name, title, None if figure is None else figures.png(figure), text)
        for name, title, (figure, text) in drawn
    ]


def _modules(figures: ModuleType, summary: dict[str, Any]) -> "_Drawn":
    modules = summary["modules"]
    if not modules:
        return None, "The store has no modules."
    errors = np.array([module["error"] for module in modules])
    worst = modules[int(errors.argmax())]
    figure = figures.error_by_module(places(module["name"] for module in modules), errors)
    return figure, f"Largest: {worst['error']:.4g} in {worst['name']}."


def _adapters(figures: ModuleType, store: Store, summary: dict[str, Any]) -> "_Drawn":
    if not summary["adapters"]:
        return None, "The store has no adapters."
    errors = np.array([adapter["error"] for adapter in summary["adapters"]])
    figure = figures.error_by_adapter(errors, store.names)
    return figure, f"Half of the adapters are at {np.median(errors):.4g} or below."


def _clusters(
    figures: ModuleType, store: Store, shared: np.ndarray, summary: dict[str, Any]
) -> "_Drawn":
    numbers = cluster_numbers(store, shared)
    if numbers is None:
        return None, "None: each adapter has factors of its own."
    # An adapter with different clusters in different modules: their numbers mean nothing.
    least = np.where(shared >= 0, shared, shared.max(initial=-1)).min(axis=1)
    differ = bool((shared.max(axis=1) > least).any())
    count = numbers.sizes.shape[1]
    if differ:
        text = "Each module has clusters of its own. Black lines: the range over modules."
    elif count == 1:
        text = "One cluster: all adapters share the same bases."
    else:
        text = f"{count:,} clusters. Black lines: the range over modules."
    if summary["uncompressed"]:
        text += f" Not in them: {summary['uncompressed']:,} adapters kept as they were."
    return figures.clusters(numbers.sizes, numbers.errors, differ=differ), text


def _map(figures: ModuleType, store: Store, shared: np.ndarray) -> "_Drawn":
    found = adapter_map(store, shared)
    if found is None:
        return None, "A map needs three or more adapters with cores."
    text = "Near each other: alike in what the bases hold of them."
    if len(found.points) < len(store):
        text += f" {len(found.points):,} of {len(store):,} adapters."
    return figures.adapter_map(found.points, found.cluster, found.share), text


def _spectra(figures: ModuleType, extra: ReportData | None, summary: dict[str, Any]) -> "_Drawn":
    if extra is None:
        return None, _NEEDS_SOURCES
    modules = summary["modules"]
    ranks = [module["rank"] for module in modules if module["clusters"]]
    ranks = ranks or [rank for module in modules for rank in module["own_ranks"]] or [0]
    low, high = min(ranks), max(ranks)
    text = ""
    if high:
        which = f"rank {low}" if low == high else f"ranks {low} to {high}"
        text = f"The store's {which}."
    if len(extra.spectra) < len(modules):
        text += f" {len(extra.spectra):,} of {len(modules):,} modules."
    longest = max(map(len, extra.spectra.values()), default=0)
    text += f" Adapters have ranks up to {longest}."
    return figures.spectra(_by_kind(extra.spectra, summary), ranks), text.strip()


def _by_kind(spectra: dict[str, torch.Tensor], summary: dict[str, Any]) -> dict[str, np.ndarray]:
    """The mean spectrum of each kind of module."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for (kind, _), values in zip(_places(spectra, summary), spectra.values(), strict=True):
        kinds.setdefault(kind, []).append(values)
    return {
        kind: torch.nn.utils.rnn.pad_sequence(found).double().mean(1).numpy()
        for kind, found in kinds.items()
    }


def _bounds(figures: ModuleType, extra: ReportData | None, summary: dict[str, Any]) -> "_Drawn":
    if extra is None:
        return None, _NEEDS_SOURCES
    if not extra.bounds:
        return None, "Bounds are for joint diagonalisations: here no adapters share bases."
    found = list(extra.bounds.values())
    lower = [max(b.bounds.error_at_least, b.bounds.error_at_least_one_sided) for b in found]
    upper = [b.bounds.error_at_most if b.whole else np.nan for b in found]
    reached = [b.reached for b in found]
    figure = figures.bounds(
        _places(extra.bounds, summary), np.array(lower), np.array(upper), np.array(reached)
    )
    return figure, _bounds_text(summary, extra)


def _bounds_text(summary: dict[str, Any], extra: ReportData) -> str:
    found = list(extra.bounds.values())
    ranks = [bound.bounds.lossless_rank for bound in found if bound.whole]
    text = ""
    if ranks:
        low, high = min(ranks), max(ranks)
        which = str(low) if low == high else f"{low} to {high}"
        text = f"A JD without loss would need rank {which}."
    if len(found) < len(summary["modules"]):
        text += f" {len(found):,} of {len(summary['modules']):,} modules."
    if not all(bound.whole for bound in found):
        least = min(bound.adapters for bound in found)
        text += f" On {least:,} adapters or more of each, where only “no JD is better” is known."
    return text.strip()


def _places(names: Iterable[str], summary: dict[str, Any]) -> list[tuple[str, int | None]]:
    """Kinds and layers of some modules, of the same names as among all."""
    every = [module["name"] for module in summary["modules"]]
    where = dict(zip(every, places(every), strict=True))
    return [where[name] for name in names]


def _bytes(figures: ModuleType, store: Store, summary: dict[str, Any]) -> "_Drawn":
    parts = byte_parts(store)
    largest = max(parts, key=parts.__getitem__)
    share = parts[largest] / max(sum(parts.values()), 1)
    figure = figures.sizes(summary["sizes"]["adapter_bytes"], parts)
    return figure, f"Largest part of the store: {largest}, {share:.0%}."


def _page(summary: dict[str, Any], cards: list[_Card]) -> str:
    name = Path(summary["path"]).resolve().name or summary["path"]
    settings = " · ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in summary["settings"].items()
    )
    about = (
        f"generation {summary['generation']} of {summary['path']}",
        f"base model {summary['base_model']['name']}",
        f"made {summary['created_at']} by {summary['created_by']}",
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in _notes(summary))
    drawn = "".join(picture(c.title, c.png, c.text) for c in cards if c.png is not None)
    return page(
        f"{name}: vllm-jd report",
        f"""<header>
<h1>{escape(name)}</h1>
<p>{escape(" · ".join(about))}</p>
<p><b>{escape(summary["method"])}</b> · {escape(settings)}</p>
</header>
{tiles(_key_numbers(summary))}
{notes}<main>
{drawn}<section class="tables">
{_worst_adapters(summary)}
{_worst_modules(summary)}
</section>
</main>
{_not_drawn(cards)}<footer>Error: ‖BA − B̂Â‖²<sub>F</sub> / ‖BA‖²<sub>F</sub>, the relative
squared reconstruction error of a module, B̂Â being what is stored. Means are over the modules,
or adapters, that have factors.</footer>
""",
    )


def _key_numbers(summary: dict[str, Any]) -> dict[str, str]:
    sizes = summary["sizes"]
    before, after = size_text(sizes["adapter_bytes"]), size_text(sizes["store_bytes"])
    exact = summary["exact_error"]
    return {
        "adapters": f"{len(summary['adapters']):,}",
        "modules": f"{len(summary['modules']):,}",
        "bytes": f"{before} → {after}",
        "parameters saved": f"{sizes['parameter_saved_ratio']:.1%}",
        "mean error": f"{summary['error']:.4g}",
        "before quantisation": "not quantised" if exact is None else f"{exact:.4g}",
        "kept uncompressed": f"{summary['uncompressed']:,}",
        "clusters": _cluster_count(summary),
    }


def _cluster_count(summary: dict[str, Any]) -> str:
    sizes = summary["clusters"]
    if sizes is None:
        most = max(module["clusters"] for module in summary["modules"])
        return f"{summary['settings'].get('clusters', most):,} a module"
    if len(sizes) < 2:
        return str(len(sizes) or "none")
    return f"{len(sizes):,} (of {min(sizes):,} to {max(sizes):,})"


def _notes(summary: dict[str, Any]) -> list[str]:
    notes = []
    if "clusters" not in summary["settings"]:
        return notes  # advice for joint diagonalisations
    if summary["sizes"]["parameter_saved_ratio"] <= 0:
        notes.append(
            "This store is not smaller than its adapters: shared bases pay with more adapters, "
            "a lower --rank or fewer --clusters."
        )
    if summary["error"] >= _LOSSY:
        notes.append(
            f"Below an error of {_LOSSY} the paper found 99 % of LoRA’s quality kept: a higher "
            "--rank or more --clusters bring it down."
        )
    return notes


def _not_drawn(cards: list[_Card]) -> str:
    """What has no figure, and why: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for card in cards:
        if card.png is None:
            reasons.setdefault(card.text, []).append(card.title)
    lines = "".join(
        f"<li><b>{escape(', '.join(titles))}</b>: "
        + re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
        + "</li>\n"
        for text, titles in reasons.items()
    )
    return f'<h2 class="none">Not drawn</h2>\n<ul class="none">\n{lines}</ul>\n' if lines else ""


def _worst_adapters(summary: dict[str, Any]) -> str:
    worst = sorted(summary["adapters"], key=lambda adapter: -adapter["error"])
    rows = [
        (adapter["name"], _cluster_text(adapter), adapter["error"], adapter["worst_module_error"])
        for adapter in worst[:_WORST_ADAPTERS]
    ]
    return table("Worst adapters", ("adapter", "cluster", "error", "worst module"), rows)


def _worst_modules(summary: dict[str, Any]) -> str:
    worst = sorted(summary["modules"], key=lambda module: -module["error"])
    rows = [
        (module["name"], rank_text([module]), module["error"]) for module in worst[:_WORST_MODULES]
    ]
    return table("Worst modules", ("module", "rank", "error"), rows)


def _cluster_text(adapter: dict[str, Any]) -> str:
    clusters = adapter["clusters"]
    if adapter["uncompressed"]:
        return "kept"
    if not clusters:
        return "own"
    return str(clusters[0]) if len(clusters) == 1 else "several"
