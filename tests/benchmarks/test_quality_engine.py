"""The quality study end to end on a tiny random Llama: what vLLM says of a cell's store, against
what transformers says with the adapters exported from it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import quality
import quality_cells
import quality_results
import tasks

from tests.serving.conftest import write_wide_adapter
from tests.tiny_llama import write_tiny_llama
from vllm_jd.compressor import Settings, export_adapter
from vllm_jd.store import Store

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

WORDS = ["Input", "Output", ":", "cat", "dog", "horse", "cow", "hen", "goat", "mouse", "pig"]
CELLS = [Settings(method="svd", rank=1, store_dtype="int4"), Settings(rank=8, clusters=2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of two layers with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    write_tiny_llama(
        folder,
        layers=2,
        positions=512,
        vocab_size=len(vocabulary),
        bos_token_id=1,
        eos_token_id=1,
    )
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(8):
        write_wide_adapter(folder / f"task{i}", model, seed=i)
        config = folder / f"task{i}" / "adapter_config.json"
        settings = json.loads(config.read_text())
        settings["lora_alpha"] *= 8  # loud enough to be heard through bfloat16
        settings["alpha_pattern"] = {k: 8 * a for k, a in settings["alpha_pattern"].items()}
        config.write_text(json.dumps(settings))
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


def losses(model, folder, items):
    """Each item's loss by transformers and PEFT, in float32; without a folder the base model's."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = base if folder is None else peft.PeftModel.from_pretrained(base, folder)
    found = []
    for item in items:
        ids = torch.tensor([item.prompt + item.target])
        with torch.no_grad():
            told = tuned(input_ids=ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
        found.append(-float(told[range(len(item.target)), item.target].mean()))
    return np.array(found)


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
        items = tasks.read_items(data / f"{name}.jsonl", "test", 4, tokenizer)
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
