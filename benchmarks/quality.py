"""Does a compressed adapter still do its job? Ways to store n adapters, by what is answered.

A *cell* is a collection of n adapters and a way to store it. Each is compressed as `vllm-jd
compress` does, and vLLM answers the test items of the adapters' tasks with it (`tasks.py`): Rouge,
exact match, the target's loss, and which answers are those of the uncompressed adapter. Beside
them: how far the numbers are off (`quality_errors.py`), bytes and numbers stored.

    python benchmarks/quality.py run --data DATA --work out/quality --out benchmarks/results/quality
    python benchmarks/quality.py report benchmarks/results/quality

DATA has a JSON-lines file for each task (see train_adapters.py), `--adapters` are folders named by
their tasks; the first n are the collection of n. One JSON file a cell, written whole: what is done
is kept, the same command goes on. One engine asks all cells of one n: it starts with a store that
is only there to make room (`room`), and the cells' stores are opened beside it, as generations that
requests name, so that each is served from its own bases and cores. `--alone CELL` asks one of them
again through an engine that has nothing else. Stores that something else made of the same adapters
are asked by

    python benchmarks/quality.py ask STORE … --data DATA …        # from cores_together.py
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import tasks
import typer
from engine_process import in_process
from lora_hub import SHIPPED, adapters_of, task_of
from quality_cells import SUITES, Cell, cells
from quality_errors import Judge
from quality_figures import draw
from quality_results import load
from quality_tables import write_tables
from rebuilt import Share
from rich.console import Console
from rich.progress import Progress

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.report.summary import Sizes, sizes
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.evaluate.metrics import SCORES
from vllm_jd.store import Store, read_base_model
from vllm_jd.store.files import replace_text

SIZES = (8, 16, 32, 64)
COMMON = ("items", "seed", "dtype")  # of all answers that are compared

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Mistake(Exception):
    """Of who runs it: what was found, what was expected."""


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    work: Annotated[Path, typer.Option(help="Folder for the stores, kept.")],
    out: Annotated[Path, typer.Option(help="Folder of the results, one JSON file a cell.")],
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Adapters in their order; default: the shipped ones.")
    ] = None,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "small",
    n: Annotated[
        list[int] | None, typer.Option(help="Sizes of collections; default: 8, or all there are.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Test items of each task, at most.")] = 24,
    asked: Annotated[int, typer.Option(min=1, help="Adapters that are asked, the first.")] = 16,
    most: Annotated[int | None, typer.Option(min=1, help="Cells of each n.")] = None,
    ways: Annotated[
        str | None, typer.Option(help="Comma-separated: only cells whose label begins so.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="2/3: every third cell; several parts may run side by side.")
    ] = "1/1",
    cells_only: Annotated[
        bool, typer.Option("--cells-only", help="Do not ask the base model and LoRA.")
    ] = False,
    device: Annotated[str, typer.Option(help="On which to compress, as torch names it.")] = "cpu",
    alone: Annotated[
        str | None, typer.Option(help="Ask this cell again, by its label, on its own.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The engine's; float32 where the CPU has no bfloat16.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the choice of items.")] = 0,
) -> None:
    """Compress and ask what is not there yet."""
    folders = [found for path in (adapters or [SHIPPED]) for found in adapters_of(path)]
    there = [each for each in SIZES if each <= len(folders)]
    counts = n or (there[:1] if suite == "small" else there)
    try:
        if suite not in SUITES:
            raise Mistake(f"found the suite {suite!r}, expected one of {', '.join(SUITES)}")
        if not counts or max(counts) > len(folders):
            least = max(counts, default=SIZES[0])
            raise Mistake(f"found {len(folders)} adapters, expected at least {least}")
        for count in counts:
            chosen = part_of(cells(suite, count)[:most], ways, part)
            of = {"items": items, "seed": seed, "dtype": dtype}
            study = Study(folders[:count], data, work / f"n{count}", out, asked, of, device)
            if alone is None:
                study.ask(chosen, plain=not cells_only)
                continue
            of_that_name = [cell for cell in chosen if cell.label == alone]
            if not of_that_name:
                labels = ", ".join(cell.label for cell in chosen)
                raise Mistake(f"found no cell {alone!r}, expected one of {labels}")
            study.ask_alone(*of_that_name)
    except Mistake as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error


def part_of(chosen: Sequence[Cell], ways: str | None, part: str) -> list[Cell]:
    """The cells of some ways, and of them every so many.

    Raises:
        Mistake: `part` is no such thing.
    """
    if ways is not None:
        begin = ways.split(",")
        chosen = [cell for cell in chosen if cell.label.split()[0] in begin]
    first, _, of = part.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise Mistake(f"found --part {part!r}, expected one such as 2/3")
    return list(chosen[int(first) - 1 :: int(of)])


@app.command()
def ask(
    stores: Annotated[list[Path], typer.Argument(help="Whose adapters' cores were trained.")],
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    work: Annotated[Path, typer.Option(help="Folder for the store that makes room, kept.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    adapters: Annotated[list[Path], typer.Option(help="What they were, in their order.")],
    items: Annotated[int, typer.Option(min=1, help="Test items of each task, at most.")] = 24,
    dtype: Annotated[str, typer.Option(help="The engine's.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the choice of items.")] = 0,
) -> None:
    """Ask stores whose cores `cores_together.py` trained, all of one collection, and LoRA."""
    opened = [Store.open(path) for path in stores]
    try:
        folders = [found for path in adapters for found in adapters_of(path)][: len(opened[0])]
        names = sorted(folder.name for folder in folders)
        if any(sorted(store.names) != names for store in opened):
            raise Mistake("found stores of other adapters, expected those of --adapters")
        of = {"items": items, "seed": seed, "dtype": dtype}
        study = Study(folders, data, work / f"n{len(names)}", out, len(names), of)
        study.ask_stores(opened)
    except Mistake as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of the results; tables go there.")],
) -> None:
    """Write tables.md and figures of what is there."""
    try:
        found = load(results)
    except ValueError as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from error
    write_tables(found, results / "tables.md")
    draw(found, results)


class Study:
    """The cells of one collection.

    Args:
        folders: its adapters.
        data: of the tasks' files.
        work: folder for its stores.
        out: folder of all results.
        asked: of how many adapters, the first.
        of: what all answers have in common: `items` of each task, the `seed` of their choice, the
            engine's `dtype`.
        device: on which to compress.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        data: Path,
        work: Path,
        out: Path,
        asked: int,
        of: dict[str, Any],
        device: str = "cpu",
    ) -> None:
        self.folders = folders
        self.device = device
        self.data = data
        self.work = work
        self.out = out
        self.tasks = {folder.name: task_of(folder) for folder in folders[:asked]}
        missing = [task for task in self.tasks.values() if not self._file(task).exists()]
        if missing:
            raise Mistake(f"{data}: found no {missing[0]}.jsonl, expected a file for each task")
        self.model = ensure_smollm2()
        base = read_base_model(self.model)
        self.collection = read_adapters(folders, base_model=base.name, same_base=True)
        sources = "".join(self.collection.source_sha256)
        self.of = of | {
            "asked": len(self.tasks),
            "sources": hashlib.sha256(sources.encode()).hexdigest()[:16],
        }
        self._judge: Judge | None = None

    def ask(self, chosen: Sequence[Cell], *, plain: bool = True) -> None:
        """All cells that have no result yet, and of the base model and LoRA what is missing."""
        missing = [cell for cell in chosen if not self._done(cell)]
        plain_ones = {who: self._unasked(who) for who in ("base", "lora")} if plain else {}
        if not missing and not any(plain_ones.values()):
            return
        with Progress(console=err) as progress:
            bar = progress.add_task(f"compressing, n = {len(self.folders)}", total=len(missing))
            for cell in missing:
                self._compress(cell)
                progress.advance(bar)
        room = self._room([cell.settings for cell in chosen])
        self._engine(room, [self._job(cell) for cell in missing], plain_ones)

    def ask_alone(self, cell: Cell) -> None:
        """One cell through an engine that starts with its store; the result goes beside it."""
        self._compress(cell)
        self._engine(self._store(cell), [self._job(cell, ".alone.json")], {})

    def ask_stores(self, stores: Sequence[Store]) -> None:
        """Stores of these adapters whose cores were trained, and of LoRA what is missing; labels
        end with the folder's name."""
        # Such a store counts the adapters that its cores came as, not those that it was made from.
        factors = map(self.collection.factors, self.collection.shapes)
        numbers = sum(of.a.numel() + of.b.numel() for of in factors)
        jobs, of_all = [], []
        for store in stores:
            of_all.append(Settings.from_recorded(store.manifest.method, store.manifest.settings))
            label = f"{Cell(len(self.folders), of_all[-1]).label} {store.path.name}"
            file = self.out / f"n{len(self.folders)}" / f"{label.replace(' ', '-')}.json"
            if file.exists():
                continue
            found = sizes(store)
            found = replace(
                found,
                adapter_bytes=sum(self.collection.source_bytes),
                parameter_saved_ratio=1 - found.store_parameters / numbers,
            )
            head = {"label": label, "trained": True}
            head |= self._said(store, of_all[-1].as_dict(), found)
            jobs.append({"store": str(store.path), "file": str(file), "head": head})
        plain = {"lora": self._unasked("lora")}
        if jobs or plain["lora"]:
            self._engine(self._room(of_all), jobs, plain)

    def _job(self, cell: Cell, suffix: str = ".json") -> dict[str, Any]:
        return {
            "store": str(self._store(cell)),
            "file": str((self.out / cell.file).with_suffix(suffix)),
            "head": json.loads(self._head(cell).read_text()),
        }

    def _engine(self, room: Path, jobs: list[dict[str, Any]], plain: dict[str, list[str]]) -> None:
        if plain.get("lora"):
            self._plain_store()
        job = {
            "model": str(self.model),
            "room": str(room),
            "lora": str(self.work / "lora"),
            "plain": plain,
            "out": str(self.out),
            "cells": jobs,
            "tasks": {name: str(self._file(task)) for name, task in self.tasks.items()},
            "of": self.of,
        }
        in_process(__file__, job)

    def _file(self, task: str) -> Path:
        return self.data / f"{task}.jsonl"

    def _store(self, cell: Cell) -> Path:
        return self.work / Path(cell.file).stem

    def _head(self, cell: Cell) -> Path:
        return self._store(cell).with_suffix(".json")

    def _done(self, cell: Cell) -> bool:
        file = self.out / cell.file
        if not file.exists():
            return False
        found = json.loads(file.read_text())["of"]
        if found != self.of:
            raise Mistake(
                f"{file}: found results of {found}, expected {self.of}; choose another --out"
            )
        return True

    def _unasked(self, who: str) -> list[str]:
        """Adapters whose items the base model, or LoRA, was not asked yet."""
        file = self.out / f"{who}.json"
        if not file.exists():
            return list(self.tasks)
        found = json.loads(file.read_text())
        for key in COMMON:
            if found["of"][key] != self.of[key]:
                raise Mistake(
                    f"{file}: found {key} {found['of'][key]}, expected {self.of[key]}; "
                    "choose another --out"
                )
        return [name for name in self.tasks if name not in found["answers"]]

    def _compress(self, cell: Cell) -> None:
        if self._head(cell).exists():
            return
        start = time.perf_counter()
        collection = Share(self.collection, cell.share) if cell.share else self.collection
        with compress(collection, self._store(cell), cell.settings, device=self.device) as store:
            seconds = time.perf_counter() - start
            found = sizes(store)
            if cell.share:
                found = collection.sizes(found)
            head = {"label": cell.label, "compress_seconds": round(seconds, 1)}
            head |= self._said(store, cell.settings.as_dict(), found)
        replace_text(self._head(cell), json.dumps(head))

    def _said(
        self, store: Store, settings: dict[str, Any], found: Sizes | None = None
    ) -> dict[str, Any]:
        """What a result says of a store beside the answers."""
        found = found or sizes(store)
        return {
            "n": len(self.folders),
            "settings": settings,
            "bytes": found.store_bytes,
            "adapter_bytes": found.adapter_bytes,
            "saved": round(found.parameter_saved_ratio, 5),
            "errors": {
                name: {key: round(value, 5) for key, value in each.items()}
                for name, each in self._judged().errors(store).items()
            },
        }

    def _judged(self) -> Judge:
        if self._judge is None:
            self._judge = Judge(self.collection)
        return self._judge

    def _plain_store(self) -> None:
        if not (self.work / "lora" / "CURRENT").exists():
            settings = Settings(method="none", store_dtype="float32")
            compress(self.collection, self.work / "lora", settings).close()

    def _room(self, chosen: Sequence[Settings]) -> Path:
        """A store in whose tensors every store of these settings finds place."""
        settings = room(chosen)
        path = self.work / f"room-{settings.rank}-{settings.clusters}"
        if not (path / "CURRENT").exists():
            compress(self.collection, path, settings).close()
        return path


def room(chosen: Sequence[Settings]) -> Settings:
    """Settings of a store with as high ranks, as long cores and as many rows as any of these.

    Its slots: of the highest rank as many as any has clusters, two at least, and one for each
    adapter of the adapters' own rank, as all of them are kept as they are. Requests that find
    theirs in use wait.
    """
    rank = max(1, *(each.rank for each in chosen))
    clusters = max(2, *(each.clusters for each in chosen))
    return Settings(rank=rank, clusters=clusters, max_adapter_error=0.0, iterations=1)


# --- in the engine's process ---


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Ask what a job names, and write a file for each."""
    from transformers import AutoTokenizer
    from vllm.lora.request import LoRARequest

    from vllm_jd.plugin.api.requests import store_path

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    llm = tasks.engine(job["model"], job["room"], dtype=job["of"]["dtype"])
    of = job["of"]
    items = {
        name: tasks.read_items(Path(file), "test", of["items"], tokenizer, of["seed"])
        for name, file in job["tasks"].items()
    }
    numbers = iter(range(1, 1 << 30))  # vLLM's ids: an adapter of each store has its own

    def answered(store: str | None, names: Sequence[str]) -> dict[str, Any]:
        path = None
        if store is not None:
            with Store.open(store, verify=False) as opened:
                path = store_path(store, opened.generation)
        asked: list[tasks.Item] = []
        requests: list[Any] = []
        for name in names:
            one = None if path is None else LoRARequest(name, next(numbers), path)
            asked += items[name]
            requests += [one] * len(items[name])
        start = time.perf_counter()
        found = iter(tasks.scores(llm, asked, requests))
        seconds = time.perf_counter() - start
        each = {name: series([next(found) for _ in items[name]]) for name in names}
        return {"answers": each, "seconds": round(seconds, 1)} | provenance()

    with Progress(console=err) as progress:
        bar = progress.add_task("asking", total=len(job["plain"]) + len(job["cells"]))
        for who, names in job["plain"].items():
            if names:
                add_plain(
                    Path(job["out"]) / f"{who}.json",
                    answered(job["lora"] if who == "lora" else None, names),
                    of,
                )
            progress.advance(bar)
        for cell in job["cells"]:
            result = {"of": of} | cell["head"] | answered(cell["store"], list(job["tasks"]))
            write(Path(cell["file"]), result)
            progress.advance(bar)
    return {}


def series(found: Sequence[tasks.Score]) -> dict[str, list[Any]]:
    """The figures of one task's items; `said` has digests by which answers can be compared."""
    result: dict[str, list[Any]] = {
        name: [round(getattr(score, name), 4) for score in found] for name in SCORES
    }
    result["said"] = [hashlib.sha256(s.said.encode()).hexdigest()[:8] for s in found]
    return result


def add_plain(file: Path, found: dict[str, Any], of: dict[str, Any]) -> None:
    """Add answers of the base model or LoRA to those that are there."""
    before = json.loads(file.read_text()) if file.exists() else {"answers": {}}
    found["answers"] = before["answers"] | found["answers"]
    write(file, {"of": {key: of[key] for key in COMMON}} | found)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(result) + "\n")


def provenance() -> dict[str, Any]:
    """When, where and with what a result was taken."""
    import torch

    found = machine.conditions(machine.vllm_package(), "torch")
    if torch.cuda.is_available():
        found["machine"] = f"{torch.cuda.get_device_name()}; {found['machine']}"
    found["versions"]["vllm-jd"] = version("vllm-jd")
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        Path(sys.argv[3]).write_text(json.dumps(answers(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        app()
