"""Adapters that touch a vision tower, which no server has adapters for."""

import json

import pytest
import torch

from tests.cli.test_cli import fail, succeed
from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.read.adapters import read_for_store
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store

LANGUAGE = {"model.language_model.layers.0.self_attn.q_proj": (16, 16)}
TOWER = {"model.visual.blocks.0.attn.qkv": (8, 24), "model.visual.merger.mlp.0": (8, 16)}


@pytest.fixture
def folders(tmp_path, write_adapters):
    """Two of the language model, one of both, one of the tower alone."""
    found = write_adapters(tmp_path / "in", 2, shapes=LANGUAGE, ranks=(2,))
    found += write_adapters(tmp_path / "in", 1, prefix="both", shapes=LANGUAGE | TOWER, ranks=(2,))
    return found + write_adapters(tmp_path / "in", 1, prefix="eye", shapes=TOWER, ranks=(2,))


def test_they_are_kept_left_out_or_refused(folders):
    notes = []
    assert read_adapters(folders).shapes.keys() == LANGUAGE.keys() | TOWER.keys()
    collection = read_adapters(folders[:3], towers="leave-out", on_note=notes.append)
    assert collection.shapes == LANGUAGE and len(collection.names) == 3
    assert [note for note in notes if "both" in note and "2 modules of a tower" in note]
    whole = read_adapters(folders[:3])
    (module,) = LANGUAGE
    assert torch.equal(collection.factors(module).a, whole.factors(module).a)
    assert torch.equal(collection.factors(module).b, whole.factors(module).b)
    with pytest.raises(AdapterError) as refused:
        read_adapters(folders, towers="refuse")
    assert len(refused.value.faults) == 2 and all("visual" in f for f in refused.value.faults)
    with pytest.raises(AdapterError, match="nothing is left of it") as refused:
        read_adapters(folders, towers="leave-out")
    assert len(refused.value.faults) == 1


def test_a_store_takes_what_it_has_of_them(tmp_path, folders):
    without = compress(
        read_adapters(folders[:3], towers="leave-out"), tmp_path / "s", Settings(rank=4)
    )
    assert read_for_store([folders[2]], without.manifest).shapes == LANGUAGE
    kept = compress(read_adapters(folders[:3]), tmp_path / "k", Settings(rank=4))
    assert read_for_store([folders[2]], kept.manifest).shapes == LANGUAGE | TOWER


def test_on_the_command_line(tmp_path, folders):
    out = ["--out", tmp_path / "s", "--rank", 4]
    assert "--towers leave-out" in fail("compress", *folders[:3], *out, "--towers", "refuse")
    done = succeed("compress", *folders[:3], *out, "--towers", "leave-out", "--json")
    assert json.loads(done.stdout)["unserved"] == []
    assert "2 modules" in fail("add", tmp_path / "s", f"new={folders[2]}")
    succeed("add", tmp_path / "s", f"new={folders[2]}", "--towers", "leave-out")
    store = Store.open(tmp_path / "s")
    assert "new" in store and {m.name for m in store.manifest.modules} == LANGUAGE.keys()
    assert "--towers" in fail("recompress", tmp_path / "s", "--towers", "keep", code=2)
