"""Step `limit`: how far the kernels are from what this GPU can do, and vLLM's beside them.

First what it can do: bytes a second of a copy, operations a second of a matrix product. Then each
layer of the models, each after the caches were filled with other data: our call, the layer's own
product, and vLLM's kernels with as many adapters as take the memory of ours.
"""

import os
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from shapes import LLAMA, MISTRAL, Layer, slots_of_equal_memory

from gpu_steps import stock
from gpu_steps.layers import (
    ADAPTERS,
    CLUSTERS,
    RANK,
    draw,
    make_pools,
    our_call,
    stock_call,
)
from gpu_steps.step import Call, Flush, Step, alternate, main, recorded, summary
from gpu_steps.traffic import least
from vllm_jd.kernels.triton import backend

TOKENS = (32, 1, 256, 8, 2048, 64, 128)  # the first ones tell most
LAYERS = 4  # a graph has so many, each with pools of its own; 1 where there is no GPU
ROUNDS = 25
SECONDS_OF_A_CELL = 1.5  # about, with compiling


def run(step: Step) -> None:
    """Measure, the most telling first."""
    ops = stock.load(step.bundle)
    step.put("vllm", stock.packed_version(step.bundle))
    if ops is None:
        step.skip("vLLM's kernels", "no bundle with them (make gpu-first-bundle)")
    step.doing("copy and matrix product")
    limits = machine_limits(step)
    step.put("limits", limits)
    flush = Flush(step.device)
    if step.enough(5, "launches without work"):
        step.put("launch", launches(step, flush))
    for tokens in (2,) if step.small else TOKENS:
        for model, layer in layers(step):
            what = f"{model} {layer.name}, {tokens} tokens"
            if not step.enough(SECONDS_OF_A_CELL, what):
                continue
            try:
                step.add("cells", cell(step, model, layer, tokens, ops, flush, limits))
            except Exception as error:  # one that does not launch must not hide the others
                step.fault(what, error)
                if step.on_gpu:
                    torch.cuda.synchronize()  # raises, and so ends the step, if the device is gone


def layers(step: Step) -> list[tuple[str, Layer]]:
    if step.small:
        return [("tiny", Layer("qkv", 64, (64, 32, 32)))]
    found = [("Mistral-7B", layer) for layer in MISTRAL.linear().values()]
    return found + [("Llama-3-70B TP 8", layer) for layer in LLAMA.linear(8).values()]


def machine_limits(step: Step) -> dict[str, Any]:
    """What the device reaches: bytes a second of a copy and of reading, operations a second."""
    size, n, rounds = (1 << 20, 64, 2) if step.small else (4 << 30, 8192, 10)
    like = {"dtype": torch.bfloat16, "device": step.device}
    source = torch.empty(size // 2, **like).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, **like) for _ in range(2))
    c = torch.empty_like(a)
    times = alternate(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: source.view(torch.int64).sum(),
            "product": lambda: torch.mm(a, b, out=c),
        },
        step.device,
        rounds,
    )
    copy, read, product = (summary(times[name]) for name in ("copy", "read", "product"))
    return {
        "copy_bytes_per_second": 2e6 * size / copy["median"],
        "read_bytes_per_second": 1e6 * size / read["median"],
        "flops_per_second": 2e6 * n**3 / product["median"],
        "microseconds": {"copy": copy, "read": read, "product": product},
        "bytes": size,
        "n": n,
    }


def launches(step: Step, flush: Flush) -> dict[str, Any]:
    """A call in which no token has an adapter: what launches cost, without and with dependent
    launches (VLLM_JD_PDL)."""
    layer = layers(step)[0][1]
    none = torch.full((8,), -1, dtype=torch.int32, device=step.device)
    times = {"empty": recorded([flush] * copies(step), step.device)}
    counts = 0
    for name, pdl in (("plain", "0"), ("dependent", "1")):
        os.environ["VLLM_JD_PDL"] = pdl
        pools = [_pools(step, layer) for _ in range(copies(step))]
        calls = [our_call(layer, 8, part, None, none, None)[0] for part in pools]
        counts = len(backend.plan_of(pools[0], 8).launches)
        times[name] = recorded(between(flush, calls), step.device)
    del os.environ["VLLM_JD_PDL"]
    found = net(alternate(times, step.device, _rounds(step)), copies(step))
    return {"launches": counts, "microseconds": found}


def copies(step: Step) -> int:
    return LAYERS if step.on_gpu else 1


def _rounds(step: Step) -> int:
    return ROUNDS if step.on_gpu else 1


def settings(step: Step) -> tuple[int, int, int]:
    """(adapters, rank, clusters)."""
    return (12, 4, 3) if step.small else (ADAPTERS, RANK, CLUSTERS)


def _dtype(step: Step) -> torch.dtype:
    # The interpreter's dot product, which vLLM's kernels use as it is, has no bfloat16.
    return torch.bfloat16 if step.on_gpu else torch.float16


def _pools(step: Step, layer: Layer) -> Any:
    adapters, rank, clusters = settings(step)
    return make_pools(layer, adapters, rank, clusters, step.device, _dtype(step))


def between(flush: Flush, calls: list[Call]) -> list[Call]:
    return [part for call in calls for part in (flush, call)]


def net(times: dict[str, list[float]], calls: int) -> dict[str, dict[str, float]]:
    """Microseconds of one call, without what `empty` takes in the same round."""
    empty = times.pop("empty")
    return {
        name: summary([(t - e) / calls for t, e in zip(taken, empty, strict=True)])
        for name, taken in times.items()
    }


def cell(
    step: Step,
    model: str,
    layer: Layer,
    tokens: int,
    ops: Any,
    flush: Flush,
    limits: dict[str, Any],
) -> dict[str, Any]:
    """One layer at one number of tokens: all systems, and what they are measured against."""
    adapters, rank, clusters = settings(step)
    dtype = _dtype(step)
    slots, order = draw(tokens, adapters, step.device, clusters=clusters)
    graphs: dict[str, Call] = {"empty": recorded([flush] * copies(step), step.device)}
    kept: list[Any] = []  # graphs read them

    pools = [_pools(step, layer) for _ in range(copies(step))]
    ours = [our_call(layer, tokens, part, None, slots, order) for part in pools]
    kept.append((pools, ours))
    graphs["ours"] = recorded(between(flush, [call for call, *_ in ours]), step.device)

    if step.on_gpu and layer == layers(step)[0][1]:
        # The same numbers, and launches that wait for the end of the one before them.
        os.environ["VLLM_JD_PDL"] = "0"
        twins = [our_call(layer, tokens, replace(part), None, slots, order) for part in pools]
        del os.environ["VLLM_JD_PDL"]
        kept.append(twins)
        calls = between(flush, [call for call, *_ in twins])
        graphs["ours, plain launches"] = recorded(calls, step.device)

    like = {"dtype": dtype, "device": step.device}
    weights = [torch.randn(sum(layer.d_out), layer.d_in, **like) for _ in range(copies(step))]
    x, y = ours[0][1], torch.empty(tokens, sum(layer.d_out), **like)
    base = [lambda w=w: torch.mm(x, w.T, out=y) for w in weights]
    graphs["base"] = recorded(between(flush, base), step.device)

    room = slots_of_equal_memory(
        [(layer.d_in, width) for width in layer.d_out], adapters, rank, clusters
    )
    max_loras = ceil(room)
    if ops is not None:
        ops.forget()
        stocks = [
            stock_call(
                *(ops, layer, tokens, max_loras, step.device, dtype, slots), specialised=False
            )
            for _ in range(copies(step))
        ]
        kept.append(stocks)
        graphs["stock"] = recorded(between(flush, [call for call, *_ in stocks]), step.device)
    found = net(alternate(graphs, step.device, _rounds(step)), copies(step))
    del graphs, kept
    plan = backend.plan_of(pools[0], tokens, places=len(order))
    drawn = slots.tolist()
    in_order = [drawn[token] if token >= 0 else -1 for token in order.tolist()]
    moved, flops = least(plan, drawn if plan.variant == "rows" else in_order, clusters, rank)
    microseconds = found["ours"]["median"]
    floor = 1e6 * max(moved / limits["copy_bytes_per_second"], flops / limits["flops_per_second"])
    distinct = len(set(drawn))
    return {
        "model": model,
        "layer": layer.name,
        "tokens": tokens,
        "adapters": distinct,
        "clusters": len({slot % clusters for slot in drawn}),
        "variant": plan.variant,
        "launches": len(plan.launches),
        "bytes": moved,
        "flops": flops,
        "microseconds": found,
        "floor_microseconds": floor,
        "achieved": floor / microseconds,
        "of_base": microseconds / found["base"]["median"],
        "stock_slots": max_loras,
        "stock_adapters": len({slot % max_loras for slot in drawn}),
        "times_faster_than_stock": found["stock"]["median"] / microseconds if ops else None,
    }


if __name__ == "__main__":
    main("limit", run)
