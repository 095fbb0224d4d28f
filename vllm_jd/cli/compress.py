"""`vllm-jd compress` and `vllm-jd plan`."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal as size
from rich.markup import escape

from vllm_jd.cli import screens
from vllm_jd.cli.console import (
    JsonOption,
    err,
    fail,
    out,
    print_json,
    progress,
    user_errors,
    warn,
)
from vllm_jd.cli.fit import Fit, base_folder, fit_of
from vllm_jd.cli.method_options import flag, given_options, is_given

if TYPE_CHECKING:
    from vllm_jd.compressor import PeftCollection, Settings
    from vllm_jd.compressor.choose.plan import Candidate
    from vllm_jd.store import BaseModelInfo, Store
    from vllm_jd.store.manifest import Manifest


class Towers(StrEnum):
    """`--towers`."""

    KEEP = "keep"
    LEAVE_OUT = "leave-out"
    REFUSE = "refuse"


class StoreDtype(StrEnum):
    """`--store-dtype`."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"
    INT4 = "int4"


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes, as people write them: 256MB, 1.5 GiB, 4096."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(|k|m|g|ki|mi|gi)b?\s*", str(text).lower())
    try:
        return int(float(match[1]) * _UNITS[match[2]])  # type: ignore[index]
    except (TypeError, ValueError):
        raise typer.BadParameter(
            f"{text!r} is no size; expected a number of bytes, such as 256MB or 1.5GiB"
        ) from None


AdaptersArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTERS",
        help="PEFT adapter folders, folders of them, NAME=FOLDER, or Hugging Face Hub ids or "
        "collections.",
    ),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The adapters' base model: its folder (its config is recorded, and checked "
        "when the store is served) or its name.",
    ),
]
SameBaseOption = Annotated[
    bool,
    typer.Option(
        "--same-base",
        help="Whatever the adapters call their base model, it is the one of --base-model. Their "
        "layers must have its shapes; the names are recorded.",
    ),
]
TowersOption = Annotated[
    Towers,
    typer.Option(
        help="What to do with modules of vision and audio towers, which `vllm-jd serve` cannot "
        "serve: keep them for other servers, leave them out, or refuse such adapters."
    ),
]
ConvertOption = Annotated[
    bool,
    typer.Option(
        "--convert",
        help="Make plain LoRA adapters, of twice the rank, of PiSSA and OLoRA ones, which changed "
        "the base model's weights. Needs --base-model with its folder.",
    ),
]
StoreDtypeOption = Annotated[
    StoreDtype,
    typer.Option(
        help="Type of the stored numbers; int8 and int4 have scales. A target chooses among "
        "bfloat16, int8 and int4 if it is left out."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of every random choice.")]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, …", metavar="DEVICE")
]

_TARGET = {"rich_help_panel": "Targets: let the settings be chosen"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_SHOWN = 8  # adapters on a command line that is shown


def compress(
    context: typer.Context,
    adapters: AdaptersArgument,
    store: Annotated[Path, typer.Option("--out", metavar="STORE", help="The store to write.")],
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="The smallest store that should keep 0.99 of the quality.", **_TARGET
        ),
    ] = False,
    target_quality: Annotated[
        float | None,
        typer.Option(
            help="The smallest store that should keep this share of LoRA's Rouge-L.", **_TARGET
        ),
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(
            min=0, help="The smallest store of at most this relative squared error.", **_TARGET
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="The least error within this size, such as 256MB.",
            **_TARGET,
        ),
    ] = None,
    max_adapter_error: Annotated[
        float | None,
        typer.Option(
            min=0, help="Keep an adapter uncompressed that would lose more than this.", **_TARGET
        ),
    ] = None,
    store_dtype: StoreDtypeOption = StoreDtype.BFLOAT16,
    base_model: BaseModelOption = None,
    same_base: SameBaseOption = False,
    towers: TowersOption = Towers.KEEP,
    convert: ConvertOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Spread the modules over a Ray cluster: its address, or auto.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="HTML", help="Write a report with figures.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compress adapters of one base model into a store.

    It can be stopped at any time: the same command goes on where it was.
    A store that is there already stays as it is until the new one is complete.
    """
    from vllm_jd.compressor.choose.quality import AUTO_QUALITY
    from vllm_jd.compressor.choose.targets import compress_to_target
    from vllm_jd.compressor.read.base_layers import read_config
    from vllm_jd.compressor.report.summary import store_summary
    from vllm_jd.compressor.run.compress import compress as run

    if auto and target_quality is None and target_error is None:
        target_quality = AUTO_QUALITY
    target_error = _error_wanted(target_error, target_quality)
    wanted = auto or target_error is not None or max_bytes is not None
    settings = _settings(
        given_options(context),
        to_target=wanted,
        seed=seed,
        store_dtype=store_dtype.value,
        max_adapter_error=max_adapter_error,
    )
    stopped = "stopped: nothing is lost; the same command goes on from here"
    with user_errors(stopped), progress(quiet=as_json) as on_progress:
        collection, known = read_collection(
            adapters, base_model, on_progress, same_base=same_base, towers=towers, convert=convert
        )
        _check_settings(settings, collection)
        options: dict[str, Any] = {
            "base_model": known,
            "device": find_device(device),
            "on_progress": on_progress,
        }
        if ray is not None:
            if device not in ("auto", "cpu"):
                raise typer.BadParameter(f"--ray computes on CPUs, but --device is {device}")
            options["device"] = "cpu"
            from vllm_jd.compressor.run.ray_map import ray_map

            options["module_map"] = ray_map(ray)
        if wanted:
            result, _ = compress_to_target(
                collection,
                store,
                settings,
                target_error=target_error,
                max_bytes=max_bytes,
                methods=[settings.method] if "method" in given_options(context) else None,
                dtypes=_dtypes(context),
                on_choice=lambda candidate: _tell_choice(candidate, quiet=as_json),
                **options,
            )
        else:
            result = run(collection, store, settings, **options)
        figures = _report(result, collection, report, on_progress)
        folder = base_folder(base_model, collection.base_model)
        fit = fit_of(result, read_config(folder) if folder else {})
    summary = store_summary(result)
    if as_json:
        facts = {key: value for key, value in summary.items() if key != "adapters"}
        print_json(facts | {"unserved": fit.refused + fit.doubtful})
        return
    screens.print_overview(out, summary)
    _tell_how_to_serve(store, base_model or collection.base_model, result.names, fit)
    if figures:
        out.print(f"Report:    {escape(str(figures))}", soft_wrap=True)


def plan(
    context: typer.Context,
    adapters: AdaptersArgument,
    figure: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the trade-off.")] = None,
    target_quality: Annotated[
        float | None,
        typer.Option(help="Mark the smallest that should keep this share of LoRA's Rouge-L."),
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(min=0, help="Mark the smallest store of at most this error.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Leave out larger ones."),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show also settings that others beat on both counts.")
    ] = False,
    store_dtype: StoreDtypeOption = StoreDtype.BFLOAT16,
    base_model: BaseModelOption = None,
    same_base: SameBaseOption = False,
    towers: TowersOption = Towers.KEEP,
    convert: ConvertOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show what different settings would cost and lose, without writing a store.

    Errors are estimated from a few modules. `compress --auto`, `--target-quality`,
    `--target-error` and `--max-bytes` choose from the same table.
    """
    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.choose.plan import choose
    from vllm_jd.compressor.choose.plan import plan as run
    from vllm_jd.compressor.choose.quality import AUTO_QUALITY, expected_quality

    if target_quality is None and target_error is None:
        target_quality = AUTO_QUALITY
    target = _error_wanted(target_error, target_quality)
    assert target is not None
    with user_errors(), progress(quiet=as_json) as on_progress:
        collection, _ = read_collection(
            adapters, base_model, on_progress, same_base=same_base, towers=towers, convert=convert
        )
        base = Settings(store_dtype=store_dtype.value, seed=seed)
        _check_settings(base, collection)
        candidates = run(
            collection,
            base=base,
            dtypes=_dtypes(context),
            on_progress=on_progress,
        )
        if max_bytes is not None:
            candidates = [c for c in candidates if c.bytes <= max_bytes]
        chosen = next(iter(choose(candidates, target_error=target)), None)
        if figure is not None:
            from vllm_jd.compressor.choose.plan_figure import draw_plan

            draw_plan(candidates, figure, target=target, chosen=chosen)
    if as_json:
        print_json(
            {
                "adapters": len(collection.names),
                "adapter_bytes": sum(collection.source_bytes),
                "target_quality": target_quality,
                "target_error": target,
                "chosen": None if chosen is None else candidates.index(chosen),
                "candidates": [
                    {
                        **{"label": c.label, **asdict(c), "settings": c.settings.as_dict()},
                        "expected": (kept := expected_quality(c.error)) and asdict(kept),
                    }
                    for c in candidates
                ],
            }
        )
        return
    screens.print_plan(
        out,
        candidates,
        source_bytes=sum(collection.source_bytes),
        target=target,
        chosen=chosen,
        show_all=show_all,
        quality=target_quality,
        command=_compress_command(context, adapters, target, target_quality),
    )
    if figure is not None:
        out.print(f"Figure: {escape(str(figure))}", soft_wrap=True)


def read_collection(
    adapters: list[str],
    base_model: str | None,
    on_progress: Any,
    *,
    same_base: bool = False,
    towers: Towers = Towers.KEEP,
    convert: bool = False,
    store: "Manifest | None" = None,
) -> tuple["PeftCollection", "BaseModelInfo | None"]:
    """The adapters of the command line, and what is known of their base model.

    `store`: that which they are added to or were made into; its base model and the names of its
    layers are theirs.
    """
    from vllm_jd.compressor import read_adapters
    from vllm_jd.compressor.read.base_layers import read_config
    from vllm_jd.demo.smollm2 import default_cache_dir
    from vllm_jd.store import BaseModelInfo, read_base_model

    known = None
    folder = None if base_model is None or not Path(base_model).is_dir() else Path(base_model)
    if convert and folder is None:
        raise typer.BadParameter("--convert needs --base-model with the base model's folder")
    if same_base and base_model is None and store is None:
        raise typer.BadParameter("--same-base needs --base-model, the name that the store has")
    if base_model is not None:
        known = BaseModelInfo(name=base_model) if folder is None else read_base_model(folder)
    name = known.name if known else None
    if store is not None:
        name = name or store.base_model.name
    collection = read_adapters(
        adapters,
        base_model=name,
        base_config=read_config(folder) if folder else store and store.base_model.config,
        base_folder=folder,
        base_names=[] if store is None else store.base_model.names,
        same_base=same_base,
        towers=towers.value,
        convert=convert,
        convert_cache=default_cache_dir() / "initial",
        modules=[] if store is None else [module.name for module in store.modules],
        on_fetch=lambda done, total: on_progress("fetching adapters", done, total),
        on_skip=lambda text: err.print(f"[yellow]skipped:[/] {escape(text)}", soft_wrap=True),
        on_note=warn,
        on_progress=lambda done, total: on_progress("checking adapters", done, total),
        on_convert=lambda done, total: on_progress("converting adapters", done, total),
    )
    if known is None and (Path(collection.base_model) / "config.json").is_file():
        known = read_base_model(Path(collection.base_model))
    return collection, known


def _settings(given: dict[str, Any], *, to_target: bool, **common: Any) -> "Settings":
    """The settings of the command line; what the method has not is wrong usage.

    `given` is `--method` and its options. With a target, some are chosen: none of those may be
    given beside it.
    """
    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.choose.plan import CHOSEN, PLANNED
    from vllm_jd.compressor.errors import SettingsError
    from vllm_jd.compressor.methods.registry import find_method
    from vllm_jd.compressor.settings import DEFAULT_METHOD

    method = str(given.get("method", DEFAULT_METHOD))
    options = {name: value for name, value in given.items() if name != "method"}
    targets = "--auto, --target-quality, --target-error or --max-bytes"
    if to_target and method not in PLANNED:
        raise typer.BadParameter(
            f"--method {method} cannot be given together with {targets}, which choose among "
            f"{', '.join(PLANNED)}"
        )
    if to_target and (chosen := [flag(name) for name in CHOSEN if name in options]):
        raise typer.BadParameter(
            f"{', '.join(chosen)} cannot be given together with {targets}, which choose it"
        )
    try:
        find_method(method).refuse_unknown(options, flag)
        return Settings(method, **options, **common)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from None


def _check_settings(settings: "Settings", collection: "PeftCollection") -> None:
    """Refuse what the method cannot do, or the collection has no room for."""
    from vllm_jd.compressor.errors import SettingsError
    from vllm_jd.compressor.run.experts import check_experts

    try:
        check_experts(collection, settings)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from None
    n = len(collection.names)
    if settings.method == "hydraopt" and settings.matrices > n:
        raise typer.BadParameter(f"--matrices is {settings.matrices}, but there are {n} adapters")


def find_device(name: str) -> str:
    """A device that torch has; auto: a GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}; auto and cpu always work")
    return name


def _error_wanted(error: float | None, quality: float | None) -> float | None:
    """The error that a target stands for, if there is one."""
    from vllm_jd.compressor.choose.quality import error_for
    from vllm_jd.compressor.errors import SettingsError

    if quality is None:
        return error
    if error is not None:
        raise typer.BadParameter("--target-quality and --target-error cannot be given together")
    try:
        return error_for(quality)
    except SettingsError as wrong:
        raise typer.BadParameter(f"--target-quality: {wrong}") from None


def _dtypes(context: typer.Context) -> Sequence[str]:
    """Among which a target chooses."""
    from vllm_jd.compressor.choose.plan import DTYPES

    return (context.params["store_dtype"].value,) if is_given(context, "store_dtype") else DTYPES


def _compress_command(
    context: typer.Context, adapters: list[str], error: float, quality: float | None
) -> str:
    """The `compress` that makes what `plan` chose; STORE is what to put in."""
    words = ["vllm-jd", "compress", *(adapters if len(adapters) <= _SHOWN else ["ADAPTERS"])]
    words += ["--out", "STORE"]
    if quality is None:
        words += ["--target-error", f"{error:g}"]
    else:
        words += ["--target-quality", f"{quality:g}"]
    for name in ("max_bytes", "store_dtype", "base_model", "seed"):
        if is_given(context, name):
            value = context.params[name]
            words += [flag(name), str(getattr(value, "value", value))]
    words += [flag(name) for name in ("same_base", "convert") if context.params[name]]
    return shlex.join(words)


def _tell_choice(candidate: "Candidate", *, quiet: bool) -> None:
    if not quiet:
        out.print(
            f"trying [bold]{escape(candidate.label)}[/]: about {size(candidate.bytes)}, "
            f"error {candidate.error:.3f}"
        )


def _tell_how_to_serve(store: Path, base_model: str, names: list[str], fit: Fit) -> None:
    """A command that runs as it stands, or says what to put in; or why none would."""
    fit.tell(out)
    if fit.refused:
        return
    # A bare name may be anybody's folder; vLLM takes folders and Hub ids.
    known = base_folder(None, base_model) or _HUB_ID.fullmatch(base_model)
    model = base_model if known else "BASE"
    words = ["vllm-jd", "serve", str(store), "--model", model]
    if known and model in names:  # both are models of the server
        words += ["--served-model-name", f"{model}-base"]
    out.print(f"Serve it:  [bold]{escape(shlex.join(words))}", soft_wrap=True, highlight=False)
    if not known:
        what = "the adapters' base model" if base_model == "unknown" else base_model
        out.print(f"           BASE: the folder or Hub id of {escape(what)}", soft_wrap=True)


def _report(
    store: "Store", collection: "PeftCollection", file: Path | None, on_progress: Any
) -> Path | None:
    if file is None:
        return None
    from vllm_jd.compressor.report.report import write_report
    from vllm_jd.compressor.report.report_data import collect

    write_report(store, file, extra=collect(collection, store, on_progress))
    return file
