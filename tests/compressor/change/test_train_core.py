"""Cores trained in a store's bases, of a tiny model whose right answers are known."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from tests.compressor.change.made import bits
from tests.tiny_llama import tiniest_llama
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import recompress
from vllm_jd.compressor.change.train_core import (
    TrainError,
    Training,
    add_trained,
    train_core,
)
from vllm_jd.compressor.change.uploads import refit
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.errors import AdapterError, ModelError
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store.settling import settle

HIDDEN, VOCABULARY, N = 24, 32, 8
SHAPES = {"model.embed_tokens": (VOCABULARY, HIDDEN)} | {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, 8),
        "mlp.up_proj": (HIDDEN, 16),
    }.items()
}
METHODS = {
    "clusters": Settings(rank=4, clusters=2, store_dtype="float32"),
    "bfloat16": Settings(rank=4, clusters=3),
    "diagonal": Settings(method="jd-diag", rank=6, clusters=2, store_dtype="float32"),
    "int8": Settings(rank=8, store_dtype="int8"),
}
TRAINING = Training(epochs=5, learning_rate=0.2, batch_tokens=64, held_out=0.2)


@pytest.fixture(scope="module")
def model():
    return tiniest_llama()


@pytest.fixture
def store_of(tmp_path, write_adapters):
    def store_of(kind):
        small = {"alpha": 0.05}
        folders = write_adapters(
            tmp_path / "a", N, shapes=SHAPES, ranks=(2, 3), seed=1, kind="real", config=small
        )
        return compress(read_adapters(folders), tmp_path / "store", METHODS[kind])

    return store_of


def merged(model, factors):
    """The model with an adapter, module → (B, A), in its own weights."""
    changed = copy.deepcopy(model)
    for module, (b, a) in factors.items():
        delta = b.float() @ a.float()
        changed.get_submodule(module).weight.data += delta.T if "embed" in module else delta
    return changed


def said_by(model, n=40, least=4, most=9):
    """What a model says to random prompts, of several lengths."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(n):
        length = least + i % (most - least)
        prompt = torch.randint(0, VOCABULARY, (1, 3 + i % 4), generator=generator)
        with torch.no_grad():
            whole = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
        found.append(Example(prompt[0].tolist(), whole[0, prompt.shape[1] :].tolist()))
    return found


def loss_of(model, examples):
    """The mean loss of a token, one example at a time and without padding."""
    total = tokens = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        wanted = torch.tensor(example.completion)
        total -= float(scores[len(example.prompt) - 1 : -1].gather(1, wanted[:, None]).sum())
        tokens += len(wanted)
    return total / tokens


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_trained_is_what_the_store_serves(model, store_of, kind):
    store = store_of(kind)
    teacher = store.names[3]
    examples = said_by(merged(model, store.factors(teacher)))
    told = []
    trained = train_core(
        store, model, examples, training=TRAINING, on_progress=lambda *x: told.append(x)
    )
    assert trained.held_out and trained.judged == 8
    assert trained.after < trained.before - 0.3
    assert trained.numbers == store.manifest.core_row
    assert told[-1] == ("training", trained.steps, trained.steps)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks, "the model is not as it was"

    before = bits(store)
    added = add_trained(store.path, trained, "new")
    assert added.names == [*store.names, "new"]
    after = bits(added)
    assert {name: after[name] for name in before} == before
    # One cluster in all modules, whose core is the one that was trained.
    assert set(added.chosen[-1, :, 0].tolist()) == {trained.cluster}
    limit = {"int8": 1e-3, "bfloat16": 1e-4}.get(kind, 1e-9)
    assert float(added.error[-1].max()) < limit
    served = merged(model, added.factors("new"))
    judged = held_out(examples, TRAINING)
    rel = {"int8": 0.02, "bfloat16": 0.01}.get(kind, 1e-4)
    assert loss_of(served, judged) == pytest.approx(trained.after, rel=rel)
    assert loss_of(model, judged) == pytest.approx(trained.before, rel=1e-4)


def held_out(examples, training):
    """Those that are not trained on."""
    order = list(range(len(examples)))
    random.Random(training.seed).shuffle(order)
    return [examples[i] for i in sorted(order[: round(training.held_out * len(examples))])]


def test_the_cluster_whose_bases_the_task_lies_in_is_chosen(model, store_of):
    store = store_of("clusters")
    for cluster in (0, 1):
        generator = torch.Generator().manual_seed(cluster)
        factors = {}
        for module, (b, a) in store.factors(store.names[0]).items():
            bases = store.bases(module)
            rank = len(bases.v) // 2
            u, v = (x[cluster * rank : (cluster + 1) * rank] for x in (bases.u, bases.v))
            core = torch.randn(rank, rank, generator=generator)
            core *= (b @ a).norm() / core.norm()
            factors[module] = (u.T @ core, v)
        examples = said_by(merged(model, factors))
        found = train_core(store, model, examples, training=Training(epochs=1))
        assert found.cluster == cluster
        given = train_core(store, model, examples, training=Training(epochs=1), cluster=1 - cluster)
        assert given.cluster == 1 - cluster


def test_the_epoch_that_does_best_on_what_was_held_out_is_kept(model, store_of):
    """Noise: after the first epoch it is learnt by heart, and the rest gets worse."""
    store = store_of("clusters")
    rng = random.Random(0)
    noise = [
        Example([rng.randrange(VOCABULARY) for _ in range(3)], [rng.randrange(4) for _ in range(5)])
        for _ in range(24)
    ]
    wild = Training(epochs=12, learning_rate=3.0, batch_tokens=48, held_out=0.4)
    trained = train_core(store, model, noise, training=wild, cluster=0)
    last = train_core(store, model, noise, training=replace(wild, held_out=0.0), cluster=0)
    assert (last.epoch, last.held_out, last.judged) == (12, False, 24)
    assert trained.epoch < 12
    kept = merged(model, trained.factors)
    assert loss_of(kept, held_out(noise, wild)) == pytest.approx(trained.after, rel=1e-4)


@pytest.mark.parametrize("stop", [1, 9, 17])
def test_it_goes_on_where_it_was_stopped(model, store_of, tmp_path, stop):
    store = store_of("clusters")
    examples = said_by(merged(model, store.factors(store.names[0])))
    whole = train_core(store, model, examples, training=TRAINING)
    assert whole.steps > 20
    seen = []

    def interrupt(what, done, total):
        if what == "training":
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

    kept = tmp_path / "kept" / "x.pt"
    options = {"training": TRAINING, "kept": kept}
    with pytest.raises(KeyboardInterrupt):
        train_core(store, model, examples, on_progress=interrupt, **options)
    again = []
    found = train_core(store, model, examples, on_progress=lambda *x: again.append(x), **options)
    first = next(done for what, done, _ in again if what == "training")
    assert (first > 0) == (stop > whole.steps // 4), "finished epochs are not trained again"
    for module, pair in whole.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(found.factors[module], pair, strict=True))
    assert (found.after, found.epoch) == (whole.after, whole.epoch)
    # Where it could not be added, the same call gives it out once more, untrained.
    again.clear()
    once_more = train_core(
        store, model, examples, on_progress=lambda *x: again.append(x), **options
    )
    assert [each for each in again if each[0] == "training"] == [
        ("training", whole.steps, whole.steps)
    ]
    assert (once_more.after, once_more.epoch, once_more.steps) == (
        whole.after, whole.epoch, whole.steps,
    )  # fmt: skip


def test_what_was_kept_of_something_else_or_is_damaged_is_not_gone_on_with(
    model, store_of, tmp_path
):
    store = store_of("clusters")
    examples = said_by(merged(model, store.factors(store.names[0])))
    whole = train_core(store, model, examples, training=TRAINING)
    kept = tmp_path / "x.pt"
    kept.write_bytes(b"not a file of torch's")
    found = train_core(store, model, examples, training=TRAINING, kept=kept)
    assert found.after == whole.after

    def interrupt(what, done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_core(store, model, examples[1:],
            training=TRAINING, kept=kept, on_progress=interrupt,
        )  # fmt: skip
    assert kept.exists()
    found = train_core(store, model, examples, training=TRAINING, kept=kept)
    assert found.after == whole.after


def test_bases_that_were_fitted_anew_meanwhile_are_told(model, store_of, tmp_path):
    store = store_of("clusters")
    examples = said_by(model)
    trained = train_core(store, model, examples, training=Training(epochs=1))
    recompress(store.path, read_adapters([tmp_path / "a" / name for name in store.names[:5]]))
    with pytest.raises(TrainError, match="fitted anew while new was trained"):
        add_trained(store.path, trained, "new")


def test_new_bases_can_be_fitted_to_it_too(model, store_of, tmp_path):
    store = store_of("clusters")
    trained = train_core(store, model, said_by(model), training=Training(epochs=1))
    add_trained(store.path, trained, "new").close()
    settle(store.path)  # what keeps house clears away what nobody needs
    found = refit(store.path, originals=[tmp_path / "a"], max_adapter_error=9.0)
    assert found.refitted and set(found.store.names) == {*store.names, "new"}
    kept = found.store.factors("new")
    delta = sum((b @ a).square().sum() for b, a in trained.factors.values())
    lost = sum(
        (b @ a - kept[module][0] @ kept[module][1]).square().sum()
        for module, (b, a) in trained.factors.items()
    )
    assert float(lost) < 0.5 * float(delta)


def test_a_name_that_is_taken_is_refused_unless_it_is_to_give_way(model, store_of):
    store = store_of("clusters")
    name = store.names[2]
    trained = train_core(store, model, said_by(model), training=Training(epochs=1))
    with pytest.raises(AdapterError, match=name):
        add_trained(store.path, trained, name)
    replaced = add_trained(store.path, trained, name, replace=True)
    assert sorted(replaced.names) == sorted(store.names)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"method": "svd", "rank": 2}, {}, "store by svd, whose adapters have no cores"),
        ({"method": "none"}, {}, "store by none"),
        ({"method": "ties"}, {}, "store by ties"),
        ({"rank": 2, "clusters": 2}, {"cluster": 2}, "no cluster 2.*expected 0 to 1"),
        ({"rank": 2}, {"training": Training(held_out=0.9)}, "leave none to train on"),
    ],
)
def test_what_cannot_be_trained_is_told(model, tmp_path, write_adapters, settings, given, message):
    folders = write_adapters(tmp_path / "a", 4, shapes=SHAPES, ranks=(2,), kind="real")
    store = compress(read_adapters(folders), tmp_path / "s", Settings(**settings))
    examples = said_by(model, n=2 if "none to" in message else 12)
    with pytest.raises(TrainError, match=message):
        train_core(store, model, examples, **given)


def test_training_that_comes_to_nothing_is_told(model, store_of):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainError, match=r"the loss became nan at step 1.*lower --learning-rate"):
        train_core(store_of("clusters"), broken, said_by(model), cluster=0)


def test_another_model_is_told(store_of):
    with pytest.raises(ModelError, match=r"model\.embed_tokens.*does not have"):
        train_core(store_of("clusters"), torch.nn.Linear(1, 1), [Example([1], [2])] * 20)
