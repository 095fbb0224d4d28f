"""Weights that are found on examples, of a tiny model whose right weights are known."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.several_rows import compress
from tests.tiny_llama import tiniest_llama
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.choose.blend_weights import (
    BlendFitError,
    _Blended,
    _groups,
    _promising,
    fit_blend,
)
from vllm_jd.compressor.choose.examples import Example
from vllm_jd.compressor.errors import ModelError

HIDDEN, VOCABULARY, N = 24, 32, 6
SHAPES = {"model.embed_tokens": (VOCABULARY, HIDDEN)} | {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, 8),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.up_proj": (HIDDEN, 16),
    }.items()
}
METHODS = {
    "clusters": Settings(rank=4, clusters=2, store_dtype="float32"),
    "diagonal": Settings(method="jd-diag", rank=6, clusters=2, store_dtype="float32"),
    "own rows": Settings(rank=2, clusters=2, store_dtype="float32"),
    "svd": Settings(method="svd", rank=2, store_dtype="float32"),
}
ROWS = {"own rows": {"own": 1}}


@pytest.fixture(scope="module")
def model():
    return tiniest_llama()


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("fit")
    small = {"lora_alpha": 0.03}
    folders = write_adapters(
        folder / "a", N, shapes=SHAPES, ranks=(2, 3), seed=1, kind="real", config=small
    )
    rows = ROWS.get(request.param, {})
    return compress(read_adapters(folders), folder / "store", METHODS[request.param], **rows)


def merged(model, store, weights):
    """The model with the blend in its own weights."""
    copy = LlamaForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for name, weight in weights.items():
        for module, (b, a) in store.factors(name).items():
            delta = weight * (b @ a)
            copy.get_submodule(module).weight.data += delta.T if "embed" in module else delta
    return copy


def examples_of(model, n=6, length=12):
    """What a model says to random prompts."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(n):
        prompt = torch.randint(0, VOCABULARY, (1, 5), generator=generator)
        with torch.no_grad():
            whole = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip
        found.append(Example(prompt[0].tolist(), whole[0, 5:].tolist()))
    return found


def test_the_loss_is_that_of_the_merged_model(model, store):
    a, b, c = store.names[:3]
    weights = {a: 0.7, b: -0.4, c: 1.1}
    (example, *_) = examples_of(model)
    with _Blended(store, model, list(weights)).installed() as blended:
        found = blended.loss([example], torch.tensor(list(weights.values())))
    ids = torch.tensor([example.prompt + example.completion])
    with torch.no_grad():
        logits = merged(model, store, weights)(input_ids=ids).logits[0].double()
    scores = torch.log_softmax(logits, -1)[4:-1]
    expected = -scores.gather(1, torch.tensor(example.completion)[:, None]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0].double()
    assert not torch.allclose(plain, logits, atol=1e-2), "the adapters do nothing"


def test_it_finds_what_the_examples_were_made_with(model, store):
    a, b = store.names[1], store.names[4]
    wanted = {a: 1.2, b: -0.8}
    examples = examples_of(merged(model, store, wanted))
    told = []
    found = fit_blend(
        store, model, examples, most=3, steps=25, on_progress=lambda *each: told.append(each)
    )
    assert found.after < found.before - 0.05 and found.after <= found.best[1] + 1e-6
    assert found.weights.get(a, 0) > 0.2 and found.weights.get(b, 0) < -0.1
    assert len(found.weights) <= 3 and set(found.candidates) == set(store.names)
    assert found.tokens == 6 * 12
    assert ("weights", 25, 25) in told and ("single adapters", N, N) in told
    expected = merged(model, store, found.weights)
    with _Blended(store, expected, [a]).installed() as blended:
        assert blended.loss(examples, torch.zeros(1)) == pytest.approx(found.after, rel=1e-3)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks, "the model is not as it was"


def test_the_steepest_are_tried(model, store, monkeypatch):
    from vllm_jd.compressor.choose import blend_weights as module

    a = store.names[3]
    examples = examples_of(merged(model, store, {a: 1.5}))
    monkeypatch.setattr(module, "_CANDIDATES", 2)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * own_numbers(store, 17).max())
    told = []
    found = _promising(store, model, examples, lambda what, *each: told.append(each))
    assert len(found) == 2 and a in found
    assert len(told) > 1 and told[-1] == (N, N), "all were looked at in one pass"
    slopes = []
    for name in store.names:  # by small steps
        with _Blended(store, model, [name]).installed() as blended:
            up, down = (blended.loss(examples, torch.tensor([w])) for w in (0.01, -0.01))
        norm = float(store.norm[store.index(name)].double().square().sum().sqrt())
        slopes.append(abs(down - up) / norm)
    best = sorted(range(N), key=slopes.__getitem__, reverse=True)[:2]
    assert {store.names[i] for i in best} == set(found)


def own_numbers(store, tokens):
    """What each adapter has for itself: its cores, and of vectors that nobody else has their
    numbers, and twice their products with each token."""
    found = torch.full((len(store),), store.manifest.core_row)
    for column, module in enumerate(store.manifest.modules):
        rows = store.rows(module.name)
        for i, numbers in enumerate(store.chosen[:, column].tolist()):
            for number in numbers:
                if number >= module.shared:
                    width = module.d_in + module.d_out + 2 * tokens
                    found[i] += int(rows[number, 2]) * width
    return found


def test_passes_are_bounded_by_numbers(store, monkeypatch):
    """As many adapters in order as have so many numbers of their own; one that has more, alone."""
    from vllm_jd.compressor.choose import blend_weights as module

    own = own_numbers(store, 100).tolist()
    assert min(own) > 0
    for limit, expected in [(sum(own), [N]), (sum(own) - 1, [N - 1, 1]), (1, [1] * N)]:
        monkeypatch.setattr(module, "_AT_ONCE", limit)
        assert list(_groups(store, 100)) == expected
    monkeypatch.setattr(module, "_AT_ONCE", own[0] + own[1])
    assert next(iter(_groups(store, 100))) == 2


def test_what_helps_nobody_is_told(model, store):
    """What the base model says itself no adapter makes likelier by more than its weight costs."""
    examples = examples_of(model)
    sure = LlamaForCausalLM(model.config).eval()
    sure.load_state_dict(model.state_dict())
    sure.lm_head.weight.data *= 100  # so that it is certain of each token
    with pytest.raises(BlendFitError, match=r"make the examples' loss smaller.*--adapter"):
        fit_blend(store, sure, examples, steps=2)


def test_a_model_may_spell_its_layers_otherwise(model, store):
    """As a wrapper has them: the layers are the same ones."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = model

        def forward(self, **given):
            return self.language_model(**given)

    (example, *_) = examples_of(model, n=1)
    names, weights = store.names[:2], torch.tensor([0.9, -0.6])
    losses = []
    for each in (model, Wrapper()):
        with _Blended(store, each, names).installed() as blended:
            losses += [blended.loss([example], weights), blended.loss([example], 0 * weights)]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


def test_candidates_may_be_named(model, store):
    examples = examples_of(merged(model, store, {store.names[0]: 1.5}), n=1)
    names = [store.names[0], store.names[0], store.names[2]]
    found = fit_blend(store, model, examples, candidates=names, steps=1)
    assert found.candidates == (store.names[0], store.names[2])
    with pytest.raises(BlendFitError, match="nobody"):
        fit_blend(store, model, examples, candidates=["nobody"], steps=1)


def test_another_model_is_told(store):
    with pytest.raises(ModelError, match=r"model\.embed_tokens.*does not have"):
        fit_blend(store, torch.nn.Linear(1, 1), [Example([1], [2])], steps=1)
