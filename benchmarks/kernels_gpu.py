"""Time of the Triton kernels on a GPU: every configuration of the fixed list, and each stage beside
vLLM's operators and the roofline.

Layers lie in a CUDA graph, each after the caches were filled with other data. `make gpu-check` runs
both commands and puts their tables into its report; by themselves:

    python benchmarks/kernels_gpu.py autotune --out out/autotune.json
    python benchmarks/kernels_gpu.py microbench --out out/microbench.json

Exit codes: 0; 1 some configurations did not run; 3 there is no GPU.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_check import NO_GPU_CODE, has_gpu
from rich.console import Console
from roofline import (
    BATCHES,
    LLAMA,
    MISTRAL,
    SETTINGS,
    Gpu,
    Kernel,
    Layer,
    cell,
    grid_rows,
    our_kernels,
    predictions,
    stock_kernels,
)
from servers import FIGURE_1, LORA_RANK, slots_of_equal_memory

from vllm_jd.cli.console import fail
from vllm_jd.kernels import ModulePools
from vllm_jd.kernels.triton.plan import CONFIGS, Config, LayerShape, plan
from vllm_jd.row import CORE_FULL, ROW_FIELDS

console = Console(stderr=True)
app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)

ADAPTERS, RANK, CLUSTERS = 1024, *FIGURE_1[1024]
TOKENS = (1, 8, 16, 32, 64, 128, 256, 2048)
PREFILL_REQUESTS = 16  # of a batch of more than 256 tokens
LAYERS = 4  # a graph has so many, each with pools of its own
FLUSH_BYTES = 128 << 20  # read before each layer: bases are as cold as in a model
DTYPE = "bfloat16"
TUNED = (
    *(("Mistral-7B", layer) for layer in MISTRAL.linear().values()),
    *(("Llama-3-70B TP 8", layer) for layer in LLAMA.linear(8).values()),
)
ROWS, TILES = ", rows", ", tiles"
OURS, EQUAL = "vllm-jd", "vLLM, equal memory"
Call = Callable[[], None]


def candidates(tokens: int) -> dict[str, Config]:
    """The fixed list: each configuration as it is, and with either variant for so many tokens."""
    found = {}
    for config in CONFIGS:
        found[config.name] = config
        found[config.name + ROWS] = replace(config, row_tokens=tokens)
        found[config.name + TILES] = replace(config, row_tokens=0)
    return found


def draw(tokens: int, adapters: int, device: str, seed: int = 0) -> tuple[Any, Any]:
    """(slot, order) of each token: int32 [tokens], uniform adapters, those of one cluster (slot
    modulo CLUSTERS) side by side. More than 256 tokens belong to PREFILL_REQUESTS requests."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    requests = PREFILL_REQUESTS if tokens > 256 else tokens
    picks = torch.randint(adapters, (requests,), generator=generator)
    slots = picks.repeat_interleave(-(-tokens // requests))[:tokens].int()
    order = torch.argsort(slots % CLUSTERS * adapters + slots, stable=True).int()
    return slots.to(device), order.to(device)


def make_pools(layer: Layer, adapters: int, rank: int, clusters: int, device: str) -> ModulePools:
    """Random pools of a layer: adapter a in cluster a % clusters, a full core in each slice."""
    import torch

    slices = len(layer.d_out)
    rows = torch.zeros(adapters, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
    adapter = torch.arange(adapters)
    cluster = adapter % clusters
    for s in range(slices):
        fields = {
            "v_start": (s * clusters + cluster) * rank,
            "u_start": cluster * rank,
            "rank": torch.tensor(rank),
            "core_slot": adapter,
            "core_offset": torch.tensor(s * rank**2),
            "core_kind": torch.tensor(CORE_FULL),
            "scale_row": torch.tensor(-1),
        }
        for name, values in fields.items():
            rows[:, s, 0, ROW_FIELDS.index(name)] = values.int()

    def normal(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=getattr(torch, DTYPE), device=device)
        return made.normal_(std=shape[-1] ** -0.5)

    return ModulePools(
        v=normal(slices * clusters * rank, layer.d_in),
        u=[normal(clusters * rank, width) for width in layer.d_out],
        cores=normal(adapters, slices * rank**2),
        rows=rows.to(device),
    )


def our_call(
    layer: Layer, tokens: int, pools: ModulePools, config: Config, slots: Any, order: Any
) -> tuple[Call, Any, Any]:
    """(what adds the adapters, its x, its y)."""
    import torch

    from vllm_jd.kernels.triton import backend

    like = {"dtype": pools.dtype, "device": pools.device}
    x = torch.randn(tokens, layer.d_in, **like)
    y = torch.zeros(tokens, sum(layer.d_out), **like)
    rank = int(pools.rows[..., ROW_FIELDS.index("rank")].max())

    def call() -> None:
        backend.add_adapters(y, x, pools, slots, order)

    backend.prepare(pools, rank, config)
    return call, x, y


def stock_call(
    layer: Layer, tokens: int, max_loras: int, device: str, slots: Any, *, specialised: bool
) -> tuple[Call, Any, Any, tuple[Any, Any]]:
    """(what vLLM's operators do for the layer, its x, its y, its A and B of all slots)."""
    import torch
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    from vllm.lora.utils import get_captured_lora_counts

    like = {"dtype": getattr(torch, DTYPE), "device": device}
    a = tuple(
        torch.empty(max_loras, 1, LORA_RANK, layer.d_in, **like).normal_(std=layer.d_in**-0.5)
        for _ in layer.d_out
    )
    b = tuple(
        torch.empty(max_loras, 1, width, LORA_RANK, **like).normal_() for width in layer.d_out
    )
    x = torch.randn(tokens, layer.d_in, **like)
    y = torch.zeros(tokens, sum(layer.d_out), **like)
    counts = get_captured_lora_counts(max_loras, specialised)
    meta = LoRAKernelMeta.make(max_loras, tokens, device=device, captured_lora_counts=counts)
    meta.prepare_tensors(slots % max_loras)

    def call() -> None:
        z = torch.empty(len(a), tokens, LORA_RANK, dtype=torch.float32, device=device)
        arguments = meta.meta_args(tokens, specialised)
        lora_shrink(x, list(a), z, *arguments, 1.0)
        lora_expand(z, list(b), y, *arguments, offset_start=0, add_inputs=True)

    return call, x, y, (a, b)


class Timer:
    """Times calls as a CUDA graph runs them, each after the caches were filled with other data."""

    def __init__(self) -> None:
        import torch

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
        import torch

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
    import torch

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
        pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda") for _ in range(LAYERS)]
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
    gpu, timer = Gpu(), Timer()
    layer = MISTRAL.linear()["qkv"]
    pools = [make_pools(layer, ADAPTERS, RANK, CLUSTERS, "cuda") for _ in range(LAYERS)]
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
                stock_call(layer, tokens, max_loras, "cuda", slots, specialised=specialised)
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
    one = stock_call(layer, 32, ADAPTERS, "cuda", none.new_zeros(32), specialised=False)
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
