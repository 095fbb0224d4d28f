"""One layer, one module: spellings that vLLM maps to one layer, and those that nobody can tell."""

import importlib
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_jd.compressor import AdapterError, Settings, export_adapter, read_adapters
from vllm_jd.compressor.change.incremental import add
from vllm_jd.compressor.read.names import layer_key
from vllm_jd.compressor.run.compress import compress

TAIL = "layers.3.self_attn.q_proj"
NOW, BEFORE, ALONE = "model.language_model.", "language_model.model.", "model."


def write(write_adapter, folder, seed, *modules, **config):
    """An adapter of random factors of rank 2 of these modules, 8 → 6."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    return write_adapter(folder, {m: (randn(6, 2), randn(2, 8)) for m in modules}, **config)


def refused(*paths, **options):
    with pytest.raises(AdapterError) as error:
        read_adapters(paths, **options)
    return error.value.faults


def delta(collection, i, module):
    """What adapter i adds to a module, `[d_out, d_in]`."""
    found = collection.factors(module).subset(torch.tensor([i]))
    return found.b.double().T @ found.a.double()


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [BEFORE, ALONE, "base_model.model.model.language_model.", "base_model.model." * 2 + BEFORE],
)
def test_two_spellings_are_one_module_with_the_numbers_of_both(
    tmp_path, write_adapter, peft_deltas, other
):
    first = write(write_adapter, tmp_path / "a", 0, NOW + TAIL)
    second = write(write_adapter, tmp_path / "b", 1, other + TAIL)
    for order in ([first, second], [second, first]):
        collection = read_adapters(order)
        assert collection.shapes == {NOW + TAIL: (8, 6)}
        for i, folder in enumerate([first, second]):
            (expected,) = peft_deltas(folder).values()
            assert close(delta(collection, i, NOW + TAIL), expected)


def test_peft_names_written_twice_are_read_once(tmp_path, write_adapter):
    """As vLLM reads them; alone in their collection, too."""
    folder = write(write_adapter, tmp_path / "a", 0, "base_model.model." + ALONE + TAIL)
    assert list(read_adapters([folder]).shapes) == [ALONE + TAIL]


@pytest.mark.parametrize("prefix", [NOW, BEFORE, ALONE, "llm.model.", "transformer."])
def test_a_collection_of_one_spelling_keeps_it(tmp_path, write_adapter, prefix):
    write(write_adapter, tmp_path / "a", 0, prefix + TAIL)
    write(write_adapter, tmp_path / "b", 1, prefix + TAIL)
    assert list(read_adapters([tmp_path]).shapes) == [prefix + TAIL]


def test_patterns_go_by_the_names_that_the_adapter_has(tmp_path, write_adapter, peft_deltas):
    write(write_adapter, tmp_path / "a", 0, NOW + TAIL)
    pattern = {BEFORE + TAIL: 64}
    folder = write(write_adapter, tmp_path / "b", 1, BEFORE + TAIL, alpha_pattern=pattern)
    (expected,) = peft_deltas(folder).values()
    assert close(delta(read_adapters([tmp_path]), 1, NOW + TAIL), expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NOW, BEFORE),
        (NOW, ALONE),
        (ALONE, "base_model.model." + ALONE),
        (BEFORE, "model." + BEFORE),
    ],
)
def test_one_adapter_with_two_names_of_a_layer_is_refused_with_both(
    tmp_path, write_adapter, one, other
):
    write(write_adapter, tmp_path / "good", 0, one + TAIL)
    write(write_adapter, tmp_path / "bad", 1, one + TAIL, other + TAIL)
    (fault,) = refused(tmp_path)
    found, _, _ = fault.partition(", which name one layer of the base model")
    assert found.startswith(f"{tmp_path / 'bad'}: found ")
    assert set(found.split(" found ")[1].split(" and ")) == {one + TAIL, other + TAIL}


def test_names_that_may_mean_one_layer_are_refused_with_both(tmp_path, write_adapter):
    write(write_adapter, tmp_path / "a", 0, "llm." + ALONE + TAIL)
    write(write_adapter, tmp_path / "b", 1, ALONE + TAIL)
    (fault,) = refused(tmp_path)
    assert "llm." + ALONE + TAIL in fault
    assert f" {ALONE + TAIL}," in fault


def test_names_that_one_adapter_has_side_by_side_are_two_layers(tmp_path, write_adapter):
    """One adapter has each layer once."""
    both = ["backbone.layers.0.proj", "head.layers.0.proj"]
    write(write_adapter, tmp_path / "a", 0, *both)
    write(write_adapter, tmp_path / "b", 1, both[0])
    write(write_adapter, tmp_path / "c", 2, both[1])
    assert list(read_adapters([tmp_path]).shapes) == both


def test_a_tower_is_not_the_language_model(tmp_path, write_adapter):
    vision = "model.vision_tower.encoder." + TAIL
    write(write_adapter, tmp_path / "a", 0, NOW + TAIL)
    write(write_adapter, tmp_path / "b", 1, vision)
    assert set(read_adapters([tmp_path]).shapes) == {NOW + TAIL, vision}


def test_other_shapes_under_two_spellings_are_refused(tmp_path, write_adapter):
    write(write_adapter, tmp_path / "a", 0, NOW + TAIL)
    write(write_adapter, tmp_path / "b", 1, NOW + TAIL)
    wide = {BEFORE + TAIL: (torch.ones(6, 2), torch.ones(2, 9))}
    write_adapter(tmp_path / "c", wide)
    (fault,) = refused(tmp_path)
    assert "adapts a layer of [6, 9]" in fault


def test_an_adapter_added_under_another_spelling_joins_the_stores_module(
    tmp_path, write_adapter, peft_deltas
):
    made = write(write_adapter, tmp_path / "made" / "a", 0, BEFORE + TAIL)
    later = write(write_adapter, tmp_path / "later" / "b", 1, NOW + TAIL)
    settings = Settings(method="none", store_dtype="float32")
    store = compress(read_adapters([made]), tmp_path / "store", settings)
    names = [module.name for module in store.manifest.modules]
    assert names == [BEFORE + TAIL]
    store = add(tmp_path / "store", read_adapters([later], modules=names), max_adapter_error=0.0)
    assert [module.name for module in store.manifest.modules] == names
    (expected,) = peft_deltas(later).values()
    exported = export_adapter(store, "b", tmp_path / "out")
    assert close(peft_deltas(exported)[names[0]], expected)


words = st.sampled_from(
    ["model", "language_model", "base_model", "layers", "0", "q_proj", "visual", "blocks"]
)


@given(st.lists(words, min_size=1, max_size=6).map(".".join))
def test_a_key_is_the_end_of_a_name_and_its_own_key(module):
    key = layer_key(module)
    assert f".{module}".endswith(f".{key}")
    assert layer_key(key) == layer_key(f"base_model.model.{module}") == key


# Wrappers of vLLM that import without an image library; the tables of the others are as these.
WRAPPERS = {
    "paligemma": "PaliGemmaForConditionalGeneration",
    "gemma3n_mm": "Gemma3nForConditionalGeneration",
    "phi3v": "Phi3VForCausalLM",
    "keye": "KeyeForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "isaac": "IsaacForConditionalGeneration",
    "gemma4": "Gemma4ForCausalLM",
}
# The prefixes of the wrappers that do not, as their `hf_to_vllm_mapper` has them.
TABLES = {
    "Qwen2-VL": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "LLaVA, Gemma 3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "lm_head.": "language_model.lm_head.",
    },
    "Qwen3-Omni": {
        "thinker.lm_head.": "language_model.lm_head.",
        "thinker.model.": "language_model.model.",
        "thinker.": "",
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *TABLES, None])
def test_what_vllm_maps_to_one_layer_has_one_key(wrapper):
    """Of all spellings of layers, by vLLM's own function and its models' own tables."""
    pytest.importorskip("vllm")
    from vllm.lora.utils import parse_fine_tuned_lora_name
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = None
    if wrapper in TABLES:
        mapper = WeightsMapper(orig_to_new_prefix=TABLES[wrapper])
    elif wrapper:
        module = importlib.import_module(f"vllm.model_executor.models.{wrapper}")
        mapper = getattr(module, WRAPPERS[wrapper]).hf_to_vllm_mapper.get_rename_mapper()
    prefixes = ["", "model.", NOW, BEFORE, "language_model.", "model." + BEFORE, "thinker.model."]
    prefixes += ["base_model.model." + prefix for prefix in prefixes]
    tails = [TAIL, "layers.4.mlp.up_proj", "lm_head", "visual.blocks.0.attn.qkv"]
    tails += ["vision_tower.encoder.layers.3.self_attn.q_proj"]
    places: dict[str, set[str]] = {}
    for prefix, tail in itertools.product(prefixes, tails):
        name = f"base_model.model.{prefix}{tail}.lora_A.weight"
        place, _ = parse_fine_tuned_lora_name(name, mapper)
        places.setdefault(place, set()).add(layer_key(prefix + tail))
    assert len(places) >= len(tails)
    assert {place: keys for place, keys in places.items() if len(keys) > 1} == {}


def test_a_doubled_prefix_goes_through_the_command_line(tmp_path, write_adapter):
    from typer.testing import CliRunner

    from vllm_jd.cli.app import app

    write(write_adapter, tmp_path / "in" / "a", 0, ALONE + TAIL)
    write(write_adapter, tmp_path / "in" / "b", 1, "base_model.model." + ALONE + TAIL)
    out = tmp_path / "s"
    run = CliRunner().invoke(app, ["compress", str(tmp_path / "in"), "--out", str(out), "--json"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    summary = json.loads(run.stdout)
    assert [module["name"] for module in summary["modules"]] == [ALONE + TAIL]
    assert [module["adapters"] for module in summary["modules"]] == [2]
