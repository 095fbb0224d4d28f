"""Is an adapter that is trained in a store's bases as good as a LoRA adapter?

For each task that a LoRA adapter was trained for (`train_adapters.py`), a store is made of all the
other adapters, and a core is trained in its bases (`vllm-jd train-core`) on the same examples, in
as many epochs. The loss of a token of the task's test items, in nats, is that of

- the base model;
- `lora`: the LoRA adapter as it is;
- `added`: that adapter projected onto the store's bases, as `vllm-jd add` does;
- `born`: the core, in the store (16-bit numbers).

All of them are computed in one way, by transformers with the adapter's deltas beside the layers.
What is done is kept. One command:

    python benchmarks/born_in_store.py --data DATA --adapters TRAINED --out out/born.json

DATA has a JSON-lines file for each task; `--others` are more adapters for the stores.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from lora_hub import adapters_of, task_of
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add
from vllm_jd.compressor.change.train_core import Training, add_trained, train_core
from vllm_jd.compressor.choose.cores import mean_loss
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import beside, layers_of, load_model, seen_by
from vllm_jd.compressor.run.compress import compress
from vllm_jd.demo.smollm2 import ensure_smollm2
from vllm_jd.store import Store, read_base_model

ITEMS = 64  # of each task's test items, at most
BATCH_TOKENS = 1024  # where nothing is trained

console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tasks' JSON-lines files.")],
    adapters: Annotated[Path, typer.Option(help="LoRA adapters, with their training.json.")],
    work: Annotated[Path, typer.Option(help="Folder for the stores.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    others: Annotated[list[Path] | None, typer.Option(help="More adapters for stores.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Default: all adapters'.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Of the bases. Default: 16.")] = None,
    learning_rate: float = 0.5,
    threads: int | None = None,
    seed: int = 0,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    path = ensure_smollm2()
    base = read_base_model(path).name
    model, tokenizer = load_model(str(path), "cpu", "float32")
    trained = {task_of(folder): folder for folder in adapters_of(adapters)}
    more = [folder for each in others or () for folder in adapters_of(each)]
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for name in task or list(trained):
        record = json.loads((trained[name] / "training.json").read_text())
        rest = [folder for other, folder in trained.items() if other != name]
        rest += [folder for folder in more if task_of(folder) != name]
        file = data / f"{name}.jsonl"
        train, test = (examples(file, split, tokenizer) for split in ("train", "test"))
        for r in rank or [16]:
            key = {"task": name, "rank": r, "others": len(rest), "learning_rate": learning_rate}
            if any(row.items() >= key.items() for row in found["rows"]):
                continue
            collection = read_adapters(rest, base_model=base, same_base=True)
            folder = work / f"{name}-{r}-{len(rest)}"
            if not (folder / "CURRENT").exists():
                compress(collection, folder, Settings(rank=r, seed=seed)).close()
            with Store.open(folder) as store:
                start = time.perf_counter()
                born = train_core(
                    store,
                    model,
                    train,
                    training=Training(
                        epochs=record["epochs"], learning_rate=learning_rate, held_out=0, seed=seed
                    ),
                )
                seconds = time.perf_counter() - start
            own = read_adapters([trained[name]], base_model=base, same_base=True)
            add_trained(folder, born, "born", replace=True).close()
            with add(folder, own, replace=True) as store:
                layers = layers_of(store, model)
                ways = {
                    "base": {},
                    "lora": lora(own),
                    "added": store.factors(own.names[0]),
                    "born": store.factors("born"),
                }
                losses = {}
                for way, factors in ways.items():
                    with beside(deltas(layers, factors)):
                        losses[way] = round(mean_loss(model, test, BATCH_TOKENS), 4)
                error = store.error[store.index(own.names[0])].double().mean()
            row = key | losses
            row |= {"error": round(float(error), 4), "numbers": born.numbers}
            row |= {"lora_numbers": sum(a.numel() + b.numel() for b, a in ways["lora"].values())}
            found["rows"].append(row | {"seconds": round(seconds, 1), "items": len(test)})
            found |= {
                "date": date.today().isoformat(),
                "machine": machine.describe(),
                "versions": {of: version(of) for of in ("torch", "transformers", "vllm-jd")},
                "seed": seed,
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
            console.print(row)
    show(found["rows"])


def examples(file: Path, split: str, tokenizer: Any) -> list[Example]:
    """As the LoRA adapters were trained: the prompt, the answer and end of sequence."""
    found = []
    for line in map(json.loads, file.read_text().splitlines()):
        if line["split"] == split:
            prompt = tokenizer(f"Input: {line['input']}\nOutput:").input_ids
            answer = tokenizer(f" {line['output']}", add_special_tokens=False).input_ids
            found.append(Example(prompt, [*answer, tokenizer.eos_token_id]))
    return found if split == "train" else found[:ITEMS]


def lora(own: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(B, A) of the one adapter of a collection."""
    each = {module: own.factors(module) for module in own.shapes}
    return {module: (factors.b.T, factors.a) for module, factors in each.items()}


def deltas(
    layers: Mapping[str, torch.nn.Module],
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """What an adapter, module → (B, A), adds to its layers."""

    def delta(b: torch.Tensor, a: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: seen_by(a.float(), x) @ b.float().T

    return [(layers[module], delta(*pair)) for module, pair in factors.items()]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=box.SIMPLE, title="loss of a token of the test items, nats")
    for name in ("task", "rank", "base", "lora", "added", "born", "numbers"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        table.add_row(
            row["task"],
            *(str(row[name]) for name in ("rank", "base", "lora", "added", "born")),
            f"{row['numbers']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
