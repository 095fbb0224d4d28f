"""A store of experts that does not fit its manifest is refused; one without the field opens."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.compressor.run.test_experts import DOWN, UP, E, Q, made
from tests.several_rows import compress
from tests.store.stores import live, rewrite_manifest, rewrite_tensors
from vllm_jd.compressor import Settings
from vllm_jd.row import STORED_FIELDS
from vllm_jd.store import Store, StoreError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two clusters of rank 2, and adapters with rows of their own; not to be changed."""
    path = tmp_path_factory.mktemp("experts") / "store"
    collection = made(6)
    collection.made[UP][0][0, 1:] = 0  # the first has expert 0 alone
    settings = Settings(rank=2, clusters=2, experts="separate")
    compress(collection, path, settings, own=1).close()
    return path


@pytest.fixture
def store(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "store"))


def at(name, **fields):
    def change(manifest):
        (module,) = (module for module in manifest["modules"] if module["name"] == name)
        module.update(fields)

    return change


MANIFEST_LIES = {
    "an expert less": at(UP, experts=E - 1),
    "twice the experts": at(UP, experts=2 * E),
    "no experts": at(UP, experts=0),
    "fewer than none": at(UP, experts=-1),
    "experts of a plain module": at(Q, experts=1),
    "cores that are no multiple": at(UP, core_size=E * 4 - 1),
    "smaller cores": at(UP, core_size=E * 3),
    "another rank": at(UP, rank=1),
    "fewer shared": at(UP, shared=1),
    "fewer vectors": at(DOWN, u_rows=5),
}


@pytest.mark.parametrize("case", MANIFEST_LIES)
def test_a_manifest_that_does_not_fit_is_refused(store, case):
    rewrite_manifest(store, MANIFEST_LIES[case])
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(live(store)) in str(caught.value)


TABLE_LIES = {
    "a shared row of rank 0": (1, 2, "rank", 0),
    "a private row of rank -1": (2, 0, "rank", -1),
    "a private row beyond the vectors": (2, 0, "v_start", 10_000),
    "an expert's bases beyond the vectors": (0, E - 1, "u_start", 10_000),
    "a start below 0": (1, 1, "u_start", -1),
    "a scale that is not there": (0, 0, "scale_row", 0),
    "a core of one expert in what is an adapter's own": (3, 1, "core_kind", 1),
}


@pytest.mark.parametrize("case", TABLE_LIES)
def test_a_table_that_does_not_fit_is_refused(store, case):
    row, expert, field, value = TABLE_LIES[case]

    def change(tensors):
        tensors[f"{UP}.clusters"][row, expert, STORED_FIELDS.index(field)] = value

    rewrite_tensors(store, "bases-00000.safetensors", change)
    with pytest.raises(StoreError):
        Store.open(store)


def test_what_an_expert_without_a_row_points_to_does_not_matter(store):
    table = Store.open(store).rows(UP)
    empty = (table[..., STORED_FIELDS.index("rank")] == 0).nonzero()
    assert len(empty) == E - 1
    before = Store.open(store).factors("a0")

    def change(tensors):
        for row, expert in empty.tolist():
            tensors[f"{UP}.clusters"][row, expert, 0] = 1

    rewrite_tensors(store, "bases-00000.safetensors", change)
    after = Store.open(store).factors("a0")
    assert before.keys() == after.keys()
    for layer, pair in before.items():
        assert all(map(torch.equal, pair, after[layer]))


def test_a_store_from_before_there_were_experts_opens(tmp_path):
    compress(made(4, modules=(Q,)), tmp_path / "s", Settings(rank=2)).close()
    expected = Store.open(tmp_path / "s").factors("a1")

    def change(manifest):
        for module in manifest["modules"]:
            assert module.pop("experts") == 0

    rewrite_manifest(tmp_path / "s", change)
    assert (
        "experts"
        not in json.loads((live(tmp_path / "s") / "manifest.json").read_text())["settings"]
    )
    found = Store.open(tmp_path / "s").factors("a1")
    assert all(map(torch.equal, found[Q], expected[Q]))
