"""A store of tiny adapters, their items, and an engine that knows its answers."""

import hashlib
import json
from contextlib import contextmanager

import pytest

from tests.cli.test_cli import TINY_CONFIG
from tests.tiny_llama import write_word_tokenizer
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.evaluate import run
from vllm_jd.evaluate.questions import Answer
from vllm_jd.store import read_base_model

WORDS = ["cat", "dog", "hen", "pig", "cow", "owl", "fox", "elk", "ant", "bat", "says", ":"]
NAMES = [f"adapter-{i:03d}" for i in range(4)]
RUINED = NAMES[2]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A model's folder without weights: its configuration, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    write_word_tokenizer(folder, WORDS)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = TINY_CONFIG | heads | {"max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def items(adapter, count=6):
    """What an adapter is asked; no other is asked the same."""
    place = NAMES.index(adapter)
    lines = []
    for k in range(count):
        words = [WORDS[(place + k + j) % 10] for j in range(3)]
        lines.append(
            {"prompt": f"{WORDS[place]} {words[0]} says :", "completion": " " + " ".join(words)}
        )
    return lines


@pytest.fixture
def collection(tmp_path, tokens, write_adapters):
    """(Store's folder, adapters, data): three of the four adapters have items."""
    folders = write_adapters(tmp_path / "adapters", 4, kind="real")
    settings = Settings(rank=3)
    compress(
        read_adapters(folders), tmp_path / "store", settings, base_model=read_base_model(tokens)
    ).close()
    data = tmp_path / "data"
    data.mkdir()
    for name in NAMES[:3]:
        write_items(data / f"{name}.jsonl", items(name, 4 + NAMES.index(name)))
    return tmp_path / "store", tmp_path / "adapters", data


def write_items(file, lines):
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")


class FakeEngine:
    """Answers as `said` says, and notes what it was asked.

    The base model says one word; an adapter as it is what is expected, but for every third item;
    the store's the same, but for the ruined one.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = []
        self.settings = []
        self.fails = {}  # adapter → why what the store has of it cannot be served
        self.stops_after = None  # batches

    @contextmanager
    def __call__(self, settings, folder, log):
        assert folder.is_dir()
        log.write_text("what an engine prints")
        self.settings.append(settings)
        yield self

    def ask(self, questions, max_new_tokens):
        if self.stops_after == 0:
            raise KeyboardInterrupt
        if self.stops_after:
            self.stops_after -= 1
        self.asked += questions
        return [self._answer(question) for question in questions]

    def _answer(self, question):
        way = "store" if question.folder is None else "lora"
        way = "base" if question.adapter is None else way
        if way == "store" and question.adapter in self.fails:
            return Answer("", 0.0, self.fails[question.adapter])
        wanted = self.tokenizer.decode(question.completion)
        return Answer(*said(way, question.adapter, wanted))


def said(way, adapter, wanted):
    """(Answer, loss) of the fake engine."""
    words = wanted.split()
    odd = int(hashlib.sha256(wanted.encode()).hexdigest(), 16) % 3 == 0
    loss = 1 + (len(words[0]) + ord(words[-1][0])) % 7 / 10
    if way == "base":
        return f"{words[0]} indeed", loss + 3
    if way == "store" and adapter == RUINED:
        return " ".join(reversed(words)), loss + 0.5
    text = " ".join(words[:2]) if odd else wanted
    return f" {text}\n", loss + (0.01 if way == "store" else 0)


@pytest.fixture
def engine(monkeypatch, tokens):
    """The fake engine, which `evaluate` asks."""
    from transformers import AutoTokenizer

    fake = FakeEngine(AutoTokenizer.from_pretrained(tokens))
    monkeypatch.setitem(run.evaluate.__kwdefaults__, "engine", fake)
    return fake
