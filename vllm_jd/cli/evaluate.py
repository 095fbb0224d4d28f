"""`vllm-jd evaluate`: does a store still do what its adapters do?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_jd.cli.console import JsonOption, err, fail, out, print_json, progress, user_errors, warn
from vllm_jd.cli.store import StoreArgument

if TYPE_CHECKING:
    from vllm_jd.evaluate.results import Results

RESULTS, PAGE = "results.json", "report.html"
_SHOWN = 5  # adapters that suffered most


def evaluate(
    context: typer.Context,
    store: StoreArgument,
    adapters: Annotated[
        list[str],
        typer.Option(
            "--adapters",
            metavar="DIR",
            help="The adapters that the store was made from, as `compress` was given them; once "
            "for each folder.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="A folder with a file NAME.jsonl for each adapter that is to be asked; a line is "
            "an object with prompt and completion, or with messages of which the last is the "
            "assistant's.",
        ),
    ],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model: folder or Hub id. Default: what the store calls it.",
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of each adapter, at most.")] = 32,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Ask this adapter only; once for each."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help=f"Keep every answer there ({RESULTS}), and write a page about them ({PAGE}); the "
            "same command goes on where it was.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            "--max_model_len",
            min=2,
            help="Leave out items that are longer than this with their answer, in tokens. Default: "
            "than what the model has room for.",
        ),
    ] = None,
    store_base_model: Annotated[
        str | None,
        typer.Option(help="The name the store's adapters give the base model, if it is another."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of items.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Ask a store's adapters your own items, compressed and uncompressed, and compare the answers.

    Each adapter with a file of items is asked them through vLLM: the base model, the adapter
    as it is, and what the store has of it. Every other flag is passed on to vLLM, as `serve` does:
    --dtype, --tensor-parallel-size, … .
    """
    from vllm_jd.evaluate.errors import UsageError
    from vllm_jd.evaluate.page import check_drawing, write_page
    from vllm_jd.evaluate.results import Results
    from vllm_jd.evaluate.run import Options
    from vllm_jd.evaluate.run import evaluate as run
    from vllm_jd.serve.server import ServeError, check_flags, check_installed, open_for
    from vllm_jd.store import Store
    from vllm_jd.store.files import replace_text

    flags = context.args
    if flags and not flags[0].startswith("-"):
        raise typer.BadParameter(
            f"found {flags[0]!r} without an option; expected --adapters once for each folder, and "
            "vLLM's flags after STORE"
        )
    with (
        user_errors("stopped: with --out the same command goes on from here"),
        progress(quiet=as_json) as on_progress,
    ):
        try:
            if folder is not None:
                check_drawing()
                _make(folder)
            check_installed()
            check_flags(flags)
            with Store.open(store, verify=False) as named:
                model = base_model or named.manifest.base_model.name
            opened, doubts = open_for(store, model, store_base_model, "--base-model")
            for doubt in doubts:
                warn(f"the engine may refuse the store: {doubt}")
            options = Options(
                items=items,
                max_new_tokens=max_new_tokens,
                max_model_len=max_model_len,
                seed=seed,
                flags=tuple(flags),
                store_base_model=store_base_model,
            )
            with opened:
                evaluated = run(
                    opened,
                    model,
                    adapters,
                    data,
                    names=adapter or (),
                    options=options,
                    out=folder,
                    on_note=warn,
                    on_progress=on_progress,
                )
                results = Results(opened, model, evaluated, options)
                if folder is not None:
                    found = json.dumps(results.as_dict(items=True), indent=1, ensure_ascii=False)
                    replace_text(folder / RESULTS, found + "\n")
                    write_page(results, folder / PAGE)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None
        except ServeError as error:
            fail(str(error))
    if as_json:
        print_json(results.as_dict(items=False))
        return
    print_results(out, results)
    if folder is not None:
        err.print(f"Report: {folder / PAGE}", markup=False, highlight=False, soft_wrap=True)


def _make(folder: Path) -> None:
    """The folder for results; ends the command where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror or error}; expected a folder to write into")


def print_results(console: Console, results: "Results") -> None:
    """What came of it: figures of each way to answer, the adapters that suffered most, and what to
    do."""
    from vllm_jd.evaluate.page import NAMES, figures

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for name in NAMES.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in figures(results):
        table.add_row(*row)
    console.print(table)
    worst = results.worst(_SHOWN)
    if worst:
        _print_worst(console, results, worst)
    console.print(results.headline(), markup=False, highlight=False)
    for sentence in results.advice():
        console.print(f"- {sentence}", markup=False, highlight=False)


def _print_worst(console: Console, results: "Results", worst: list[int]) -> None:
    store, lora = results.compared["store"], results.compared["lora"]
    rises, same = store.rises(), store.each("agreement")
    ours, theirs = store.each("rouge_l"), lora.each("rouge_l")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("lost most", overflow="fold")
    for title in ("items", "loss", "Rouge-L", "word for\nword", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for i in worst:
        table.add_row(
            escape(results.names[i]),
            str(len(results.evaluated.adapters[i].items)),
            f"{rises[i]:+.3f}",
            f"{theirs[i]:.2f} → {ours[i]:.2f}",
            f"{same[i]:.0%}",
            f"{results.errors[i]:.2g}",
        )
    console.print(table)
