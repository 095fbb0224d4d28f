"""What the command line shows people: summaries as tables."""

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal as size
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vllm_jd.compressor.choose.plan import Candidate

_LOSSY = 0.6  # Compress then Serve, §6.5


def print_overview(console: Console, summary: dict[str, Any]) -> None:
    """A store in a dozen lines."""
    from vllm_jd.compressor.choose.quality import expected_quality, measured

    sizes, clusters = summary["sizes"], summary["clusters"]
    settings = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in summary["settings"].items()
    )
    ratio = sizes["parameter_saved_ratio"]
    rows = {
        "store": f"{summary['path']} (generation {summary['generation']})",
        "base model": summary["base_model"]["name"],
        "method": f"{summary['method']} ({settings})",
        "adapters": f"{len(summary['adapters']):,}",
        "modules": f"{len(summary['modules']):,}",
        "files": f"{size(sizes['adapter_bytes'])} of adapters → {size(sizes['store_bytes'])}",
        "parameters": f"{sizes['adapter_parameters']:,} → {sizes['store_parameters']:,} "
        f"({ratio:.1%} saved)",
        "error": f"{summary['error']:.4g} (relative, squared; mean over adapters and modules)",
    }
    if summary["error"] > 0 and (kept := expected_quality(summary["error"])) is not None:
        rows["should keep"] = (
            f"{kept.rouge_l} of the adapters' Rouge-L, {kept.unchanged} of their answers word for "
            f"word: what such errors kept on {measured()['model']} (docs/quality.md)"
        )
    if summary["exact_error"] is not None:
        rows["error"] += f"; {summary['exact_error']:.4g} before {summary['dtype']}"
    if summary["uncompressed"]:
        rows["uncompressed"] = f"{summary['uncompressed']:,} adapters kept as they were"
    if clusters and len(clusters) > 1:
        least, most = min(clusters), max(clusters)
        members = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        rows["clusters"] = f"{len(clusters):,}, of {members} adapters each"
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", escape(value))
    console.print(table)
    if ratio <= 0 and summary["method"] in ("jd-full", "jd-diag"):
        console.print(
            "[yellow]note:[/] this store is not smaller than its adapters: shared bases pay with "
            "more adapters, a lower --rank or fewer --clusters"
        )
    if summary["error"] >= _LOSSY and summary["method"] in ("jd-full", "jd-diag"):
        console.print(
            f"[yellow]note:[/] below an error of {_LOSSY} the paper found 99 % of LoRA's quality "
            "kept: a higher --rank or more --clusters bring it down"
        )


def print_plan(
    console: Console,
    candidates: "list[Candidate]",
    *,
    source_bytes: int,
    target: float,
    quality: float | None,
    chosen: "Candidate | None",
    show_all: bool,
    command: str,
) -> None:
    """The trade-off between bytes and error; the chosen settings marked, and how to get them.

    `quality`: the share of LoRA's that the target error stands for, or None.
    """
    from vllm_jd.compressor.choose.quality import expected_quality, measured

    title = f"{size(source_bytes)} of adapters"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0)
    )
    table.add_column("settings", no_wrap=True)
    columns = ("store", "share", "error", "kept\n(at least)", "MB read\nby 1/32/256")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in candidates:
        if not (candidate.best or show_all or candidate is chosen):
            continue
        table.add_row(
            candidate.label,
            size(candidate.bytes),
            f"{candidate.bytes / max(source_bytes, 1):.0%}",
            f"{candidate.error:.3f}",
            f"{kept.rouge_l.expected:.2f} ({kept.rouge_l.low:.2f})"
            if (kept := expected_quality(candidate.error))
            else "?",
            "/".join(f"{step.bytes / 1e6:.1f}" for step in candidate.steps),
            style="bold green" if candidate is chosen else None,
        )
    console.print(table)
    console.print(
        "error: relative, squared, estimated on a few modules. kept: of the adapters' Rouge-L, as "
        f"settings of that error kept of it on {measured()['model']}, and the low end of its 95 % "
        "interval (?: no error so large was tried; other models may bear more or less). MB read: "
        "of bases and cores, by a decode step of so many requests, each for an adapter drawn "
        "evenly.",
        style="dim",
    )
    if chosen is None:
        least = min(candidates, key=lambda c: c.error, default=None)
        hint = f"; the closest is {least.label}, {least.error:.3f}" if least else ""
        console.print(f"[yellow]note:[/] nothing here reaches an error of {target:.3g}{hint}")
    else:
        wanted = f"an error of at most {target:.3g}"
        if quality is not None:
            wanted += f", which should keep {quality:g}"
        console.print(f"Smallest with {wanted}: [bold green]{chosen.label}[/]")
        console.print(f"Make it:  [bold]{escape(command)}", soft_wrap=True, highlight=False)


def print_modules(console: Console, summary: dict[str, Any]) -> None:
    """Modules of the same kind (q_proj, …) together: one line each."""
    from vllm_jd.compressor.report.summary import rank_text

    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in summary["modules"]:
        kind = module["name"].rsplit(".", 1)[-1]
        if module["experts"]:
            kind += f", each of {module['experts']:,} experts"
        kinds.setdefault(kind, []).append(module)
    table = Table(title="modules", title_justify="left")
    for column in ("module", "layers", "d_out × d_in", "rank", "mean error", "worst layer"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for kind, modules in kinds.items():
        errors = [module["error"] for module in modules]
        table.add_row(
            escape(kind),
            str(len(modules)),
            f"{modules[0]['d_out']} × {modules[0]['d_in']}",
            rank_text(modules),
            f"{sum(errors) / len(errors):.4g}",
            f"{max(errors):.4g}",
        )
    console.print(table)


def print_adapters(console: Console, summary: dict[str, Any], most: int = 50) -> None:
    """The adapters, or those with the largest errors."""
    adapters = summary["adapters"]
    title = "adapters"
    if len(adapters) > most:
        title = f"the {most} of {len(adapters):,} adapters with the largest error (all: --json)"
        adapters = sorted(adapters, key=lambda adapter: -adapter["error"])[:most]
    table = Table(title=title, title_justify="left")
    table.add_column("adapter", overflow="fold")
    for column in ("rank", "cluster", "mean error", "worst module"):
        table.add_column(column, justify="right")
    for adapter in adapters:
        table.add_row(
            escape(adapter["name"]),
            "–".join(str(r) for r in {min(adapter["source_ranks"]), max(adapter["source_ranks"])})
            if adapter["source_ranks"]
            else "",
            _cluster_text(adapter),
            f"{adapter['error']:.4g}",
            f"{adapter['worst_module_error']:.4g}",
        )
    console.print(table)


def _cluster_text(adapter: dict[str, Any]) -> str:
    clusters = adapter["clusters"]
    if adapter["uncompressed"]:
        return "uncompressed"
    if not clusters:
        return "own"
    return str(clusters[0]) if len(clusters) == 1 else f"{len(clusters)} of them"


def print_adapter(console: Console, adapter: dict[str, Any]) -> None:
    """One adapter, module by module."""
    title = f"{escape(adapter['name'])}: error {adapter['error']:.4g}"
    if adapter.get("source"):
        title += f"\nfrom {escape(adapter['source'])}"
    table = Table(title=title, title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("source rank", "cluster", "norm", "error"):
        table.add_column(column, justify="right")
    for module in adapter["modules"]:
        table.add_row(
            escape(module["name"]),
            str(module["source_rank"]),
            "own" if module["cluster"] is None else str(module["cluster"]),
            f"{module['norm']:.4g}",
            f"{module['error']:.4g}",
        )
    console.print(table)


def print_diff(console: Console, result: dict[str, Any], most: int = 20) -> None:
    """What changed between two generations."""
    old, new = result["old"], result["new"]
    title = f"generation {old['generation']} → {new['generation']}"
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]adapters", f"{old['adapters']:,} → {new['adapters']:,}")
    table.add_row("[bold]store", " → ".join(size(count) for count in result["store_bytes"]))
    error = result["error"]
    if error["before"] is not None:
        what = f"{error['before']:.4g} → {error['after']:.4g} (mean over the adapters in both)"
        table.add_row("[bold]error", what)
    for name, (before, after) in result["settings"].items():
        table.add_row(f"[bold]{escape(name.replace('_', ' '))}", escape(f"{before} → {after}"))
    console.print(f"[bold]{title}")
    console.print(table)
    for what in ("added", "removed", "replaced"):
        names = result[what]
        if names:
            shown = ", ".join(names[:most]) + (" …" if len(names) > most else "")
            console.print(f"[bold]{what}[/] ({len(names):,}): {escape(shown)}")
    changed = error["adapters"]
    if changed:
        changes = Table(title=f"error of {len(changed):,} adapters changed", title_justify="left")
        changes.add_column("adapter", overflow="fold")
        for column in ("before", "after"):
            changes.add_column(column, justify="right")
        for adapter in changed[:most]:
            changes.add_row(
                escape(adapter["name"]), f"{adapter['before']:.4g}", f"{adapter['after']:.4g}"
            )
        console.print(changes)
