"""The quality study's tables, as Markdown: a summary, and the paper's tables 7 to 14."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from quality_results import Result

from vllm_jd.evaluate.bootstrap import Interval, shown
from vllm_jd.evaluate.compared import RELATIVE

NAMES = {"rouge_l": "Rouge-L", "rouge_1": "Rouge-1", "exact": "exact match", "loss": "loss"}


def markdown(results: Sequence[Result]) -> str:
    """All tables."""
    parts = ["# The quality study's tables", ABOUT, "## Summary"]
    for n in sizes(results):
        parts += [f"### {n} adapters", summary([r for r in results if r.n in (0, n)], n)]
    parts += ["## How many items it takes", POWER, power(results)]
    for number, title, of in papers():
        parts.append(f"## {title} (as the paper's table {number})")
        parts.append(by_task(results, of, lora=number != "14"))
    return "\n\n".join(parts) + "\n"


ABOUT = """Written by `benchmarks/quality.py report`. Means over tasks; in brackets 95 % bootstrap
intervals over tasks and items. *Of LoRA*: the mean as a share of the uncompressed adapters' mean.
Loss: nats a token of the target. Agreement: answers that are word for word the uncompressed
adapter's. Error: relative squared reconstruction error, the mean over an adapter's modules.
*Worst adapter*: the smallest share of its own LoRA's Rouge-L, and the largest rise of the loss. Of
single tasks the figures are as coarse as their few items."""


POWER = """Of the cells that keep at least 0.9 of LoRA's Rouge-L: the spread of an item's difference
from LoRA within a task, the items (of all tasks together) with which a change as small as that is
seen at the 5 % level four times in five, and the smallest change that this study's items show so.
Tasks are taken as they are: for claims about other tasks it takes more, see the intervals."""
SEEN = 1.96 + 0.84  # standard errors that a change must have: 5 % level, 80 % power


def power(results: Sequence[Result]) -> str:
    """What can be seen with so many items."""
    cells = [r for r in results if r.n and r.kept("rouge_l").value > 0.9]
    if not cells:
        return "No cell keeps as much."
    items = np.mean([sum(map(len, cell.values["loss"])) for cell in cells])
    lora = {metric: cells[0].each_lora(metric).mean() for metric in NAMES}
    small = {
        "rouge_l": ("1 % of LoRA's", 0.01 * lora["rouge_l"]),
        "exact": ("2 % of LoRA's", 0.02 * lora["exact"]),
        "loss": ("0.01 nats", 0.01),
        "agreement": ("0.02", 0.02),
    }
    lines = []
    for metric, (text, change) in small.items():
        deviation = np.mean([spread_within(cell, metric) for cell in cells])
        lines.append(
            [
                NAMES.get(metric, metric),
                f"{deviation:.3f}",
                text,
                f"{(SEEN * deviation / change) ** 2:,.0f}",
                f"{SEEN * deviation / np.sqrt(items):.3f}",
            ]
        )
    head = ["", "spread", "change", "items for it", f"seen with {items:.0f} items"]
    return table(head, lines)


def spread_within(cell: Result, metric: str) -> float:
    """Standard deviation of an item's difference from LoRA, in one task."""
    pairs = zip(cell.values[metric], cell.lora[metric], strict=True)
    return float(np.sqrt(np.mean([np.var(np.subtract(a, b)) for a, b in pairs])))


def sizes(results: Sequence[Result]) -> list[int]:
    """The collections' sizes."""
    return sorted({result.n for result in results} - {0})


def of_asked(results: Sequence[Result], n: int) -> list[Result]:
    """The cells of one n; the base model and LoRA on the items that these were asked."""
    cells = [result for result in results if result.n == n]
    if not cells:
        return []
    names = cells[0].names
    plain = [narrowed(result, names) for result in results if result.n == 0]
    return plain + cells


def narrowed(result: Result, names: Sequence[str]) -> Result:
    """A result of some of its adapters."""
    at = [result.names.index(name) for name in names]
    values, lora = (
        {metric: [each[i] for i in at] for metric, each in whose.items()}
        for whose in (result.values, result.lora)
    )
    return Result(list(names), values, lora, result.n, result.label, result.raw)


def summary(results: Sequence[Result], n: int) -> str:
    """The figures that a user chooses by, of one n."""
    lines = []
    for result in of_asked(results, n):
        loss, _ = result.worst_added()
        kept, _ = result.worst_kept("rouge_l")
        stored = ["", "", ""]
        if result.n:
            stored = [
                f"{result.raw['bytes'] / 1e6:.2f}",
                f"{100 * result.raw['saved']:.0f} %",
                f"{result.figures('error').mean():.2f}",
            ]
        lines.append(
            [
                result.label,
                *stored,
                shown(result.kept("rouge_l"), 2),
                shown(result.kept("exact"), 2),
                shown(result.added("loss"), 3, "+"),
                shown(result.mean("agreement"), 2),
                f"{kept:.2f}, {loss:+.3f}",
            ]
        )
    head = [
        "way",
        "MB",
        "saved",
        "error",
        "Rouge-L of LoRA",
        "exact match of LoRA",
        "loss − LoRA's",
        "agreement",
        "worst adapter",
    ]
    return table(head, lines)


def papers() -> list[tuple[str, str, Callable[[Result], tuple[np.ndarray, Interval | None]]]]:
    """(number, title, what of a result) of each of the paper's tables."""

    def absolute(metric: str) -> Callable[[Result], tuple[np.ndarray, Interval | None]]:
        return lambda result: (result.each(metric), result.mean(metric))

    def relative(metric: str) -> Callable[[Result], tuple[np.ndarray, Interval | None]]:
        def of(result: Result) -> tuple[np.ndarray, Interval | None]:
            return result.shares(metric), result.kept(metric)

        return of

    def errors(result: Result) -> tuple[np.ndarray, Interval | None]:
        return (result.figures("error"), None) if result.n else (np.array([]), None)

    numbers = iter(range(7, 12))
    found = []
    for metric in RELATIVE:
        found.append((str(next(numbers)), f"{NAMES[metric]} of LoRA's", relative(metric)))
        if metric != "exact":
            found.append((str(next(numbers)), f"{NAMES[metric]}", absolute(metric)))
    return [
        *found,
        ("12", "Loss of the target", absolute("loss")),
        ("13", "Agreement", absolute("agreement")),
        ("14", "Error", errors),
    ]


def by_task(
    results: Sequence[Result],
    of: Callable[[Result], tuple[np.ndarray, Interval | None]],
    *,
    lora: bool = True,
) -> str:
    """A column a task, a row a cell, and the mean."""
    names = max((result.names for result in results), key=len)
    lines = []
    for result in results:
        each, mean = of(result)
        if not len(each):
            continue
        at = dict(zip(result.names, each, strict=True))
        cells = [f"{at[name]:.2f}" if name in at and at[name] == at[name] else "" for name in names]
        lines.append(
            [
                str(result.n or ""),
                result.label,
                *cells,
                f"{np.nanmean(each):.3f}" if mean is None else shown(mean, 3),
            ]
        )
    if not lora:
        lines = [line for line in lines if line[1] != "LoRA"]
    return table(["n", "way", *(short(name) for name in names), "mean"], lines)


def short(name: str) -> str:
    """A task's number, if its name has one."""
    return name.split("_")[0].removeprefix("task")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_tables(results: Sequence[Result], file: Path) -> None:
    """Write `markdown` to a file."""
    file.write_text(markdown(results), encoding="utf-8")
