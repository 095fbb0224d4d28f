"""Time of the Triton kernels on a GPU: every configuration of the fixed list, and each stage beside
vLLM's operators and the roofline.

Layers lie in a CUDA graph, each after the caches were filled with other data. `make gpu-check` runs
both commands and puts their tables into its report; by themselves:

    python benchmarks/kernels_gpu.py autotune --out out/autotune.json
    python benchmarks/kernels_gpu.py microbench --out out/microbench.json

Exit codes: 0; 1 some configurations did not run; 3 there is no GPU.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_check import NO_GPU_CODE, has_gpu
from gpu_steps.layers import (
    ADAPTERS,
    CLUSTERS,
    RANK,
    Call,
    candidates,
    draw,
    make_pools,
    our_call,
    stock_call,
)
from rich.console import Console
from roofline import (
    BATCHES,
    SETTINGS,
    Gpu,
    Kernel,
    cell,
    grid_rows,
    our_kernels,
    predictions,
    stock_kernels,
)
from shapes import LLAMA, MISTRAL, slots_of_equal_memory

from vllm_jd.cli.console import fail
from vllm_jd.kernels.triton.plan import CONFIGS, LayerShape, plan

console = Console(stderr=True)
app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)

TOKENS = (1, 8, 16, 32, 64, 128, 256, 2048)
LAYERS = 4  # a graph has so many, each with pools of its own
FLUSH_BYTES = 128 << 20  # read before each layer: bases are as cold as in a model
DTYPE = torch.bfloat16
TUNED = (
    *(("Mistral-7B", layer) for layer in MISTRAL.linear().values()),
    *(("Llama-3-70B TP 8", layer) for layer in LLAMA.linear(8).values()),
)
OURS, EQUAL = "vllm-jd", "vLLM, equal memory"


class Timer:
    """Times calls as a CUDA graph runs them, each after the caches were filled with other data."""

    def __init__(self) -> None:
        self._data = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
        self._sum = torch.zeros((), dtype=torch.int64, device="cuda")
        self._empty = self._milliseconds([lambda: None] * LAYERS)

    def __call__(self, calls: Sequence[Call]) -> float:
        """Microseconds of one call: the median over replays of a graph of all of them."""
        return 1e3 * (self._milliseconds(calls) - self._empty) / len(calls)

    def kernels(self, calls: Sequence[Call]) -> dict[str, float]:
        """Microseconds of each kernel of one call, by its name, from the profiler."""
        from torch.profiler import ProfilerActivity, profile

        graph = self._graph(calls)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(20):
                graph.replay()
            _synchronise()
        # A name stands once for each call, but for those of the flush.
        return {
            event.key: event.self_device_time_total / event.count
            for event in profiler.key_averages()
            if not event.key.startswith(("Memcpy", "void at::native::reduce"))
        }

    def _milliseconds(self, calls: Sequence[Call]) -> float:
        from triton.testing import do_bench

        graph = self._graph(calls)
        return do_bench(graph.replay, warmup=50, rep=200, return_mode="median")

    def _graph(self, calls: Sequence[Call]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and fills what is kept from call to call
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                torch.sum(self._data, dim=0, out=self._sum)
                call()
        return graph


def _synchronise() -> None:
    torch.cuda.synchronize()


def _need_gpu(command: str) -> None:
    if not has_gpu():
        console.print(f"[red]no CUDA GPU found: {command} measures nothing without one")
        raise typer.Exit(NO_GPU_CODE)


@app.command()
def autotune(
    out: Annotated[Path, typer.Option(help="JSON to write; a table goes beside it.")],
) -> None:
    """Time every configuration of the fixed list for a grid of shapes."""
    _need_gpu("autotune")
    timer, found = Timer(), []
    for model, layer in TUNED:
        pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda", DTYPE) for _ in range(LAYERS)]
        for tokens in TOKENS:
            slots, order = draw(tokens, ADAPTERS, "cuda")
            times: dict[str, float | str] = {}
            for name, config in candidates(tokens).items():
                try:
                    calls = [our_call(layer, tokens, p, config, slots, order)[0] for p in pools]
                    times[name] = timer(calls)
                except Exception as error:  # one that does not launch must not hide the others
                    times[name] = f"{type(error).__name__}: {error}"[:200]
            best = min((t, n) for n, t in times.items() if isinstance(t, float))[1]
            found.append({"model": model, "layer": layer.name, "tokens": tokens, "best": best}
                         | {"microseconds": times})  # fmt: skip
            print(model, layer.name, tokens, best, flush=True)
            out.write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        "## Configurations, microseconds a layer",
        "",
        f"{ADAPTERS:,} adapters, {CLUSTERS} clusters, rank {RANK}. Rows: a program for a token.",
        "",
        "| model | layer | tokens | default | best | its time | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        times = row["microseconds"]
        failed = [name for name, t in times.items() if isinstance(t, str)]
        cells = (
            *(row["model"], row["layer"], row["tokens"], _time(times[CONFIGS[0].name])),
            *(row["best"], _time(times[row["best"]]), ", ".join(failed)),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if any(isinstance(t, str) for row in found for t in row["microseconds"].values()):
        fail(f"some configurations did not run; {out} says which and why")


def _time(value: float | str) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "failed"


@app.command()
def microbench(
    out: Annotated[Path, typer.Option(help="JSON to write; a table goes beside it.")],
) -> None:
    """Time each stage, and vLLM's operators, against the roofline's numbers."""
    _need_gpu("microbench")
    from gpu_steps.stock import Ops

    gpu, timer, ops = Gpu(), Timer(), Ops()
    layer = MISTRAL.linear()["qkv"]
    pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda", DTYPE) for _ in range(LAYERS)]
    room = slots_of_equal_memory(
        [(layer.d_in, width) for width in layer.d_out], ADAPTERS, RANK, CLUSTERS
    )
    systems = {
        EQUAL: (ceil(room), False),
        "vLLM, all resident": (ADAPTERS, False),
        "vLLM, all resident, specialised": (ADAPTERS, True),
    }
    rows, stages = [], []
    for tokens in TOKENS:
        slots, order = draw(tokens, ADAPTERS, "cuda")
        adapters, clusters = (len(part.unique()) for part in (slots, slots % CLUSTERS))
        model = our_kernels(layer, tokens, adapters, clusters, RANK)
        calls = [our_call(layer, tokens, p, CONFIGS[0], slots, order)[0] for p in pools]
        rows.append(_row(OURS, tokens, timer(calls), model, gpu))
        stages += _stages(OURS, tokens, timer.kernels(calls), model, gpu)
        for name, (max_loras, specialised) in systems.items():
            made = [
                stock_call(
                    *(ops, layer, tokens, max_loras, "cuda", DTYPE, slots),
                    specialised=specialised,
                )
                for _ in range(LAYERS)
            ]
            distinct = len((slots % max_loras).unique())
            grid = grid_rows(max_loras, distinct, specialised=specialised)
            model = stock_kernels(layer, tokens, distinct, grid)
            calls = [call for call, *_ in made]
            rows.append(_row(name, tokens, timer(calls), model, gpu))
            stages += _stages(name, tokens, timer.kernels(calls), model, gpu)
            del made, calls
    none = slots.new_full((32,), -1)
    calls = [our_call(layer, 32, p, CONFIGS[0], none, None)[0] for p in pools]
    launches = len(plan(LayerShape(layer.d_in, layer.d_out, max_rank=RANK), 32).launches)
    one = stock_call(
        *(ops, layer, 32, ADAPTERS, "cuda", DTYPE, none.new_zeros(32)), specialised=False
    )
    measured = {
        "launch": timer(calls) / launches,
        "programs": timer.kernels([one[0]])["_lora_shrink_kernel"],
        **{f"ours {row['tokens']}": row["microseconds"] for row in rows if row["system"] == OURS},
        **{
            f"stock_equal_memory {row['tokens']}": row["microseconds"]
            for row in rows
            if row["system"] == EQUAL
        },
    }
    content = {
        "assumed": asdict(gpu),
        "predictions": verdicts(
            predictions([cell(SETTINGS[0], b, ADAPTERS, gpu) for b in BATCHES], gpu), measured
        ),
        "calls": rows,
        "stages": stages,
    }
    out.write_text(json.dumps(content, indent=2) + "\n")
    out.with_suffix(".md").write_text(microbench_table(content))
    print(microbench_table(content))


def verdicts(
    expected: Sequence[Mapping[str, Any]], measured: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The model's predictions with what was measured of them, and whether it confirms them."""
    found = []
    for prediction in expected:
        value = measured.get(prediction["key"])
        verdict = "not measured"
        if value is not None:
            inside = prediction["low"] <= value <= prediction["high"]
            verdict = "confirmed" if inside else "refuted"
        found.append({**prediction, "measured": value, "verdict": verdict})
    return found


def _row(
    system: str, tokens: int, microseconds: float, model: Sequence[Kernel], gpu: Gpu
) -> dict[str, Any]:
    """A call of one layer against the model of its kernels."""
    modelled = 1e6 * sum(kernel.seconds(gpu) for kernel in model)
    moved = sum(kernel.hbm_bytes for kernel in model)
    return {
        "system": system,
        "tokens": tokens,
        "microseconds": microseconds,
        "model_microseconds": modelled,
        "of_model": microseconds / modelled,
        "gigabytes_per_second": moved / microseconds / 1e3,
    }


def _stages(
    system: str, tokens: int, times: Mapping[str, float], model: Sequence[Kernel], gpu: Gpu
) -> list[dict[str, Any]]:
    """The same of each kernel, without its launch; those that the profiler did not see are left
    out."""
    found = []
    for kernel in model:
        names = [name for name in times if kernel.name in name]
        if not names:
            continue
        taken = times[names[0]]
        limits = kernel.limits(gpu)
        bound = max(limits, key=limits.__getitem__)
        modelled = 1e6 * limits[bound]
        found.append(
            {
                "system": system,
                "tokens": tokens,
                "kernel": kernel.name,
                "microseconds": taken,
                "model_microseconds": modelled,
                "bound": bound,
                "of_model": taken / modelled,
                "gigabytes_per_second": kernel.hbm_bytes / taken / 1e3,
            }
        )
    return found


def microbench_table(content: Mapping[str, Any]) -> str:
    """Markdown of the microbenchmark."""
    lines = [
        "## Kernels against the model",
        "",
        f"q, k, v of Mistral-7B, {ADAPTERS:,} adapters, {CLUSTERS} clusters, rank {RANK}; each",
        "layer after the caches were filled with other data, in a CUDA graph.",
        "",
        "| prediction | model | measured | confirmed between | |",
        "|---|---|---|---|---|",
    ]
    for p in content["predictions"]:
        measured = "" if p["measured"] is None else f"{p['measured']:.1f}"
        lines.append(
            f"| {p['what']} | {p['model']:.1f} {p['unit']} | {measured} | {p['low']:.1f} – "
            f"{p['high']:.1f} | {p['verdict']} |"
        )
    head = "| µs | model, µs | of the model | GB/s |"
    lines += ["", "| system | tokens " + head, "|---|---|---|---|---|---|"]
    lines += [f"| {row['system']} | {row['tokens']} {_numbers(row)}" for row in content["calls"]]
    lines += [
        "",
        "| system | tokens | kernel | bound by " + head,
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['system']} | {row['tokens']} | {row['kernel']} | {row['bound']} {_numbers(row)}"
        for row in content["stages"]
    ]
    return "\n".join(lines) + "\n"


def _numbers(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['microseconds']:.1f} | {row['model_microseconds']:.1f} "
        f"| {row['of_model']:.2f} | {row['gigabytes_per_second']:.0f} |"
    )


if __name__ == "__main__":
    app()
