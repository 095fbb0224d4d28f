"""`--same-base`, `--convert`, NAME=PATH and what is said of adapters, on the command line."""

import json
import shutil

import pytest
from peft import LoraConfig

from tests.cli.test_cli import edit_config, fail, run, succeed
from tests.compressor.read.peft_folders import base_model, loaded, logits, same, save, trained
from vllm_jd.store import Store


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    base_model().save_pretrained(folder)
    return folder


def test_every_adapter_of_a_peft_folder_and_its_names(tmp_path):
    model = trained(1)
    model.add_adapter("chat", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder = save(model, tmp_path / "support")
    succeed("compress", folder, f"other={folder}/chat", "--out", tmp_path / "s", "--rank", 2)
    assert Store.open(tmp_path / "s").names == ["other", "support"]
    succeed("plan", f"x={folder}", folder / "chat")
    # Added under a name that is there: the message says how to give another.
    message = fail("add", tmp_path / "s", f"other={folder}")
    assert "give the new ones other names (NAME=PATH)" in message
    succeed("add", tmp_path / "s", f"third={folder}")
    assert Store.open(tmp_path / "s").names == ["other", "support", "third"]


def test_same_base(tmp_path, write_adapters, base):
    first, second = write_adapters(tmp_path / "in", 2)
    edit_config(second, base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    out = ["--out", tmp_path / "s", "--rank", 2]
    message = fail("compress", first, second, *out)
    assert "say so with --base-model org/tiny-llama --same-base" in message
    assert "--base-model" in fail("compress", first, second, *out, "--same-base", code=2)
    succeed("compress", first, second, *out, "--base-model", "org/tiny-llama", "--same-base")
    found = json.loads(succeed("inspect", tmp_path / "s", "--json").stdout)["base_model"]
    assert found["name"] == "org/tiny-llama"
    assert found["other_names"] == ["unsloth/tiny-llama-bnb-4bit"]
    # In a store that has names, these need not be said again; others do.
    more = shutil.copytree(second, tmp_path / "more")
    succeed("add", tmp_path / "s", more)
    edit_config(more, base_model_name_or_path="/data/llama")
    assert "--same-base" in fail("add", tmp_path / "s", f"x={more}")
    succeed("add", tmp_path / "s", f"x={more}", "--same-base")
    assert Store.open(tmp_path / "s").manifest.base_model.other_names == [
        "/data/llama",
        "unsloth/tiny-llama-bnb-4bit",
    ]
    succeed("recompress", tmp_path / "s", first, more)
    assert len(Store.open(tmp_path / "s").manifest.base_model.other_names) == 2
    succeed(
        "report",
        tmp_path / "s",
        "--out",
        tmp_path / "r.html",
        "--adapters",
        first,
        "--adapters",
        more,
    )
    # The base model's folder says what its layers are: these adapters' are others.
    message = fail("compress", first, *out, "--base-model", base, "--same-base")
    assert "not adapters of one base model (--same-base)" in message


def test_convert(tmp_path, base, monkeypatch):
    monkeypatch.setenv("VLLM_JD_CACHE", str(tmp_path / "cache"))
    model = trained(init_lora_weights="pissa")
    folder = save(model, tmp_path / "a")
    out = ["--out", tmp_path / "s", "--method", "none", "--store-dtype", "float32"]
    message = fail("compress", folder, *out)
    assert "init_lora_weights is 'pissa'" in message and "--convert --base-model FOLDER" in message
    for more in ([], ["--base-model", "org/tiny-llama"]):
        assert "--convert needs --base-model" in fail(
            "compress", folder, *out, "--convert", *more, code=2
        )
    succeed("compress", folder, *out, "--convert", "--base-model", base)
    succeed("export", tmp_path / "s", "a", "--out", tmp_path / "exported")
    same(loaded(tmp_path / "exported"), logits(model), 1e-4)
    # What `plan` suggests runs as it stands.
    shown = succeed("plan", folder, "--convert", "--base-model", base, "--same-base").stdout
    assert "--convert" in shown and "--same-base" in shown


def test_what_is_to_be_known_of_adapters_is_said_on_stderr(tmp_path):
    save(trained(size=0.0), tmp_path / "in" / "fresh")
    folder = save(trained(), tmp_path / "in" / "sql")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy").rename(folder / "checkpoint-9")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = run("compress", tmp_path / "in", "--out", tmp_path / "s", "--rank", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["base_model"]["name"] == "org/tiny-llama"
    said = " ".join(result.stderr.split())
    assert "warning: fresh: changes nothing" in said
    assert f"warning: {folder}: left out checkpoint-9" in said
    assert "warning: sql: a chat template beside it" in said
    assert Store.open(tmp_path / "s").names == ["fresh", "sql"]
