"""`vllm-jd compress` and `vllm-jd plan`."""

import re
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal as size
from rich.markup import escape

from vllm_jd.cli import screens
from vllm_jd.cli.console import JsonOption, err, fail, out, print_json, progress, user_errors

if TYPE_CHECKING:
    from vllm_jd.compressor import PeftCollection
    from vllm_jd.compressor.calibrate.moments import Moments
    from vllm_jd.compressor.choose.plan import Candidate
    from vllm_jd.store import BaseModelInfo, Store


class Method(StrEnum):
    """`--method`; `vllm_jd.compressor.methods.registry` must know them all."""

    JD_FULL = "jd-full"
    JD_DIAG = "jd-diag"
    SVD = "svd"
    HYDRAOPT = "hydraopt"
    TIES = "ties"
    TASK_ARITHMETIC = "task-arithmetic"
    DARE = "dare"
    DARE_TIES = "dare-ties"
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


class Allocation(StrEnum):
    """`--rank-allocation`."""

    UNIFORM = "uniform"
    SPECTRUM = "spectrum"


class Sign(StrEnum):
    """`--majority-sign`."""

    TOTAL = "total"
    FREQUENCY = "frequency"


class Distance(StrEnum):
    """`--distance`."""

    MAE = "mae"
    FROBENIUS = "frobenius"


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
        help="PEFT adapter folders, folders of them, or Hugging Face Hub ids or collections.",
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
StoreDtypeOption = Annotated[
    StoreDtype, typer.Option(help="Type of the stored numbers; int8 and int4 have scales.")
]
CalibrateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PROMPTS",
        help="Weigh errors by the inputs that the base model's layers see on these prompts (.txt, "
        ".jsonl), or by moments measured before (.safetensors). Needs --base-model.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of every random choice.")]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, …", metavar="DEVICE")
]

_TARGET = {"rich_help_panel": "Targets: let the settings be chosen"}
_METHOD = {"rich_help_panel": "Method"}
_MERGE = {"rich_help_panel": "Merges and HydraOpt"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_SHOWN = 8  # adapters on a command line that is shown
_KNOBS = ("rank", "clusters", "residual_rank", "mean_rank", "matrices")


def compress(
    context: typer.Context,
    adapters: AdaptersArgument,
    store: Annotated[Path, typer.Option("--out", metavar="STORE", help="The store to write.")],
    auto: Annotated[
        bool,
        typer.Option("--auto", help="The smallest store that should keep the quality.", **_TARGET),
    ] = False,
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
    method: Annotated[Method, typer.Option(help="How to compress.", **_METHOD)] = Method.JD_FULL,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the bases.", **_METHOD)] = 16,
    clusters: Annotated[
        int, typer.Option(min=1, help="Groups of adapters; each has bases of its own.", **_METHOD)
    ] = 1,
    cluster_scope: Annotated[
        Scope,
        typer.Option(help="One cluster for all modules of an adapter, or one a module.", **_METHOD),
    ] = Scope.ADAPTER,
    iterations: Annotated[
        int, typer.Option(min=1, help="Most updates of the bases.", **_METHOD)
    ] = 10,
    solver: Annotated[
        Solver,
        typer.Option(help="Top eigenvectors in turn, or power steps (paper, A.1, A.2).", **_METHOD),
    ] = Solver.ALTERNATING,
    rank_allocation: Annotated[
        Allocation,
        typer.Option(
            help="The same rank everywhere, or where it helps most, at the same bytes.", **_METHOD
        ),
    ] = Allocation.UNIFORM,
    residual_rank: Annotated[
        int, typer.Option(min=0, help="Rank of a private part of each adapter.", **_METHOD)
    ] = 0,
    mean_rank: Annotated[
        int, typer.Option(min=0, help="Rank of a mean adapter that all share.", **_METHOD)
    ] = 0,
    matrices: Annotated[
        int, typer.Option(min=1, help="HydraOpt's M: matrices B to choose from.", **_MERGE)
    ] = 1,
    temperature: Annotated[
        float, typer.Option(min=1e-6, help="Of HydraOpt's softmax.", **_MERGE)
    ] = 0.1,
    distance: Annotated[
        Distance, typer.Option(help="What HydraOpt minimises.", **_MERGE)
    ] = Distance.MAE,
    steps: Annotated[int, typer.Option(min=1, help="Of HydraOpt's optimiser.", **_MERGE)] = 200,
    density: Annotated[
        float,
        typer.Option(
            min=1e-6, max=1, help="Part of the numbers that TIES and DARE keep.", **_MERGE
        ),
    ] = 0.5,
    majority_sign: Annotated[
        Sign, typer.Option(help="How TIES elects signs.", **_MERGE)
    ] = Sign.TOTAL,
    merge_weight: Annotated[
        float | None,
        typer.Option(
            help="PEFT's weight of each adapter in a merge. [default: equal adapters merge to "
            "themselves]",
            **_MERGE,
        ),
    ] = None,
    store_dtype: StoreDtypeOption = StoreDtype.BFLOAT16,
    calibrate: CalibrateOption = None,
    base_model: BaseModelOption = None,
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
    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.choose.plan import AUTO_ERROR
    from vllm_jd.compressor.choose.targets import compress_to_target
    from vllm_jd.compressor.report.summary import store_summary
    from vllm_jd.compressor.run.compress import compress as run

    wanted = auto or target_error is not None or max_bytes is not None
    if auto and target_error is None:
        target_error = AUTO_ERROR
    if wanted:
        _refuse_knobs(context)
    settings = Settings(
        method=method.value,
        rank=rank,
        clusters=clusters,
        cluster_scope=cluster_scope.value,
        iterations=iterations,
        solver=solver.value,
        rank_allocation=rank_allocation.value,
        residual_rank=residual_rank,
        mean_rank=mean_rank,
        merge_weight=merge_weight,
        density=density,
        majority_sign=majority_sign.value,
        matrices=matrices,
        temperature=temperature,
        distance=distance.value,
        steps=steps,
        seed=seed,
        store_dtype=store_dtype.value,
        max_adapter_error=max_adapter_error,
    )
    stopped = "stopped: nothing is lost; the same command goes on from here"
    with user_errors(stopped), progress(quiet=as_json) as on_progress:
        collection, known = read_collection(adapters, base_model, on_progress)
        _check_settings(settings, collection, calibrated=calibrate is not None)
        options: dict[str, Any] = {
            "base_model": known,
            "metrics": find_moments(calibrate, base_model, collection, on_progress),
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
                methods=[method.value] if _given(context, "method") else None,
                on_choice=lambda candidate: _tell_choice(candidate, quiet=as_json),
                **options,
            )
        else:
            result = run(collection, store, settings, **options)
        figures = _report(result, collection, report, on_progress)
    summary = store_summary(result)
    if as_json:
        print_json({key: value for key, value in summary.items() if key != "adapters"})
        return
    screens.print_overview(out, summary)
    _tell_serve(store, base_model or collection.base_model)
    if figures:
        out.print(f"Report:    {escape(str(figures))}", soft_wrap=True)


def plan(
    context: typer.Context,
    adapters: AdaptersArgument,
    figure: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the trade-off.")] = None,
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
    calibrate: CalibrateOption = None,
    base_model: BaseModelOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show what different settings would cost and lose, without writing a store.

    Errors are estimated from a few modules. `compress --auto`, `--target-error` and
    `--max-bytes` choose from the same table.
    """
    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.choose.plan import AUTO_ERROR, choose
    from vllm_jd.compressor.choose.plan import plan as run

    with user_errors(), progress(quiet=as_json) as on_progress:
        collection, _ = read_collection(adapters, base_model, on_progress)
        candidates = run(
            collection,
            base=Settings(store_dtype=store_dtype.value, seed=seed),
            metrics=find_moments(calibrate, base_model, collection, on_progress),
            on_progress=on_progress,
        )
        if max_bytes is not None:
            candidates = [c for c in candidates if c.bytes <= max_bytes]
        target = AUTO_ERROR if target_error is None else target_error
        chosen = next(iter(choose(candidates, target_error=target)), None)
        if figure is not None:
            from vllm_jd.compressor.choose.plan_figure import draw_plan

            draw_plan(candidates, figure, target=target, chosen=chosen)
    if as_json:
        print_json(
            {
                "adapters": len(collection.names),
                "adapter_bytes": sum(collection.source_bytes),
                "target_error": target,
                "chosen": None if chosen is None else candidates.index(chosen),
                "candidates": [
                    {"label": c.label, **asdict(c), "settings": asdict(c.settings)}
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
        command=_compress_command(context, adapters, target),
    )
    if figure is not None:
        out.print(f"Figure: {escape(str(figure))}", soft_wrap=True)


def read_collection(
    adapters: list[str], base_model: str | None, on_progress: Any
) -> tuple["PeftCollection", "BaseModelInfo | None"]:
    """The adapters of the command line, and what is known of their base model."""
    from vllm_jd.compressor import read_adapters
    from vllm_jd.store import BaseModelInfo, read_base_model

    known = None
    if base_model is not None:
        folder = Path(base_model)
        known = read_base_model(folder) if folder.is_dir() else BaseModelInfo(name=base_model)
    collection = read_adapters(
        adapters,
        base_model=known.name if known else None,
        base_config=known.config if known else None,
        on_fetch=lambda done, total: on_progress("fetching adapters", done, total),
        on_skip=lambda text: err.print(f"[yellow]skipped:[/] {escape(text)}", soft_wrap=True),
        on_progress=lambda done, total: on_progress("checking adapters", done, total),
    )
    if known is None and (Path(collection.base_model) / "config.json").is_file():
        known = read_base_model(Path(collection.base_model))
    return collection, known


def _given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse_knobs(context: typer.Context) -> None:
    """With a target, settings are chosen: none may be given beside it."""
    given = [f"--{name.replace('_', '-')}" for name in _KNOBS if _given(context, name)]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)} cannot be given together with --auto, --target-error or "
            "--max-bytes, which choose it"
        )


def _check_settings(settings: Any, collection: "PeftCollection", *, calibrated: bool) -> None:
    """Refuse what the method does not have, or the collection has no room for."""
    from vllm_jd.compressor.methods.registry import METHODS

    method = METHODS[settings.method]
    for name in ("residual_rank", "mean_rank"):
        if getattr(settings, name) and name not in method.options:
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is of methods with shared bases (jd-full, jd-diag), "
                f"not of {settings.method}"
            )
    if settings.clusters > 1 and not method.clustered:
        raise typer.BadParameter(
            f"--clusters is of methods with clusters (jd-full, jd-diag), not of {settings.method}"
        )
    if settings.rank_allocation != "uniform" and "rank_allocation" not in method.options:
        raise typer.BadParameter(f"--rank-allocation: {settings.method} has no ranks to allocate")
    if calibrated and "merge_weight" in method.options:
        raise typer.BadParameter(
            f"--calibrate: {settings.method} goes by single entries, whatever the inputs are"
        )
    n = len(collection.names)
    if settings.method == "hydraopt" and settings.matrices > n:
        raise typer.BadParameter(f"--matrices is {settings.matrices}, but there are {n} adapters")


def find_moments(
    source: Path | None, base_model: str | None, collection: "PeftCollection", on_progress: Any
) -> "Moments | None":
    """What `--calibrate` asks for."""
    if source is None:
        return None
    from vllm_jd.compressor.calibrate.moments import calibrate
    from vllm_jd.demo.smollm2 import default_cache_dir

    model = base_model or collection.base_model
    return calibrate(
        source,
        model,
        collection.shapes,
        default_cache_dir() / "calibration",
        on_progress=on_progress,
    )


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


def _tell_serve(store: Path, base_model: str) -> None:
    """How to serve a store: a line that runs as it stands, or says what to put in."""
    # A bare name may be anybody's folder; vLLM takes folders and Hub ids.
    known = Path(base_model, "config.json").is_file() or _HUB_ID.fullmatch(base_model)
    model = base_model if known else "BASE"
    command = shlex.join(["vllm-jd", "serve", str(store), "--model", model])
    out.print(f"Serve it:  [bold]{escape(command)}", soft_wrap=True, highlight=False)
    if not known:
        what = "the adapters' base model" if base_model == "unknown" else base_model
        out.print(f"           BASE: the folder or Hub id of {escape(what)}", soft_wrap=True)


def _compress_command(context: typer.Context, adapters: list[str], target: float) -> str:
    """The `compress` that makes what `plan` chose; STORE is what to put in."""
    words = ["vllm-jd", "compress", *(adapters if len(adapters) <= _SHOWN else ["ADAPTERS"])]
    words += ["--out", "STORE", "--target-error", f"{target:g}"]
    for name in ("max_bytes", "store_dtype", "calibrate", "base_model", "seed"):
        if _given(context, name):
            value = context.params[name]
            words += [f"--{name.replace('_', '-')}", str(getattr(value, "value", value))]
    return shlex.join(words)


def _tell_choice(candidate: "Candidate", *, quiet: bool) -> None:
    if not quiet:
        out.print(
            f"trying [bold]{escape(candidate.label)}[/]: about {size(candidate.bytes)}, "
            f"error {candidate.error:.3f}"
        )


def _report(
    store: "Store", collection: "PeftCollection", file: Path | None, on_progress: Any
) -> Path | None:
    if file is None:
        return None
    from vllm_jd.compressor.report.report import write_report
    from vllm_jd.compressor.report.report_data import collect

    write_report(store, file, extra=collect(collection, store, on_progress))
    return file
