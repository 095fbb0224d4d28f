"""Generations that somebody reads: they outlive `prune`, and a reader outlives its generation."""

import errno
import fcntl
import gc
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.store import Store, StoreError, holding
from vllm_jd.store.generations import Pruned, generations_on_disk, prune

HOLDER = Path(__file__).with_name("holder.py")
KINDS = ["bfloat16", "int8", "int4"]


@pytest.fixture(scope="module", params=KINDS)
def good(request, tmp_path_factory, write_adapters):
    """A store of two generations; not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    folders = write_adapters(folder / "in", 6, kind="real", ranks=(2, 4))
    settings = Settings(rank=3, clusters=2, store_dtype=request.param)
    compress(read_adapters(folders[:5]), folder / "store", settings, own=1)
    add(folder / "store", read_adapters(folders[5:]))
    return folder / "store"


@pytest.fixture
def path(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "store"))


@contextmanager
def another_process(path):
    """Another process that has the live generation open; gives (process, generation)."""
    process = subprocess.Popen(
        [sys.executable, str(HOLDER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def everything(store):
    """All numbers of a store, as bytes."""
    found = [store.cores(0, len(store))]
    for info in store.manifest.modules:
        bases = store.bases(info.name)
        found += [bases.u, bases.v, bases.rows]
    found += [
        side for name in store.names for pair in store.factors(name).values() for side in pair
    ]
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in found]


def test_prune_leaves_what_another_process_reads(path):
    with another_process(path) as (process, generation):
        assert generation == 2
        remove(path, ["adapter-000"])
        assert prune(path, 0) == Pruned(deleted=[1], held={2: [process.pid]})
        assert generations_on_disk(path) == [2, 3]
        assert prune(path, 0) == Pruned(held={2: [process.pid]})
        assert len(Store.open(path)) == 5
    assert prune(path, 0) == Pruned(deleted=[2])


def test_a_reader_goes_on_where_its_generation_was_deleted_by_force(path):
    expected = float(Store.open(path).cores(0, 6).double().sum())
    with another_process(path) as (process, _):
        remove(path, ["adapter-000"])
        assert prune(path, 0, force=True) == Pruned([1, 2], {2: [process.pid]})
        assert generations_on_disk(path) == [3]
        assert not (path / "generations" / "2").exists()
        told, _ = process.communicate("", timeout=60)
        assert process.returncode == 0
        assert float(told) == expected


def test_all_of_a_deleted_generation_can_be_read_after_a_late_first_look(path):
    reader, other = Store.open(path), Store.open(path)
    expected = everything(other)
    other.close()
    remove(path, ["adapter-000", "adapter-005"])
    assert prune(path, 0, force=True) == Pruned([1, 2], {2: [os.getpid()]})
    assert everything(reader) == expected
    reader.prefetch(5)


def test_a_generation_is_held_until_it_is_closed_or_forgotten(path):
    remove(path, ["adapter-000"])
    remove(path, ["adapter-001"])
    opened = Store.open_generation(path, *current_of(path, 2), verify=False)
    with Store.open_generation(path, *current_of(path, 3), verify=False):
        assert prune(path, 0).held == {2: [os.getpid()], 3: [os.getpid()]}
    assert prune(path, 0) == Pruned([3], {2: [os.getpid()]})
    del opened
    gc.collect()
    assert prune(path, 0) == Pruned([2])


def current_of(path, number):
    from vllm_jd.store.files import sha256_file

    return number, sha256_file(path / "generations" / str(number) / "manifest.json")


def test_a_closed_store_still_lists_and_says_that_it_is_closed(path):
    opened = Store.open(path)
    opened.close()
    opened.close()
    opened.prefetch(0)
    assert opened.names[0] == "adapter-000"
    assert opened.error.shape == (6, 4)
    for read in (
        lambda: opened.cores(0, 1),
        lambda: opened.bases(opened.manifest.modules[0].name),
        lambda: opened.rows(opened.manifest.modules[0].name),
        lambda: opened.factors("adapter-001"),
    ):
        with pytest.raises(StoreError, match="after the store was closed"):
            read()


def test_files_that_are_open_are_given_back(path):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        Store.open(path).close()
    assert count() == before
    for _ in range(3):
        Store.open(path)
    gc.collect()
    assert count() == before
    (path / "generations" / "2" / "cores-00000.safetensors").write_bytes(b"")
    for _ in range(3):
        with pytest.raises(StoreError):
            Store.open(path)
    gc.collect()
    assert count() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_written_opens_and_is_held(path):
    for folder, _, files in os.walk(path):
        for name in files:
            Path(folder, name).chmod(0o444)
    assert len(Store.open(path)) == 6


def test_a_hold_needs_no_right_to_write(path, monkeypatch):
    flags = []
    original = os.open
    monkeypatch.setattr(
        os, "open", lambda file, flag, *more: flags.append(flag) or original(file, flag, *more)
    )
    opened = Store.open(path)
    assert len(flags) >= 3
    assert not any(flag & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flag in flags)
    opened.close()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_reading_and_pruning_go_on(path, monkeypatch, error):
    class NoLocks:
        """The module fcntl on a file system without locks."""

        LOCK_SH, LOCK_EX, LOCK_NB = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_NB

        @staticmethod
        def flock(*_):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(holding, "fcntl", NoLocks)  # the writer's lock is another one
    opened = Store.open(path)
    expected = everything(opened)
    remove(path, ["adapter-000"])
    assert prune(path, 0) == Pruned([1, 2])
    assert everything(opened) == expected


def test_a_generation_that_is_being_deleted_is_not_opened(path):
    deletion = holding.Deletion(path / "generations" / "2" / "manifest.json")
    assert deletion.holders is None
    with pytest.raises(StoreError, match="being deleted"):
        Store.open(path)
    del deletion
    gc.collect()
    assert len(Store.open(path)) == 6


# --- reads that fail ---


def cut_reads(monkeypatch, how, after=0):
    """From now on reads fail, but for the first `after` of them."""
    original, count = os.preadv, [0]

    def preadv(descriptor, buffers, offset):
        count[0] += 1
        if count[0] <= after:
            return original(descriptor, [buffers[0][:7]], offset)
        if how == "EIO":
            raise OSError(errno.EIO, "Input/output error")
        return 0

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("how", ["EIO", "short"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_read_that_fails_names_file_and_adapter_and_the_next_one_is_right(
    path, monkeypatch, how, after
):
    opened = Store.open(path)
    expected = opened.cores(4, 5)
    cut_reads(monkeypatch, how, after)
    with pytest.raises(StoreError, match=r"cores-00000.*adapter 'adapter-004'") as caught:
        opened.cores(4, 5)
    assert ("Input/output error" if how == "EIO" else "cut short") in str(caught.value)
    monkeypatch.undo()
    cut_reads(monkeypatch, how, after)
    with pytest.raises(StoreError, match="'adapter-002' and the 2 after it"):
        opened.cores(2, 5)
    monkeypatch.undo()
    cut_reads(monkeypatch, how)
    module = opened.manifest.modules[0].name
    with pytest.raises(StoreError, match=rf"bases-0000.*{module}"):
        opened.vectors(module, "V", 0, 3)
    monkeypatch.undo()
    assert torch.equal(opened.cores(4, 5), expected)


def test_reads_in_pieces_give_the_whole(path, monkeypatch):
    opened = Store.open(path)
    expected = everything(opened)
    cut_reads(monkeypatch, "EIO", after=10**9)
    assert everything(opened) == expected


def test_a_file_cut_short_after_opening_is_an_error(path):
    opened = Store.open(path)
    file = path / "generations" / "2" / "cores-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(StoreError, match=r"cores-00000.*adapter-004.*cut short"):
        opened.cores(4, 5)
    assert opened.cores(0, 1).isfinite().all()
