"""What it costs to serve a store whose bases do not fit.

A store of 2,000 clusters of rank 16 for SmolLM2-135M's q, k and v is served with room for the bases
of 100. A closed loop keeps so many requests in the system that twice as many wait as run: random
prompts, ten new tokens, one request after another of a fixed schedule. Clusters are drawn

- uniformly, or by Zipf's law, from all; adapters uniformly from the cluster;
- `fits`: uniformly from as many as there is room for but for a few: nothing is paged in.

They are measured on one engine, round after round; then, with `--resident`, on an engine that has
all bases resident (about 9 GB of memory). Prints JSON. One command:

    python benchmarks/paged_bases.py --work out/paged --out out/paged_bases.json

The first time it writes the store (5.9 GB, some minutes). On a machine that others use, too, let
vLLM compute with one thread: `OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind`.
"""

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import typer
from engine_process import in_process

from vllm_jd.demo.smollm2 import ensure_smollm2

EACH, RANK = 8, 16
SEQUENCES, IN_SYSTEM = 32, 96
PROMPT, NEW = 64, 10
ZIPF = 1.0
SPARE = 4  # clusters of `fits` less than there is room for


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    clusters: Annotated[int, typer.Option(min=10)] = 2000,
    room: Annotated[int, typer.Option(help="Clusters whose bases have room at once.")] = 100,
    requests: Annotated[int, typer.Option(min=64, help="Of one run.")] = 160,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    resident: Annotated[bool, typer.Option(help="Also with all bases resident.")] = True,
) -> None:
    model = ensure_smollm2()
    store = work / f"store-{clusters}"
    if not (store / "CURRENT").exists():
        from random_store import write_random_store

        write_random_store(model, store, clusters * EACH, clusters, rank=RANK)
    job: dict[str, Any] = {
        "model": str(model),
        "store": str(store),
        "clusters": clusters,
        "requests": requests,
        "rounds": rounds,
    }
    parts = {"paged": {"room": room, "traffics": ["fits", *TRAFFICS]}}
    if resident:
        parts["resident"] = {"room": None, "traffics": TRAFFICS}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "settings": {
            "clusters": clusters,
            "room": room,
            "rank": RANK,
            "sequences": SEQUENCES,
            "in_system": IN_SYSTEM,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "requests": requests,
            "zipf": ZIPF,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        load = [round(each, 1) for each in os.getloadavg()]
        result[name] = in_process(__file__, job | part) | {"load_before": load}
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


TRAFFICS = ["uniform", "zipf"]


def schedule(traffic: str, clusters: int, room: int, count: int, seed: int) -> list[int]:
    """The adapter of each request, the same for the same arguments."""
    rng = np.random.default_rng([seed, count, clusters])
    if traffic == "fits":
        chosen = rng.integers(room - SPARE, size=count)
    elif traffic == "uniform":
        chosen = rng.integers(clusters, size=count)
    else:
        weights = np.arange(1, clusters + 1) ** -ZIPF
        # Often asked for does not mean written first.
        names = np.random.default_rng(0).permutation(clusters)
        chosen = names[rng.choice(clusters, size=count, p=weights / weights.sum())]
    return (chosen * EACH + rng.integers(EACH, size=count)).tolist()


def run(job_file: Path, result_file: Path) -> None:
    """Measure one engine; what `in_process` starts."""
    from vllm import LLM

    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    job = json.loads(job_file.read_text())
    store = Store.open(job["store"], verify=False)
    paged = job["room"] is not None
    # Cores get a tenth of what there is (`vllm_jd.plugin.engine.capacity`).
    basis = 2 * RANK * sum(m.d_in + m.d_out for m in store.manifest.modules)
    memory = int((job["room"] + 0.5) * basis / 0.9) if paged else None
    engine = LLM(
        job["model"],
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        **engine_args(job["store"], max_num_seqs=SEQUENCES, adapter_memory=memory),
    ).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    slots = {c.rank: c.count for c in scheduler.adapters.capacity.bases["v"]}
    room = min(slots[RANK], job["clusters"])
    runs: list[dict[str, Any]] = []

    def warm(traffic: str, seed: int) -> None:
        """Leave the slots as they are in the long run."""
        adapters = schedule(traffic, job["clusters"], room, 2 * room if paged else 8, 1000 + seed)
        if traffic == "fits":  # each of its clusters once
            adapters = [c * EACH for c in range(room - SPARE)]
        closed_loop(engine, store, adapters, seed, prompt=4, new=1)

    def measure(traffic: str, seed: int) -> dict[str, Any]:
        fills = scheduler.adapters.residency.fills
        before = Counter(fills)
        adapters = schedule(traffic, job["clusters"], room, job["requests"], seed)
        measured = closed_loop(engine, store, adapters, seed)
        paged_in = {kind: fills[kind] - before[kind] for kind in ("basis", "adapter")}
        return {"traffic": traffic, "fills": paged_in} | measured

    for traffic in job["traffics"]:
        for seed in range(job["rounds"]):
            warm(traffic, seed)
            runs.append(measure(traffic, seed) | {"round": seed})
            print(summarise(runs[-1:]), file=sys.stderr, flush=True)
    summary = summarise(runs)
    result_file.write_text(
        json.dumps({"slots": room, "memory": memory, "summary": summary, "runs": runs})
    )


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each traffic, all rounds together."""
    rows = []
    for traffic in dict.fromkeys(each["traffic"] for each in runs):
        its = [each for each in runs if each["traffic"] == traffic]
        waits = [wait for each in its for wait in each["ttft_s"]]
        rows.append(
            {
                "traffic": traffic,
                "requests_per_s": [each["requests_per_s"] for each in its],
                "ttft_p50_s": round(float(np.percentile(waits, 50)), 2),
                "ttft_p99_s": round(float(np.percentile(waits, 99)), 2),
                "clusters_paged_in": [each["fills"]["basis"] // 2 for each in its],
            }
        )
    return rows


def closed_loop(
    engine: Any,
    store: Any,
    adapters: Sequence[int],
    seed: int,
    *,
    prompt: int = PROMPT,
    new: int = NEW,
) -> dict[str, Any]:
    """Requests for these adapters in this order, `IN_SYSTEM` at once."""
    from vllm import SamplingParams

    from vllm_jd.plugin.api.requests import adapter_request

    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new)
    left = list(enumerate(adapters))[::-1]
    began: dict[str, float] = {}
    first: dict[str, float] = {}
    done = 0
    steps: list[float] = []
    start = time.perf_counter()
    while done < len(adapters):
        while left and len(began) - done < IN_SYSTEM:
            number, adapter = left.pop()
            tokens = rng.integers(1000, 40000, size=prompt).tolist()
            lora = adapter_request(store, store.names[adapter])
            engine.add_request(str(number), {"prompt_token_ids": tokens}, params, lora_request=lora)
            began[str(number)] = time.perf_counter()
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        steps.append(now - before)
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id.split("-")[0], now)
            if output.finished:
                reason = output.outputs[0].finish_reason
                if reason != "length":
                    raise RuntimeError(f"request {output.request_id} ended with {reason!r}")
                done += 1
    took = time.perf_counter() - start
    # Not of the first, which no queue stood before.
    waits = [first[str(i)] - began[str(i)] for i in range(SEQUENCES, len(adapters))]
    if not waits:
        return {}
    return {
        "requests_per_s": round(len(adapters) / took, 3),
        "ttft_s": [round(wait, 3) for wait in waits],
        "step_p50_ms": round(statistics.median(steps) * 1e3, 1),
        "steps": len(steps),
        "seconds": round(took, 1),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
