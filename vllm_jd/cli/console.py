"""What all subcommands share: consoles, progress bars, and how errors are told."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@contextmanager
def user_errors(stopped: str = "stopped") -> Iterator[None]:
    """Print what a user can mend as a message; exit code 1, and 130 for Ctrl-C."""
    from vllm_jd.compressor.errors import CompressorError
    from vllm_jd.store import StoreError

    try:
        yield
    except (CompressorError, StoreError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        err.print(f"[yellow]{stopped}")
        raise typer.Exit(130) from None


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 1."""
    err.print("[red]error:[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def warn(message: str) -> None:
    """Print a warning."""
    err.print("[yellow]warning:[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, one line for each kind of work."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=err, disable=quiet)
    tasks: dict[str, Any] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bar.start()  # not before: a bar without work leaves an empty line
            tasks[what] = bar.add_task(what)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield update
    finally:
        if tasks:
            bar.stop()


def print_json(value: Any) -> None:
    """Print for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
