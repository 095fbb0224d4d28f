"""`vllm-jd train-core`, with a tiny model that has a tokenizer of words."""

import json
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.test_cli import fail, succeed
from tests.tiny_llama import write_tiny_llama, write_word_tokenizer
from vllm_jd.compressor.choose.examples import read_examples
from vllm_jd.store import Store
from vllm_jd.store.writer import writing

WORDS = [f"w{i}" for i in range(40)]
RANDOM = random.Random(0)
LINES = [
    {"prompt": f"{a} {b}", "completion": f" {a} w7"}
    for a, b in (RANDOM.sample(WORDS, 2) for _ in range(60))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    size = write_word_tokenizer(folder, WORDS)
    write_tiny_llama(folder, layers=2, vocab_size=size, bos_token_id=1, eos_token_id=1)
    return folder


@pytest.fixture
def store(model, tmp_path, write_adapters):
    shapes = {f"model.layers.{i}.self_attn.q_proj": (128, 128) for i in (0, 1)}
    shapes |= {f"model.layers.{i}.self_attn.v_proj": (128, 64) for i in (0, 1)}
    config = {"alpha": 0.3, "base": "org/tiny-llama"}
    folders = write_adapters(tmp_path / "in", 6, shapes=shapes, kind="real", config=config)
    succeed("compress", *folders, "--out", tmp_path / "s", "--rank", 8, "--base-model", model)
    return tmp_path / "s"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "cache"))


def test_an_adapter_is_trained_and_is_in_the_store(model, store, data, tmp_path):
    arguments = ["--data", data, "--base-model", model, "--epochs", 4, "--device", "cpu"]
    found = json.loads(succeed("train-core", store, "--name", "new", *arguments, "--json").stdout)
    assert found["loss"]["adapter"] < found["loss"]["base"] - 0.01
    assert (found["generation"], found["cluster"], found["numbers"]) == (2, 0, 4 * 8**2)
    assert found["judged"] == {"examples": 6, "held_out": True}
    assert found["error"] < 1e-3
    with Store.open(store) as opened:
        assert opened.names[-1] == "new" and len(opened) == 7
    # The end of the text was learnt, and what PEFT makes of the export is what was said.
    succeed("export", store, "new", "--out", tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(tuned, tmp_path / "export").eval()
    examples = read_examples(data, tokenizer, end=True)
    assert all(example.completion[-1] == tokenizer.eos_token_id for example in examples)
    total = tokens = 0.0
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    for example in (examples[i] for i in order[:6]):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([example.prompt + example.completion])).logits[0]
        told = logits[len(example.prompt) - 1 : -1].log_softmax(-1)
        total -= float(told[range(len(example.completion)), example.completion].sum())
        tokens += len(example.completion)
    assert total / tokens == pytest.approx(found["loss"]["adapter"], rel=0.02)


def test_what_was_trained_is_not_lost_where_the_store_cannot_be_written(
    model, store, data, tmp_path
):
    arguments = ["--data", data, "--base-model", model, "--epochs", 1, "--name", "new"]
    with writing(store):
        assert "another process" in fail("train-core", store, *arguments)
    (kept,) = (tmp_path / "cache" / "train-core").iterdir()
    succeed("train-core", store, *arguments)
    assert not kept.exists()
    with Store.open(store) as opened:
        assert opened.names[-1] == "new"


def test_it_tells_people(model, store, data):
    arguments = ["--data", data, "--base-model", model, "--epochs", 1, "--held-out", 0]
    shown = succeed("train-core", store, "--name", "new", *arguments).stdout
    assert "new: 256 numbers in the bases of cluster 0" in shown
    assert "60 examples it was trained on" in shown and "after epoch 1" in shown
    assert "generation 2: 7 adapters" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "adapter-001"], "there is an adapter of that name; choose another"),
        (["--name", " "], "--name"),
        (["--name", "new", "--cluster", "3"], "no cluster 3"),
        (["--name", "new", "--base-model", "/no/such/model"], "cannot be loaded"),
        (["--name", "new", "--data", "/no/such/file"], "cannot be read"),
        (["--name", "new", "--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(model, store, data, tree, arguments, message):
    before = tree(store)
    given = {"--data": str(data), "--base-model": str(model)}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    words = [word for pair in given.items() for word in pair]
    assert message in fail("train-core", store, *words)
    assert tree(store) == before


def test_an_adapter_of_the_same_name_gives_way_if_that_is_wanted(model, store, data):
    arguments = ["--data", data, "--base-model", model, "--epochs", 1]
    succeed("train-core", store, "--name", "adapter-001", *arguments, "--replace")
    with Store.open(store) as opened:
        assert sorted(opened.names) == [f"adapter-00{i}" for i in range(6)]
