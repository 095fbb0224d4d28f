"""A store is served on the model that it was made for, and on no other."""

import json
from pathlib import Path

import pytest

from vllm_jd.store import (
    BaseModelInfo,
    StoreError,
    check_base_model,
    read_base_model,
    short_name,
)
from vllm_jd.store.base_model import fingerprint

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def info(name="org/Tiny-Llama", **changes):
    digest, fields = fingerprint(CONFIG | changes)
    return BaseModelInfo(name=name, fingerprint=digest, config=fields)


@pytest.mark.parametrize(
    "name",
    [
        "org/tiny-llama",
        "tiny-llama",
        "Tiny-Llama",
        "/models/Tiny-Llama",
        "/models/Tiny-Llama/",
        "/hf/hub/models--org--Tiny-Llama/snapshots/0123abc",
        "/hf/hub/models--org--Tiny-Llama/snapshots/0123abc/",
        "/hf/hub/models--Tiny-Llama/snapshots/0123abc",
        "other-org/tiny-llama",
    ],
)
def test_the_same_model_by_another_path_is_accepted(name):
    check_base_model(info(), name, CONFIG)
    check_base_model(info(name=name), "org/tiny-llama", CONFIG)


def test_another_save_of_the_same_model_is_accepted():
    other = CONFIG | {"torch_dtype": "float32", "use_cache": False, "transformers_version": "9"}
    check_base_model(info(), "tiny-llama", other)
    del other["rope_theta"]
    other["head_dim"] = 16
    check_base_model(info(), "tiny-llama", other)
    check_base_model(BaseModelInfo(name="tiny-llama"), "tiny-llama", CONFIG)


def test_another_name_is_refused_unless_it_is_said_to_be_the_same():
    with pytest.raises(StoreError) as caught:
        check_base_model(info(), "org/renamed", CONFIG)
    assert "made for base model 'org/Tiny-Llama', but 'org/renamed' is served" in str(caught.value)
    assert "--store-base-model org/Tiny-Llama" in str(caught.value)
    check_base_model(info(), "org/renamed", CONFIG, alias="org/Tiny-Llama")
    check_base_model(info(), "org/renamed", CONFIG, alias="tiny-llama")
    with pytest.raises(StoreError, match="is served"):
        check_base_model(info(), "org/renamed", CONFIG, alias="another")


@pytest.mark.parametrize("alias", [None, "org/Tiny-Llama"])
def test_another_config_is_refused_field_by_field(alias):
    served = CONFIG | {"hidden_size": 96, "model_type": "qwen2"}
    with pytest.raises(StoreError) as caught:
        check_base_model(info(), "org/Tiny-Llama", served, alias=alias)
    assert "hidden_size: store 64, served model 96" in str(caught.value)
    assert "model_type: store 'llama', served model 'qwen2'" in str(caught.value)
    assert "vocab_size" not in str(caught.value)


def test_a_base_model_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert read_base_model(folder) == info(name="Tiny-Llama")
    assert read_base_model(folder, "org/x") == info(name="org/x")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_base_model_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"config\.json"):
        read_base_model(tmp_path)


def test_a_relative_folder_has_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "Tiny" / "sub").mkdir(parents=True)
    (tmp_path / "Tiny" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path / "Tiny")
    assert read_base_model(Path()).name == "Tiny"
    monkeypatch.chdir(tmp_path / "Tiny" / "sub")
    assert read_base_model(Path("..")).name == "Tiny"


def test_short_names():
    assert short_name("org/model") == "model"
    assert short_name("model") == "model"
    assert short_name("/a/b/model//") == "model"
    assert short_name("models--a--b-c/snapshots/x") == "b-c"
    assert short_name("C:\\\\models\\\\Llama 3\\\\".replace("\\\\", "\\")) == "Llama 3"


def test_a_mere_number_is_no_name():
    """Else two models of Kaggle's, or two runs' checkpoints, would be one."""
    for path in ("/kaggle/input/gemma/pytorch/2b/1", "runs/sql/checkpoint-500"):
        assert short_name(path) == short_name(path + "/") == path
    assert short_name("/models/qwen2.5") == "qwen2.5"
    stored = BaseModelInfo(name="/kaggle/input/gemma/pytorch/2b/1")
    check_base_model(stored, "/kaggle/input/gemma/pytorch/2b/1/", {})
    with pytest.raises(StoreError, match="is served"):
        check_base_model(stored, "/kaggle/input/llama-3/pytorch/8b/1", {})
