"""The stores and the table of `profile_sizes.py`; the engines themselves take minutes each."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import profile_sizes
from random_store import write_random_store

from vllm_jd.store import Store


@pytest.mark.parametrize("targets", profile_sizes.TARGETS)
@pytest.mark.parametrize("name", profile_sizes.MODELS)
def test_a_store_is_of_the_models_shape(name, targets, tmp_path):
    """Every layer of it, a quarter as wide; adapters dealt to clusters evenly."""
    config = profile_sizes.COMMON | profile_sizes.MODELS[name]
    for size in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        config[size] //= 4
    config["num_key_value_heads"] = 1
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    layers = profile_sizes.TARGETS[targets]
    store = write_random_store(
        tmp_path / "model", tmp_path / "store", 10, 3, targets=layers, rank=4
    )
    modules = {info.name: info for info in store.manifest.modules}
    assert len(modules) == config["num_hidden_layers"] * len(layers)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    k = modules["model.layers.0.self_attn.k_proj"]
    assert (k.d_in, k.d_out, k.rank) == (config["hidden_size"], head, 4)
    if targets == "all":
        down = modules["model.layers.0.mlp.down_proj"]
        assert (down.d_in, down.d_out) == (config["intermediate_size"], config["hidden_size"])
    chosen = store.chosen[:, store.module_index(k.name), 0].tolist()
    assert chosen == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert store.rows(k.name)[:, :3].tolist() == [[0, 0, 4], [4, 4, 4], [8, 8, 4]]
    a, b = (store.factors(each)[k.name] for each in (store.names[0], store.names[3]))
    same = [torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert sorted(same) == [False, True], "one basis for both, and a core of its own for each"


def test_a_store_may_be_of_8_bits(tmp_path):
    config = profile_sizes.COMMON | profile_sizes.MODELS["llama-3.2-1b"]
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stores = [
        write_random_store(tmp_path, tmp_path / str(q), 10, 3, rank=16, quantised=q)
        for q in (None, "int8")
    ]
    Store.open(stores[1].path).close()  # every check of a server
    assert stores[1].stored_bytes < 0.6 * stores[0].stored_bytes
    for module, (a, b) in stores[0].factors("random-00004").items():
        x, y = stores[1].factors("random-00004")[module]
        assert torch.allclose(a @ b, x @ y, atol=0.02 * float((a @ b).abs().max()))


def test_the_table_says_where_the_aim_is_missed():
    one = {"with": 10, "without": 9.9, "speed": 0.99, "speed_from": 0.985, "speed_to": 0.995}
    slow = one | {"speed": 0.97, "speed_from": 0.96, "speed_to": 0.98}
    steps = {"decode 1": {"one": one, "uniform": one}, "decode 8": {"one": one, "uniform": slow}}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(profile_sizes.table({"llama": {"qkv": {"step_ms": steps}}}))
    lines = console.export_text().splitlines()
    first, second = (next(line for line in lines if f"decode {n}" in line) for n in (1, 8))
    assert first.rstrip().endswith("met")
    assert second.rstrip().endswith("missed") and "0.970 (0.960–0.980)" in second
