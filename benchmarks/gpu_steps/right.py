"""Step `right`: the kernels on this GPU against the float64 formula, and vLLM's beside them.

The cases are those of tests/kernels/triton/test_native.py, a spread of them, dealt to several
processes: compiling takes most of the time, and a case that breaks the device takes only its own
process along, which starts again behind it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_steps import step
from gpu_steps.interpreter import hasten
from gpu_steps.step import Step

Check = Callable[[], float | None]
WORKERS_AT_MOST = 8


def cases(small: bool, bundle: Path | None) -> dict[str, Check]:
    """Name → what checks it and returns the largest error, in the order of their worth.

    A check raises AssertionError where a number is wrong. The error is in units of the last place.
    """
    found: dict[str, Check] = {}
    for name, check in (_small if small else _all)(bundle):
        found[name] = check
    return found


def _all(bundle: Path | None) -> Iterator[tuple[str, Check]]:
    from tests.kernels.triton.test_native import CONFIGS, KINDS, LAYER

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for n, layout in ((1, "equal"), (45, "mixed"), (300, "runs"), (64, "distinct")):
        yield f"bfloat16, {n} tokens, {layout}", _product(n, bf16, layout=layout, **LAYER)
    for n in (8, 128, 300):
        yield f"bfloat16, {n} tokens, one graph, other adapters", _graph(n, bf16)
    mistral = {"d_in": 4096, "d_out": (4096, 1024, 1024), "ranks": (16, 16), "clusters": 25}
    for n in (32, 200, 300):
        yield f"q, k, v of Mistral-7B, {n} tokens", _product(n, bf16, slots=64, **mistral)
    for n in (1, 32, 300):
        yield f"vLLM's kernels, {n} tokens", _stock(n, bf16, bundle)
    wide = {"d_in": 96, "d_out": (160, 64)}
    for n in (3, 70, 300):
        for bits in (8, 4):
            yield (
                f"bases in 8 bits, cores in {bits}, {n} tokens",
                _codes(n, bf16, bits, ranks=(13, 16), depth=2, int8=True, **wide),
            )
    for n in (16, 17, 300):
        yield f"float16, {n} tokens", _product(n, fp16, layout="mixed", **LAYER)
    yield "float16, 128 tokens, one graph, other adapters", _graph(128, fp16)
    for n in (2, 70):
        yield f"float32, {n} tokens", _product(n, fp32, layout="mixed", **LAYER)
    for n in (5, 33, 100):
        for ranks in ((1, 40), (60, 70), (256, 256)):
            odd = {"d_in": 70, "d_out": (150, 33), "depth": 3, "strided": True}
            yield f"ranks {ranks}, three rows, {n} tokens", _product(n, bf16, ranks=ranks, **odd)
    for kind, number in KINDS.items():
        for scaled in (False, True):
            yield (
                f"cores {kind}{', scales' if scaled else ''}",
                _product(40, bf16, ranks=(8, 21), kinds=(number,), scaled=(scaled,), **wide),
            )
    for n in (4, 40, 300):
        yield f"dependent launches, {n} tokens", _dependent(n)
    for config in CONFIGS:
        for n in (7, 40, 300):
            for variant in ("rows", "tiles"):
                name = f"configuration {config.name}, {variant}, {n} tokens"
                yield name, _product(n, bf16, config=(config, variant), **LAYER)


def _small(bundle: Path | None) -> Iterator[tuple[str, Check]]:
    shape = {"d_in": 40, "d_out": (40, 17), "ranks": (4, 8)}
    bf16, fp16 = torch.bfloat16, torch.float16
    for n in (1, 18):
        yield f"bfloat16, {n} tokens", _product(n, bf16, layout="mixed", **shape)
    yield "bfloat16, 18 tokens, tiles", _product(18, bf16, config=(None, "tiles"), **shape)
    yield "float16, bases in 8 bits, cores in 4", _codes(5, fp16, 4, int8=True, **shape)
    yield "vLLM's kernels, 5 tokens", _stock(5, fp16, bundle, d_in=32, d_out=(32, 16))
    yield "bfloat16, 8 tokens, one graph, other adapters", _graph(8, bf16)


class Impossible(Exception):
    """A case that cannot be checked here; says why."""


def _product(n_tokens: int, dtype: torch.dtype, *, config: Any = None, **shape: Any) -> Check:
    """One call against the oracle, and again with the tokens of each cluster side by side."""

    def check() -> float:
        from dataclasses import replace

        from tests.kernels.triton import test_native as native
        from vllm_jd.kernels.triton.plan import DEFAULT

        case = native.make_case(n_tokens=n_tokens, dtype=dtype, **shape)
        chosen = None
        if config is not None:
            chosen = replace(config[0] or DEFAULT, row_tokens=n_tokens * (config[1] == "rows"))
        worst = native.assert_close(native.run(case, config=chosen), case)
        ordered = native.run(case, config=chosen, order=native.by_cluster(case))
        return max(worst, native.assert_close(ordered, case))

    return check


def _codes(n_tokens: int, dtype: torch.dtype, bits: int, **shape: Any) -> Check:
    """Cores that lie in codes of so many bits, against the numbers that these stand for."""

    def check() -> float:
        from tests.kernels.test_kernels import Case
        from tests.kernels.triton import test_native as native
        from vllm_jd.kernels import ModulePools

        case = native.make_case(n_tokens=n_tokens, dtype=dtype, **shape)
        pools = case.pools
        slots, length = pools.cores.shape
        largest = 127 if bits == 8 else 7
        code = torch.randint(-largest, largest + 1, (slots, length), dtype=torch.int32)
        steps = (torch.rand(slots, -(-length // 32)) / largest).to(torch.bfloat16)
        numbers = code * steps.float().repeat_interleave(32, dim=1)[:, :length]
        if bits == 8:
            stored = code.to(torch.int8)
        else:
            even = torch.nn.functional.pad(code + 8, (0, length % 2))
            stored = (even[:, ::2] | even[:, 1::2] << 4).to(torch.uint8)

        def with_cores(cores: torch.Tensor, steps: torch.Tensor | None) -> Case:
            made = ModulePools(
                v=pools.v, u=pools.u, cores=cores, rows=pools.rows, scales=pools.scales,
                v_int8=pools.v_int8, u_int8=pools.u_int8, core_steps=steps,
            )  # fmt: skip
            return Case(made, case.x, case.y, case.token_slots)

        mine, decoded = with_cores(stored, steps), with_cores(numbers.to(dtype), None)
        return native.assert_close(native.run(mine), decoded)

    return check


def _graph(n_tokens: int, dtype: torch.dtype) -> Check:
    """A captured graph whose replays see other slots, orders, cores, rows and bases."""

    def check() -> None:
        from tests.kernels.triton import test_native as native

        if native.DEVICE != "cuda":
            raise Impossible("CUDA graphs need a CUDA device")
        native.test_one_graph_serves_any_adapters_and_sees_what_changes(n_tokens, dtype)

    return check


def _dependent(n_tokens: int) -> Check:
    """Programmatic dependent launch changes no bit."""

    def check() -> None:
        import pytest

        from tests.kernels.triton import test_native as native

        if native.DEVICE != "cuda" or torch.cuda.get_device_capability()[0] < 9:
            raise Impossible("programmatic dependent launch needs sm_90")
        with pytest.MonkeyPatch.context() as patch:
            native.test_dependent_launches_change_no_bit(n_tokens, patch)

    return check


def _stock(
    n_tokens: int,
    dtype: torch.dtype,
    bundle: Path | None,
    *,
    d_in: int = 4096,
    d_out: tuple[int, ...] = (4096, 1024, 1024),
) -> Check:
    """vLLM's shrink and expand against float64: what is compared with later computes the same."""

    def check() -> None:
        from shapes import Layer

        from gpu_steps import stock
        from gpu_steps.layers import stock_call

        ops = stock.load(bundle)
        if ops is None:
            raise Impossible("no bundle with vLLM's kernels (make gpu-first-bundle)")
        device = os.environ["VLLM_JD_TEST_DEVICE"]
        slots = torch.randint(4, (n_tokens,), dtype=torch.int32).to(device)
        layer = Layer("layer", d_in, d_out)
        call, x, y, pools = stock_call(
            ops, layer, n_tokens, 4, device, dtype, slots, specialised=False
        )
        call()
        x64 = x.double().cpu()
        for t, slot in enumerate(slots.tolist()):
            wanted = torch.cat(
                [
                    b[slot, 0].double().cpu() @ (a[slot, 0].double().cpu() @ x64[t])
                    for a, b in zip(pools.a, pools.b, strict=True)
                ]
            )
            error = float((y[t].double().cpu() - wanted).norm() / wanted.norm())
            assert error < 0.02, f"token {t} is {error:.3g} off, relatively"

    return check


# --- the processes ---


def work(told: Any) -> None:
    """Check the cases whose turn it is, one line of JSON for each."""
    os.environ["VLLM_JD_TEST_DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
    hasten()
    turn, workers = map(int, told.worker.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    with told.out.open("a") as file:

        def say(**line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        dealt = cases(told.small, told.bundle)
        say(total=len(dealt))
        for number, (name, check) in enumerate(dealt.items()):
            if number % workers != turn or number < told.after:
                continue
            say(number=number, case=name, begins=True)
            start = time.monotonic()
            found: dict[str, object] = {"right": True}
            broken = False
            try:
                torch.manual_seed(number)
                found["units_in_the_last_place"] = check()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except Impossible as why:
                found = {"right": None, "why": str(why)}
            except Exception as error:
                found = {"right": False, "why": f"{type(error).__name__}: {error}"[:1000]}
                broken = not _alive()
            say(number=number, case=name, seconds=round(time.monotonic() - start, 2), **found)
            if broken:
                os._exit(1)


def _alive() -> bool:
    """Whether the device still computes; after an illegal access none of a process's calls do."""
    if not torch.cuda.is_available():
        return True
    try:
        return float(torch.ones(1, device="cuda").sum()) == 1
    except Exception:
        return False


class Worker:
    """One process that checks a share of the cases, started again where a case ended it."""

    MODULE = ("-m", "gpu_steps.right")

    def __init__(self, step: Step, turn: int, workers: int, folder: Path) -> None:
        self.lines = folder / f"{turn}.jsonl"
        self._command = [
            *(sys.executable, *self.MODULE, "--out", str(self.lines)),
            *("--seconds", "0", "--worker", f"{turn}/{workers}"),
            *(["--small"] if step.small else []),
            *(["--bundle", str(step.bundle)] if step.bundle else []),
        ]
        self._read = 0
        self.total = 0  # cases of all processes
        self.begun: tuple[int, str] | None = None
        self.process = self._start(0)

    def _start(self, after: int) -> subprocess.Popen:
        return subprocess.Popen([*self._command, "--after", str(after)])

    def news(self) -> list[dict[str, Any]]:
        """Lines about cases that ended since the last call; restarts the process if it must."""
        code = self.process.poll()
        found = []
        if self.lines.exists():
            text = self.lines.read_text()[self._read :]
            whole = text[: text.rfind("\n") + 1]
            self._read += len(whole)
            for line in map(json.loads, whole.splitlines()):
                if "total" in line:
                    self.total = line["total"]
                elif line.pop("begins", False):
                    self.begun = (line["number"], line["case"])
                else:
                    self.begun = None
                    found.append(line)
                    last = line["number"]
        if code and self.begun is not None:  # it died inside a case
            number, case = self.begun
            found.append(
                {"number": number, "case": case, "right": False, "why": f"exit code {code}"}
            )
            self.begun = None
            self.process = self._start(number + 1)
        elif code and found:
            self.process = self._start(last + 1)
        elif code:
            found.append(
                {"number": -1, "case": "a process", "right": False, "why": f"exit code {code}"}
            )
        return found

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.process.poll() is not None


def run(step: Step) -> None:
    """Deal the cases out, and note each one's result as it comes."""
    workers = max(1, min(WORKERS_AT_MOST, (os.cpu_count() or 1) // 2 if step.on_gpu else 2))
    step.put("workers", workers)
    with tempfile.TemporaryDirectory() as folder:
        busy = all_of_them = [Worker(step, n, workers, Path(folder)) for n in range(workers)]
        try:
            while busy and step.left > 0:
                time.sleep(0.2)
                ended = [worker for worker in busy if worker.ended]
                for worker in busy:
                    for line in worker.news():
                        _note(step, line)
                busy = [worker for worker in busy if worker not in ended or not worker.ended]
                now = [worker.begun[1] for worker in busy if worker.begun]
                if now and step.content["doing"] != "; ".join(now):
                    step.doing("; ".join(now))
        finally:
            for worker in busy:
                worker.process.kill()
                worker.process.wait()
        for worker in busy:
            if worker.begun:
                step.skip(worker.begun[1], "it had not ended when the time was up")
    checked = step.content.get("cases", [])
    total = max(worker.total for worker in all_of_them)
    step.put(
        "summary",
        {
            "right": sum(line["right"] is True for line in checked),
            "wrong": sum(line["right"] is False for line in checked),
            "not checked": sum(line["right"] is None for line in checked),
            "not reached": max(0, total - len(checked)),
        },
    )


def _note(step: Step, line: dict[str, Any]) -> None:
    step.add("cases", line)
    if line["right"] is False:
        step.fault(line["case"], line["why"])
    elif line["right"] is None:
        step.skip(line["case"], line["why"])


if __name__ == "__main__":
    parser = step.arguments("right")
    parser.add_argument("--worker")
    parser.add_argument("--after", type=int, default=0)
    told = parser.parse_args()
    if told.worker:
        work(told)
    else:
        step.main("right", run)
