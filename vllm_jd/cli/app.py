"""The `vllm-jd` command. Subcommands are thin: they parse, call, and print."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_jd import __version__
from vllm_jd.cli import blend as blend_command
from vllm_jd.cli import compress as compress_command
from vllm_jd.cli import evaluate as evaluate_command
from vllm_jd.cli import keys as keys_commands
from vllm_jd.cli import store as store_commands
from vllm_jd.cli import train_core as train_core_command
from vllm_jd.cli.compress import parse_size
from vllm_jd.cli.console import JsonOption, err, fail, out, print_json, user_errors, warn
from vllm_jd.cli.method_options import MethodCommand
from vllm_jd.cli.store import StoreArgument
from vllm_jd.plugin import defaults

_RECOMPRESS = {"rich_help_panel": "Compressing uploads"}

app = typer.Typer(
    name="vllm-jd",
    help="Compress a collection of LoRA adapters and serve all of them at once with vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=MethodCommand)(compress_command.compress)
for command in (
    compress_command.plan,
    store_commands.inspect,
    store_commands.report,
    store_commands.verify,
    store_commands.export,
    store_commands.add,
    store_commands.remove,
    store_commands.recompress,
    store_commands.diff,
    store_commands.rollback,
    store_commands.prune,
    blend_command.blend,
    train_core_command.train_core,
):
    app.command()(command)
_ALSO_VLLM = {"allow_extra_args": True, "ignore_unknown_options": True}
_USAGE = "[OPTIONS] [ANY vLLM FLAG]…"
app.command(context_settings=_ALSO_VLLM, options_metavar=_USAGE)(evaluate_command.evaluate)
app.add_typer(keys_commands.app)


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


@app.command(context_settings=_ALSO_VLLM, options_metavar=_USAGE)
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
    ] = defaults.MAX_LORAS,
    max_cpu_loras: Annotated[
        int,
        typer.Option(
            "--max-cpu-loras",
            "--max_cpu_loras",
            min=1,
            help="Uncompressed adapters kept in main memory.",
        ),
    ] = defaults.MAX_CPU_LORAS,
    max_num_seqs: Annotated[
        int | None,
        typer.Option("--max-num-seqs", "--max_num_seqs", min=1, help="As in vLLM."),
    ] = None,
    core_slots: Annotated[
        int | None,
        typer.Option(
            "--core-slots",
            "--core_slots",
            min=1,
            help="Adapters of the store whose cores are in memory at once; the others' are read "
            "when they are asked for. At least --max-num-seqs. Default: as many as fit in 1 GiB.",
        ),
    ] = None,
    adapter_memory: Annotated[
        int | None,
        typer.Option(
            "--adapter-memory",
            "--adapter_memory",
            parser=parse_size,
            metavar="SIZE",
            help="Memory of each worker for bases and cores, such as 4GB. What does not fit is "
            "read when it is asked for, bases cluster by cluster. Default: all bases, and cores "
            "as --core-slots says.",
        ),
    ] = None,
    max_blend: Annotated[
        int,
        typer.Option(
            "--max-blend",
            "--max_blend",
            min=0,
            max=64,
            help="Adapters that one request may blend. 0: no blends, and no memory for them.",
        ),
    ] = defaults.MAX_BLEND,
    store_base_model: Annotated[
        str | None,
        typer.Option(help="The name the store's adapters give BASE, if it is another than BASE's."),
    ] = None,
    additional_config: Annotated[
        str | None,
        typer.Option("--additional-config", "--additional_config", help="As in vLLM."),
    ] = None,
    allow_runtime_lora_updating: Annotated[
        bool | None,
        typer.Option(
            "--allow-runtime-lora-updating/--no-allow-runtime-lora-updating",
            help="Whether clients may upload, load, replace and delete adapters while the server "
            "runs. Default: where VLLM_ALLOW_RUNTIME_LORA_UPDATING or --adapter-root says so.",
            show_default=False,
        ),
    ] = None,
    adapter_root: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter-root",
            "--adapter_root",
            metavar="DIR",
            help="A folder, or an address (hf://org, s3://bucket/folder, gs://…, az://…), that "
            "clients may have adapters loaded from; once for each.",
        ),
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapter-dir",
            "--adapter_dir",
            metavar="DIR",
            help="A folder of adapters' folders to follow: what comes, changes and goes in it does "
            "so in the server, by the folder's name.",
        ),
    ] = None,
    max_adapter_size: Annotated[
        int | None,
        typer.Option(
            "--max-adapter-size",
            "--max_adapter_size",
            parser=parse_size,
            metavar="SIZE",
            help="How large the weights of an upload may be. Default: 4 GiB.",
        ),
    ] = None,
    allow_remote_adapters: Annotated[
        bool,
        typer.Option(
            "--allow-remote-adapters",
            help="Let clients have adapters downloaded from the Hugging Face Hub.",
        ),
    ] = False,
    follow_generations: Annotated[
        bool,
        typer.Option(
            "--follow-generations/--no-follow-generations",
            help="Serve a new generation of the store as soon as it is published, or only when "
            "asked to (POST /v1/store/reload): replica by replica.",
        ),
    ] = True,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            "--api_keys",
            metavar="FILE",
            help="Answer nobody without a key of this file (`vllm-jd keys add FILE NAME`), each "
            "with its tenant, rights and limits. It is read anew when it changes.",
        ),
    ] = None,
    max_queued_requests: Annotated[
        int | None,
        typer.Option(
            "--max-queued-requests",
            "--max_queued_requests",
            min=0,
            help="With --api-keys: how many requests of one tenant may wait for the engine; more "
            "get 429. [default: 128]",
            show_default=False,
        ),
    ] = None,
    recompress_count: Annotated[
        int,
        typer.Option(
            min=0,
            help="Compress uploads in the background when so many wait; 0: not for their number.",
            **_RECOMPRESS,
        ),
    ] = defaults.RECOMPRESS_COUNT,
    recompress_age: Annotated[
        float,
        typer.Option(
            min=0,
            help="The same when the oldest of them has waited so many seconds; 0: not for that.",
            **_RECOMPRESS,
        ),
    ] = defaults.RECOMPRESS_AGE,
    refit_share: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Fit the bases anew when more uploads than this share of the adapters would lose "
            "too much on those that are there. [default: never]",
            **_RECOMPRESS,
        ),
    ] = None,
    recompress_threads: Annotated[
        int, typer.Option(min=1, help="CPU threads for that.", **_RECOMPRESS)
    ] = defaults.RECOMPRESS_THREADS,
    recompress_device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="Where new bases are fitted: cpu, cuda, …", **_RECOMPRESS
        ),
    ] = defaults.RECOMPRESS_DEVICE,
    originals: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="For new bases: where the adapters lie that the store was made from.",
            **_RECOMPRESS,
        ),
    ] = None,
) -> None:
    """Start vLLM's OpenAI-compatible server with every adapter of a store resident.

    Every other flag is passed on to vLLM: --port, --host, --api-key, --dtype,
    --max-model-len, --lora-modules, …
    (`python -m vllm.entrypoints.openai.api_server --help` lists them).
    """
    from vllm_jd.plugin.config import RecompressConfig
    from vllm_jd.serve import (
        ServeError,
        exposure,
        run_server,
        runtime_updating,
        server_command,
        server_environment,
    )

    roots = adapter_root or []
    updating = runtime_updating(allow_runtime_lora_updating, roots, os.environ)
    if not store.exists() and context.args:
        # `serve --port 8000 STORE` takes --port for the store.
        fail(f"{store}: no such store; STORE comes first, vLLM's flags after it")
    with user_errors():
        try:
            command = server_command(
                store,
                model,
                context.args,
                max_loras=max_loras,
                max_cpu_loras=max_cpu_loras,
                max_num_seqs=max_num_seqs,
                store_base_model=store_base_model,
                core_slots=core_slots,
                adapter_memory=adapter_memory,
                max_blend=max_blend,
                additional_config=additional_config,
                on_doubt=lambda text: warn(f"the server may refuse the store: {text}"),
                allow_runtime_lora_updating=updating,
                adapter_roots=roots,
                allow_remote_adapters=allow_remote_adapters,
                adapter_dir=adapter_dir,
                max_adapter_size=max_adapter_size,
                follow_generations=follow_generations,
                api_keys=api_keys,
                max_queued_requests=max_queued_requests,
                recompress=RecompressConfig(
                    count=recompress_count or None,
                    age=recompress_age or None,
                    refit_share=refit_share,
                    threads=recompress_threads,
                    device=recompress_device,
                    originals=tuple(str(folder.absolute()) for folder in originals or []),
                ),
            )
        except ServeError as error:
            fail(str(error))
    environment = server_environment(allow_runtime_lora_updating=updating)
    for line in exposure(
        context.args,
        environment,
        updating=updating,
        adapter_roots=roots,
        remote=allow_remote_adapters,
        adapter_dir=adapter_dir,
        api_keys=api_keys,
    ):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    code, fault = run_server(command, environment)
    if fault:
        fail(fault)
    raise typer.Exit(code)


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

    from vllm_jd.demo.demo import run_demo
    from vllm_jd.demo.smollm2 import BaseModelError, default_cache_dir
    from vllm_jd.serve import ServeError, ServerFailed

    with user_errors():
        try:
            path = store or default_cache_dir() / "demo-store"
            size, answers = run_demo(err if as_json else out, path, log or path.with_suffix(".log"))
        except (ServeError, ServerFailed, BaseModelError) as error:
            fail(str(error))
    if as_json:
        print_json({"sizes": asdict(size), "answers": [asdict(answer) for answer in answers]})


if __name__ == "__main__":
    app()
