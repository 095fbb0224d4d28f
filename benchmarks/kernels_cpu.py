"""Time of the CPU kernel against the linear layer that it adds to; prints JSON.

One step is the q, k, v layers of a model (default: SmolLM2-135M's 30), each with weights, bases and
cores of its own. In every layer the base GEMM and the kernel run one after the other and are timed
apart; before them, as much memory is read as the layer's other weights take, so that the caches are
as cold as in a model. `cpu` is the kernel as it is served: with packed bases where the processor
takes them, and `cpu_int8` with those of a quantised store; `rows` is the same kernel with the bases
as rows, `int8` as rows in 8 bits. They and the torch reference get steps of their own, in turn.
"""

import argparse
import json
import statistics
import time

import torch
from packing import pack

from vllm_jd import row
from vllm_jd.kernels import Int8Rows, ModulePools, cpu, reference
from vllm_jd.kernels.cpu.packed import can_pack
from vllm_jd.row import CORE_FULL, ROW_FIELDS
from vllm_jd.store.quantise import quantise

D_IN, D_OUT, RANK = 576, (576, 192, 192), 16
OTHER_WEIGHTS_BYTES = 2 * (576 * 576 + 3 * 576 * 1536)  # o, gate, up and down
PREFILL_REQUESTS = 16


def make_layers(
    layers: int, clusters: int, adapters: int, dtype: torch.dtype
) -> tuple[list[ModulePools], torch.Tensor]:
    """Pools of each layer, adapter a in cluster a % clusters, and the base weights."""
    cores = torch.randn(adapters, layers * len(D_OUT) * RANK**2).to(dtype)
    pools = []
    for layer in range(layers):
        rows = torch.zeros(adapters, len(D_OUT), 1, len(ROW_FIELDS), dtype=torch.int32)
        for s in range(len(D_OUT)):
            cluster = torch.arange(adapters) % clusters
            rows[:, s, 0, row.V_START] = (s * clusters + cluster) * RANK
            rows[:, s, 0, row.U_START] = cluster * RANK
            rows[:, s, 0, row.RANK] = RANK
            rows[:, s, 0, row.CORE_SLOT] = torch.arange(adapters)
            rows[:, s, 0, row.CORE_OFFSET] = (layer * len(D_OUT) + s) * RANK**2
            rows[:, s, 0, row.CORE_KIND] = CORE_FULL
            rows[:, s, 0, row.SCALE_ROW] = -1
        v = torch.randn(len(D_OUT) * clusters * RANK, D_IN).to(dtype)
        u = [torch.randn(clusters * RANK, width).to(dtype) for width in D_OUT]
        pools.append(ModulePools(v, u, cores, rows))
    return pools, torch.randn(layers, sum(D_OUT), D_IN).to(dtype)


def as_packed(pools: ModulePools, clusters: int) -> ModulePools:
    """The same with packed bases."""
    cluster = pools.rows[:, 0, 0, row.U_START].long() // RANK
    first = torch.arange(clusters) * RANK
    tables = [
        torch.stack([first + s * clusters * RANK, first, torch.full_like(first, RANK)], dim=1)
        for s in range(len(D_OUT))
    ]
    v, u = pools.v_int8 or pools.v, pools.u_int8 or pools.u
    packed, starts = pack([v] * len(D_OUT), u, tables)
    rows = pools.rows.clone()
    for s, places in enumerate(starts):
        rows[:, s, 0, : row.RANK] = places[cluster]
    return ModulePools(pools.v[:1], [u[:1] for u in pools.u], pools.cores, rows, packed=packed)


def as_int8(pools: ModulePools) -> ModulePools:
    """The same with bases in 8 bits."""
    v, *u = (Int8Rows(*quantise(rows, "int8")) for rows in (pools.v, *pools.u))
    empty = pools.v[:0], [each[:0] for each in pools.u]
    return ModulePools(*empty, pools.cores, pools.rows, v_int8=v, u_int8=u)


def draw_slots(tokens: int, requests: int, adapters: int) -> torch.Tensor:
    """Slot of each token: `requests` adapters, all different, an equal share of tokens each."""
    slots = torch.randperm(adapters)[:requests].repeat_interleave(tokens // requests)
    assert slots.unique().numel() == requests and slots.numel() == tokens
    return slots.int()


def measure(
    paths: dict[str, list[ModulePools]],
    weights: torch.Tensor,
    tokens: int,
    requests: int,
    seconds: float,
) -> dict[str, float]:
    """Milliseconds a step of each path: medians over the steps that fit into `seconds`."""
    adapters = paths["cpu"][0].rows.shape[0]
    x = torch.randn(tokens, D_IN).to(weights.dtype)
    other_weights = torch.zeros(len(weights), OTHER_WEIGHTS_BYTES // 8, dtype=torch.int64)
    times: dict[str, list[float]] = {"base": []} | {name: [] for name in paths}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["cpu"]) < 5:
        slots = draw_slots(tokens, requests, adapters)
        for name, pools in paths.items():
            backend = reference if name == "reference" else cpu
            base = added = 0.0
            for layer_pools, weight, other in zip(pools, weights, other_weights, strict=True):
                other.sum()
                start = time.perf_counter()
                y = torch.nn.functional.linear(x, weight)
                between = time.perf_counter()
                backend.add_adapters(y, x, layer_pools, slots)
                added += time.perf_counter() - between
                base += between - start
            times[name].append(added * 1e3)
            times["base"].append(base * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def call_overhead(pools: ModulePools) -> float:
    """Microseconds of a call in which no token has an adapter."""
    x, y = torch.zeros(1, D_IN, dtype=pools.dtype), torch.zeros(1, sum(D_OUT), dtype=pools.dtype)
    slots = torch.full((1,), -1, dtype=torch.int32)
    repeats = 10_000
    start = time.perf_counter()
    for _ in range(repeats):
        cpu.add_adapters(y, x, pools, slots)
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--adapters", type=int, default=1024)
    parser.add_argument("--clusters", type=int, nargs="+", default=[1, 4, 25])
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if not cpu.is_available():
        parser.exit(1, "the CPU kernel could not be built: there is nothing to measure\n")
    results = []
    for clusters in options.clusters:
        dtype = getattr(torch, options.dtype)
        pools, weights = make_layers(options.layers, clusters, options.adapters, dtype)
        paths = {"cpu": pools, "rows": pools, "int8": [as_int8(each) for each in pools]}
        if can_pack(dtype):
            paths["cpu"] = [as_packed(each, clusters) for each in pools]
            paths["cpu_int8"] = [as_packed(each, clusters) for each in paths["int8"]]
        paths["reference"] = pools
        loads = [("decode", n, n) for n in options.decode]
        loads += [("prefill", n, min(n, PREFILL_REQUESTS)) for n in options.prefill]
        for phase, tokens, requests in loads:
            times = measure(paths, weights, tokens, requests, options.seconds)
            row = {"phase": phase, "tokens": tokens, "requests": requests, "clusters": clusters}
            row |= {f"{name}_ms": round(value, 3) for name, value in times.items()}
            row |= {f"{name}_to_base": round(times[name] / times["base"], 3) for name in paths}
            results.append(row)
    report = {
        "config": vars(options) | {"d_in": D_IN, "d_out": D_OUT, "rank": RANK},
        "isa": cpu.isa(),
        "torch": torch.__version__,
        "call_overhead_us": round(call_overhead(pools[0]), 2),
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
