"""What of a base model can have adapters served, by its config.json alone."""

import itertools
import json

import pytest
import torch

from vllm_jd.compressor.read.base_layers import misfits, read_config, told

transformers = pytest.importorskip("transformers")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
QWEN = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "text_config": {key: LLAMA[key] for key in LLAMA if key not in ("architectures", "model_type")},
    "vision_config": {"depth": 2, "embed_dim": 8, "num_heads": 2, "hidden_size": 24},
}


def names(config, *modules):
    """Those that do not fit: module → whether that is certain."""
    return {misfit.module: misfit.certain for misfit in misfits(modules, config)}


def reason(config, *module):
    (sentence,) = told(misfits([module], config))
    return sentence


def test_all_linear_layers_of_a_model_are_served_and_its_embedding():
    """As transformers makes it for real, with every number of it."""
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})
    model = transformers.LlamaForCausalLM(config)
    linear = [
        (name, part.in_features, part.out_features)
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear)
    ]
    assert len(linear) == 3 * 7 + 1
    assert names(LLAMA, *linear) == {}
    assert names(LLAMA, ("lm_head", 24, 51)) == {"lm_head": True}
    assert names(LLAMA, ("model.embed_tokens", 50, 24)) == {}
    assert names(LLAMA, ("model.embed_tokens", 52, 24)) == {"model.embed_tokens": True}
    assert "52 → 24, which is 50 → 24" in reason(LLAMA, "model.embed_tokens", 52, 24)


def test_another_shape_is_told_with_both():
    sentence = reason(LLAMA, "model.layers.0.self_attn.k_proj", 24, 24)
    assert sentence.startswith("model.layers.0.self_attn.k_proj: ")
    assert "24 → 24" in sentence
    assert "24 → 8 in LlamaForCausalLM" in sentence


@pytest.mark.parametrize(("layer", "wrong"), [(0, False), (2, False), (3, True), (31, True)])
def test_layers_after_the_last(layer, wrong):
    module = (f"model.layers.{layer}.mlp.down_proj", 40, 24)
    assert names(LLAMA, module) == ({module[0]: True} if wrong else {})
    nameless = LLAMA | {"architectures": ["OfSomeRemoteCode"]}
    assert names(nameless, module) == ({module[0]: True} if wrong else {})


SPELLINGS = ["model.language_model.", "language_model.model.", "model."]


@pytest.mark.parametrize("prefix", SPELLINGS)
def test_of_a_wrapper_the_language_model_is_served_however_it_is_spelled(prefix):
    assert names(QWEN, (f"{prefix}layers.2.self_attn.q_proj", 24, 24)) == {}
    assert names(QWEN, (f"{prefix}layers.2.self_attn.q_proj", 24, 8)) != {}
    assert names(QWEN, (f"{prefix}layers.3.self_attn.q_proj", 24, 24)) != {}
    assert names(QWEN, (f"{prefix}embed_tokens", 50, 24)) == {}


@pytest.mark.parametrize("architecture", ["Qwen2VLForConditionalGeneration", "OfSomeRemoteCode"])
@pytest.mark.parametrize(
    "module",
    [
        "visual.blocks.0.attn.qkv",
        "model.visual.blocks.1.mlp.fc1",
        "model.visual.merger.mlp.0",
        "model.language_model.layers.0.mlp.experts.3.up_proj",
    ],
)
def test_towers_and_experts_are_not(architecture, module):
    config = QWEN | {"architectures": [architecture]}
    assert names(config, (module, 24, 24)) == {module: True}


def test_a_layer_that_transformers_names_otherwise_is_in_doubt():
    module = "model.layers.0.self_attn.W_pack"
    assert names(LLAMA, (module, 24, 72)) == {module: False}
    # A router is there, though as no linear layer of torch's.
    moe = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | {
        key: LLAMA[key] for key in LLAMA if key not in ("architectures", "model_type")
    }
    assert names(moe, ("model.layers.0.mlp.gate", 24, 8)) == {}


def test_widths_that_contradict_a_config_are_in_doubt_without_the_class():
    nameless = {key: value for key, value in LLAMA.items() if key != "architectures"}
    for kind, shape in {"q_proj": (32, 24), "o_proj": (24, 32), "down_proj": (40, 32)}.items():
        module = f"model.layers.0.x.{kind}"
        assert names(nameless, (module, *shape)) == {module: False}
        assert names(nameless, (module, 24, 24)) == {}
    assert names(nameless, ("lm_head", 32, 50)) == {"lm_head": False}
    assert names(nameless, ("lm_head", 24, 50)) == {}
    assert names(nameless, ("model.embed_tokens", 50, 32)) == {"model.embed_tokens": False}
    assert names(nameless, ("model.embed_tokens", 50, 24)) == {}


def test_a_layer_of_transformers_conv1d_is_the_other_way_round():
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 24, "n_layer": 1}
    gpt2 |= {"n_head": 3}
    assert names(gpt2, ("transformer.h.0.attn.c_attn", 24, 72)) == {}
    assert names(gpt2, ("transformer.h.0.attn.c_attn", 72, 24)) != {}
    gpt2 |= {"vocab_size": 50, "n_positions": 16}
    assert names(gpt2, ("transformer.wte", 50, 24)) == {}
    assert "not that of the language model's tokens" in reason(gpt2, "transformer.wpe", 16, 24)


def test_nothing_known_tells_nothing_but_what_names_say():
    modules = [("model.layers.99.self_attn.q_proj", 7, 9), ("visual.blocks.0.attn.qkv", 7, 9)]
    assert names({}, *modules) == {"visual.blocks.0.attn.qkv": True}


def test_like_reasons_are_told_once():
    modules = [(f"visual.blocks.{i}.attn.qkv", 8, 24) for i in range(5)]
    assert told(misfits(modules, {})) == [
        "visual.blocks.0.attn.qkv and 4 more: not of the language model: only its tokens have "
        "adapters"
    ]


ODD = [None, [], {}, "x", 0, -1, 10**30, 1.5, True, ["LlamaForCausalLM"], {"hidden_size": "x"}]


@pytest.mark.parametrize("key", [*LLAMA, "text_config", "quantization_config", "dtype"])
def test_no_config_stops_the_check(key):
    modules = [("model.layers.0.self_attn.q_proj", 24, 24), ("visual.blocks.0.attn.qkv", 7, 9)]
    for value in ODD:
        assert names(LLAMA | {key: value}, *modules)["visual.blocks.0.attn.qkv"]


def test_only_a_readable_object_is_a_config(tmp_path):
    assert read_config(tmp_path) == {}
    for text, expected in {"{": {}, "[]": {}, "\xff": {}, '{"a": 1}': {"a": 1}}.items():
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert read_config(tmp_path) == expected
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(("one", "other"), itertools.permutations(SPELLINGS, 2))
def test_the_check_goes_by_layers_not_by_spellings(one, other):
    shapes = itertools.product((24, 8), repeat=2)
    for shape in shapes:
        found = [names(QWEN, (f"{p}layers.0.self_attn.k_proj", *shape)) for p in (one, other)]
        assert [len(each) for each in found] in ([0, 0], [1, 1])
