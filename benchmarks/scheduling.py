"""Does it pay to let requests whose cluster is in the batch go first? A SIMULATION, no server runs.

The order of admission is that of the plugin (`vllm_jd.plugin.cluster_order`); time is a model. What
a step of n tokens and c clusters takes is measured here first, with the real CPU kernel and real
GEMMs of a model's shapes on one thread:

    step = GEMMs(n) + call + per_token · n + per_cluster · c

The GEMMs are all linear layers and, for each sequence, the output head. Attention, norms, sampling
and vLLM's own work are left out: they take the same time in any order, so a server gains less than
is shown here. Requests have 88 prompt tokens and 1 to 2·m − 1 new ones, m in the mean, and arrive
at random (Poisson) at a multiple of what first come, first served gets through. Prompts are
computed in one step, as many as fit into the step's tokens. Each window sees the same arrivals.
Prints JSON, draws a figure. One command:

    python benchmarks/scheduling.py --out out/scheduling.json
"""

import heapq
import json
import math
import statistics
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import machine
import matplotlib
import numpy as np
import torch
import typer
from rich.console import Console
from scipy.optimize import nnls

from vllm_jd.kernels import ModulePools
from vllm_jd.kernels.cpu import backend as cpu
from vllm_jd.plugin.cluster_order import ClusterOrder
from vllm_jd.row import CORE_FULL, ROW_FIELDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

console = Console(stderr=True)

RANK = 16
ADAPTERS = 1024
PROMPT = 88
BATCH = 32  # sequences of a step
STEP_TOKENS = 2048
WINDOWS = (0, 8, 32, 128)
LOADS = (0.7, 0.95, 1.3)
ZIPF = 1.0

DECODE = (8, 16, 32, 64)
CLUSTERS = (1, 2, 4, 8, 16, 25)
PREFILL = (128, 256)


@dataclass(frozen=True)
class Model:
    """Shapes of a model: `others` are the linear layers beside q, k, v, as (d_in, d_out)."""

    layers: int
    timed_layers: int
    hidden: int
    qkv: tuple[int, ...]
    others: tuple[tuple[int, int], ...]
    head: int


MODELS = {
    "SmolLM2-135M": Model(
        30, 10, 576, (576, 192, 192), ((576, 576), (576, 3072), (1536, 576)), 49152
    ),
    "Mistral-7B": Model(
        32, 2, 4096, (4096, 1024, 1024), ((4096, 4096), (4096, 28672), (14336, 4096)), 32000
    ),
}


# ---------------------------------------------------------------- what a step takes


@dataclass(frozen=True)
class Cost:
    """What a step takes, in milliseconds."""

    tokens: list[int]
    gemms: list[float]
    """All linear layers, at so many tokens."""
    head: float
    """The output head, per sequence."""
    call: float
    per_token: float
    per_cluster: float
    points: list[dict[str, float]] = field(repr=False)
    """What the kernel's three numbers were fitted to."""

    def table(self) -> np.ndarray:
        """Without clusters and head, for 0 … STEP_TOKENS tokens; beyond the last measured point
        the line through the last two goes on."""
        n = np.arange(STEP_TOKENS + 1)
        slope = (self.gemms[-1] - self.gemms[-2]) / (self.tokens[-1] - self.tokens[-2])
        beyond = np.maximum(n - self.tokens[-1], 0) * slope
        gemms = np.interp(n, self.tokens, self.gemms) + beyond
        return gemms + self.call + self.per_token * n


def make_pools(model: Model) -> list[ModulePools]:
    """The q, k, v layers' bases and cores, adapter a in cluster a % clusters."""
    clusters, slices = max(CLUSTERS), len(model.qkv)
    cores = torch.randn(ADAPTERS, model.timed_layers * slices * RANK**2).bfloat16()
    cluster = torch.arange(ADAPTERS) % clusters
    pools = []
    for layer in range(model.timed_layers):
        rows = torch.zeros(ADAPTERS, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
        for s in range(slices):
            offset = (layer * slices + s) * RANK**2
            fields = [(s * clusters + cluster) * RANK, cluster * RANK, RANK]
            fields += [CORE_FULL, -1, torch.arange(ADAPTERS), offset]
            for i, value in enumerate(fields):
                rows[:, s, 0, i] = value
        v = torch.randn(slices * clusters * RANK, model.hidden).bfloat16()
        u = [torch.randn(clusters * RANK, width).bfloat16() for width in model.qkv]
        pools.append(ModulePools(v, u, cores, rows))
    return pools


def draw_slots(tokens: int, clusters: int) -> torch.Tensor:
    """Adapters of a step: one a decoded token or prompt, exactly `clusters` clusters among them."""
    count = tokens if tokens <= max(DECODE) else max(1, tokens // PROMPT)
    step = max(CLUSTERS)
    places = torch.randperm(ADAPTERS // step)[:count] if count <= ADAPTERS // step else None
    rows = places if places is not None else torch.randint(ADAPTERS // step, (count,))
    chosen = torch.randperm(step)[:clusters]
    slots = rows * step + chosen[torch.arange(count) % clusters]
    slots = slots[torch.randperm(count)]
    return slots.repeat_interleave(math.ceil(tokens / count))[:tokens].int()


def measure(model: Model, seconds: float) -> Cost:
    """Time the GEMMs and the kernel layer by layer, as a step runs through them."""
    pools = make_pools(model)
    shapes = [(model.hidden, sum(model.qkv)), *model.others]
    layers = [
        [torch.randn(d_out, d_in, dtype=torch.bfloat16) for d_in, d_out in shapes] for _ in pools
    ]
    head = torch.randn(model.head, model.hidden, dtype=torch.bfloat16)
    inputs = {d_in: torch.randn(max(PREFILL), d_in).bfloat16() for d_in, _ in shapes}
    cases = [(n, c) for n, c in product(DECODE, CLUSTERS) if c <= n]
    cases += [(n, n // PROMPT) for n in PREFILL]
    gemms: dict[int, list[float]] = {}
    kernel: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    heads: list[float] = []
    scale = model.layers / model.timed_layers
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(heads) < 3:
        for tokens, clusters in cases:
            slots = draw_slots(tokens, clusters)
            base = added = 0.0
            for weights, layer_pools in zip(layers, pools, strict=True):
                start = time.perf_counter()
                qkv = torch.nn.functional.linear(inputs[model.hidden][:tokens], weights[0])
                between = time.perf_counter()
                cpu.add_adapters(qkv, inputs[model.hidden][:tokens], layer_pools, slots)
                after = time.perf_counter()
                for weight in weights[1:]:
                    torch.nn.functional.linear(inputs[weight.shape[1]][:tokens], weight)
                base += time.perf_counter() - after + between - start
                added += after - between
            gemms.setdefault(tokens, []).append(base * scale * 1e3)
            kernel[tokens, clusters].append(added * scale * 1e3)
        start = time.perf_counter()
        torch.nn.functional.linear(inputs[model.hidden][:BATCH], head)
        heads.append((time.perf_counter() - start) * 1e3 / BATCH)
    took = {case: statistics.median(times) for case, times in kernel.items()}
    call, per_token, per_cluster = fit(took)
    tokens = sorted(gemms)
    points = [
        {
            "tokens": n,
            "clusters": c,
            "kernel_ms": round(ms, 3),
            "fitted_ms": round(call + per_token * n + per_cluster * c, 3),
        }
        for (n, c), ms in took.items()
    ]
    return Cost(
        tokens=tokens,
        gemms=[round(statistics.median(gemms[n]), 3) for n in tokens],
        head=statistics.median(heads),
        call=call,
        per_token=per_token,
        per_cluster=per_cluster,
        points=points,
    )


def fit(took: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    """call, per_token and per_cluster (none negative) of the decode steps, by least squares."""
    rows = [(1, n, c, ms) for (n, c), ms in took.items() if n in DECODE]
    matrix = np.array(rows, dtype=float)
    found, _ = nnls(matrix[:, :3], matrix[:, 3])
    return tuple(float(value) for value in found)


# ---------------------------------------------------------------- the simulation


class Request(NamedTuple):
    number: int
    cluster: int
    arrival: float
    new_tokens: int


class Outcome(NamedTuple):
    """Of one run, seconds."""

    requests_per_second: float
    latency: np.ndarray
    wait: np.ndarray
    clusters_per_step: float
    overtaken: int


def draw_requests(
    count: int, clusters: int, popularity: str, new_tokens: int, rate: float, seed: int
) -> list[Request]:
    """`rate` in requests a second; `inf`: all are there at the start."""
    rng = np.random.default_rng(seed)
    cluster_of = rng.permutation(np.arange(ADAPTERS) % clusters)
    weights = np.ones(ADAPTERS) if popularity == "uniform" else np.arange(1, ADAPTERS + 1) ** -ZIPF
    adapters = rng.choice(ADAPTERS, count, p=weights / weights.sum())
    lengths = rng.integers(1, 2 * new_tokens, count)
    gaps = rng.exponential(1.0, count)
    arrivals = np.zeros(count) if math.isinf(rate) else np.cumsum(gaps) / rate
    found = zip(cluster_of[adapters], arrivals, lengths, strict=True)
    return [Request(i, int(c), float(a), int(n)) for i, (c, a, n) in enumerate(found)]


def simulate(requests: list[Request], cost: Cost, window: int) -> Outcome:
    """Run all requests to their end."""
    table = cost.table() / 1e3
    head, per_cluster = cost.head / 1e3, cost.per_cluster / 1e3
    order: ClusterOrder[Request] = ClusterOrder(window, lambda request: request.cluster)
    coming, waiting = deque(requests), deque()
    running: dict[int, Request] = {}
    ends: list[tuple[int, int]] = []  # (the step after a request's last, its number)
    present: Counter[int] = Counter()
    overtaken = np.zeros(len(requests), dtype=int)
    wait, latency = np.zeros(len(requests)), np.zeros(len(requests))
    now, step, cluster_steps = 0.0, 0, 0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            waiting.append(coming.popleft())
        room = BATCH - len(running)
        room = min(room, (STEP_TOKENS - len(running)) // PROMPT)
        admitted = admit(order, waiting, running, room, overtaken)
        for request in admitted:
            wait[request.number] = now - request.arrival
            running[request.number] = request
            present[request.cluster] += 1
            heapq.heappush(ends, (step + request.new_tokens, request.number))
        tokens = len(running) + len(admitted) * (PROMPT - 1)
        here = len(present)
        took = table[tokens] + head * len(running) + per_cluster * here
        # Steps that only decode are alike until one ends, or starts.
        steps = 1
        if not admitted:
            steps = ends[0][0] - step
            if coming and room > 0 and not waiting:
                steps = min(steps, max(1, math.ceil((coming[0].arrival - now) / took)))
        now += took * steps
        step += steps
        cluster_steps += here * steps
        while ends and ends[0][0] <= step:
            request = running.pop(heapq.heappop(ends)[1])
            latency[request.number] = now - request.arrival
            present[request.cluster] -= 1
            if not present[request.cluster]:
                del present[request.cluster]
    return Outcome(
        len(requests) / now, latency, wait, cluster_steps / step, int(overtaken.max(initial=0))
    )


def admit(
    order: ClusterOrder[Request],
    waiting: deque[Request],
    running: dict[int, Request],
    room: int,
    overtaken: np.ndarray,
) -> list[Request]:
    """Take up to `room` requests out of `waiting`, in the plugin's order."""
    if not waiting or room <= 0:
        return []
    # Nobody further back is looked at: the queue may be long.
    head = list(islice(waiting, room + order.window))
    admitted = order.arrange(head, running.values(), room)[:room]
    chosen = set(admitted)
    left = [request for request in head if request not in chosen]
    for _ in head:
        waiting.popleft()
    waiting.extendleft(reversed(left))
    order.record(head, set(left))
    for request in left:
        overtaken[request.number] += sum(other.number > request.number for other in admitted)
    return admitted


# ---------------------------------------------------------------- the report


def compare(
    cost: Cost, clusters: int, popularity: str, new_tokens: int, count: int, seeds: int
) -> list[dict[str, Any]]:
    """All loads and windows of one setting: means over the seeds, ratios to window 0.

    `ceiling_ratio`: what requests a second could grow by if all adapters were in one cluster, with
    all requests there at the start.
    """

    setting = (count, clusters, popularity, new_tokens)

    def run(rate: float, window: int, seed: int) -> Outcome:
        return simulate(draw_requests(*setting, rate, seed), cost, window)

    capacity = run(math.inf, 0, 0).requests_per_second
    # No order can do better than this: all in one cluster.
    alike = [request._replace(cluster=0) for request in draw_requests(*setting, math.inf, 0)]
    ceiling = simulate(alike, cost, 0).requests_per_second / capacity
    rows = []
    for load in LOADS:
        outcomes = {w: [run(load * capacity, w, s) for s in range(seeds)] for w in WINDOWS}
        first = None
        for window, runs in outcomes.items():
            found = {
                "requests_per_second": statistics.fmean(r.requests_per_second for r in runs),
                "latency_p50": statistics.fmean(np.percentile(r.latency, 50) for r in runs),
                "latency_p99": statistics.fmean(np.percentile(r.latency, 99) for r in runs),
                "wait_p99": statistics.fmean(np.percentile(r.wait, 99) for r in runs),
                "wait_max": max(float(r.wait.max()) for r in runs),
            }
            first = first or found
            ratios = {
                f"{key}_ratio": round(value / first[key], 4) if first[key] else None
                for key, value in found.items()
            }
            rows.append(
                {
                    "clusters": clusters,
                    "popularity": popularity,
                    "new_tokens": new_tokens,
                    "load": load,
                    "window": window,
                    "clusters_per_step": round(
                        statistics.fmean(r.clusters_per_step for r in runs), 2
                    ),
                    "ceiling_ratio": round(ceiling, 4),
                    "most_overtaken": max(r.overtaken for r in runs),
                }
                | {key: float(f"{value:.5g}") for key, value in found.items()}
                | ratios
            )
            assert rows[-1]["most_overtaken"] <= window
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput in overload and latency below it, against the window."""
    panels = [
        ("requests_per_second_ratio", max(LOADS), "requests a second"),
        ("latency_p50_ratio", 0.95, "median latency"),
        ("latency_p99_ratio", 0.95, "99th percentile of latency"),
    ]
    figure, axes = plt.subplots(
        len(MODELS), len(panels), figsize=(11, 6), sharex=True, layout="constrained"
    )
    labels = [str(window) for window in WINDOWS]
    for (model, row), (key, load, title) in product(zip(MODELS, axes, strict=True), panels):
        axis = row[[panel[0] for panel in panels].index(key)]
        axis.axhline(1, color="0.6", linewidth=0.8)
        for (clusters, popularity), colour in zip(
            product((25, 64), ("uniform", "zipf")), plt.cm.tab10.colors, strict=False
        ):
            for new_tokens, style in ((10, "--"), (100, "-")):
                found = [
                    r[key]
                    for r in rows
                    if (r["model"], r["clusters"], r["popularity"], r["new_tokens"], r["load"])
                    == (model, clusters, popularity, new_tokens, load)
                ]
                name = f"{clusters} clusters, {popularity}, {new_tokens} new tokens"
                axis.plot(labels, found, style, marker=".", color=colour, label=name)
        axis.set_title(f"{model}: {title}\nat {load:g} × capacity", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("window")
    for axis in axes[:, 0]:
        axis.set_ylabel("ratio to first come, first served")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("Cluster-aware admission: a simulation with measured costs of a step")
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="JSON file; the figure lies beside it.")] = Path(
        "out/scheduling.json"
    ),
    requests: Annotated[int, typer.Option(min=100, help="Requests of each run.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 2,
    seconds: Annotated[float, typer.Option(help="For timing each model's step.")] = 8.0,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not cpu.is_available():
        console.print("the CPU kernel could not be built: there is nothing to measure")
        raise typer.Exit(1)
    costs: dict[str, Cost] = {}
    rows = []
    for name, model in MODELS.items():
        console.print(f"timing {name} …")
        cost = costs[name] = measure(model, seconds)
        console.print(
            f"  {cost.gemms[cost.tokens.index(BATCH)] + BATCH * cost.head:.1f} ms of GEMMs at "
            f"{BATCH} tokens, {cost.per_cluster:.3f} ms a cluster, {cost.per_token:.3f} ms a token"
        )
        for clusters, popularity, new_tokens in product((25, 64), ("uniform", "zipf"), (10, 100)):
            found = compare(cost, clusters, popularity, new_tokens, requests, seeds)
            rows += [{"model": name} | row for row in found]
    report = {
        "what": "a simulation: no server ran; see the head of benchmarks/scheduling.py",
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {"torch": torch.__version__, "vllm-jd": version("vllm-jd")},
        "isa": cpu.isa(),
        "setting": {
            "adapters": ADAPTERS,
            "rank": RANK,
            "batch": BATCH,
            "step_tokens": STEP_TOKENS,
            "prompt_tokens": PROMPT,
            "zipf": ZIPF,
            "requests": requests,
            "seeds": seeds,
        },
        "costs_ms": {name: asdict(cost) for name, cost in costs.items()},
        "results": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, out.with_suffix(".png"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
