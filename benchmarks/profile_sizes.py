"""What adapters add to a step of models of the sizes that people serve, on this machine.

`profile_step.py` on random bfloat16 weights of Llama-3.2-1B's and Qwen2.5-1.5B's shape, which vLLM
makes itself, with 1,024 random adapters in 25 clusters of rank 16: on q, k and v, and on all seven
linear layers. Nothing is downloaded or compressed: the numbers mean nothing, the times do. Prints
a table, and after each engine writes what there is to the JSON. One command:

    python benchmarks/profile_sizes.py --work out/sizes --out out/profile_sizes.json

It makes the stores (2 GB) and takes about six minutes for each of the four engines; `--model` and
`--targets` choose some, `--store-dtype int8` stores of 8-bit bases and cores.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import profile_step
import typer
from engine_process import in_process
from random_store import write_random_store
from rich import box
from rich.console import Console
from rich.table import Table

ADAPTERS, CLUSTERS, RANK = 1024, 25, 16
BATCHES = [1, 8, 32, 64]
QKV = ("q_proj", "k_proj", "v_proj")
TARGETS = {"qkv": QKV, "all": (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")}
AIM = 0.98
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}
ModelName = StrEnum("ModelName", {name: name for name in MODELS})
TargetName = StrEnum("TargetName", {name: name for name in TARGETS})
StoreType = StrEnum("StoreType", ["bfloat16", "int8"])


def main(
    work: Annotated[Path, typer.Option(help="Folder for models and stores, kept.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    model: Annotated[list[ModelName] | None, typer.Option(help="Default: both.")] = None,
    targets: Annotated[list[TargetName] | None, typer.Option(help="Default: both.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sizes; default 1, 8, 32, 64.")] = None,
    pairs: Annotated[int, typer.Option(min=4, help="Of steps; of prefills a fifth.")] = 40,
    eager: bool = False,
    store_dtype: Annotated[StoreType, typer.Option()] = StoreType.bfloat16,
) -> None:
    """What adapters add to a step of models of the sizes that people serve."""
    result = profile_step.about(eager) | {
        "store_dtype": store_dtype.value,
        "adapters": ADAPTERS,
        "clusters": CLUSTERS,
        "rank": RANK,
        "pairs": pairs,
        "models": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in model or MODELS:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(COMMON | MODELS[name], indent=2))
        for which in targets or TARGETS:
            store = work / f"{name}-{which}-{store_dtype.value}"
            if not (store / "CURRENT").exists():
                write_random_store(
                    folder,
                    store,
                    ADAPTERS,
                    CLUSTERS,
                    targets=TARGETS[which],
                    rank=RANK,
                    quantised=None if store_dtype == StoreType.bfloat16 else store_dtype.value,
                )
            job = {
                "model": str(folder),
                "store": str(store),
                "batches": batch or BATCHES,
                "pairs": pairs,
                "eager": eager,
                "engine": {"load_format": "dummy", "skip_tokenizer_init": True},
            }
            found = in_process(profile_step.__file__, job)
            result["models"].setdefault(name, {})[which] = found
            out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(result["models"]))


def table(models: dict[str, dict[str, Any]]) -> Table:
    """Speed of a step with adapters, of one without; in brackets where its median lies, 95 %."""
    shown = Table(
        *("model", "adapted", "step", "without, ms", "one for all", "uniform", f"aim {AIM}"),
        box=box.SIMPLE_HEAD,
    )
    for name, parts in models.items():
        for which, part in parts.items():
            for step, traffics in part["step_ms"].items():
                cells = [
                    f"{one['speed']:.3f} ({one['speed_from']:.3f}–{one['speed_to']:.3f})"
                    for one in (traffics["one"], traffics["uniform"])
                ]
                met = all(one["speed"] >= AIM for one in traffics.values())
                without = f"{traffics['uniform']['without']:.1f}"
                shown.add_row(name, which, step, without, *cells, "met" if met else "missed")
    return shown


if __name__ == "__main__":
    typer.run(main)
