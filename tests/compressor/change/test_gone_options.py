"""What a store that was made with options of an earlier version can still do, and what not."""

import json

import pytest

from tests.cli.test_cli import fail, succeed
from tests.compressor.change.gone_options import its_adapters, old_store, take_for_its_own
from tests.compressor.change.made import bits
from tests.compressor.change.test_uploads import upload
from tests.store.test_format import check
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import recompress
from vllm_jd.store import Store

MADE_WITH = "made with rank_allocation spectrum"


@pytest.fixture
def store(tmp_path):
    return old_store(tmp_path / "store")


@pytest.fixture
def adapters(tmp_path, make_factors, write_adapter):
    return its_adapters(tmp_path / "in", make_factors, write_adapter)


def test_it_is_what_it_was(store, adapters, peft_deltas):
    """Read by ours and by the document's reader; against the adapters that it was made of."""
    opened = check(store)
    assert opened.manifest.rows == 3
    assert len({info.rank for info in opened.manifest.modules}) == 3
    for row, folder in enumerate(adapters):
        found = opened.factors(folder.name)
        for module, expected in peft_deltas(folder).items():
            b, a = (side.double() for side in found[module])
            lost = float((b @ a - expected).square().sum() / expected.square().sum())
            error = float(opened.error[row, opened.module_index(module)])
            assert error == pytest.approx(lost, rel=1e-3, abs=1e-7)


def test_it_is_shown_verified_exported_and_made_smaller(store, adapters, tmp_path, peft_deltas):
    summary = json.loads(succeed("inspect", store, "--json").stdout)
    assert summary["settings"]["residual_rank"] == summary["settings"]["mean_rank"] == 1
    assert summary["uncompressed"] == 1 and sum(summary["clusters"]) == 5
    assert "residual rank 1, mean rank 1" in " ".join(succeed("inspect", store).stdout.split())
    succeed("inspect", store, "a2")
    succeed("verify", store)
    take_for_its_own(store, adapters)
    succeed("report", store, "--out", tmp_path / "page.html", "--adapters", adapters[0].parent)
    before = bits(Store.open(store))
    succeed("export", store, "a2", "--out", tmp_path / "a2")
    given = Store.open(store).factors("a2")
    for module, delta in peft_deltas(tmp_path / "a2").items():
        b, a = (side.double() for side in given[module])
        assert float((b @ a - delta).norm()) < 1e-5 * float(delta.norm())
    succeed("remove", store, "a0")
    del before["a0"]
    assert bits(Store.open(store)) == before
    check(store)


def test_what_would_fit_it_again_is_refused_in_one_line(store, adapters, tmp_path, tree):
    new = adapters[0].rename(tmp_path / "new")
    before = tree(store)
    for arguments in (
        ("add", store, new),
        ("recompress", store, new),
        ("recompress", store, "--refit", "--originals", tmp_path / "in"),
    ):
        message = fail(*arguments)
        assert MADE_WITH in message and "`vllm-jd compress ADAPTERS --out STORE`" in message
        assert "Traceback" not in message
    before.pop("recompression.json", None)
    assert {name: tree(store)[name] for name in before} == before


def test_uploads_stay_as_they_are(store, adapters):
    """What a server starts behind itself."""
    upload(store, ("new", adapters[0]))
    said = json.loads(succeed("recompress", store, "--json").stdout)
    assert MADE_WITH in said["refused"]["new"]
    assert (said["generation"], said["compressed"]) == (1, {})


def test_all_of_it_compressed_anew_takes_its_place(store, adapters):
    succeed("compress", *adapters, "--out", store, "--rank", 3)
    succeed("add", store, "again=" + str(adapters[0]))
    assert Store.open(store).manifest.rows == 1


def test_new_settings_start_from_its_bases(store, adapters):
    found = recompress(store, read_adapters(adapters), Settings(rank=3, clusters=2))
    assert found.manifest.rows == 1
    assert check(store).generation == 2
