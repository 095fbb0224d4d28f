"""Cores of a store's adapters that `cores_together.py` trains side by side, of a tiny model."""

import contextlib
import random
from pathlib import Path

import pytest
import torch

from tests.tiny_llama import tiniest_llama
from vllm_jd.compressor import Settings, compress, read_adapters
from vllm_jd.compressor.choose.cores import batches, mean_loss
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.choose.model import beside, layers_of, seen_by
from vllm_jd.store import Store

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
HIDDEN, VOCABULARY = 24, 32
SHAPES = {
    f"model.layers.{i}.self_attn.{name}_proj": (HIDDEN, width)
    for i in range(2)
    for name, width in (("q", HIDDEN), ("v", 8))
}
WAYS = {
    "clusters": Settings(rank=4, clusters=2, store_dtype="float32"),
    "int8": Settings(rank=8, store_dtype="int8"),
    "int4": Settings(rank=8, store_dtype="int4"),
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import cores_together

    return cores_together


@pytest.fixture
def store_of(tmp_path, write_adapters):
    def store_of(way):
        folders = write_adapters(
            tmp_path / "in", 5, shapes=SHAPES, ranks=(2, 3), seed=1, kind="real"
        )
        return compress(read_adapters(folders), tmp_path / "store", WAYS[way])

    return store_of


@pytest.fixture(scope="module")
def model():
    return tiniest_llama().requires_grad_(False)


def examples(count, seed):
    """Prompts of random tokens, answered with one that belongs to the seed."""
    rng = random.Random(seed)
    return [
        Example([rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 6))], [seed, seed + 1])
        for _ in range(count)
    ]


def loss_of(model, store, name, asked):
    """With what the store has of an adapter beside the layers, from its factors."""
    layers = layers_of(store, model)
    deltas = [
        (layers[module], lambda x, b=b, a=a: seen_by(a, x) @ b.T)
        for module, (b, a) in store.factors(name).items()
    ]
    with beside(deltas):
        return mean_loss(model, asked, 64)


@pytest.mark.parametrize(("start", "way"), [*(("core", way) for way in WAYS), ("zero", "clusters")])
def test_what_is_trained_is_what_the_new_store_serves(
    script, store_of, model, tmp_path, start, way
):
    store = store_of(way)
    names = [store.names[i] for i in (3, 0, 4)]
    asked = [examples(6, seed) for seed in range(3)]
    schedules = [batches(asked[i], 24, random.Random(0)) * (12 - i) for i in range(3)]
    schedules.sort(key=len, reverse=True)
    trained = script.Trained(store, model, names, script.Start(start), contextlib.nullcontext)
    before = trained.together.losses(asked, 64)
    if start == "core" and way == "clusters":  # rounded a second time, numbers may differ
        of_store = [loss_of(model, store, *each) for each in zip(names, asked, strict=True)]
        assert before == pytest.approx(of_store, rel=1e-4)
    for _ in trained.together.train(schedules, 1.0):
        pass
    after = trained.together.losses(asked, 64)
    assert all(now < then - 0.1 for now, then in zip(after, before, strict=True)), (before, after)
    trained.write(tmp_path / "new")
    with Store.open(tmp_path / "new") as new:
        assert sorted(new.names) == sorted(store.names)
        assert new.manifest.modules == store.manifest.modules
        found = [loss_of(model, new, *each) for each in zip(names, asked, strict=True)]
        # The steps of a store's codes are those of normalised cores: not quite the trained ones'.
        assert found == pytest.approx(after, rel={"int8": 5e-3, "int4": 0.02}.get(way, 1e-4))
        for name in set(store.names) - set(names):
            for module, pair in store.factors(name).items():
                for own, kept in zip(pair, new.factors(name)[module], strict=True):
                    assert torch.equal(own, kept)


def test_side_by_side_each_learns_what_it_learns_alone(script, store_of, model):
    store = store_of("clusters")
    asked = [examples(6, seed) for seed in range(5)]
    schedules = [batches(each, 24, random.Random(1)) * 2 for each in asked]

    def train(chosen):
        names = [store.names[i] for i in chosen]
        trained = script.Trained(store, model, names, script.Start.core, contextlib.nullcontext)
        for _ in trained.together.train([schedules[0]] + [schedules[i] for i in chosen[1:]], 0.3):
            pass
        return trained.together.numbers

    both = train([0, 1, 2, 3, 4])
    assert len({tuple(row) for row in store.chosen[:, 0].tolist()}) == 2  # of both clusters
    torch.testing.assert_close(both[:1], train([0]), rtol=1e-3, atol=1e-5)


def test_a_store_without_full_cores_is_refused(script, tmp_path, write_adapters, model):
    folders = write_adapters(tmp_path / "in", 3, shapes=SHAPES, ranks=(2, 3), seed=1)
    store = compress(read_adapters(folders), tmp_path / "store", Settings(method="jd-diag", rank=4))
    with pytest.raises(SystemExit, match="found other cores, expected jd-full's"):
        script.Trained(store, model, store.names, script.Start.core, contextlib.nullcontext)
