"""What one bare GPU can prove in eight minutes: no network, no vLLM, nothing to install.

    make gpu-first-bundle                        # where vLLM is installed: build/gpu-first
    python benchmarks/gpu_first.py run           # on the GPU: or make gpu-first
    python benchmarks/gpu_first.py run --small   # a rehearsal, in Triton's interpreter

It needs torch, Triton, transformers, peft, pytest, hypothesis and rich (and not typer, which needs
pydantic). Each step is a process with a time limit that writes its own JSON as it goes: what is
done stays, whatever stops it or this script. One file beside them holds all, named by the device.

Exit codes of `run`: 0 all steps ended well; 1 a step failed, or ran out of time or room; 2 wrong
usage; 3 there is no GPU, and nothing was run; 130 stopped with Ctrl-C.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "gpu-first"
NO_GPU_CODE = 3
GRACE_SECONDS = 8  # what a step gets to end by itself, after the time that it was told
MOST_BYTES = 2 << 30  # that a step may leave in its folder
CLOSING_SECONDS = 5  # for the table, kept free of the budget
SLOWER = 8  # a rehearsal's limits are so many times longer: the interpreter is slow

console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)


@dataclass(frozen=True)
class Step:
    """One thing to run, in the order of their worth.

    Args:
        title: what it shows.
        seconds: its limit; 0: all that is left of the budget.
        least: with fewer seconds left it is not begun.
        command: words for Python; `--out`, `--seconds`, `--small` and `--bundle` come after them.
        needs: packages without which it can show nothing.
    """

    title: str
    seconds: float
    least: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ("torch", "triton")


STEPS = {
    "right": Step(
        "the kernels say what the float64 formula says, also as a replayed CUDA graph",
        90, 30, ("-m", "gpu_steps.right"), ("torch", "triton", "pytest", "hypothesis", "peft"),
    ),
    "limit": Step(
        "each layer against this GPU's bandwidth, its base product and vLLM's kernels",
        90, 30, ("-m", "gpu_steps.limit"),
    ),
    "model": Step(
        "a step of Mistral-7B: base, merged, ours, vLLM's kernels (Figure 1 without the server)",
        150, 60, ("-m", "gpu_steps.model"), ("torch", "triton", "transformers"),
    ),
    "cliff": Step(
        "the same step where adapters must come over PCIe, against all of them resident",
        75, 50, ("-m", "gpu_steps.cliff"), ("torch", "triton", "transformers"),
    ),
    "tuned": Step(
        "the best configuration of the kernels for each shape: a table that they read",
        70, 40, ("-m", "gpu_steps.tuned"),
    ),
    "engine": Step(
        "vLLM itself without its compiled operators: does the plugin start, are the tokens right",
        0, 45, ("-m", "gpu_steps.engine"), ("torch", "triton", "transformers", "peft"),
    ),
}  # fmt: skip


@dataclass
class Result:
    """What became of a step: `done`, `failed`, `timed out`, `too large`, `stopped` or `not run`."""

    key: str
    title: str
    outcome: str = "not run"
    reason: str = ""
    code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0


def main(words: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("bundle", help=bundle.__doc__)
    one.add_argument("--out", type=Path, default=BUNDLE, help="folder to fill; it is made anew")
    one.set_defaults(call=bundle)
    one = commands.add_parser("run", help=run.__doc__)
    one.add_argument(
        "--out", type=Path, default=Path("out/gpu-first"), help="for the results; new or empty"
    )
    one.add_argument("--seconds", type=_seconds, default=480, help="for everything (%(default)s)")
    one.add_argument(
        "--only", action="append", choices=STEPS, help="a step to run; may be given several times"
    )
    one.add_argument(
        "--small", action="store_true", help="tiny shapes; without a GPU in Triton's interpreter"
    )
    one.add_argument("--bundle", type=Path, default=BUNDLE, help="what `bundle` wrote")
    one.set_defaults(call=run)
    told = vars(parser.parse_args(words))
    return told.pop("call")(**told)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"seconds must be a number from 1 on, not {text}")
    return seconds


def bundle(out: Path) -> int:
    """Copy what the GPU machine lacks out of the packages that are installed here."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_steps import carried, served, step, stock

    new = out.with_name(f"{out.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    try:
        version = stock.pack(new)
        carried.pack(new)
        served.make(new / served.SERVED)
    except ModuleNotFoundError as error:
        console.print(f"[red]{error}")
        return 1
    if fault := carried.download(new):
        console.print(f"[yellow]no wheels, without which the step engine does not run: {fault}")
    (new / step.COMMIT_FILE).write_text(f"{step.commit() or ''}\n")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(
        f"{out}: the LoRA kernels and all Python files of {version}, "
        f"{len([*out.rglob('*.whl')])} wheels, {size / (1 << 20):.1f} MiB"
    )
    return 0


def run(out: Path, seconds: float, only: Sequence[str] | None, *, small: bool, bundle: Path) -> int:
    """Run the steps, the most telling first, and print what they found."""
    started = time.monotonic()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        console.print(f"[red]--out {out} exists and is not an empty folder; name another one")
        return 2
    if not small and not has_gpu():
        console.print(
            "[yellow]no CUDA GPU found: nothing was run, and nothing about speed is known; "
            "--small rehearses in Triton's interpreter"
        )
        return NO_GPU_CODE
    out.mkdir(parents=True, exist_ok=True)
    end = started + seconds - CLOSING_SECONDS
    results = [Result(key, STEPS[key].title) for key in STEPS if not only or key in only]
    slower = SLOWER if small and not has_gpu() else 1
    plan(results, end - time.monotonic(), slower)
    code = 1
    with tempfile.TemporaryDirectory(prefix="gpu-first-") as work:
        try:
            for result in results:
                run_step(result, end, out, Path(work), slower=slower, small=small, bundle=bundle)
                write(out, results, seconds=seconds, small=small)
            code = exit_code(results)
        except KeyboardInterrupt:
            code = 130
            console.print("[yellow]stopped; what was done is kept")
    file = write(out, results, seconds=seconds, small=small)
    report(out, results)
    if small and not has_gpu():
        console.print("[yellow]Triton's interpreter ran this: its times say nothing")
    console.print(f"results: {file}, log: {out / 'log.txt'}", soft_wrap=True)
    return code


@functools.cache
def has_gpu() -> bool:
    """Whether torch finds a CUDA device; asked in a process of its own, which then is gone."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def exit_code(results: Sequence[Result]) -> int:
    """0, or 1 if a step that was begun did not end well."""
    return int(any(result.outcome not in ("done", "not run") for result in results))


def plan(results: Sequence[Result], seconds: float, slower: float = 1) -> None:
    """Say what will be run and for how long at most, and what will not, before anything is."""
    left = seconds
    for result in results:
        step = STEPS[result.key]
        missing = [package for package in step.needs if find_spec(package) is None]
        if missing:
            result.reason = f"needs {', '.join(missing)}, which is not installed"
        elif left < step.least:
            result.reason = f"{left:.0f} s would be left of the budget, it needs {step.least:.0f}"
        else:
            result.limit = min(step.seconds * slower or left, left)
            left -= result.limit
            result.reason = ""
        say = f"at most {result.limit:.0f} s" if result.limit else f"skipped: {result.reason}"
        console.print(f"{result.key}: {say}: {result.title}")


def run_step(
    result: Result,
    end: float,
    out: Path,
    work: Path,
    *,
    slower: float,
    small: bool,
    bundle: Path,
) -> None:
    """Run one step and note the outcome. Its children end with it."""
    step = STEPS[result.key]
    left = end - time.monotonic()
    # What others left over of their limits goes on; a step that was not to run may run after all.
    if any(find_spec(package) is None for package in step.needs):
        return
    if left < step.least:
        result.reason = f"{max(0, left):.0f} s are left of the budget, it needs {step.least:.0f}"
        console.print(f"[yellow]{result.key}: not run: {result.reason}")
        return
    result.limit, result.reason = min(step.seconds * slower or left, left), ""
    told = max(1.0, result.limit - GRACE_SECONDS)
    command = [sys.executable, *step.command, "--out", str(out.resolve() / f"{result.key}.json")]
    command += ["--seconds", f"{told:.0f}", *(["--small"] if small else [])]
    if bundle.is_dir():
        command += ["--bundle", str(bundle.resolve())]
    folder = work / result.key
    folder.mkdir()
    log = work / f"{result.key}.log"
    start = time.monotonic()
    try:
        with console.status(f"{result.key}: {result.title}"):
            _execute(command, result, folder, log, _environment(work, folder, small))
    except KeyboardInterrupt:
        result.outcome, result.reason = "stopped", "Ctrl-C"
        raise
    finally:
        result.seconds = round(time.monotonic() - start, 1)
        _keep_log(log, out / "log.txt", result.key)
        shutil.rmtree(folder, ignore_errors=True)
    colour = "green" if result.outcome == "done" else "red"
    after = f": {result.reason}" if result.reason else ""
    console.print(
        f"[{colour}]{result.key}: {result.outcome}[/] after {result.seconds:.0f} s{after}"
    )


def _environment(work: Path, folder: Path, small: bool) -> dict[str, str]:
    # Not the repository itself: its link `kernels` would hide a package of transformers'.
    packages = work / "packages"
    packages.mkdir(exist_ok=True)
    for name in ("vllm_jd", "tests"):
        if not (packages / name).is_symlink():
            (packages / name).symlink_to(ROOT / name)
    paths = [str(packages), str(ROOT / "benchmarks")]
    told = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths += [path for path in told if path and Path(path).resolve() != ROOT.resolve()]
    changed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in native code says where it was called
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "TRITON_CACHE_DIR": str(work / "triton"),  # what one step compiled, the next need not
    }
    if small and not has_gpu():
        changed |= {"TRITON_INTERPRET": "1"}
    return os.environ | changed


def _execute(
    command: Sequence[str], result: Result, folder: Path, log: Path, environment: Mapping[str, str]
) -> None:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _watch(process, result, folder, log)
        finally:
            _stop(process)


def _watch(process: subprocess.Popen, result: Result, folder: Path, log: Path) -> None:
    """Wait for its end, or that its time or its room is used up."""
    end = time.monotonic() + result.limit
    while (code := process.poll()) is None:
        if time.monotonic() > end:
            result.outcome, result.reason = "timed out", f"after {result.limit:.0f} s"
            return
        if _size(folder) + log.stat().st_size > MOST_BYTES:
            result.outcome = "too large"
            result.reason = f"it wrote more than {MOST_BYTES >> 20} MiB of temporary files"
            return
        time.sleep(0.2)
    result.code = code
    result.outcome = "done" if code == 0 else "failed"
    if code:
        result.reason = f"exit code {code}: {last_words(log)}"


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except FileNotFoundError:  # it was temporary
                continue
    return total


def _stop(process: subprocess.Popen) -> None:
    """End it and all its children; those of a process that ended by itself, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _keep_log(log: Path, all_of_them: Path, key: str) -> None:
    """Append a step's log, its end if it is long, to the one that stays."""
    try:
        text = log.read_bytes()[-(1 << 20) :]
        with all_of_them.open("ab") as file:
            file.write(f"==== {key}\n".encode() + text + b"\n")
    except OSError as error:
        console.print(f"[yellow]the log of {key} was not kept: {error}")


def last_words(log: Path) -> str:
    """The last line of a log that says something, shortened; of a crash, what was said before."""
    text = log.read_text(errors="replace")
    before, crash, _ = text.partition("Fatal Python error")
    lines = (before if before.strip() or not crash else text).splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return said[:160]


# --- what was found ---


def write(out: Path, results: Sequence[Result], *, seconds: float, small: bool) -> Path:
    """One file with everything so far, named after the device."""
    parts = {result.key: found(out, result.key) for result in results}
    device = next((part["device"]["name"] for part in parts.values() if part), "unknown")
    file = out / f"gpu-first-{file_name(device)}.json"
    content = {
        "device": device,
        "small": small,
        "seconds": seconds,
        "steps": [asdict(result) for result in results],
        **{key: part for key, part in parts.items() if part},
    }
    beside = file.with_suffix(".part")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(file)
        for old in out.glob("gpu-first-*.json"):
            if old != file:
                old.unlink()
    except OSError as error:  # each step's own file is there still
        console.print(f"[yellow]{file} was not written: {error}")
    return file


def found(out: Path, key: str) -> dict[str, Any] | None:
    """What a step wrote, or None."""
    try:
        return json.loads((out / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def file_name(device: str) -> str:
    """A device's name as part of a file's: `NVIDIA H100 80GB HBM3` → `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def report(out: Path, results: Sequence[Result]) -> None:
    """Print a table of the steps, and one for what each found."""
    table = Table("step", "result", "seconds", "", box=box.SIMPLE_HEAD)
    for result in results:
        why = result.reason
        part = found(out, result.key) or {}
        if result.outcome in ("timed out", "too large") and part.get("doing"):
            why += f"; it was at: {part['doing']}"
        table.add_row(result.key, result.outcome, f"{result.seconds:.0f}", why)
    say = Console(width=None if sys.stdout.isatty() else 130)
    say.print(table)
    for result in results:
        part = found(out, result.key)
        if part is None:
            continue
        show = TABLES.get(result.key)
        for shown in show(part) if show else ():
            say.print(shown)
        for skipped in part["skipped"]:
            say.print(f"[dim]{result.key}: skipped {skipped['what']}: {skipped['why']}")
        for fault in part["faults"]:
            say.print(f"[red]{result.key}: {fault['what']}[/]: {fault['error'][:300]}")


def _right(part: Mapping[str, Any]) -> list[object]:
    counts = ", ".join(f"{n} {what}" for what, n in part.get("summary", {}).items())
    cases = [case for case in part.get("cases", []) if case.get("units_in_the_last_place")]
    worst = max((case["units_in_the_last_place"] for case in cases), default=None)
    after = f"; largest error {worst:.2f} units in the last place" if worst is not None else ""
    return [f"right: {counts or 'not all of it was checked'}{after}"]


def _limit(part: Mapping[str, Any]) -> list[object]:
    shown: list[object] = []
    if limits := part.get("limits"):
        shown.append(
            f"limit: copy {limits['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"product {limits['flops_per_second'] / 1e12:.0f} TFLOP/s"
        )
    if launch := part.get("launch"):
        shown.append(
            f"limit: {launch['launches']} launches without work: "
            + ", ".join(f"{n} {t['median']:.2f} µs" for n, t in launch["microseconds"].items())
        )
    table = Table(
        *("layer", "tokens", "adapters", "ours, µs", "spread", "of the limit", "base, µs"),
        *("ours / base", "vLLM, µs", "times faster"),
        box=box.SIMPLE_HEAD,
    )
    for cell in sorted(part.get("cells", []), key=_place):
        ours, stock = cell["microseconds"]["ours"], cell["microseconds"].get("stock")
        table.add_row(
            *(f"{cell['model']} {cell['layer']}", str(cell["tokens"]), str(cell["adapters"])),
            *(f"{ours['median']:.1f}", f"{ours['p10']:.1f}–{ours['p90']:.1f}"),
            *(f"{cell['achieved']:.0%}", f"{cell['microseconds']['base']['median']:.1f}"),
            f"{cell['of_base']:.2f}",
            f"{stock['median']:.1f}" if stock else "",
            f"{cell['times_faster_than_stock']:.2f}" if stock else "",
        )
    return [*shown, table] if table.rows else shown


def _place(cell: Mapping[str, Any]) -> tuple[str, str, int]:
    return cell["model"], cell["layer"], cell["tokens"]


def _model(part: Mapping[str, Any]) -> list[object]:
    shown: list[object] = []
    if right := part.get("right"):
        shown.append(
            f"model: adapters change the logits by {right['changed_by']:.2g}, relatively, and "
            f"{right['error']:.2g} off the plain torch path; without adapter "
            f"{'unchanged' if right['unchanged_without_adapter'] else 'CHANGED'}"
        )
    batches = part.get("batches", [])
    names = list(dict.fromkeys(name for batch in batches for name in batch["microseconds"]))
    table = Table("step", *(f"{name}, ms" for name in names), box=box.SIMPLE_HEAD)
    for batch in sorted(batches, key=lambda batch: (batch["batch"][0], batch["tokens"])):
        cells = []
        for name in names:
            ratio = f" ({batch['of_base'][name]:.3f})" if name != "base" else ""
            cells.append(f"{batch['microseconds'][name]['median'] / 1e3:.3f}{ratio}")
        table.add_row(batch["batch"], *cells)
    note = "model: milliseconds of a step (in brackets: the base model's, by it)"
    return [*shown, note, table] if batches else shown


def _cliff(part: Mapping[str, Any]) -> list[object]:
    shown: list[object] = []
    if copy := part.get("copy"):
        times = copy["microseconds"]
        shown.append(
            f"cliff: an adapter of {copy['adapter_bytes'] / 1e6:.1f} MB comes in "
            f"{times['tensors']['median'] / 1e3:.2f} ms, tensor by tensor; as one block in "
            f"{times['block']['median'] / 1e3:.2f} ms "
            f"({copy['block_bytes_per_second'] / 1e9:.0f} GB/s)"
        )
    table = Table(
        *("adapters", "system", "tokens/s", "first token, ms: median", "p99", "running"),
        *("copies a step", "steps"),
        box=box.SIMPLE_HEAD,
    )
    for one in sorted(part.get("loops", []), key=lambda one: one["adapters"]):
        first = one["first_token_ms"]
        table.add_row(
            *(str(one["adapters"]), one["system"], f"{one['tokens_per_second']:.0f}"),
            *(f"{first['median']:.1f}", f"{first['p99']:.1f}", f"{one['running']:.1f}"),
            *(f"{one['copies_per_step']:.2f}", str(one["steps"])),
        )
    return [*shown, table] if table.rows else shown


def _tuned(part: Mapping[str, Any]) -> list[object]:
    entries = sorted(part.get("entries", []), key=_place)
    if not entries:
        return []
    table = Table("layer", "tokens", "best", "µs", "default, µs", "failed", box=box.SIMPLE_HEAD)
    for one in entries:
        times, default = one["microseconds"], one["microseconds"].get("default")
        if one["best"] != "default" or one["failed"]:
            table.add_row(
                *(f"{one['model']} {one['layer']}", str(one["tokens"]), one["best"]),
                f"{times[one['best']]['median']:.1f}",
                f"{default['median']:.1f}" if default else "",
                ", ".join(one["failed"]),
            )
    best = sum(one["best"] == "default" for one in entries)
    note = f"tuned: the default is the best for {best} of {len(entries)} shapes"
    shown = [note, *([table] if table.rows else [])]
    if not part["file"].startswith("cpu"):  # the interpreter's times say nothing
        shown.append(f"tuned: copy tuned.json to vllm_jd/kernels/triton/tuned/{part['file']}")
    return shown


def _engine(part: Mapping[str, Any]) -> list[object]:
    table = Table(
        *("vLLM", "runner", "platform", "kernels", "start, s", "answers", "PEFT's", "wrong"),
        *("came to", "error"),
        box=box.SIMPLE_HEAD,
    )
    for one in part.get("engines", []):
        table.add_row(
            *(one["name"], str(one["runner"]), one.get("platform", ""), one.get("kernels", "")),
            *(str(one.get(name, "")) for name in ("start_seconds", "asked", "same", "wrong")),
            *(one.get("came_to", ""), one.get("error", "")[:200]),
        )
    return [table] if table.rows else []


TABLES = {
    "right": _right,
    "limit": _limit,
    "model": _model,
    "cliff": _cliff,
    "tuned": _tuned,
    "engine": _engine,
}


if __name__ == "__main__":
    sys.exit(main())
