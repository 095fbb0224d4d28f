"""`vllm-jd blend`: weights for a blend, found on a few examples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_jd.cli.compress import BaseModelOption
from vllm_jd.cli.console import JsonOption, fail, out, print_json, progress, user_errors
from vllm_jd.cli.store import StoreArgument

if TYPE_CHECKING:
    from vllm_jd.compressor.choose.blend_weights import Fitted
    from vllm_jd.store import Store
    from vllm_jd.store.blend import Blend


def blend(
    store: StoreArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="JSONL",
            help="Examples of the task, one object a line: prompt and completion, or messages of "
            "which the last is the assistant's. A handful is enough.",
        ),
    ],
    base_model: BaseModelOption = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="An adapter to try; once for each. Default: the 20 that promise most.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Give the blend this name in the store's fleet: servers of the store serve it "
            "from then on."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option("--most", min=1, max=64, help="Parts of the blend, at most.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search.")] = 40,
    as_json: JsonOption = False,
) -> None:
    """Find weights with which a store's adapters do a new task, from a few examples of it.

    It runs the base model on this machine's processors and prints the weights, as a request has
    them. Nothing is changed without --name.
    """
    from vllm_jd.compressor.choose.blend_weights import fit_blend
    from vllm_jd.compressor.choose.examples import read_examples
    from vllm_jd.compressor.choose.model import load_model
    from vllm_jd.store import Store
    from vllm_jd.store.blend import of_mapping

    with user_errors(), progress(quiet=as_json) as on_progress:
        opened = Store.open(store, verify=False)
        if name is not None:
            _check_free(opened, name)
        named = base_model or opened.manifest.base_model.name
        model, tokenizer = load_model(named, "cpu", "float32")
        fitted = fit_blend(
            opened,
            model,
            read_examples(data, tokenizer),
            candidates=adapters or None,
            most=most,
            steps=steps,
            on_progress=on_progress,
        )
        if name is not None:
            _give(store, name, of_mapping(fitted.weights))
    if as_json:
        print_json(
            {
                "name": name,
                "weights": fitted.weights,
                "loss": {"base": fitted.before, "blend": fitted.after},
                "best_adapter": {"name": fitted.best[0], "loss": fitted.best[1]},
                "candidates": list(fitted.candidates),
                "tokens": fitted.tokens,
            }
        )
    else:
        _show(fitted)


def _check_free(store: "Store", name: str) -> None:
    """End the command where a name is that of something else than a blend."""
    from vllm_jd.store.fleet import Blended, check_name, read_fleet

    try:
        check_name(name)
    except ValueError as error:
        fail(f"--name: {error}")
    if not isinstance(read_fleet(store.path).meaning(name, store), Blended | None):
        fail(f"--name {name}: there is an adapter of that name; choose another")


def _give(path: Path, name: str, blend: "Blend") -> None:
    """Give a name a blend, unless it was given to an upload since it was asked for."""
    from vllm_jd.store import StoreError
    from vllm_jd.store.fleet import Entry, blended, change_fleet

    def change(entries: dict[str, Entry]) -> None:
        before = entries.get(name, Entry())
        if before.digest:
            raise StoreError(
                f"--name {name}: was given to an upload meanwhile, expected a free name or one of "
                "a blend; choose another"
            )
        entries[name] = blended(blend, pinned=before.pinned)

    change_fleet(path, change)


def _show(fitted: "Fitted") -> None:
    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    width = max(len(name) for name in fitted.weights)
    for name, weight in fitted.weights.items():
        line(f"{name:{width}}  {weight:+.4f}")
    line("")
    line(f"loss of {fitted.tokens} tokens: {fitted.before:.3f} on the base model,")
    line(f"  {fitted.best[1]:.3f} with the best single adapter ({fitted.best[0]}),")
    line(f"  {fitted.after:.3f} with the blend")
