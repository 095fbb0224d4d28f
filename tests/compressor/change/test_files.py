"""The files of a changed store: linked, copied and checked, and pruned."""

from pathlib import Path

import pytest

from tests.compressor.change.made import Made, bits, build, linked, payload
from vllm_jd.compressor.change.incremental import add
from vllm_jd.store import GenerationWriter, Store, StoreError
from vllm_jd.store.generations import Pruned, generations_on_disk, open_number, prune


def test_where_nothing_can_be_linked_files_are_copied_and_checked(tmp_path, some, monkeypatch):
    build(tmp_path / "s", some(0, 4), rank=2)

    def refuse(self, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    before = Store.open(tmp_path / "s")
    after = add(tmp_path / "s", Made(some(4, 6)))
    assert not linked(after, before)
    assert payload(after)["bases-00000.safetensors"] == payload(before)["bases-00000.safetensors"]
    file = after.folder / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"bases-00000\.safetensors: found sha256 .* is damaged"):
        add(tmp_path / "s", Made(some(6, 7)))
    assert generations_on_disk(tmp_path / "s") == [1, 2]


def test_a_file_that_does_not_read_back_is_not_published(tmp_path, some, monkeypatch):
    build(tmp_path / "s", some(0, 4), rank=2)
    original = GenerationWriter.publish

    def spoil(self, **options):
        shards = options["core_shards"]
        options["core_shards"] = [shard.model_copy(update={"first": 0}) for shard in shards]
        return original(self, **options)

    monkeypatch.setattr(GenerationWriter, "publish", spoil)
    with pytest.raises(StoreError, match="gap"):
        add(tmp_path / "s", Made(some(4, 6)))
    monkeypatch.undo()
    assert Store.open(tmp_path / "s").generation == 1
    assert add(tmp_path / "s", Made(some(4, 6))).generation == 2


def test_old_generations_open_by_number_and_are_pruned(tmp_path, some):
    path = tmp_path / "s"
    build(path, some(0, 4), rank=2)
    for i in range(4, 8):
        add(path, Made(some(i, i + 1)))
    assert generations_on_disk(path) == [1, 2, 3, 4, 5]
    for number in range(1, 6):
        assert open_number(path, number).names == list(some(0, 3 + number))
    mapped = open_number(path, 1)
    expected = bits(mapped)
    assert prune(path, 9) == Pruned()
    mapped.close()
    assert prune(path, 2) == Pruned([1, 2])
    assert generations_on_disk(path) == [3, 4, 5]
    assert not [entry for entry in (path / "generations").iterdir() if entry.name[0] == "."]
    with pytest.raises(StoreError, match="no generation 1 on disk; found 3, 4, 5"):
        open_number(path, 1)
    with pytest.raises(StoreError, match="no generation 6"):
        open_number(path, 6)
    with pytest.raises(ValueError, match="keep"):
        prune(path, -1)
    assert len(Store.open(path)) == 8
    file = path / "generations" / "3" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"adapters\.safetensors: found"):
        open_number(path, 3)
    assert prune(path, 0) == Pruned([3, 4])
    assert prune(path, 0) == Pruned()
    # Bases were shared with the deleted generations: they are still there.
    found = bits(Store.open(path))
    assert all(found[name] == value for name, value in expected.items())


def test_what_a_killed_prune_left_goes(tmp_path, some):
    path = tmp_path / "s"
    build(path, some(0, 3), rank=2)
    add(path, Made(some(3, 4)))
    folder = path / "generations"
    (folder / "1").rename(folder / ".1.deleted")
    assert prune(path, 0) == Pruned()
    assert [entry.name for entry in folder.iterdir()] == ["2"]
