"""A store compressed anew from what it was, and what differs between two."""

import json
import sys

import pytest
import torch

from tests.compressor.change.made import Made, build, check_errors
from vllm_jd.compressor import AdapterError, Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.change.diff import diff
from vllm_jd.compressor.change.incremental import add, recompress, remove
from vllm_jd.compressor.run.clustering import assign_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import BaseModelInfo

# --- recompress ---


def test_recompress_uses_the_recorded_settings_and_the_old_clusters(tmp_path, some, monkeypatch):
    path = tmp_path / "s"
    known = BaseModelInfo(name="org/tiny", config={"hidden_size": 12})
    settings = Settings(rank=3, clusters=3, iterations=7, seed=5, store_dtype="float32")
    compress(Made(some(0, 12)), path, settings, base_model=known)
    grown = add(path, Made(some(12, 16)))
    everyone = Made(some(0, 16))
    starts = []

    def spy(*args, **options):
        starts.append(options["start"])
        return assign_adapters(*args, **options)

    monkeypatch.setattr(sys.modules[compress.__module__], "assign_adapters", spy)
    everyone_but_one = Made({n: f for n, f in (some(0, 17)).items() if n != "adapter-03"})
    store = recompress(path, everyone_but_one)
    assert store.names == everyone_but_one.names
    (start,) = starts
    expected = [int(grown.chosen[grown.index(n), 0, 0]) if n in grown else -1 for n in store.names]
    assert start.tolist() == expected
    assert expected[-1] == -1
    assert store.generation == 3
    assert store.manifest.settings == grown.manifest.settings
    assert store.manifest.base_model == known
    store = recompress(path, everyone, Settings(rank=2, clusters=2))
    assert starts[-1] is None  # another number of clusters
    assert (store.manifest.settings["rank"], store.manifest.settings["clusters"]) == (2, 2)
    store = recompress(path, everyone, Settings(method="svd", rank=1))
    assert store.manifest.method == "svd"
    check_errors(store, some(0, 16))
    with pytest.raises(AdapterError, match="org/other"):
        recompress(path, Made(some(0, 3), base_model="org/other"))


def test_recompress_is_at_least_as_close_as_adding(tmp_path, some):
    path = tmp_path / "s"
    build(path, some(0, 8), rank=3, clusters=2)
    grown = add(path, Made(some(8, 30)))
    again = recompress(path, Made(some(0, 30)))
    assert float(again.error.mean()) < float(grown.error.mean())


def grouped(sizes, seed=0):
    """Adapters in groups with spaces of their own, one module; and their groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    left = torch.randn(len(sizes), 30, 2, generator=generator)
    right = torch.randn(len(sizes), 2, 36, generator=generator)
    pairs = [
        (
            torch.randn(2, 2, generator=generator) @ right[g],
            left[g] @ torch.randn(2, 2, generator=generator),
        )
        for g in groups.tolist()
    ]
    factors = ModuleFactors.stack(pairs, 36, 30).normalised()[0]
    return factors, groups


def test_newcomers_join_the_cluster_that_keeps_most_of_them():
    factors, groups = grouped([5, 4, 6])
    start = (groups + 1) % 3  # names of clusters are arbitrary, and must be kept
    expected = start.clone()
    start[[1, 6, 7, 14]] = -1
    found = assign_adapters([factors], 3, 2, seed=0, start=start)
    assert found.tolist() == expected.tolist()


def test_an_assignment_to_start_from_may_be_wrong_or_leave_a_cluster_empty():
    factors, groups = grouped([5, 4, 6])
    options = {"seed": 0}
    wrong = groups.clone()
    wrong[2] = 1
    found = assign_adapters([factors], 3, 2, start=wrong, **options)
    assert found.tolist() == groups.tolist()
    empty = torch.zeros(15, dtype=torch.int64)
    found = assign_adapters([factors], 3, 2, start=empty, **options)
    assert sorted(set(found.tolist())) == [0, 1, 2]
    nobody = torch.full((15,), -1)
    found = assign_adapters([factors], 3, 2, start=nobody, **options)
    assert torch.equal(found, assign_adapters([factors], 3, 2, **options))


# --- diff ---


def test_diff_says_what_changed(tmp_path, some):
    path = tmp_path / "s"
    first = build(path, some(0, 6), rank=3)
    changed = {"adapter-02": some(30, 31)["adapter-30"]} | some(6, 8)
    add(path, Made(changed), replace=True)
    second = remove(path, ["adapter-04"])
    found = json.loads(json.dumps(diff(first, second)))
    assert found["added"] == ["adapter-06", "adapter-07"]
    assert found["removed"] == ["adapter-04"]
    assert found["replaced"] == ["adapter-02"]
    assert (found["old"]["generation"], found["new"]["generation"]) == (1, 3)
    assert (found["old"]["adapters"], found["new"]["adapters"]) == (6, 7)
    assert [line["name"] for line in found["error"]["adapters"]] == ["adapter-02"]
    common = ["adapter-00", "adapter-01", "adapter-02", "adapter-03", "adapter-05"]
    for store, key in ((first, "before"), (second, "after")):
        errors = [float(store.error[store.index(name)].mean()) for name in common]
        assert found["error"][key] == pytest.approx(sum(errors) / 5)
        assert found["error"]["adapters"][0][key] == pytest.approx(errors[2])
    assert found["settings"] == {}
    assert found["store_bytes"] == [first.stored_bytes, second.stored_bytes]

    third = recompress(path, Made(some(0, 8)), Settings(rank=4, clusters=2, store_dtype="int8"))
    found = diff(second, third)
    assert found["settings"] == {
        "rank": [3, 4],
        "clusters": [1, 2],
        "store_dtype": ["bfloat16", "int8"],
        "dtype": ["bfloat16", "int8"],
    }
    changes = [abs(line["after"] - line["before"]) for line in found["error"]["adapters"]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 7
    nothing = build(tmp_path / "t", some(20, 22), method="svd", rank=1)
    found = diff(third, nothing)
    assert found["error"] == {"before": None, "after": None, "adapters": []}
    assert found["settings"]["method"] == ["jd-full", "svd"]
    assert found["settings"]["clusters"] == [2, None]
