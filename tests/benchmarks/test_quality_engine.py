"""The quality study end to end on a tiny random Llama: what vLLM says of a cell's store, against
what transformers says with the adapters exported from it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import quality
import quality_cells
import quality_results
import tasks

from tests.word_llama import losses, write_loud_adapter, write_word_llama
from vllm_jd.compressor import Settings, export_adapter
from vllm_jd.store import Store

pytest.importorskip("peft")
pytestmark = pytest.mark.slow

WORDS = ["Input", "Output", ":", "cat", "dog", "horse", "cow", "hen", "goat", "mouse", "pig"]
CELLS = [Settings(method="svd", rank=1, store_dtype="int4"), Settings(rank=8, clusters=2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_word_llama(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(8):
        write_loud_adapter(folder / f"task{i}", model, seed=i)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(8):
        lines = [
            {"split": split, "input": " ".join(rng.choice(WORDS[3:], 4)), "output": WORDS[3 + i]}
            for split in ("train", "test")
            for _ in range(8)
        ]
        (folder / f"task{i}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_each_cell_is_served_from_its_own_store(model, adapters, data, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(quality, "ensure_smollm2", lambda: model)
    monkeypatch.setattr(
        quality, "cells", lambda suite, n: [quality_cells.Cell(n, one) for one in CELLS]
    )
    work, out = tmp_path / "work", tmp_path / "out"
    quality.run(data=data, work=work, out=out, adapters=[adapters], asked=2, items=4)
    base, lora, *cells = quality_results.load(out)
    assert len(cells) == len(CELLS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for i, name in enumerate(lora.names):
        read = tasks.read_items(data / f"{name}.jsonl", "test", 4, tokenizer)
        items = [(item.prompt, item.target) for item in read]
        expected = {
            "base": losses(model, None, items),
            "LoRA": losses(model, adapters / name, items),
        }
        for cell in cells:
            stored = work / "n8" / cell.label.replace(" ", "-")
            with Store.open(stored) as store:
                folder = export_adapter(store, name, tmp_path / "exported" / cell.label / name)
            expected[cell.label] = losses(model, folder, items)
        for one in (base, lora, *cells):
            found = np.array(one.values["loss"][i])
            # vLLM computes in bfloat16, of which each loss is a few hundredths off here.
            off = {label: np.abs(found - theirs).mean() for label, theirs in expected.items()}
            own = off.pop(one.label)
            assert own < 0.06 and own < min(off.values()) / 2, (one.label, own, off)
    assert lora.mean("agreement").value == 1
