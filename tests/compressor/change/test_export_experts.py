"""Exported adapters of experts: PEFT's forward pass on them is what the store adds."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.compressor.read import moe_folders as moe
from tests.compressor.read.moe_folders import EXPERTS, HIDDEN, INNER, MIXTRAL, QWEN
from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import read_base_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def said_with(family, folder):
    return moe.logits(PeftModel.from_pretrained(moe.base_model(family), folder).eval())


def served(family, store, name):
    return moe.with_factors(family, store.factors(name))


@pytest.fixture(scope="module", params=["Qwen3Moe", "Mixtral", "GptOss"])
def stacked(request, tmp_path_factory):
    """A family, folders of three adapters of it, one of other ranks, and what PEFT says."""
    folder = tmp_path_factory.mktemp(request.param)
    patterns = {"rank_pattern": {"model.layers.0.mlp.experts.gate_up_proj": 4}}
    configs = [{}, patterns, {"r": 2}]
    said = [
        moe.stacked(request.param, folder / f"a{i}", seed=i, **config)
        for i, config in enumerate(configs)
    ]
    return request.param, [folder / f"a{i}" for i in range(3)], said


OPTIONS = {
    "lossless": {"rank": 40, "store_dtype": "float32"},
    "joint": {"rank": 6, "experts": "joint"},
    "separate, int8": {"rank": 3, "store_dtype": "int8"},
    "kept": {"rank": 6, "max_adapter_error": 0.3, "experts": "joint"},
    "svd": {"method": "svd", "rank": 2},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_stacks_stay_stacks(tmp_path, stacked, kind):
    family, folders, said = stacked
    store = compress(read_adapters(folders), tmp_path / "store", Settings(**OPTIONS[kind]))
    for i, name in enumerate(store.names):
        found = said_with(family, export_adapter(store, name, tmp_path / name))
        if kind == "lossless":
            torch.testing.assert_close(found, said[i], rtol=0, atol=1e-4)
        else:
            assert (found - said[i]).abs().max() > 1e-3
        torch.testing.assert_close(found, served(family, store, name), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "names"), [("Qwen3Moe", QWEN), ("Mixtral", MIXTRAL)])
@pytest.mark.parametrize("kind", ["joint", "svd", "none"])
def test_layers_of_their_own_stay_that(tmp_path, family, names, kind):
    for i in range(3):
        own = range(EXPERTS) if i else (0, 2)
        moe.own_layers(tmp_path / f"a{i}", names, seed=i, experts=own)
    options = OPTIONS.get(kind, {"method": "none"})
    folders = [tmp_path / f"a{i}" for i in range(3)]
    base_config = moe.base_model(family).config.to_dict()
    collection = read_adapters(folders, base_config=base_config)
    store = compress(collection, tmp_path / "store", Settings(**options))
    for name in store.names:
        exported = export_adapter(store, name, tmp_path / "out" / name)
        expected = served(family, store, name)
        torch.testing.assert_close(said_with(family, exported), expected, rtol=0, atol=2e-5)
        keys = load_file(exported / WEIGHTS).keys()
        layer = f"base_model.model.{names[0].format(1)}.{EXPERTS - 1}.{names[1][0]}"
        assert f"{layer}.lora_A.weight" in keys and len(keys) == 2 * 3 * EXPERTS * moe.LAYERS
        again = read_adapters([exported], base_config=base_config)
        back = moe.with_deltas(family, again, 0)
        torch.testing.assert_close(back, expected, rtol=0, atol=2e-5)


def test_one_projection_alone(tmp_path):
    moe.stacked("Qwen3Moe", tmp_path / "a", target_parameters=["gate_up_proj"], target_modules=[])
    store = compress(read_adapters([tmp_path / "a"]), tmp_path / "s", Settings(method="none"))
    exported = export_adapter(store, "a", tmp_path / "out")
    expected = served("Qwen3Moe", store, "a")
    torch.testing.assert_close(said_with("Qwen3Moe", exported), expected, rtol=0, atol=2e-5)
    keys = load_file(exported / WEIGHTS)
    a = keys["base_model.model.model.layers.0.mlp.experts.lora_A.weight"]
    assert a.shape == (3 * EXPERTS, HIDDEN)
    config = json.loads((exported / CONFIG).read_text())
    assert config["target_parameters"] == [
        f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(moe.LAYERS)
    ]
    down = {"target_parameters": ["down_proj"], "target_modules": []}
    said = moe.stacked("GptOss", tmp_path / "b", **down)
    options = {"base_config": moe.base_model("GptOss").config.to_dict()}
    collection = read_adapters([tmp_path / "b"], **options)
    assert collection.shapes["model.layers.0.mlp.experts.down_proj"] == (INNER, HIDDEN)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CONFIG.replace("adapter_", "")).write_text(
        json.dumps(options["base_config"], default=str)
    )
    known = read_base_model(tmp_path / "base", moe.BASE)
    settings = Settings(method="none", store_dtype="float32")
    store = compress(collection, tmp_path / "t", settings, base_model=known)
    found = said_with("GptOss", export_adapter(store, "b", tmp_path / "out-b"))
    torch.testing.assert_close(found, said, rtol=0, atol=1e-5)
