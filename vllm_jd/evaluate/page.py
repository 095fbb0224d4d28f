"""The page about an evaluation, for people."""

import re
from html import escape
from pathlib import Path

import numpy as np
from rich.filesize import decimal as size_text

from vllm_jd.compressor.report.page import page, picture, table, tiles
from vllm_jd.evaluate.bootstrap import shown
from vllm_jd.evaluate.compared import METRICS, RELATIVE
from vllm_jd.evaluate.errors import EvaluateError
from vllm_jd.evaluate.results import Results

NAMES = {"base": "base model", "lora": "uncompressed", "store": "the store"}
METRIC_NAMES = {
    "rouge_l": "Rouge-L",
    "rouge_1": "Rouge-1",
    "exact": "exact match",
    "loss": "loss, nats",
    "agreement": "word for word",
}
_ABOUT = """Means are over adapters; in brackets 95 % bootstrap intervals, adapters drawn again and
in each of them its items. Loss: of what is expected, nats a token. Word for word: answers that are
the uncompressed adapter’s. Error: relative squared reconstruction error. Rouge sees words of the
letters a to z and digits only."""
_NAMED = 3  # adapters with their names in the figure
_WORST, _ITEMS = 5, 4  # adapters whose answers are shown, and how many of each
_LONG = 1500  # characters of a prompt or an answer that are shown


def check_drawing() -> None:
    """Whether a page can be made.

    Raises:
        EvaluateError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise EvaluateError(
            "the report page needs matplotlib, which is not installed: "
            "pip install 'vllm-jd[evaluate]'"
        ) from None


def results_page(results: Results) -> str:
    """The page, as HTML."""
    facts, evaluated = results.facts, results.evaluated
    name = Path(facts["path"]).resolve().name or facts["path"]
    about = (
        f"generation {facts['generation']} of {facts['path']}",
        f"base model {results.model}",
        f"vLLM {evaluated.versions.get('vllm') or 'unknown'}",
    )
    settings = " · ".join(f"{k.replace('_', ' ')} {v}" for k, v in facts["settings"].items())
    notes = "".join(f'<p class="note">{_in_words(each)}</p>\n' for each in results.advice())
    return page(
        f"{name}: vllm-jd evaluate",
        f"""<header>
<h1>{escape(name)}: does it still do what its adapters do?</h1>
<p>{escape(" · ".join(about))}</p>
<p><b>{escape(facts["method"])}</b> · {escape(settings)}</p>
</header>
<p class="headline">{escape(results.headline())}</p>
{notes}{tiles(_key_numbers(results))}
<main>
<section>{_ways(results)}</section>
{_figure(results)}<section class="whole">{_adapters(results)}</section>
</main>
{_answers(results)}<footer>Greedy answers of up to {results.options.max_new_tokens} tokens, through
vLLM. {_ABOUT}</footer>
""",
        _STYLE,
    )


def _key_numbers(results: Results) -> dict[str, str]:
    sizes = results.facts["sizes"]
    return {
        "adapters asked": f"{len(results.names):,} of {len(results.store):,}",
        "items": f"{results.items:,}",
        "Rouge-L kept": _plain(results.kept["store"]["rouge_l"].value, "{:.3f}"),
        "word for word": f"{results.means['store']['agreement'].value:.0%}",
        "loss": f"{results.added['store'].value:+.4f}",
        "bytes": f"{size_text(sizes['adapter_bytes'])} → {size_text(sizes['store_bytes'])}",
        "mean error": f"{results.facts['error']:.4g}",
    }


def figures(results: Results) -> list[tuple[str, str, str, str]]:
    """The figures of each of `NAMES`, as text: a row a figure, its name first. What compares with
    the uncompressed adapters has an interval, and nothing of these themselves."""
    means, kept, added = results.means, results.kept, results.added
    rows = []
    for metric in METRICS:
        name = METRIC_NAMES[metric]
        base, lora, store = (means[way][metric] for way in NAMES)
        if metric == "agreement":
            rows.append((name, shown(base, 2), "", shown(store, 2)))
            continue
        rows.append((name, *(f"{each.value:.3f}" for each in (base, lora, store))))
        if metric in RELATIVE:
            shares = [shown(kept[way][metric], 2) for way in ("base", "store")]
            rows.append(("  of LoRA's", shares[0], "", shares[1]))
        else:
            rises = shown(added["base"], 2, "+"), shown(added["store"], 3, "+")
            rows.append(("  − LoRA's", rises[0], "", rises[1]))
    return rows


def _ways(results: Results) -> str:
    return table("What was answered", ("", *NAMES.values()), figures(results), "free")


def _figure(results: Results) -> str:
    from vllm_jd.compressor.report.figures import kept_by_adapter, png

    store = results.compared["store"]
    kept = store.shares("rouge_l")
    none = int(np.isnan(kept).sum())
    if none == len(kept):
        return ""
    figure = kept_by_adapter(kept, store.rises(), results.names, results.worst(_NAMED))
    text = "A mark an adapter; red: whose loss rose most."
    if none:
        text += f" Not drawn: {none:,} which score no Rouge-L uncompressed."
    return picture("Kept and lost, by adapter", png(figure), text)


def _adapters(results: Results) -> str:
    store, lora = results.compared["store"], results.compared["lora"]
    rises, kept = store.rises(), store.shares("rouge_l")
    ours, theirs, same = store.each("rouge_l"), lora.each("rouge_l"), store.each("agreement")
    exact, their_exact = store.each("exact"), lora.each("exact")
    rows = [
        (
            results.names[i],
            str(len(results.evaluated.adapters[i].items)),
            f"{rises[i]:+.4f}",
            f"{theirs[i]:.3f} → {ours[i]:.3f}",
            _plain(kept[i], "{:.2f}"),
            f"{their_exact[i]:.2f} → {exact[i]:.2f}",
            f"{same[i]:.0%}",
            f"{results.errors[i]:.3g}",
        )
        for i in np.argsort(-rises, kind="stable")
    ]
    columns = (
        "adapter", "items", "loss", "Rouge-L", "kept", "exact match", "word for word", "error",
    )  # fmt: skip
    return table("All adapters, the one that lost most first", columns, rows, "free")


def _answers(results: Results) -> str:
    """Of the worst adapters some items, those with other answers first."""
    parts = []
    for i in results.worst(_WORST):
        adapter, scores = results.evaluated.adapters[i], results.evaluated.scores
        lora, store = scores["lora"][i], scores["store"][i]
        order = sorted(
            range(len(adapter.items)),
            key=lambda k: (lora[k].said == store[k].said, lora[k].loss - store[k].loss),
        )
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{_clipped(text)}</td>" for text in texts)
            + f"<td>{lora[k].loss:.2f} → {store[k].loss:.2f}</td></tr>\n"
            for k in order[:_ITEMS]
            for texts in [
                (
                    adapter.items[k].text.strip(),
                    adapter.items[k].expected.strip(),
                    lora[k].said,
                    store[k].said,
                )
            ]
        )
        head = "".join(
            f"<th>{title}</th>"
            for title in ("prompt", "expected", "uncompressed", "the store", "loss")
        )
        parts.append(
            f'<section class="items"><table class="texts">'
            f"<caption>{escape(adapter.name)}</caption><thead>"
            f"<tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></section>\n"
        )
    if not parts:
        return ""
    title = "What the adapters say that lost most (items with other answers first)"
    return f'<h2 class="none">{title}</h2>\n' + "".join(parts)


def _in_words(sentence: str) -> str:
    """With its commands as such."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(sentence))


def _clipped(text: str) -> str:
    return escape(text if len(text) <= _LONG else f"{text[:_LONG]} …")


def _plain(value: float, form: str) -> str:
    return "–" if np.isnan(value) else form.format(value)


def write_page(results: Results, file: Path) -> None:
    """Write the page.

    Raises:
        EvaluateError: the file cannot be written, or matplotlib is not installed.
    """
    check_drawing()
    try:
        file.write_text(results_page(results), encoding="utf-8", errors="replace")
    except OSError as error:
        raise EvaluateError(f"{file}: cannot be written: {error.strerror or error}") from None


_STYLE = """
.headline { font-size: 15px; font-weight: 600; margin: 8px 0; }
main { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
section.whole { grid-column: 1 / -1; max-height: 60vh; overflow: auto; }
section.items { margin: 6px 0; overflow-x: auto; }
main > * { overflow-x: auto; }
table.free { table-layout: auto; }
table.free th { white-space: pre; }
table.free th:nth-child(n), table.free td { width: auto; padding: 1px 8px 1px 2px; }
table.texts { min-width: 640px; }
table.texts th, table.texts td { text-align: left; white-space: pre-wrap; vertical-align: top;
  overflow-wrap: anywhere; padding: 3px 8px 3px 2px; }
table.texts th:nth-child(n), table.texts td:nth-child(n) { width: auto; }
table.texts th:last-child, table.texts td:last-child { width: 8em; white-space: nowrap; }
table.texts tr + tr td { border-top: 1px solid #eee; }
@media print { section.whole { max-height: none; } }
"""
