"""How fast adapters are compressed, in how much memory, and how near to what the machine can do.

All input is made on the fly, of real models' shapes, and the time for that taken out: no figure
here holds the reading of files. Suites:

- `smollm2`, `mistral`: 1,024 random adapters of that model through `compress`: seconds by stage,
  peak resident memory of a fresh process, error. With `--modules N` a sample of so many modules,
  and the whole extrapolated from it.
- `scale`: 1,250 to 20,000 adapters of SmolLM2's shape on a few modules: what an adapter and module
  costs as their number grows.
- `versus`: 256 adapters of d = 4096, random and with a structure, as many parameters for all: we,
  the paper's algorithm as a plain loop, and the packages lorashare and vlora, in rounds that go
  over all of them.

What the machine can do is measured in the same run; `needed_work` says what is counted. Prints
JSON, draws a figure. One command:

    python benchmarks/compression.py --out out/compression.json
"""

import json
import shutil
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import baselines
import machine
import matplotlib
import torch
import typer
from baselines import Compressed, MissingPackage, Pair, Report, measure, report, resident
from rich.console import Console
from synthetic import MODELS, RandomCollection, Structure
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vllm_jd.compressor import Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods import jd_full
from vllm_jd.compressor.run.compress import compress
from vllm_jd.compressor.run.module import compress_module
from vllm_jd.store import Store

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

console = Console(stderr=True)

# What `compress` says it does → what it is called here. Of reading only normalising is left.
STAGES = {
    "reading adapters": "reading",
    "clustering adapters": "clustering",
    "compressing modules": "modules",
    "writing the store": "writing",
}
LORA_RANK = 16
TARGETS = 3  # q, k and v: modules come in whole layers, so that a sample has the model's mix
GEMM_SIZE = 2048
STREAM_BYTES = 256 << 20
BEST_OF = 5


class Suite(StrEnum):
    SMOLLM2 = "smollm2"
    MISTRAL = "mistral"
    SCALE = "scale"
    VERSUS = "versus"


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; the figure goes beside it.")],
    suite: Annotated[
        list[Suite] | None, typer.Option(help="May be repeated; default: all of them.")
    ] = None,
    adapters: Annotated[
        list[int] | None, typer.Option(help="Numbers of adapters in place of the suites' own.")
    ] = None,
    modules: Annotated[
        int | None, typer.Option(help="Modules in place of the suites' own; a multiple of 3.")
    ] = None,
    clusters: Annotated[int, typer.Option(help="Of smollm2, mistral and scale.")] = 25,
    rank: int = 16,
    iterations: int = 10,
    rounds: Annotated[int, typer.Option(help="Of versus.")] = 3,
    threads: int = 2,
) -> None:
    if modules is not None and (modules < TARGETS or modules % TARGETS):
        raise typer.BadParameter(
            f"found {modules}, expected a multiple of {TARGETS} (q, k and v of whole layers)",
            param_hint="--modules",
        )
    chosen = suite or list(Suite)
    layers = None if modules is None else modules // TARGETS
    settings = Settings(rank=rank, clusters=clusters, iterations=iterations)
    torch.set_num_threads(threads)
    console.print("machine limits")
    limits = measure(partial(machine_limits, threads)).result
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": _versions("torch", "vllm-jd", "lorashare", "vlora-dev"),
        "threads": threads,
        "settings": {"rank": rank, "clusters": clusters, "iterations": iterations},
        "limits": limits,
    }
    for name, model in ((Suite.SMOLLM2, "smollm2"), (Suite.MISTRAL, "mistral-7b")):
        if name in chosen:
            result[name] = [_whole(model, n, layers, settings, limits) for n in adapters or [1024]]
    if Suite.SCALE in chosen:
        result["scale"] = [
            _compressed("smollm2", n, layers or 2, settings, limits)
            for n in adapters or [1250, 2500, 5000, 10_000, 20_000]
        ]
    if Suite.VERSUS in chosen:
        one = Settings(rank=rank, iterations=iterations)
        result["versus"] = [
            _versus(n, layers or 1, structure, one, rounds)
            for n in adapters or [256]
            for structure in (None, Structure())
        ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    _draw(result, out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


# --- compress as a whole ---


class ClockedCollection(RandomCollection):
    """Keeps the CPU seconds that making the factors took, so that they can be told apart."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.synthesis: list[float] = []  # appending is safe between threads

    def factors(self, module: str) -> ModuleFactors:
        start = time.thread_time()
        factors = super().factors(module)
        self.synthesis.append(time.thread_time() - start)
        return factors


class Stages:
    """`on_progress` of `compress`: the wall seconds and the synthesis' CPU seconds by stage."""

    def __init__(self, collection: ClockedCollection):
        self._collection = collection
        self._stage = "starting"
        self._since = time.perf_counter()
        self._made = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.synthesis: defaultdict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now, made = time.perf_counter(), len(self._collection.synthesis)
        self.seconds[self._stage] += now - self._since
        self.synthesis[self._stage] += sum(self._collection.synthesis[self._made : made])
        self._since, self._made = now, made
        self._stage = STAGES.get(what, what)
        self.counts[self._stage] = total
        if self._stage == "reading" and done == total:
            self._stage = "clustering"  # begins with a start, before it says so


def compress_once(collection: ClockedCollection, settings: Settings) -> dict[str, Any]:
    """Compress into a temporary store; what it took. Run it in a fresh process (`measure`)."""
    stages = Stages(collection)
    with tempfile.TemporaryDirectory(prefix="vllm-jd-bench-") as folder:
        store = compress(collection, Path(folder) / "store", settings, on_progress=stages)
        stages("end", 1, 1)
        peak = resident("VmHWM")
        made = dict(stages.synthesis)  # before counting makes some more
        issued = _issued_work(collection, store, settings)
        error, stored_bytes = float(store.error.double().mean()), store.stored_bytes
    threads = torch.get_num_threads()
    # Factors are made by as many threads as there are.
    net = {
        stage: seconds - made.get(stage, 0.0) / threads for stage, seconds in stages.seconds.items()
    }
    return {
        "seconds": sum(net.values()),
        "stage_seconds": net,
        "seconds_with_synthesis": sum(stages.seconds.values()),
        "synthesis_cpu_seconds": sum(made.values()),
        "modules_judged_by": stages.counts.get("reading", 0),
        "peak_resident_bytes": peak,
        "factor_bytes": collection.factor_bytes,
        "stored_bytes": stored_bytes,
        "error": error,
        "issued": issued,
    }


def _compressed(
    model: str, n: int, layers: int | None, settings: Settings, limits: Mapping[str, Any]
) -> dict[str, Any]:
    console.print(f"{model}: {n} adapters, {layers or 'all'} layers")
    make = partial(ClockedCollection, model, n, rank=LORA_RANK, layers=layers)
    found = measure(partial(compress_once, settings=settings), load=make).result
    shapes = list(make().shapes.values())
    found = {"model": model, "adapters": n, "modules": len(shapes)} | found
    found["microseconds_per_adapter_and_module"] = 1e6 * found["seconds"] / (n * len(shapes))
    found["largest_module_bytes"] = 4 * n * LORA_RANK * max(map(sum, shapes))
    found |= _efficiency(n, shapes, settings, found, limits)
    return found


def _whole(
    model: str, n: int, layers: int | None, settings: Settings, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """`_compressed`, with what all modules would take where only a sample was run."""
    found = _compressed(model, n, layers, settings, limits)
    total = MODELS[model]["num_hidden_layers"] * TARGETS
    if found["modules"] < total:
        factor = total / found["modules"]
        stages = {
            stage: seconds * (factor if stage in ("modules", "writing") else 1)
            for stage, seconds in found["stage_seconds"].items()
        }
        found["extrapolated"] = {
            "modules": total,
            "seconds": sum(stages.values()),
            "stage_seconds": stages,
            "from": f"{found['modules']} modules of evenly spaced layers: time in modules and "
            f"writing × {factor:.4g}, the rest as it was"
            + (
                "; clusters were judged by all modules of the sample, a whole run may judge by more"
                if found["modules_judged_by"] == found["modules"]
                else ""
            ),
        }
    return found


# --- what the machine can do, and what the algorithm needs ---


class Work(NamedTuple):
    """FLOPs (a multiplication and an addition are two), and bytes of rows that products read."""

    rough: float
    """FLOPs that bfloat16 is good enough for."""
    exact: float
    streamed: float


def needed_work(
    n: int, rank_lora: int, d_in: int, d_out: int, rank: int, iterations: int, *, bfloat16: bool
) -> Work:
    """The least arithmetic of JD-Full for one module, as `methods/jd_full.py` goes about it.

    With R = n·rank_lora rows a side, a product of a side's rows with the q = rank + 8 vectors
    that are sought costs 2·R·d·q FLOPs. Of those there are, for each side:

    - to start: 1 with the first vectors, and 2 in each of 4 power steps: 9;
    - 2 in each iteration, one back to d numbers and one with the new vectors. The last iteration
      is float32, all others and the start may be bfloat16.

    Besides, in float32: the start's weights B_iᵀB_i (2·R·rank_lora·d_out), the norms' Gram products
    (2·R·rank_lora·(d_in + d_out)), and the closing cores' A·V and Bᵀ·U (2·R·rank·(d_in + d_out)).
    Left out: QR and eigenvalues of each cluster, products of r×r matrices, the error that is
    recorded. Clusters divide the rows among them, so that their number does not come in.

    `streamed` is what the products with the rows would read if no row stayed in a cache.
    """
    rows = n * rank_lora
    d = d_in + d_out
    product = (
        2
        * rows
        * (
            d_in * min(rank + jd_full._OVERSAMPLING, d_in)
            + d_out * min(rank + jd_full._OVERSAMPLING, d_out)
        )
    )
    start = 1 + 2 * jd_full._START_STEPS
    loose = (start + 2 * (iterations - 1)) if bfloat16 else 0
    tight = start + 2 * iterations - loose
    besides = 2 * rows * (rank_lora * (d_out + d) + rank * d)
    return Work(loose * product, tight * product + besides, rows * d * (2 * loose + 4 * tight))


class CountWork(TorchDispatchMode):
    """Counts the FLOPs of the matrix products that are run inside, by the type of the numbers."""

    def __init__(self):
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.flops[result.dtype] += count(*args, **(kwargs or {}), out_val=result)
        return result


def _issued_work(
    collection: RandomCollection, store: Store, settings: Settings
) -> dict[str, float]:
    """FLOPs by type that `compress_module` runs for all modules, counted in one layer.

    It shows where iterations ended early: then less than is `needed` for all of them was issued.
    """
    modules, threads = list(collection.shapes), torch.get_num_threads()
    torch.set_num_threads(1)  # as in `parallel_map`: matrices so small only wait for each other
    with CountWork() as counted:
        for module in modules[:TARGETS]:
            assignment = store.chosen[:, store.module_index(module), 0].long()
            compress_module(collection.factors(module), assignment, settings)
    torch.set_num_threads(threads)
    factor = len(modules) / TARGETS
    return {str(dtype).split(".")[-1]: factor * flops for dtype, flops in counted.flops.items()}


def _efficiency(
    n: int,
    shapes: Sequence[tuple[int, int]],
    settings: Settings,
    found: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """What was needed for all modules, and the time for that at the machine's peak over the time
    that was taken in modules.

    Never more than was issued counts as needed, so that an early end does not look like speed.
    """
    fast = limits["bfloat16_is_used"]
    works = [
        needed_work(n, LORA_RANK, *shape, settings.rank, settings.iterations, bfloat16=fast)
        for shape in shapes
    ]
    rough, exact, streamed = (float(sum(parts)) for parts in zip(*works, strict=True))
    issued = found["issued"]
    most = {"rough": issued.get("bfloat16", 0.0), "exact": issued.get("float32", 0.0)}
    peak = limits["gemm_flops"][str(torch.get_num_threads())]
    least = min(rough, most["rough"]) / peak["bfloat16"] if fast else 0.0
    least += min(exact, most["exact"]) / peak["float32"]
    seconds = found["stage_seconds"]["modules"]
    bandwidth = limits["bytes_per_second"][str(torch.get_num_threads())]["copy"]
    return {
        "needed": {"bfloat16_flops": rough, "float32_flops": exact, "streamed_bytes": streamed},
        "ended_early": rough + exact > sum(issued.values()),
        "arithmetic_fraction": least / seconds,
        "streaming_fraction": streamed / bandwidth / seconds,
    }


def machine_limits(threads: int) -> dict[str, Any]:
    """FLOP/s of a large GEMM and bytes/s of STREAM's copy and triad, with one thread and `threads`.

    The best of five. As STREAM has it, copy moves two arrays and triad three, without what a
    cache reads before it writes.
    """
    gemm: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    count = STREAM_BYTES // 4
    a, b, c = torch.ones(count), torch.ones(count), torch.ones(count)
    before = torch.get_num_threads()
    for number in sorted({1, threads}):
        torch.set_num_threads(number)
        gemm[str(number)] = {}
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
            seconds = _fastest(partial(torch.mm, x, x))
            gemm[str(number)][str(dtype).split(".")[-1]] = 2 * GEMM_SIZE**3 / seconds
        memory[str(number)] = {
            "copy": 2 * STREAM_BYTES / _fastest(partial(a.copy_, b)),
            "triad": 3 * STREAM_BYTES / _fastest(partial(torch.add, b, c, alpha=3.0, out=a)),
        }
    torch.set_num_threads(before)
    return {
        "gemm_flops": gemm,
        "bytes_per_second": memory,
        "bfloat16_is_used": bool(jd_full.bfloat16_is_fast(torch.device("cpu"))),
    }


def _fastest(function: Callable[[], Any]) -> float:
    function()
    best = float("inf")
    for _ in range(BEST_OF):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


# --- beside others ---

Pairs = Mapping[str, Sequence[Pair]]


class PairCollection:
    """Adapters in memory as a `Collection`."""

    def __init__(self, pairs: Pairs):
        self._pairs = pairs
        n = len(next(iter(pairs.values())))
        self.base_model = "pairs"
        self.names = [f"pair-{i:05d}" for i in range(n)]
        self.shapes = {m: (own[0][0].shape[1], own[0][1].shape[0]) for m, own in pairs.items()}
        self.source_sha256 = ["0" * 64] * n
        self.source_bytes = [0] * n
        self.factor_bytes = sum(a.nbytes + b.nbytes for own in pairs.values() for a, b in own)

    def factors(self, module: str) -> ModuleFactors:
        return ModuleFactors.stack(list(self._pairs[module]), *self.shapes[module])


def make_pairs(n: int, layers: int, structure: Structure | None) -> Pairs:
    """Adapters of Mistral's shape as the packages take them."""
    collection = RandomCollection(
        "mistral-7b", n, rank=LORA_RANK, layers=layers, structure=structure
    )
    pairs = {}
    for module in collection.shapes:
        factors = collection.factors(module)
        a, b = factors.per_adapter(factors.a), factors.per_adapter(factors.b)
        pairs[module] = [(a[i], b[i].T.contiguous()) for i in range(n)]
    return pairs


def jd_parameters(pairs: Pairs, rank: int) -> int:
    """Numbers that JD-Full with one cluster stores."""
    return sum(
        rank * (own[0][0].shape[1] + own[0][1].shape[0]) + len(own) * rank**2
        for own in pairs.values()
    )


def ours(pairs: Pairs, settings: Settings) -> tuple[Compressed, Path]:
    """The whole of `compress`, a verified store on disk included; and the folder to remove."""
    collection = PairCollection(pairs)
    folder = Path(tempfile.mkdtemp(prefix="vllm-jd-bench-"))
    store = compress(collection, folder / "store", settings)

    def reconstruct(adapter: int) -> dict[str, Pair]:
        found = store.factors(collection.names[adapter])
        return {module: (a, b) for module, (b, a) in found.items()}

    rank = settings.rank
    size = jd_parameters(pairs, rank)
    return Compressed(rank, size, store.stored_bytes, reconstruct), folder


def report_and_remove(result: tuple[Compressed, Path], pairs: Pairs) -> Report:
    compressed, folder = result
    try:
        return report(compressed, pairs)
    finally:
        shutil.rmtree(folder)


def plain(pairs: Pairs, rank: int, iterations: int) -> Compressed:
    """`plain_jd` of every module, of adapters scaled to norm 1 (Compress then Serve, §6.1)."""
    found = {}
    for module, own in pairs.items():
        norms = [float(((b.T @ b) * (a @ a.T)).sum().sqrt()) for a, b in own]
        scaled = [(a, b / norm) for (a, b), norm in zip(own, norms, strict=True)]
        u, v, cores = baselines.plain_jd(scaled, rank, iterations)
        found[module] = u, v, [core * norm for core, norm in zip(cores, norms, strict=True)]

    def reconstruct(adapter: int) -> dict[str, Pair]:
        return {module: (v.T, u @ cores[adapter]) for module, (u, v, cores) in found.items()}

    size = jd_parameters(pairs, rank)
    return Compressed(rank, size, 4 * size, reconstruct)


def package(pairs: Pairs, name: str, rank: int) -> Compressed:
    """A package of `baselines` with as many parameters as come closest to JD's."""
    return getattr(baselines, name)(pairs, jd_parameters(pairs, rank))


def _versus(
    n: int, layers: int, structure: Structure | None, settings: Settings, rounds: int
) -> dict[str, Any]:
    kind = "random" if structure is None else "structured"
    rank = settings.rank
    load = partial(make_pairs, n, layers, structure)
    contenders: dict[str, tuple[Callable[..., Any], Callable[..., Report]]] = {
        "vllm-jd": (partial(ours, settings=settings), report_and_remove),
        "plain loop": (partial(plain, rank=rank, iterations=settings.iterations), report),
        "lorashare": (partial(package, name="lorashare", rank=rank), report),
        "vlora": (partial(package, name="vlora", rank=rank), report),
    }
    runs: dict[str, list[baselines.Measured]] = defaultdict(list)
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name, (function, summarise) in contenders.items():
            if name in missing:
                continue
            console.print(f"{kind} adapters, round {number + 1}: {name}")
            try:
                runs[name].append(measure(function, load=load, summarise=summarise))
            except MissingPackage as error:
                console.print(str(error))
                missing[name] = str(error)
    return {
        "input": kind,
        "adapters": n,
        "modules": layers * TARGETS,
        "note": "seconds and memory of all modules, the input in memory beforehand; vllm-jd writes "
        "a store, in bfloat16, the others leave float32 in memory; parameters are equal but for "
        "rounding to whole components, of which vlora has one at least",
        "systems": [_versus_report(name, own) for name, own in runs.items()],
        "missing": missing,
    }


def _versus_report(name: str, runs: Sequence[baselines.Measured]) -> dict[str, Any]:
    last: Report = runs[-1].result
    return {
        "name": name,
        "seconds": statistics.median(run.seconds for run in runs),
        "seconds_of_each_round": [run.seconds for run in runs],
        "peak_bytes": statistics.median(run.peak_bytes for run in runs),
        "error": statistics.median(run.result.error for run in runs),
        "components": last.components,
        "parameters": last.parameters,
        "stored_bytes": last.stored_bytes,
        "bytes_in_bfloat16": 2 * last.parameters,
    }


# --- where and with what ---


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# --- the figure ---

OURS, GREY = "#1f77b4", "#b0b0b0"


def _draw(result: Mapping[str, Any], path: Path) -> None:
    wholes = [run for name in (Suite.SMOLLM2, Suite.MISTRAL) for run in result.get(name, [])]
    scale, versus = result.get("scale", []), result.get("versus", [])
    panels: list[Callable[[Axes], None]] = []
    if wholes:
        panels.append(partial(_draw_stages, wholes))
    if wholes or scale:
        panels.append(partial(_draw_fractions, [*wholes, *scale]))
    if scale:
        panels += [partial(_draw_scale, scale), partial(_draw_memory, scale)]
    if versus:
        panels += [
            partial(_draw_versus, versus, "seconds", "seconds", True),
            partial(_draw_versus, versus, "error", "relative squared error", False),
        ]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 0.5 + 2.9 * rows), layout="constrained", squeeze=False
    )
    for panel, place in zip(panels, axes.flat, strict=False):
        panel(place)
        place.spines[["top", "right"]].set_visible(False)
        place.title.set_fontsize(10)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(f"{result['machine']}, {result['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=120)


def _label(run: Mapping[str, Any]) -> str:
    return f"{run['model']}\n{run['adapters']:,} × {run['modules']}"


def _draw_stages(runs: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    names, totals = [], []
    colours = dict(zip(("other", *STAGES.values()), plt.cm.tab20c.colors[::4], strict=False))
    for run in runs:
        at, left = len(names), 0.0
        shown = run.get("extrapolated", run)
        names.append(
            f"{run['model']}\n{run['adapters']:,} × {shown['modules']}"
            + ("\n(extrapolated)" if "extrapolated" in run else "")
        )
        for stage, colour in colours.items():
            seconds = shown["stage_seconds"].get(stage, 0.0)
            if stage != "other":
                axes.barh(at, seconds, left=left, color=colour, label=None if at else stage)
                left += seconds
        totals.append(shown["seconds"])
        memory = run["peak_resident_bytes"] / 2**30
        axes.text(left, at, f"  {shown['seconds']:.0f} s\n  {memory:.1f} GiB", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(totals))
    axes.set_xlabel("seconds, without making the input")
    axes.set_title("compress, by stage; peak resident memory")
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.2))


def _draw_fractions(runs: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    places = range(len(runs))
    for shift, key, colour, label in (
        (-0.2, "arithmetic_fraction", OURS, "of GEMM peak"),
        (0.2, "streaming_fraction", GREY, "of memory bandwidth, were nothing cached"),
    ):
        values = [100 * run[key] for run in runs]
        bars = axes.bar([at + shift for at in places], values, 0.4, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=8)
    axes.set_xticks(places, [_label(run) for run in runs], fontsize=7)
    axes.set_ylabel("%")
    axes.margins(y=0.3)
    axes.set_title("least work at the machine's peak / time in modules")
    axes.legend(fontsize=8, frameon=False)


def _draw_scale(runs: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    n = [run["adapters"] for run in runs]
    for stage, colour, modules in (
        ("modules", OURS, "modules"),
        ("clustering", "#ff7f0e", "modules_judged_by"),
        ("writing", GREY, "modules"),
    ):
        each = [
            1e6 * run["stage_seconds"].get(stage, 0.0) / (run["adapters"] * max(run[modules], 1))
            for run in runs
        ]
        axes.plot(n, each, marker="o", color=colour, label=stage)
    _by_adapters(axes, n)
    axes.set_ylabel("µs per adapter and module")
    axes.set_title(f"time as adapters grow ({runs[0]['modules']} modules of {runs[0]['model']})")
    axes.legend(fontsize=8, frameon=False)


def _draw_memory(runs: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    n = [run["adapters"] for run in runs]
    for key, colour, label in (
        ("peak_resident_bytes", OURS, "peak resident memory"),
        ("factor_bytes", GREY, "all factors in float32"),
        ("largest_module_bytes", "#ff7f0e", "factors of the largest module"),
    ):
        axes.plot(n, [run[key] / 2**30 for run in runs], marker="o", color=colour, label=label)
    _by_adapters(axes, n)
    axes.set_ylabel("GiB")
    axes.set_title("memory as adapters grow")
    axes.legend(fontsize=8, frameon=False)


def _by_adapters(axes: Axes, n: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(n, [f"{each:,}" for each in n], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("adapters")


def _draw_versus(
    runs: Sequence[Mapping[str, Any]], key: str, label: str, log: bool, axes: Axes
) -> None:
    names = [system["name"] for system in runs[0]["systems"]]
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        places = [at + (i - (len(runs) - 1) / 2) * width for at in range(len(names))]
        values = [system[key] for system in run["systems"]]
        colour = plt.cm.tab20c.colors[2 * i]
        bars = axes.bar(places, values, width, color=colour, label=f"{run['input']} adapters")
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8)
    axes.set_xticks(range(len(names)), names)
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.margins(y=0.35)
    axes.set_title(
        f"{runs[0]['adapters']} adapters, d = 4096, {runs[0]['modules']} modules, equal sizes"
    )
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    typer.run(main)
