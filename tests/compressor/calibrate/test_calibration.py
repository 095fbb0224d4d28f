"""The metric against its definition, and what it is for: closer outputs on inputs never seen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.calibrate.calibration import DAMPING, Metric
from vllm_jd.compressor.calibrate.moments import measure
from vllm_jd.compressor.read.adapters import linear_shapes
from vllm_jd.compressor.run.compress import compress

property_test = settings(max_examples=40, deadline=None, derandomize=True)


def inputs(d, tokens, decay, seed, scale=1.0):
    """Rows x, float64 `[tokens, d]`, whose directions differ in size, rotated out of the axes."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    return scale * rows * decay ** torch.arange(d) @ rotation


cases = given(
    d=st.integers(1, 40),
    tokens=st.integers(1, 80),
    decay=st.sampled_from([1.0, 0.9, 0.5]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)


@property_test
@cases
def test_undo_is_the_inverse_of_see(d, tokens, decay, seed, scale):
    x = inputs(d, tokens, decay, seed, scale)
    metric = Metric.of((x.T @ x / tokens).float())
    rows = torch.randn(5, d, generator=torch.Generator().manual_seed(seed))
    for once in (metric.undo(metric.see(rows)), metric.see(metric.undo(rows))):
        torch.testing.assert_close(once, rows, rtol=1e-3, atol=1e-3)


@property_test
@cases
def test_the_norm_of_ds_is_the_mean_square_of_dx(d, tokens, decay, seed, scale):
    x = inputs(d, tokens, decay, seed, scale)
    delta = torch.randn(7, d, generator=torch.Generator().manual_seed(seed)).double()
    metric = Metric.of((x.T @ x / tokens).float())
    found = float(metric.see(delta.float()).double().square().sum())
    damping = DAMPING * float(x.square().sum() / tokens / d) * float(delta.square().sum())
    expected = float((x @ delta.T).square().sum() / tokens) + damping
    assert found == pytest.approx(expected, rel=1e-4)


def test_inputs_without_any_preference_change_nothing():
    metric = Metric.of(4 * torch.eye(6))
    torch.testing.assert_close(metric.root, (4 * (1 + DAMPING)) ** 0.5 * torch.eye(6))


def test_the_moment_given_is_left_alone_and_factors_keep_their_ranks():
    moment = torch.eye(4, dtype=torch.float64)
    factors = ModuleFactors(torch.randn(3, 4), torch.randn(3, 2), torch.tensor([1, 2]))
    seen = Metric.of(moment).seen(factors)
    assert torch.equal(moment, torch.eye(4, dtype=torch.float64))
    assert seen.ranks is factors.ranks and torch.equal(seen.b, factors.b)


@pytest.fixture(scope="module")
def uneven_llama(tmp_path_factory):
    """A tiny Llama whose norms pass some directions on twenty times as strongly as others."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = 2.0 * 0.9 ** torch.randperm(32)
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    model.save_pretrained(folder)
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model)


def sentences(count, seed):
    ids = torch.randint(1, 64, (count, 12), generator=torch.Generator().manual_seed(seed))
    return ids, [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def logits(model, deltas, ids):
    changed = copy.deepcopy(model)
    for module, delta in deltas.items():
        changed.get_submodule(module).weight.data += delta.float()
    with torch.no_grad():
        return changed(ids).logits


@pytest.mark.parametrize("options", [{}, {"clusters": 2}])
def test_outputs_on_unseen_prompts_are_closer_with_calibration(
    uneven_llama, tmp_path, write_adapters, peft_deltas, options
):
    shapes = {
        f"model.layers.{layer}.{module}": (32, d_out)
        for layer in (0, 1)
        for module, d_out in {
            "self_attn.q_proj": 32,
            "self_attn.v_proj": 16,
            "mlp.up_proj": 48,
        }.items()
    }
    config = {"alpha": 0.08}
    folders = write_adapters(tmp_path / "in", 8, shapes=shapes, config=config)
    collection = read_adapters(folders)
    _, seen = sentences(40, seed=1)
    moments = measure(uneven_llama.folder, seen, collection.shapes, tmp_path / "m.safetensors")
    held_out, _ = sentences(20, seed=2)
    lost, recorded = {}, {}
    for label, metrics in (("plain", None), ("calibrated", moments)):
        chosen = Settings(rank=8, store_dtype="float32", **options)
        store = compress(collection, tmp_path / label, chosen, metrics=metrics)
        lost[label] = 0.0
        for folder in folders:
            exact = peft_deltas(folder)
            out = export_adapter(store, folder.name, tmp_path / label / "out" / folder.name)
            stored = peft_deltas(out)
            want = logits(uneven_llama.model, exact, held_out)
            got = logits(uneven_llama.model, stored, held_out)
            lost[label] += float((got - want).square().sum())
        recorded[label] = float(store.error.mean())
    assert lost["calibrated"] < 0.8 * lost["plain"]
    # It is a trade: the matrices themselves are further off.
    assert recorded["calibrated"] > recorded["plain"]


def test_the_recorded_input_error_is_that_of_the_outputs(
    uneven_llama, tmp_path, write_adapters, peft_deltas
):
    """An embedding's inputs are not measured: to its error all tokens are alike."""
    module, table = "model.layers.1.self_attn.q_proj", "model.embed_tokens"
    shapes = {table: (uneven_llama.model.config.vocab_size, 32), module: (32, 32)}
    folders = write_adapters(tmp_path / "in", 6, shapes=shapes)
    collection = read_adapters(folders)
    linear = linear_shapes(collection)
    assert linear == {module: (32, 32)}
    ids, seen = sentences(30, seed=3)
    moments = measure(uneven_llama.folder, seen, linear, tmp_path / "m.safetensors")
    chosen = Settings(rank=6, store_dtype="float32")
    store = compress(collection, tmp_path / "store", chosen, metrics=moments)
    with torch.no_grad():
        layers = uneven_llama.model(ids, output_hidden_states=True).hidden_states
        x = uneven_llama.model.model.layers[1].input_layernorm(layers[1]).flatten(0, 1).double()
    damping = DAMPING * float(x.square().mean())

    def seen_square(delta):
        return float((x @ delta.T).square().sum() / len(x) + damping * delta.square().sum())

    for folder in folders:
        exact = peft_deltas(folder)
        stored = peft_deltas(export_adapter(store, folder.name, tmp_path / "out" / folder.name))
        expected = seen_square(exact[module] - stored[module]) / seen_square(exact[module])
        found = store.input_error[store.index(folder.name)]
        assert float(found[store.module_index(module)]) == pytest.approx(expected, rel=1e-3)
        lost = (exact[table] - stored[table]).norm() ** 2 / exact[table].norm() ** 2
        assert float(found[store.module_index(table)]) == pytest.approx(float(lost), rel=1e-3)
