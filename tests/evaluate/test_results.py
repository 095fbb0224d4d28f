"""What an evaluation advises, by what it has found."""

from pathlib import Path

import pytest

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.evaluate.items import Asked, Item
from vllm_jd.evaluate.metrics import Score, Scorer
from vllm_jd.evaluate.results import Results
from vllm_jd.evaluate.run import Evaluated, Options

ITEM = Item("p", "e", [1], [1], [2])


@pytest.fixture(scope="module")
def stores(tmp_path_factory, write_adapters):
    """A lossy store, and one without loss, of eight adapters."""
    folder = tmp_path_factory.mktemp("stores")
    collection = read_adapters(write_adapters(folder / "in", 8, kind="real"))
    return {
        method: compress(collection, folder / method, Settings(method).adapted(rank=2))
        for method in ("jd-full", "none")
    }


def results(store, rises, kept=1.0, base=3.0, items=40):
    """Of adapters whose losses rise so, and whose store's answers keep so much."""
    adapters = [Asked(name, Path(name), [ITEM] * items) for name in store.names]
    ours, theirs, plain = [], [], []
    for rise in rises:
        theirs.append([Score(0.8, 0.8, 0.5, 1.0, "a")] * items)
        ours.append([Score(0.8 * kept, 0.8 * kept, 0.5, 1 + rise, "b" if rise else "a")] * items)
        plain.append([Score(0.1, 0.1, 0.0, base, "c")] * items)
    scores = {"base": plain, "lora": theirs, "store": ours}
    return Results(store, "base", Evaluated(adapters, scores), Options())


def test_nobody_suffers(stores):
    found = results(stores["jd-full"], [0.0] * 8)
    assert found.advice() == ["No adapter that was asked here suffers."]
    assert found.worst(5) == [] == found.suffering()
    assert "keeps 1.00 [1.00, 1.00] of the adapters' Rouge-L; 100 %" in found.headline()


def test_one_suffers(stores):
    found = results(stores["jd-full"], [0.01] * 6 + [0.4, 0.01])
    (sentence,) = found.advice()
    assert f"{found.names[6]} (+0.400)" in sentence and "vllm-jd remove STORE NAME" in sentence
    assert found.worst(1) == [6]
    # Its error says so as well.
    found.errors = found.errors * 0 + 0.2
    found.errors[6] = 0.6
    (sentence,) = found.advice()
    assert "--max-adapter-error 0.4" in sentence


def test_most_lose(stores):
    found = results(stores["jd-full"], [0.2] * 8, kept=0.9)
    (sentence,) = found.advice()
    assert "--target-quality 0.99" in sentence and "--target-error" in sentence
    # Nothing can be had from a store without loss.
    assert not [s for s in results(stores["none"], [0.2] * 8, kept=0.9).advice() if "--target" in s]


def test_doubts(stores):
    assert (
        "do no better on this data than the base model"
        in results(stores["jd-full"], [0.0] * 8, base=0.5).advice()[0]
    )
    shares = [0.5, 1.5] * 4
    found = results(stores["jd-full"], [0.0] * 8)
    for each, share in zip(found.compared["store"].values["rouge_l"], shares, strict=True):
        each[:] = [0.8 * share] * len(each)
    assert "The interval is wide" in found.advice()[0]


def test_adapters_without_rouge(stores):
    """Where nothing that Rouge sees is said, the rest still is."""
    found = results(stores["jd-full"], [0.02] * 8)
    for compared in found.compared.values():
        for values in (compared.values, compared.lora):
            values["rouge_l"][:] = [[0.0] * 40] * 8
    assert "The adapters themselves score no Rouge-L here" in found.headline()
    assert found.as_dict(items=False)["ways"]["store"]["of_lora"]["rouge_l"] is None


@pytest.mark.parametrize(
    ("expected", "said", "rouge_l", "rouge_1", "exact"),
    [
        ("the cat sat", "the cat sat", 1, 1, 1),
        ("the cat sat", " the cat sat\n", 1, 1, 1),
        ("the cat sat", "sat the cat", 2 / 3, 1, 0),
        ("the cat sat", "The Cats", 4 / 5, 4 / 5, 0),  # stemmed
        ("the cat sat", "", 0, 0, 0),
        ("猫", "猫", 0, 0, 1),
    ],
)
def test_scores(expected, said, rouge_l, rouge_1, exact):
    score = Scorer().score(expected, said, 1.5)
    assert (score.rouge_l, score.rouge_1) == pytest.approx((rouge_l, rouge_1))
    assert (score.exact, score.loss, score.said) == (exact, 1.5, said.strip())
