"""`vllm-jd train-core`: an adapter trained in a store's bases."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_jd.cli.compress import BaseModelOption, DeviceOption, find_device
from vllm_jd.cli.console import JsonOption, fail, out, print_json, progress, user_errors
from vllm_jd.cli.store import StoreArgument

if TYPE_CHECKING:
    from vllm_jd.compressor.change.train_core import Trained
    from vllm_jd.store import Store

_STOPPED = "stopped: finished epochs are kept; the same command goes on from there"


def train_core(
    store: StoreArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="JSONL",
            help="Examples of the task, one object a line: prompt and completion (the end of "
            "the text is learnt, too), or messages of which the last is the assistant's. Hundreds "
            "are better than tens.",
        ),
    ],
    name: Annotated[str, typer.Option(help="What the adapter is to be called.")],
    base_model: BaseModelOption = None,
    cluster: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="In whose bases. Default: those along which the loss falls most steeply.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.")] = 3,
    learning_rate: Annotated[
        float,
        typer.Option(
            min=0, help="Adam's, as a share of the size of the numbers in the cluster's cores."
        ),
    ] = 0.5,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a padded batch, at most.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer examples are cut.")] = 1024,
    held_out: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the examples to judge by instead of training on them: the epoch that "
            "does best on them is kept.",
        ),
    ] = 0.1,
    replace: Annotated[
        bool, typer.Option("--replace", help="An adapter of the same name gives way.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of order and choice of examples.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train an adapter in the bases that a store has, and add it to the store.

    Only a core for each module is trained (LoRA-XS), so that nothing of it is lost to compression
    and it costs the store no more than any other adapter. Servers of the store serve it from then
    on. It can be stopped: finished epochs are kept.
    """
    from vllm_jd.compressor.change.train_core import Training, add_trained
    from vllm_jd.compressor.change.train_core import train_core as run
    from vllm_jd.compressor.choose.examples import read_examples
    from vllm_jd.compressor.choose.model import load_model
    from vllm_jd.demo.smollm2 import default_cache_dir
    from vllm_jd.store import Store

    of = hashlib.sha256(f"{store.resolve()}\n{name}".encode(errors="surrogateescape"))
    kept = default_cache_dir() / "train-core" / f"{of.hexdigest()[:16]}.pt"
    training = Training(epochs, learning_rate, batch_tokens, held_out, seed)
    with user_errors(_STOPPED), progress(quiet=as_json) as on_progress:
        opened = Store.open(store, verify=False)
        _check_name(opened, name, replace=replace)
        named = base_model or opened.manifest.base_model.name
        where = find_device(device)
        dtype = "float32" if where == "cpu" else "bfloat16"
        model, tokenizer = load_model(named, where, dtype)
        trained = run(
            opened,
            model,
            read_examples(data, tokenizer, max_tokens, end=True),
            training=training,
            cluster=cluster,
            kept=kept,
            on_progress=on_progress,
        )
        added = add_trained(store, trained, name, replace=replace)
        kept.unlink(missing_ok=True)  # not before: another process may write the store just now
    index = added.index(name)
    error = float(added.error[index][added.present[index]].double().mean())
    if as_json:
        print_json(
            {
                "name": name,
                "generation": added.generation,
                "cluster": trained.cluster,
                "numbers": trained.numbers,
                "steps": trained.steps,
                "epoch": trained.epoch,
                "loss": {"base": trained.before, "adapter": trained.after},
                "judged": {"examples": trained.judged, "held_out": trained.held_out},
                "error": error,
            }
        )
        return
    _show(trained, name, added)


def _check_name(store: "Store", name: str, *, replace: bool) -> None:
    """End the command where the name cannot be given to an adapter of the store."""
    from vllm_jd.store.fleet import check_name, read_fleet

    try:
        check_name(name)
    except ValueError as error:
        fail(f"--name: {error}")
    if not replace and read_fleet(store.path).meaning(name, store) is not None:
        fail(f"--name {name}: there is an adapter of that name; choose another, or give --replace")


def _show(trained: "Trained", name: str, store: "Store") -> None:
    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    whose = "held-out examples" if trained.held_out else "examples it was trained on"
    line(f"{name}: {trained.numbers:,} numbers in the bases of cluster {trained.cluster}")
    line(f"loss a token of {trained.judged} {whose}: {trained.before:.3f} on the base model,")
    line(f"  {trained.after:.3f} with {name} (after epoch {trained.epoch})")
    line(f"generation {store.generation}: {len(store):,} adapters")
