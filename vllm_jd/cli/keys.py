"""`vllm-jd keys`: the file of API keys of `vllm-jd serve --api-keys`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vllm_jd.cli.compress import parse_size
from vllm_jd.cli.console import JsonOption, err, fail, out, print_json

if TYPE_CHECKING:
    from vllm_jd.serve.tenants.keys import Key

app = typer.Typer(
    name="keys",
    help="Make, list and remove the API keys of a server; one that runs follows within a second.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="Of `vllm-jd serve --api-keys FILE`.")
]


@app.command()
def add(
    file: FileArgument,
    name: Annotated[str, typer.Argument(help="What the key is called in listings and messages.")],
    tenant: Annotated[
        str | None,
        typer.Option(help="Whose it is. What is uploaded with it is called TENANT/…"),
    ] = None,
    right: Annotated[
        list[str] | None,
        typer.Option(
            metavar="use|upload|metrics|admin",
            help="What it may: use adapters, upload the tenant's own, read /metrics, or admin: "
            "all of the server. Once for each. Default: use.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Adapters that it may use beside the tenant's own; once for each. * stops at a /, "
            "** does not. Default: *.",
        ),
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests that are being answered at a time.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers.")
    ] = None,
    max_adapters: Annotated[
        int | None, typer.Option(min=0, help="Adapters in the tenant's name space.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Of the weights of all adapters in the tenant's name space, such as 10GB.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key, add it to FILE, and print it: the file has only its hash."""
    from vllm_jd.serve.tenants.keys import KeyFileError, Limits, add_key

    fields: dict[str, Any] = {"name": name, "tenant": tenant}
    if right:
        fields["rights"] = right
    if adapters is not None:
        fields["adapters"] = adapters
    limits = Limits(
        requests=max_requests,
        tokens_per_minute=tokens_per_minute,
        adapters=max_adapters,
        bytes=max_bytes,
    )
    try:
        text, key = add_key(file, limits=limits, **fields)
    except KeyFileError as error:
        fail(str(error))
    if as_json:
        print_json({"key": text, **_told(key)})
    else:
        typer.echo(text)
        err.print("It is shown this once: keep it.", highlight=False)


@app.command("list")
def list_keys(file: FileArgument, as_json: JsonOption = False) -> None:
    """List the keys of FILE."""
    from vllm_jd.serve.tenants.keys import KeyFileError, read_keys

    try:
        keys = read_keys(file).keys
    except KeyFileError as error:
        fail(str(error))
    if as_json:
        print_json([_told(key) for key in keys])
        return
    table = Table(box=None)
    for column in ("name", "tenant", "rights", "adapters", "limits", "made"):
        table.add_column(column, overflow="fold")
    for key in keys:
        limits = key.limits.model_dump(exclude_none=True)
        table.add_row(
            key.name,
            key.tenant or "",
            ", ".join(sorted(key.rights)),
            ", ".join(key.adapters),
            ", ".join(f"{what} {most:,}" for what, most in limits.items()),
            time.strftime("%Y-%m-%d", time.gmtime(key.created_at)) if key.created_at else "",
        )
    out.print(table, markup=False, highlight=False)


@app.command()
def remove(file: FileArgument, name: str) -> None:
    """Take a key out of FILE: it is refused from then on."""
    from vllm_jd.serve.tenants.keys import KeyFileError, remove_key

    try:
        remove_key(file, name)
    except KeyFileError as error:
        fail(str(error))


def _told(key: "Key") -> dict[str, Any]:
    """All but the hash."""
    return key.model_dump(mode="json", exclude={"sha256"})
