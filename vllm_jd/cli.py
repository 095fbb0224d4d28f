"""The `vllm-jd` command. Subcommands are thin: they parse, call, and print."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_jd import __version__, screens

app = typer.Typer(
    name="vllm-jd",
    help="Compress a collection of LoRA adapters and serve all of them at once with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


class Method(StrEnum):
    """`--method`; `vllm_jd.compressor.registry` must know them all."""

    JD_FULL = "jd-full"
    JD_DIAG = "jd-diag"
    SVD = "svd"
    TIES = "ties"
    TASK_ARITHMETIC = "task-arithmetic"
    DARE = "dare"
    DARE_TIES = "dare-ties"
    HYDRAOPT = "hydraopt"
    NONE = "none"


class Scope(StrEnum):
    """`--cluster-scope`."""

    ADAPTER = "adapter"
    MODULE = "module"


class Solver(StrEnum):
    """`--solver`."""

    ALTERNATING = "alternating"
    EIGEN = "eigen"


class StoreDtype(StrEnum):
    """`--store-dtype`."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"
    INT4 = "int4"


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Compress a collection of LoRA adapters and serve all of them at once with vLLM."""
    if version:
        typer.echo(f"vllm-jd {__version__}")
        raise typer.Exit


@app.command()
def compress(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTERS", help="PEFT adapter folders, or folders of them."),
    ],
    store: Annotated[Path, typer.Option("--out", metavar="STORE", help="The store to write.")],
    method: Annotated[Method, typer.Option(help="How to compress.")] = Method.JD_FULL,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the shared bases.")] = 16,
    clusters: Annotated[
        int, typer.Option(min=1, help="Groups of adapters; each has bases of its own.")
    ] = 1,
    cluster_scope: Annotated[
        Scope, typer.Option(help="One cluster for all modules of an adapter, or one a module.")
    ] = Scope.ADAPTER,
    iterations: Annotated[int, typer.Option(min=1, help="Most updates of the bases.")] = 10,
    solver: Annotated[
        Solver, typer.Option(help="Top eigenvectors in turn, or power steps (paper, A.1, A.2).")
    ] = Solver.ALTERNATING,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    store_dtype: Annotated[
        StoreDtype, typer.Option(help="Type of the stored numbers; int8 and int4 have scales.")
    ] = StoreDtype.BFLOAT16,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The adapters' base model: its folder (its config is recorded, and checked "
            "when the store is served) or its name.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compress adapters of one base model into a store.

    It can be stopped at any time: the same command goes on where it was.
    A store that is there already stays as it is until the new one is complete.
    """
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor import compress as run
    from vllm_jd.compressor.summary import store_summary
    from vllm_jd.store import BaseModelInfo, read_base_model

    stopped = "stopped: nothing is lost; the same command goes on from here"
    with _user_errors(stopped), _progress(quiet=as_json) as on_progress:
        known = None
        if base_model is not None:
            folder = Path(base_model)
            known = read_base_model(folder) if folder.is_dir() else BaseModelInfo(name=base_model)
        collection = read_adapters(
            adapters,
            base_model=known.name if known else None,
            on_progress=lambda done, total: on_progress("checking adapters", done, total),
        )
        if known is None and (Path(collection.base_model) / "config.json").is_file():
            known = read_base_model(Path(collection.base_model))
        settings = Settings(
            method=method.value,
            rank=rank,
            clusters=clusters,
            cluster_scope=cluster_scope.value,
            iterations=iterations,
            solver=solver.value,
            seed=seed,
            store_dtype=store_dtype.value,
        )
        result = run(collection, store, settings, base_model=known, on_progress=on_progress)
    summary = store_summary(result)
    if as_json:
        _print_json({key: value for key, value in summary.items() if key != "adapters"})
        return
    screens.print_overview(out, summary)
    model = shlex.quote(summary["base_model"]["name"])
    command = f"vllm-jd serve {shlex.quote(str(store))} --model {model}"
    out.print(f"Serve it:  [bold]{escape(command)}", soft_wrap=True)


@app.command()
def inspect(
    store: StoreArgument,
    name: Annotated[str | None, typer.Argument(help="One adapter, module by module.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a store: adapters, clusters, errors, bytes before and after."""
    from vllm_jd.compressor.summary import adapter_summary, store_summary
    from vllm_jd.store import Store

    with _user_errors():
        opened = Store.open(store, verify=False)
        if name is not None and name not in opened:
            _fail(_unknown_adapter(opened, name))
        if name is not None:
            adapter = adapter_summary(opened, name)
        else:
            summary = store_summary(opened)
    if name is not None:
        if as_json:
            _print_json(adapter)
        else:
            screens.print_adapter(out, adapter)
    elif as_json:
        _print_json(summary)
    else:
        screens.print_overview(out, summary)
        screens.print_modules(out, summary)
        screens.print_adapters(out, summary)


@app.command()
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Check every byte of a store's live generation against its hashes, shapes and types."""
    from vllm_jd.store import Store, StoreError

    try:
        opened = Store.open(store)
    except StoreError as error:
        if as_json:
            _print_json({"ok": False, "error": str(error)})
            raise typer.Exit(1) from None
        _fail(str(error))
    if as_json:
        _print_json(
            {
                "ok": True,
                "generation": opened.generation,
                "adapters": len(opened),
                "files": len(opened.manifest.files) + 1,
                "bytes": opened.stored_bytes,
            }
        )
        return
    out.print(
        f"[green]ok[/] generation {opened.generation}: {len(opened):,} adapters, "
        f"{len(opened.manifest.files) + 1} files, {screens.size(opened.stored_bytes)}"
    )


@app.command()
def export(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(help="The adapter.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
) -> None:
    """Write one adapter of a store as a PEFT adapter, equal to what the store serves."""
    from vllm_jd.compressor import export_adapter
    from vllm_jd.store import Store

    with _user_errors():
        opened = Store.open(store)
        if name not in opened:
            _fail(_unknown_adapter(opened, name))
        try:
            export_adapter(opened, name, folder)
        except OSError as error:
            _fail(str(error))
    out.print(f"wrote {escape(str(folder))}", soft_wrap=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [ANY vLLM FLAG]…",
)
def serve(
    context: typer.Context,
    store: StoreArgument,
    model: Annotated[
        str, typer.Option("--model", metavar="BASE", help="The base model: folder or Hub id.")
    ],
    max_loras: Annotated[
        int,
        typer.Option(
            "--max-loras",
            "--max_loras",
            min=1,
            help="Uncompressed adapters resident at once beside the store's.",
        ),
    ] = 8,
    max_cpu_loras: Annotated[
        int,
        typer.Option(
            "--max-cpu-loras",
            "--max_cpu_loras",
            min=1,
            help="Uncompressed adapters kept in main memory.",
        ),
    ] = 64,
    max_num_seqs: Annotated[
        int | None,
        typer.Option("--max-num-seqs", "--max_num_seqs", min=1, help="As in vLLM."),
    ] = None,
    store_base_model: Annotated[
        str | None,
        typer.Option(help="The name the store's adapters give BASE, if it is another than BASE's."),
    ] = None,
    additional_config: Annotated[
        str | None,
        typer.Option("--additional-config", "--additional_config", help="As in vLLM."),
    ] = None,
) -> None:
    """Start vLLM's OpenAI-compatible server with every adapter of a store resident.

    Every other flag is passed on to vLLM: --port, --host, --api-key, --dtype,
    --max-model-len, --lora-modules, … (`vllm serve --help` lists them).
    """
    from vllm_jd.serve import ServeError, ServerProcess, server_command, server_environment

    if not store.exists() and context.args:
        # `serve --port 8000 STORE` takes --port for the store.
        _fail(f"{store}: no such store; STORE comes first, vLLM's flags after it")
    with _user_errors():
        try:
            command = server_command(
                store,
                model,
                context.args,
                max_loras=max_loras,
                max_cpu_loras=max_cpu_loras,
                max_num_seqs=max_num_seqs,
                store_base_model=store_base_model,
                additional_config=additional_config,
            )
        except ServeError as error:
            _fail(str(error))
    raise typer.Exit(ServerProcess(command, server_environment()).wait())


@app.command()
def demo(
    store: Annotated[
        Path | None, typer.Option(help="The store to write; default: in the cache folder.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for the server's output; default: beside the store.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compress the shipped adapters, serve them, and compare what they say: all on this machine."""
    from dataclasses import asdict

    from vllm_jd.demo import run_demo
    from vllm_jd.serve import ServeError, ServerFailed
    from vllm_jd.smollm2 import BaseModelError, default_cache_dir

    with _user_errors():
        try:
            path = store or default_cache_dir() / "demo-store"
            size, answers = run_demo(err if as_json else out, path, log or path.with_suffix(".log"))
        except (ServeError, ServerFailed, BaseModelError) as error:
            _fail(str(error))
    if as_json:
        _print_json({"sizes": asdict(size), "answers": [asdict(answer) for answer in answers]})


@contextmanager
def _user_errors(stopped: str = "stopped") -> Iterator[None]:
    """Print what a user can mend as a message; exit code 1, and 130 for Ctrl-C."""
    from vllm_jd.compressor.errors import AdapterError
    from vllm_jd.store import StoreError

    try:
        yield
    except (AdapterError, StoreError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        err.print(f"[yellow]{stopped}")
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    err.print("[red]error:[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _unknown_adapter(store: Any, name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, store.names, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "`vllm-jd inspect` lists them"
    return f"{store.path}: no adapter {name!r} among its {len(store):,}; {hint}"


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, one line for each kind of work."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=quiet) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield update


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
