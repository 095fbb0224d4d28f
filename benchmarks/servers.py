"""The systems that the throughput benchmark compares: how each is made ready, started, stopped."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from large_store import write_large_store
from safetensors.torch import load_file, save_file
from shapes import FIGURE_1, LORA_RANK, slots_of_equal_memory
from synthetic import RandomCollection

from vllm_jd.compressor import Settings
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.demo import free_port
from vllm_jd.serve import ServerProcess, server_command, server_environment
from vllm_jd.store import Store, read_base_model

LARGEST = max(FIGURE_1)
"""A store of more adapters has random cores on the bases of this one, and its slots."""

ITERATIONS = 2
"""Of JD-Full. The adapters are random: more would change which numbers are multiplied, only."""

START_SECONDS = 1800
FLAGS = ("--no-enable-prefix-caching", "--disable-uvicorn-access-log")


@dataclass(frozen=True)
class Site:
    """What all servers of one run have in common.

    `work` keeps stores, PEFT folders and the merged model; what is there already is used.
    """

    model: Path
    work: Path
    flags: tuple[str, ...]
    max_num_seqs: int
    cuda: bool
    eager: bool
    store_dtype: str
    say: Callable[[str], None]


@dataclass(frozen=True)
class System:
    """One server to start. `models` are the names to ask for; `slow`: too slow for full loads."""

    name: str
    kind: str
    adapters: int
    command: tuple[str, ...]
    models: tuple[str, ...]
    slow: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


def names(adapters: Sequence[int], stock_adapters: Sequence[int], *, eager: bool) -> list[str]:
    """All systems of a suite; `make` makes them."""
    return [
        *(["base-eager"] if eager else ["base", "base-eager"]),
        "merged",
        *(f"jd-{n}" for n in adapters),
        *(f"stock-{n}" for n in stock_adapters),
    ]


def kind_of(name: str) -> str:
    """`base`, `merged`, `jd` or `stock`."""
    return name.split("-")[0]


def make(site: Site, name: str) -> System:
    """Make ready what the system needs, and say how to start it."""
    kind = kind_of(name)
    if kind == "jd":
        return _compressed(site, int(name.split("-")[1]))
    if kind == "stock":
        return _stock(site, int(name.split("-")[1]))
    model = site.model if kind == "base" else _merged_model(site)
    command = _vllm(site, model, eager=site.eager or name == "base-eager")
    return System(name, kind, 0, tuple(command), (str(model),))


def _vllm(site: Site, model: Path, *, eager: bool) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [*FLAGS, *site.flags, "--max-num-seqs", str(site.max_num_seqs)]
    return [*command, "--enforce-eager"] if eager else command


def _compressed(site: Site, adapters: int) -> System:
    rank, clusters = FIGURE_1[min(adapters, LARGEST)]
    store = _store(site, adapters)
    command = server_command(
        store.path,
        str(site.model),
        [*FLAGS, *site.flags, *(["--enforce-eager"] if site.eager else [])],
        max_loras=1,
        max_cpu_loras=1,
        max_num_seqs=site.max_num_seqs,
        store_base_model=None,
        additional_config=None,
        core_slots=min(adapters, LARGEST),
    )
    about = {"rank": rank, "clusters": clusters, "store_bytes": store.stored_bytes}
    return System(f"jd-{adapters}", "jd", adapters, tuple(command), tuple(store.names), about=about)


def _store(site: Site, adapters: int) -> Store:
    rank, clusters = FIGURE_1[min(adapters, LARGEST)]
    path = site.work / f"{site.model.name}-{adapters}-r{rank}-c{clusters}"
    if site.store_dtype != "bfloat16":
        path = path.with_name(f"{path.name}-{site.store_dtype}")
    if adapters > LARGEST and not (path / "CURRENT").exists():
        site.say(f"writing a store of {adapters} adapters")
        write_large_store(_store(site, LARGEST), path, adapters)
    if not (path / "CURRENT").exists():
        site.say(f"compressing {adapters} random adapters")
        compress(
            RandomCollection(site.model, adapters, rank=LORA_RANK),
            path,
            Settings(
                rank=rank,
                clusters=clusters,
                iterations=ITERATIONS,
                store_dtype=site.store_dtype,
            ),
            base_model=read_base_model(site.model),
            device="cuda" if site.cuda else "cpu",
        )
    return Store.open(path)


def _stock(site: Site, adapters: int) -> System:
    """vLLM's own LoRA, given what is kindest to it: it leaves layers without adapters alone, and
    all adapters may stay in main memory, so that a change of slots is a copy and not a read from
    disk. On CPUs it does not run compiled."""
    shapes = RandomCollection(site.model, 1, rank=LORA_RANK).shapes
    room = slots_of_equal_memory(shapes.values(), adapters, *FIGURE_1[adapters])
    slots = min(adapters, math.ceil(room))
    # More folders than slots: an adapter that is asked for is another one than those loaded.
    folders = [_peft_folder(site, i) for i in range(min(adapters, slots + 4))]
    models = [f"stock-{i:05d}" for i in range(adapters)]
    command = _vllm(site, site.model, eager=site.eager or not site.cuda)
    command += ["--enable-lora", "--max-lora-rank", str(LORA_RANK), "--max-loras", str(slots)]
    command += ["--lora-target-modules", *sorted({name.rpartition(".")[2] for name in shapes})]
    # --lora-modules takes all that follows it.
    command += ["--max-cpu-loras", str(adapters), "--lora-modules"]
    command += [f"{name}={folders[i % len(folders)]}" for i, name in enumerate(models)]
    return System(
        f"stock-{adapters}",
        "stock",
        adapters,
        tuple(command),
        tuple(models),
        slow=not site.cuda,
        about={"slots": slots, "slots_of_equal_memory": room},
    )


def _peft_folder(site: Site, index: int) -> Path:
    folder = site.work / f"{site.model.name}-peft" / f"{index:03d}"
    if not (folder / "adapter_config.json").exists():  # written last
        collection = RandomCollection(site.model, 1, rank=LORA_RANK, seed=index)
        collection.write_peft(0, folder)
    return folder


def _merged_model(site: Site) -> Path:
    folder = site.work / f"{site.model.name}-merged"
    if not folder.exists():
        site.say("merging one adapter into the weights")
        staged = folder.with_name(f".{folder.name}")
        shutil.rmtree(staged, ignore_errors=True)
        write_merged(site.model, RandomCollection(site.model, 1, rank=LORA_RANK), staged)
        staged.rename(folder)
    return folder


def write_merged(model: Path, collection: RandomCollection, folder: Path) -> None:
    """Write `model` with the first adapter of `collection` added to its weights: W + B·A, added in
    float32, kept in the type of W.

    Raises:
        ValueError: the model has no weight for a module of the adapter.
    """
    folder.mkdir(parents=True)
    missing = set(collection.shapes)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for module in sorted(missing):
                if (weight := tensors.get(f"{module}.weight")) is None:
                    continue
                factors = collection.factors(module)
                rank = int(factors.ranks[0])
                delta = factors.b[:rank].T @ factors.a[:rank]
                tensors[f"{module}.weight"] = (weight.float() + delta).to(weight.dtype)
                missing.discard(module)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        elif file.is_file() and file.suffix not in (".bin", ".pth", ".pt", ".gguf"):
            shutil.copy(file, folder)
    if missing:
        raise ValueError(f"{model}: no weights of {min(missing)}, nor of {len(missing) - 1} others")


@dataclass
class Server:
    """A system that is up."""

    system: System
    url: str
    process: ServerProcess
    start_seconds: float = 0.0
    peak_bytes: int = 0

    def measure_memory(self) -> None:
        """Note the resident bytes (proportional share, PSS) of all its processes."""
        total = 0
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)


class Fleet:
    """Servers that run side by side; none outlives the block.

    Args:
        site: of the systems.
        logs: folder for the servers' output.
    """

    def __init__(self, site: Site, logs: Path):
        self._site, self._logs = site, logs
        self._running: list[Server] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(self._running)

    def start(self, system: System) -> Server:
        """Start one and wait until it answers. Raises ServerFailed, with the end of its log."""
        port = free_port()
        at = system.command.index("--model")
        command = [*system.command[:at], "--host", "127.0.0.1", "--port", str(port)]
        process = ServerProcess(
            command + list(system.command[at:]),
            self._environment(system),
            self._logs / f"{system.name}.log",
        )
        server = Server(system, f"http://127.0.0.1:{port}", process)
        self._running.append(server)
        server.start_seconds = process.wait_ready(f"{server.url}/health", START_SECONDS)
        return server

    def stop(self, servers: Sequence[Server]) -> None:
        """Stop these, all at once: each may take some seconds."""
        if not servers:
            return
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(lambda server: server.process.stop(), servers))
        stopped = {server.system.name for server in servers}
        self._running = [s for s in self._running if s.system.name not in stopped]

    def _environment(self, system: System) -> dict[str, str]:
        environment = server_environment() if system.kind == "jd" else dict(os.environ)
        environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
        if not self._site.cuda:
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        return environment
