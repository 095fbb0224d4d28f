"""Adapters of experts from the command line: compress, inspect, export, and what is refused."""

import json

import pytest

from tests.cli.test_cli import fail, succeed
from tests.compressor.read import moe_folders as moe
from vllm_jd.store import Store


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four adapters of a tiny Qwen3-MoE's experts and attention, and the model's folder."""
    folder = tmp_path_factory.mktemp("experts")
    for i in range(4):
        moe.stacked("Qwen3Moe", folder / "in" / f"a{i}", seed=i)
    moe.base_model("Qwen3Moe").save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("way", ["joint", "separate"])
def test_compress_inspect_export(folders, tmp_path, way):
    out, arguments = tmp_path / "s", ["--rank", 4, "--experts", way, "--json", "--same-base"]
    base = ["--base-model", folders / "base"]
    text = succeed("compress", folders / "in", "--out", out, *base, *arguments).stdout
    summary = json.loads(text)
    assert summary["settings"]["experts"] == way
    experts = {
        module["name"].rsplit(".", 1)[-1]: module["experts"] for module in summary["modules"]
    }
    assert experts == {"q_proj": 0, "gate_up_proj": moe.EXPERTS, "down_proj": moe.EXPERTS}
    table = " ".join(succeed("inspect", out).stdout.split())
    assert f"{moe.EXPERTS} experts" in table
    store = Store.open(out)
    assert (store.rows(store.manifest.modules[0].name).shape[1]) == moe.EXPERTS
    succeed("export", out, "a2", "--out", tmp_path / "a2")
    config = json.loads((tmp_path / "a2" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 2 * moe.LAYERS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "ties"], "ties does not do"),
        (["--experts", "each"], "--experts"),
        (["--method", "svd", "--experts", "joint"], "svd has no option --experts"),
        (["--auto", "--experts", "joint"], "--experts cannot be given together"),
    ],
)
def test_what_experts_cannot_have_is_wrong_usage(folders, tmp_path, arguments, named):
    said = fail("compress", folders / "in", "--out", tmp_path / "s", *arguments, code=2)
    assert named in said
    assert not (tmp_path / "s").exists()
