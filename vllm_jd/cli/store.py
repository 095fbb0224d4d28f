"""Commands that change a store or tell of it: add, remove, recompress, diff, prune, report."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal as size
from rich.markup import escape

from vllm_jd.cli import screens
from vllm_jd.cli.compress import (
    AdaptersArgument,
    BaseModelOption,
    ConvertOption,
    DeviceOption,
    SameBaseOption,
    Towers,
    TowersOption,
    find_device,
    read_collection,
)
from vllm_jd.cli.console import (
    JsonOption,
    fail,
    out,
    print_json,
    progress,
    user_errors,
)
from vllm_jd.cli.fit import Fit, fit_of
from vllm_jd.cli.method_options import flag, is_given

if TYPE_CHECKING:
    from vllm_jd.store import Store

_STOPPED = "stopped: nothing is lost; the same command goes on from here"
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]
MaxAdapterErrorOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Keep an adapter uncompressed that would lose more than this. [default: as the "
        "store was made]",
    ),
]


def add(
    store: StoreArgument,
    adapters: AdaptersArgument,
    replace: Annotated[
        bool, typer.Option("--replace", help="Adapters of the same names give way.")
    ] = False,
    max_adapter_error: MaxAdapterErrorOption = None,
    base_model: BaseModelOption = None,
    same_base: SameBaseOption = False,
    towers: TowersOption = Towers.KEEP,
    convert: ConvertOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add adapters to a store, with the bases that it has.

    The other adapters do not change by a bit. `recompress` fits the bases anew.
    """
    from vllm_jd.compressor.change.incremental import add as run
    from vllm_jd.store import Store

    with user_errors(), progress(quiet=as_json) as on_progress:
        old = Store.open(store, verify=False).manifest
        collection, _ = read_collection(
            adapters,
            base_model,
            on_progress,
            same_base=same_base,
            towers=towers,
            convert=convert,
            store=old,
        )
        result = run(
            store,
            collection,
            max_adapter_error=max_adapter_error,
            replace=replace,
            on_progress=on_progress,
        )
    indices = [result.index(name) for name in collection.names]
    errors = [float(result.error[i][result.present[i]].double().mean()) for i in indices]
    if as_json:
        added = [{"name": n, "error": e} for n, e in zip(collection.names, errors, strict=True)]
        print_json({"generation": result.generation, "adapters": len(result), "added": added})
        return
    for name, error in zip(collection.names, errors, strict=True):
        out.print(f"added {escape(name)}: error {error:.4g}")
    _tell_generation(result)


def remove(
    store: StoreArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="The adapters.")],
    as_json: JsonOption = False,
) -> None:
    """Remove adapters from a store.

    Their own numbers are in no file of the new generation. Generations before it still have
    them: `prune` deletes these.
    """
    from vllm_jd.compressor.change.incremental import remove as run

    with user_errors():
        result = run(store, names)
    if as_json:
        print_json({"generation": result.generation, "adapters": len(result)})
        return
    _tell_generation(result)


def recompress(
    context: typer.Context,
    store: StoreArgument,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADAPTERS]",
            help="What the new generation shall hold: PEFT adapter folders, folders of them, or "
            "Hugging Face Hub ids or collections. Default: what the store holds and its uploads.",
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Without ADAPTERS: fit the bases anew, instead of projecting uploads onto them.",
        ),
    ] = False,
    originals: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="For --refit: where the adapters lie that the store was made from; once for each.",
        ),
    ] = None,
    max_adapter_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Without ADAPTERS: an upload that would lose more stays as it is. [default: as "
            "the store was made, or else what its worst adapter loses]",
        ),
    ] = None,
    base_model: BaseModelOption = None,
    same_base: SameBaseOption = False,
    towers: TowersOption = Towers.KEEP,
    convert: ConvertOption = False,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. [default: one a core]")
    ] = None,
    nice: Annotated[
        int, typer.Option(min=0, max=19, help="Give way to other processes, 19: to all.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compress a store's uploads into it, or fit its bases anew.

    Without ADAPTERS: uploads that a server has taken in go into a new generation, projected onto
    the bases that it has, but for those that would lose too much; what was deleted goes out of it.
    With ADAPTERS, or --refit: the bases are fitted anew, starting from those that are there. Method
    and settings stay as the store was made. It can be stopped: the same command goes on where it
    was.
    """
    alone = ("refit", "originals", "max_adapter_error")
    given = [flag(name) for name in alone if is_given(context, name)]
    if adapters and given:
        raise typer.BadParameter(f"{', '.join(given)} cannot be given together with ADAPTERS")
    of_adapters = ("base_model", "same_base", "towers", "convert")
    with_them = [flag(name) for name in of_adapters if is_given(context, name)]
    if with_them and not adapters:
        raise typer.BadParameter(f"{', '.join(with_them)} can be given with ADAPTERS only")
    if originals and not refit:
        raise typer.BadParameter("--originals is for --refit")
    if nice:
        os.nice(nice)
    if threads:
        import torch

        torch.set_num_threads(threads)
    if adapters:
        _recompress_all(store, adapters, base_model, device, as_json, same_base, towers, convert)
        return
    from vllm_jd.compressor.change.progress import recording
    from vllm_jd.compressor.change.uploads import bases_digest, take_in
    from vllm_jd.compressor.change.uploads import refit as fit_anew
    from vllm_jd.store import Store

    with user_errors(_STOPPED), progress(quiet=as_json) as bar:
        live = Store.open(store, verify=False)
        with recording(store, refit=refit) as recorder:

            def on_progress(what: str, done: int, total: int) -> None:
                recorder.on_progress(what, done, total)
                bar(what, done, total)

            options = {
                "max_adapter_error": max_adapter_error,
                "on_progress": on_progress,
            }
            if refit:
                device = find_device(device)
                found = fit_anew(store, originals=originals or [], device=device, **options)
            else:
                found = take_in(store, tried=recorder.now.tried(bases_digest(live)), **options)
            recorder.finish(found)
    if as_json:
        print_json(
            {
                "generation": found.store.generation,
                "adapters": len(found.store),
                "compressed": found.compressed,
                "kept": found.kept,
                "refused": found.refused,
                "removed": found.removed,
                "refitted": found.refitted,
            }
        )
        return
    for name, error in found.compressed.items():
        out.print(f"compressed {escape(name)}: error {error:.4g}", soft_wrap=True)
    for name, error in found.kept.items():
        out.print(f"kept as it is {escape(name)}: it would have an error of {error:.4g}")
    for name, reason in found.refused.items():
        out.print(f"kept as it is {escape(name)}: {escape(reason)}", soft_wrap=True)
    for name in found.removed:
        out.print(f"removed {escape(name)}", soft_wrap=True)
    _tell_generation(found.store)


def _recompress_all(
    store: Path,
    adapters: list[str],
    base_model: str | None,
    device: str,
    as_json: bool,
    same_base: bool,
    towers: Towers,
    convert: bool,
) -> None:
    """A generation of these adapters and no others."""
    from vllm_jd.compressor.change.incremental import recompress as run
    from vllm_jd.compressor.report.summary import store_summary
    from vllm_jd.store import Store

    with user_errors(_STOPPED), progress(quiet=as_json) as on_progress:
        old = Store.open(store, verify=False).manifest
        collection, known = read_collection(
            adapters,
            base_model,
            on_progress,
            same_base=same_base,
            towers=towers,
            convert=convert,
            store=old,
        )
        result = run(
            store,
            collection,
            base_model=known if base_model else None,
            device=find_device(device),
            on_progress=on_progress,
        )
    summary = store_summary(result)
    if as_json:
        print_json({key: value for key, value in summary.items() if key != "adapters"})
        return
    screens.print_overview(out, summary)


def diff(
    store: StoreArgument,
    old: Annotated[
        int | None, typer.Argument(help="Generation. [default: the one before NEW]")
    ] = None,
    new: Annotated[int | None, typer.Argument(help="Generation. [default: the live one]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two generations of a store."""
    from vllm_jd.compressor.change.diff import diff as run
    from vllm_jd.store.generations import generations_on_disk, open_number

    with user_errors():
        found = generations_on_disk(store)
        after = found[-1] if new is None else new
        before = max((g for g in found if g < after), default=None) if old is None else old
        if before is None:
            fail(f"{store}: no generation before {after} is on disk to compare it with")
        result = run(
            open_number(store, before, verify=False), open_number(store, after, verify=False)
        )
    if as_json:
        print_json(result)
        return
    screens.print_diff(out, result)


def prune(
    store: StoreArgument,
    keep: Annotated[
        int, typer.Option(min=0, help="Old generations to keep beside the live one.")
    ] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Delete also generations that somebody reads.")
    ] = False,
    originals: Annotated[
        bool,
        typer.Option(
            "--originals",
            help="Delete also uploads that are compressed by now: `recompress --refit` needs them.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete old generations of a store, but not those that a server or another process reads, and
    uploads that no name stands for any more.

    With --force these go as well: who reads them goes on, but cannot start again on them.
    """
    from vllm_jd.compressor.change.uploads import drop_refit
    from vllm_jd.store.generations import prune as run
    from vllm_jd.store.settling import settle

    with user_errors():
        done = run(store, keep, force=force)
        drop_refit(store)
        settled = settle(store, originals=originals)
    if as_json:
        held = [{"generation": number, "pids": pids} for number, pids in done.held.items()]
        uploads = {"deleted": settled.uploads, "bytes": settled.bytes, "held": settled.held}
        print_json({"deleted": done.deleted, "held": held, "uploads": uploads})
        return
    out.print(f"deleted generations: {', '.join(map(str, done.deleted)) or 'none'}")
    for number, pids in done.held.items():
        who = f"process {', '.join(map(str, pids))}" if pids else "somebody else"
        what = "was read" if force else "kept: it is read"
        hint = "" if force else "; --force deletes it all the same"
        out.print(f"generation {number} {what} by {who}{hint}", soft_wrap=True)
    if settled.uploads:
        out.print(f"deleted {settled.uploads:,} uploads, {size(settled.bytes)}")
    if settled.held:
        out.print(f"uploads kept: {escape(settled.held)}", soft_wrap=True)


def rollback(
    store: StoreArgument,
    generation: Annotated[
        int | None, typer.Argument(help="Generation. [default: the one before the live one]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make what an older generation holds the live generation again.

    Under a new number, with the old files. What names stand for by an upload stays as it is.
    A server that serves the store follows.
    """
    from vllm_jd.store.generations import revert

    with user_errors():
        result = revert(store, generation)
    if as_json:
        print_json({"generation": result.generation, "adapters": len(result)})
        return
    _tell_generation(result)


def report(
    store: StoreArgument,
    file: Annotated[Path, typer.Option("--out", metavar="HTML", help="The page to write.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            metavar="ADAPTERS",
            help="The adapters that went into the store: adds their spectra, and bounds on what "
            "the rank could reach.",
        ),
    ] = None,
) -> None:
    """Write a page of figures about a store: errors, clusters, bytes."""
    from vllm_jd.compressor.report.report import write_report
    from vllm_jd.compressor.report.report_data import collect
    from vllm_jd.store import Store

    with user_errors(), progress(quiet=False) as on_progress:
        opened = Store.open(store)
        extra = None
        if adapters:
            collection, _ = read_collection(
                adapters,
                None,
                on_progress,
                store=opened.manifest,
            )
            extra = collect(collection, opened, on_progress)
        written = write_report(opened, file, extra=extra)
    out.print(f"wrote {escape(str(written[0]))} and {len(written) - 1} figures", soft_wrap=True)


def inspect(
    store: StoreArgument,
    name: Annotated[str | None, typer.Argument(help="One adapter, module by module.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a store: adapters, clusters, errors, bytes before and after."""
    from vllm_jd.compressor.report.summary import adapter_summary, store_summary
    from vllm_jd.store import Store

    result: dict[str, Any]
    with user_errors():
        opened = Store.open(store, verify=False)
        if name is not None and name not in opened:
            fail(f"{store}: {opened.unknown(name)}")
        result = store_summary(opened) if name is None else adapter_summary(opened, name)
    if as_json:
        print_json(result)
    elif name is not None:
        screens.print_adapter(out, result)
    else:
        screens.print_overview(out, result)
        screens.print_modules(out, result)
        screens.print_adapters(out, result)


def verify(
    store: StoreArgument,
    base_model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Check also that this base model (its folder) can be served with the store.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a store's live generation against its hashes, shapes and types.

    Modules that `vllm-jd serve` would refuse are named; they are an error if --base-model is
    given, as another server may have use for them.
    """
    from vllm_jd.store import Store, StoreError

    try:
        opened = Store.open(store)
        fit = _fit(opened, base_model)
        if base_model is not None and fit.refused:
            raise StoreError(f"{base_model} cannot be served with it: {'; '.join(fit.refused)}")
    except StoreError as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
            raise typer.Exit(1) from None
        fail(str(error))
    if as_json:
        print_json(
            {
                "ok": True,
                "generation": opened.generation,
                "adapters": len(opened),
                "files": len(opened.manifest.files) + 1,
                "bytes": opened.stored_bytes,
                "unserved": fit.refused + fit.doubtful,
            }
        )
        return
    out.print(
        f"[green]ok[/] generation {opened.generation}: {len(opened):,} adapters, "
        f"{len(opened.manifest.files) + 1} files, {size(opened.stored_bytes)}"
    )
    fit.tell(out)


def export(
    store: StoreArgument,
    folder: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The folder to write: of the one adapter, or of the folders of several.",
        ),
    ],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="The adapters.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every adapter of the store.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write adapters of a store as PEFT adapters, equal to what the store serves.

    One NAME is written into DIR itself; several, or --all, each into a folder of its name in DIR.
    Stopped, the same command goes on where it was. An adapter that is there already from the same
    generation is kept; anything else that is in the way is refused before a file is written.
    """
    from vllm_jd.compressor.change.export import Exported, export_adapter, export_adapters
    from vllm_jd.store import Store

    if every == bool(names):
        raise typer.BadParameter("expected the names of adapters, or --all, and not both")
    stopped = "stopped: what is written is complete; the same command goes on from here"
    with user_errors(stopped), progress(quiet=as_json) as on_progress:
        opened = Store.open(store)
        chosen = opened.names if every else list(names or ())
        missing = [name for name in chosen if name not in opened]
        if missing:
            fail("\n".join(f"{store}: {opened.unknown(name)}" for name in missing))
        try:
            if len(chosen) == 1 and not every:
                done = [Exported(chosen[0], export_adapter(opened, chosen[0], folder), True)]
            else:
                done = export_adapters(
                    opened,
                    chosen,
                    folder,
                    on_progress=lambda n, total: on_progress("exporting adapters", n, total),
                )
        except OSError as error:
            fail(str(error))
    if as_json:
        adapters = [{"name": e.name, "folder": str(e.folder), "written": e.written} for e in done]
        print_json({"generation": opened.generation, "adapters": adapters})
        return
    if len(done) == 1:
        out.print(f"wrote {escape(str(done[0].folder))}", soft_wrap=True)
        return
    written = sum(each.written for each in done)
    kept = f"; {len(done) - written:,} were there already" if written < len(done) else ""
    out.print(f"wrote {written:,} adapters to {escape(str(folder))}{kept}", soft_wrap=True)


def _fit(store: "Store", base_model: Path | None) -> Fit:
    """How a store suits its base model: one in a folder, or what it recorded of it.

    Raises:
        StoreError: the folder holds no model, or another one.
    """
    from vllm_jd.compressor.read.base_layers import read_config
    from vllm_jd.store import check_base_model, read_base_model

    recorded = store.manifest.base_model
    if base_model is None:
        return fit_of(store, recorded.config)
    served = read_base_model(base_model)
    # By its config alone: a folder may have any name.
    check_base_model(recorded, str(base_model), served.config, alias=recorded.name)
    return fit_of(store, read_config(base_model))


def _tell_generation(store: "Store") -> None:
    out.print(f"generation {store.generation}: {len(store):,} adapters")
