"""Does an adapter learn another's task by being compressed with it? (Compress then Serve, H.2.)

For pairs of adapters A and B of one collection, the loss of A on B's test items: as it is;
compressed in a collection with B (JD-Full); and, the control, compressed in the same collection
with B shuffled: its singular values in the place of B's, in directions that have nothing of its
task. What B gives away is what the second does better than the third. Losses are of a token of the
answers, nats, by transformers. One command:

    python benchmarks/privacy.py --data DATA --adapters ADAPTERS --work out/privacy --out out/p.json

The first `--n` adapters are the collection. What is in the JSON is not run again.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import torch
import typer
from born_in_store import deltas, examples, lora
from lora_hub import adapters_of, task_of
from rebuilt import pairs_of
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_jd.compressor import Collection, Settings, read_adapters
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.choose.cores import mean_loss
from vllm_jd.compressor.choose.model import beside, layers_of, load_model
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.store import Store, read_base_model

BATCH_TOKENS = 512
DRAWS = 2000  # of the bootstrap
WAYS = ("base", "own", "plain", "together", "shuffled")
"""On B's items: the base model, B itself, A as it is, A compressed with B, and with B shuffled."""

console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    adapters: Annotated[list[Path], typer.Option(help="Adapters, or folders of them.")],
    work: Annotated[Path, typer.Option(help="Folder for the stores, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    n: Annotated[int, typer.Option(min=3, help="Adapters of the collection.")] = 16,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    each: Annotated[int, typer.Option(min=1, help="Adapters A for each B.")] = 3,
    items: Annotated[int, typer.Option(min=1, help="Of B's task.")] = 16,
    seed: int = 0,
) -> None:
    path = ensure_smollm2()
    model, tokenizer = load_model(str(path), "cpu", "float32")
    folders = [folder for each_path in adapters for folder in adapters_of(each_path)][:n]
    collection = read_adapters(folders, base_model=read_base_model(path).name, same_base=True)
    of = {"adapters": len(folders), "rank": rank, "items": items, "seed": seed}
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if found.get("of") != of:
        found = {"of": of, "rows": []}
    names = list(collection.names)  # sorted
    folder_of = {folder.name: folder for folder in folders}
    rng = random.Random(seed)
    pairs = [(b, rng.sample([a for a in names if a != b], each)) for b in names]
    done = {row["of"] for row in found["rows"]}
    for number, (b, others) in enumerate(pairs):
        if b in done:
            continue
        test = examples(data / f"{task_of(folder_of[b])}.jsonl", "test", tokenizer)[:items]
        stores = {
            "together": store_of(collection, work / "together", rank, seed),
            "shuffled": store_of(
                Shuffled(collection, number, seed), work / f"without-{b}", rank, seed
            ),
        }
        layers = layers_of(stores["together"], model)
        single = {name: read_adapters([folder_of[name]]) for name in (b, *others)}

        def loss(factors: dict[str, Any], layers: Any = layers, test: Any = test) -> float:
            with beside(deltas(layers, factors)):
                return round(mean_loss(model, test, BATCH_TOKENS), 5)

        common = {"base": loss({}), "own": loss(lora(single[b]))}
        for a in others:
            row = {"of": b, "asked": a, **common, "plain": loss(lora(single[a]))}
            row |= {way: loss(store.factors(a)) for way, store in stores.items()}
            found["rows"].append(row)
            console.print(row)
        for store in stores.values():
            store.close()
        found |= machine.conditions("torch", "transformers", "vllm-jd")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    show(found["rows"], seed)


class Shuffled:
    """A collection in which one adapter's directions are drawn anew: a `Collection` itself.

    Args:
        collection: the adapters.
        which: the one whose numbers change places, in A by columns and in B by rows.
        seed: of the places.
    """

    def __init__(self, collection: Collection, which: int, seed: int):
        self.names, self.shapes = list(collection.names), dict(collection.shapes)
        self.base_model, self.factor_bytes = collection.base_model, collection.factor_bytes
        self.source_bytes = collection.source_bytes
        self.source_sha256 = [
            digest[::-1] if i == which else digest
            for i, digest in enumerate(collection.source_sha256)
        ]
        self._collection, self._which, self._seed = collection, which, seed

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module."""
        pairs = list(pairs_of(self._collection.factors(module)))
        generator = torch.Generator().manual_seed(self._seed + list(self.shapes).index(module))
        a, b = pairs[self._which]
        pairs[self._which] = (
            a[:, torch.randperm(a.shape[1], generator=generator)],
            b[torch.randperm(b.shape[0], generator=generator)],
        )
        return ModuleFactors.stack(pairs, *self.shapes[module])


def store_of(collection: Collection, path: Path, rank: int, seed: int) -> Store:
    """JD-Full of it, in float32: rounding is not what is asked here."""
    if not (path / "CURRENT").exists():
        settings = Settings(rank=rank, seed=seed, store_dtype="float32")
        compress(collection, path, settings).close()
    return Store.open(path)


def show(rows: list[dict[str, Any]], seed: int) -> None:
    """Means over pairs, and what differs with its 95 % interval, tasks B drawn again."""
    table = Table("loss on B's items, nats", "mean over pairs", box=box.SIMPLE)
    titles = {
        "base": "base model",
        "own": "B itself",
        "plain": "A as it is",
        "together": "A, compressed with B",
        "shuffled": "A, compressed with B shuffled",
    }
    for way in WAYS:
        table.add_row(titles[way], f"{np.mean([row[way] for row in rows]):.3f}")
    for way in ("plain", "shuffled"):
        mean, low, high, fewer = difference(rows, way, seed)
        table.add_row(
            f"compressed with B − {titles[way]}",
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], lower in {fewer} of {len(rows)} pairs",
        )
    Console(width=120).print(table)


def difference(rows: list[dict[str, Any]], way: str, seed: int) -> tuple[float, float, float, int]:
    """Together less another way: (mean, low, high, pairs in which it is below 0)."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        by_task.setdefault(row["of"], []).append(row["together"] - row[way])
    means = np.array([np.mean(each) for each in by_task.values()])
    generator = np.random.default_rng(seed)
    drawn = means[generator.integers(0, len(means), (DRAWS, len(means)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    fewer = sum(row["together"] < row[way] for row in rows)
    return float(means.mean()), float(low), float(high), fewer


if __name__ == "__main__":
    typer.run(main)
