"""Train the cores of a store's adapters on their tasks, in the bases that the store has.

What `vllm-jd train-core --replace` does for one adapter, with `--start core` from the core that it
has, this does for all of them side by side (`together.py`): a GPU's way. Tasks, batches, epochs and
schedule are those by which `train_adapters.py` trained the LoRA adapters. In a store of int8 or
int4 cores are used as it rounds them, and learn as if they were not rounded (a straight-through
estimate). Prints what the cores came to as JSON; a copy of the store with them is OUT. One command:

    python benchmarks/cores_together.py STORE --data DATA --adapters TRAINED --out OUT

DATA has a JSON-lines file for each task; TRAINED are the LoRA adapters, folders named as in the
store, whose training.json says how they were trained.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from task_files import Task, read_task
from together import Together
from train_adapters import Settings, autocast, load_base, schedule_of

from vllm_jd.compressor.change.export import write_lora
from vllm_jd.compressor.change.incremental import add
from vllm_jd.compressor.change.train_core import core_sizes
from vllm_jd.compressor.choose.model import layers_of
from vllm_jd.compressor.read.adapters import read_for_store
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.row import CORE_FULL, Row
from vllm_jd.store import Store
from vllm_jd.store.quantise import dequantise, quantise

ROW_TOKENS = 1024  # of an adapter, where nothing is trained

console = Console(stderr=True)


class Start(StrEnum):
    """With which numbers a core begins."""

    core = "core"
    zero = "zero"


def main(
    store: Annotated[Path, typer.Argument(help="By jd-full.")],
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    adapters: Annotated[Path, typer.Option(help="Folder of the LoRA adapters.")],
    out: Annotated[Path, typer.Option(help="The new store.")],
    start: Annotated[Start, typer.Option(help="From the adapter's own core, or from 0.")] = (
        Start.core
    ),
    learning_rate: Annotated[
        float, typer.Option(help="As `train-core` has it: a share of the cores' numbers.")
    ] = 0.5,
    names: Annotated[
        str | None, typer.Option(help="Comma-separated: only these adapters' cores.")
    ] = None,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
) -> None:
    began = time.perf_counter()
    if out.exists():  # not after minutes of training
        raise SystemExit(f"error: found {out}, expected nothing there: choose another --out")
    opened = Store.open(store)
    asked = names.split(",") if names else opened.names
    model, tokenizer = load_base(str(ensure_smollm2()), device)
    model.eval()
    plans = {}
    for name in asked:
        record = json.loads((adapters / name / "training.json").read_text())
        settings = Settings(**{key: record[key] for key in Settings.__dataclass_fields__})
        task = Task(name, data / f"{record['task']}.jsonl")
        splits = read_task(task.path, tokenizer, model.config.max_position_embeddings)
        plans[name] = schedule_of(splits, settings)[1], splits["validation"]
    ordered = sorted(asked, key=lambda name: -len(plans[name][0]))
    many = Trained(opened, model, ordered, start, lambda: autocast(device))
    held_out = [plans[name][1] for name in ordered]
    before = many.together.losses(held_out, ROW_TOKENS)
    schedules = [plans[name][0] for name in ordered]
    with Progress(console=console) as progress:
        bar = progress.add_task(f"{len(ordered)} cores", total=len(schedules[0]))
        for losses in many.together.train(schedules, learning_rate):
            if not losses.isfinite().all():
                raise SystemExit(
                    "error: found a loss that is infinite, expected a number: lower --learning-rate"
                )
            progress.advance(bar)
    after = many.together.losses(held_out, ROW_TOKENS)
    seconds = time.perf_counter() - began
    many.write(out)
    found: dict[str, Any] = {
        "start": str(start),
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "validation": {
            name: [round(loss, 4) for loss in both]
            for name, *both in zip(ordered, before, after, strict=True)
        },
    }
    print(json.dumps(found))


class Trained:
    """Cores of adapters of a store, to be trained.

    Args:
        store: whose bases they are for.
        model: the base model.
        names: the adapters, those of most batches first.
        start: see `Start`.
        autocast: a context in which the model is run.
    """

    def __init__(
        self,
        store: Store,
        model: torch.nn.Module,
        names: Sequence[str],
        start: Start,
        autocast: Callable[[], Any],
    ) -> None:
        self._store, self._names = store, names
        self._modules = store.manifest.modules
        self._quantised = store.manifest.quantised
        layers = layers_of(store, model)
        device = next(model.parameters()).device
        indices = [store.index(name) for name in names]
        numbers = torch.stack([store.cores(i, i + 1)[0].float() for i in indices])
        self._u: list[torch.Tensor] = []
        self._v: list[torch.Tensor] = []
        first = []
        for column, info in enumerate(self._modules):
            chosen = store.rows(info.name)[store.chosen[indices, column, 0]]
            rows = [Row(*each) for each in chosen.tolist()]
            if {row.core_kind for row in rows} != {CORE_FULL}:
                raise SystemExit(
                    f"error: {store.path}: found other cores, expected jd-full's: compress by it"
                )
            for kept, pool, starts in (
                (self._u, "U", [row.u_start for row in rows]),
                (self._v, "V", [row.v_start for row in rows]),
            ):
                each = [store.vectors(info.name, pool, at, at + info.rank) for at in starts]
                kept.append(torch.stack(each).float().to(device))
            core = numbers[:, info.core_offset : info.core_offset + info.core_size]
            core = core.unflatten(1, (info.rank, info.rank))
            first.append(core if start is Start.core else torch.zeros_like(core))
        clusters = store.chosen[indices, 0, 0].tolist()
        widths = torch.tensor([info.core_size for info in self._modules])
        pace = {
            cluster: torch.tensor(core_sizes(store, cluster)).repeat_interleave(widths)
            for cluster in set(clusters)
        }
        self.together = Together(
            model,
            [layers[info.name] for info in self._modules],
            first,
            self._delta,
            autocast,
            pace=torch.stack([pace[cluster] for cluster in clusters]).to(device),
        )

    def write(self, out: Path) -> None:
        """A copy of the store in which the adapters have these cores."""
        shutil.copytree(self._store.path, out)
        with tempfile.TemporaryDirectory() as work:
            folders = []
            for i in range(len(self._names)):
                factors = {}
                parts = zip(self._modules, self._u, self._v, self.together.tensors(i), strict=True)
                for info, u, v, (core,) in parts:
                    factors[info.name] = ((u[i].T @ core).cpu(), v[i].cpu())
                folders.append(Path(work) / str(i))
                write_lora(folders[-1], factors, self._store.manifest.base_model.name)
            alone = read_for_store(folders, self._store.manifest)
            renamed = alone.renamed([(str(i), name) for i, name in enumerate(self._names)])
            add(out, renamed, replace=True).close()

    def _delta(self, i: int, core: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._quantised is not None:
            with torch.no_grad():
                rows = core.flatten(1)
                codes = quantise(rows, self._quantised)
                off = dequantise(*codes, rows.shape[1]).view_as(core) - core
            core = core + off
        u, v = (of[i][: len(core)] for of in (self._u, self._v))
        return lambda x: torch.matmul(torch.matmul(torch.matmul(x, v.mT), core.mT), u)


if __name__ == "__main__":
    typer.run(main)
