"""What the steps share: the file that each writes, the device, and times taken on it."""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu_steps.interpreter import hasten

ROOT = Path(__file__).parents[2]
COMMIT_FILE = "COMMIT"
FLUSH_BYTES = 128 << 20  # more than the L2 cache of any GPU so far
Call = Callable[[], object]


class Step:
    """One step that runs: what it has found, in a file that is whole at any moment.

    Args:
        name: of the step.
        out: JSON to write.
        seconds: after so many it should end by itself; it is stopped soon after.
        small: tiny shapes, which Triton's interpreter can take where there is no GPU.
        bundle: folder with vLLM's kernels, or None.
    """

    def __init__(
        self, name: str, out: Path, seconds: float, *, small: bool, bundle: Path | None
    ) -> None:
        self.name, self.out, self.small, self.bundle = name, out, small, bundle
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._end = time.monotonic() + seconds
        self.content: dict[str, Any] = {
            "step": name,
            "started": datetime.now().isoformat(timespec="seconds"),
            "small": small,
            "device": describe(),
            "commit": carried_commit(bundle) or commit(),
            "clocks": [clocks()],
            "doing": "starting",
            "skipped": [],
            "faults": [],
        }
        self.save()

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU, so that its times mean something."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until it should end."""
        return self._end - time.monotonic()

    def doing(self, what: str) -> None:
        """Say what comes next: what is read if it never ends."""
        self.content["doing"] = what
        self.save()
        print(f"{self.name}: {what}", flush=True)

    def enough(self, seconds: float, what: str) -> bool:
        """Whether there is time for what takes about so many seconds; if not, it is noted."""
        if self.left >= seconds:
            self.doing(what)
            return True
        self.skip(what, "no time left")
        return False

    def skip(self, what: str, why: str) -> None:
        """Note that something was not done."""
        self.content["skipped"].append({"what": what, "why": why})
        self.save()
        print(f"{self.name}: skipped {what}: {why}", flush=True)

    def fault(self, what: str, error: BaseException | str) -> None:
        """Note that something went wrong; the step goes on, but fails."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.content["faults"].append({"what": what, "error": text[:2000]})
        self.save()
        print(f"{self.name}: FAULT in {what}: {text}", flush=True)

    def put(self, key: str, value: object) -> None:
        """Set a part of the result."""
        self.content[key] = value
        self.save()

    def add(self, key: str, row: Mapping[str, object]) -> None:
        """Add a row to a list of the result."""
        self.content.setdefault(key, []).append(dict(row))
        self.save()

    def save(self) -> None:
        """Write the file: the old one or the new one is there at any moment."""
        beside = self.out.with_suffix(".part")
        try:
            beside.write_text(json.dumps(self.content, indent=1) + "\n")
            beside.replace(self.out)
        except OSError as error:  # a full disk must not end what still can be printed
            print(f"{self.name}: {self.out} was not written: {error}", flush=True)

    def end(self) -> int:
        """Its exit code: 0, or 1 where there were faults."""
        self.content["clocks"].append(clocks())
        self.content["doing"] = None
        self.save()
        return 1 if self.content["faults"] else 0


def arguments(name: str) -> argparse.ArgumentParser:
    """What every step can be told."""
    parser = argparse.ArgumentParser(prog=f"python -m gpu_steps.{name}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--bundle", type=Path)
    return parser


def main(name: str, run: Callable[[Step], None]) -> None:
    """Run a step as its process does."""
    told = arguments(name).parse_args()
    hasten()
    step = Step(name, told.out, told.seconds, small=told.small, bundle=told.bundle)
    try:
        run(step)
    except Exception as error:  # what was done before stays; the log has all of it
        traceback.print_exc()
        step.fault(str(step.content["doing"]), error)
    sys.exit(step.end())


# --- the machine ---


def describe() -> dict[str, Any]:
    """Device and versions."""
    found: dict[str, Any] = {
        "name": "CPU (Triton's interpreter)",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


def commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; None if it is none."""
    found = _said("git", "rev-parse", "HEAD")
    return found and found + ("+" if _said("git", "status", "--porcelain") else "")


def carried_commit(bundle: Path | None) -> str | None:
    """That of the checkout in which the bundle was filled: what is carried may have no git, or one
    of its own."""
    file = None if bundle is None else bundle / COMMIT_FILE
    return (file.read_text().strip() or None) if file is not None and file.is_file() else None


def clocks() -> dict[str, str] | None:
    """What the driver says of clocks, power and temperature now; None without a driver."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    said = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    if not said:
        return None
    values = said.splitlines()[0].split(", ")
    return dict(zip(fields.split(","), values, strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- times ---


def recorded(calls: Sequence[Call], device: str) -> Call:
    """What runs them all: a captured CUDA graph; on CPU a loop.

    The calls run once before, on a side stream: that compiles them. They may read and write only
    tensors that stay where they are.
    """
    if device != "cuda":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return functools.partial(_replay, graph, list(calls))


def _replay(graph: "torch.cuda.CUDAGraph", calls: Sequence[Call]) -> None:
    """`calls` are held here, and with them the tensors that the graph reads."""
    graph.replay()


class Flush:
    """Reads so much that nothing of what was used before is left in the L2 cache."""

    def __init__(self, device: str) -> None:
        size = FLUSH_BYTES if device == "cuda" else 64
        self._data = torch.zeros(size // 8, dtype=torch.int64, device=device)
        self._sum = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self) -> None:
        torch.sum(self._data, dim=0, out=self._sum)


def alternate(calls: Mapping[str, Call], device: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call in each of `rounds` rounds, one call after the other.

    What slows the machine for a while slows them all, so that ratios hold; each round begins with
    another one, for the first finds the device cool. One round goes before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order = list(calls.items())
    for _ in range(rounds):
        order.append(order.pop(0))
        if device != "cuda":
            for name, call in order:
                start = time.perf_counter()
                call()
                times[name].append(1e6 * (time.perf_counter() - start))
            continue
        events = []
        for name, call in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in events:
            times[name].append(1e3 * begin.elapsed_time(end))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and spread: the 10th and 90th percentile, and how many there were."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(ordered[round(0.1 * last)], 3),
        "p90": round(ordered[round(0.9 * last)], 3),
        "n": len(ordered),
    }
