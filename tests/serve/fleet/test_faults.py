"""Full and read-only disks, failing ones, damaged files: a clear error, and nothing is lost."""

import asyncio
import errno
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.compressor.change.test_uploads import delete, meaning, upload
from tests.serve.fleet.test_swap import Recorded
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.compressor.run.compress import compress
from vllm_jd.serve.fleet.swap import Swaps
from vllm_jd.store import Store, StoreError
from vllm_jd.store.fleet import Compressed, Uploaded, read_fleet
from vllm_jd.store.generations import prune, revert
from vllm_jd.store.settling import settle
from vllm_jd.store.uploads import Keeper, Writer

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_adapters):
    return write_adapters(tmp_path_factory.mktemp("in"), 9, kind="real", ranks=(2, 3), shared=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    """A store of two generations with two uploads, one of which the second contains."""
    path = tmp_path_factory.mktemp("made") / "s"
    compress(read_adapters(folders[:5]), path, Settings(rank=6, max_adapter_error=0.5))
    upload(path, ("old", folders[5]))
    take_in(path)
    upload(path, ("new", folders[6]))
    return path


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s")


def names(path):
    """Name → whether it is compressed, and of which source."""
    with Store.open(path) as store:
        found = read_fleet(path).meanings(store)
        return {n: bytes(store.source_sha256[m.index].tolist()).hex()
                if isinstance(m, Compressed) else m.digest for n, m in found}  # fmt: skip


CHANGES = {
    "upload": lambda path, folders: upload(path, ("more", folders[7])),
    "replace": lambda path, folders: upload(path, ("old", folders[7])),
    "delete": lambda path, folders: delete(path, "old"),
    "recompress": lambda path, folders: take_in(path),
    "roll back": lambda path, folders: revert(path, 1),
    "prune": lambda path, folders: (prune(path, 0), settle(path)),
}


def limited(size, change, path, folders, results):
    """A change in a process whose files may not grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        CHANGES[change](path, folders)
        results.put("done")
    except (StoreError, OSError) as error:
        results.put(str(error))


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "prune"])
@pytest.mark.parametrize("size", [0, 300, 3000])
def test_a_disk_that_is_full(path, folders, change, size, tmp_path):
    before = names(path)
    results = FORK.SimpleQueue()
    process = FORK.Process(target=limited, args=(size, change, path, folders, results))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    said = results.get()
    if size == 0 and change != "delete":
        assert said != "done"
    if said != "done":
        assert os.strerror(errno.EFBIG) in said or "large" in said, said
        assert names(path) == before, "it failed, and something changed"
    # With room again it goes through, and of the failure nothing stays.
    CHANGES[change](path, folders)
    expected = shutil.copytree(path, tmp_path / "other")
    for each in (path, expected):
        prune(each, 0)
        settle(each)
    assert not [f for f in path.rglob("*") if f.name.startswith(".") and f.is_dir()]


def test_a_file_system_that_is_full(made, folders):
    """The same with a real one, where this process may mount it."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("may not mount")
        try:
            path = shutil.copytree(made, Path(folder) / "s")
            before = names(path)
            filler = Path(folder) / "filler"
            for left in (0, 4096):
                free = shutil.disk_usage(folder).free
                filler.write_bytes(b"x" * max(0, free - left))
                for change in ("upload", "replace", "recompress"):
                    with pytest.raises((StoreError, OSError), match=r"No space left|os error 28"):
                        CHANGES[change](path, folders)
                    assert names(path) == before
                filler.unlink()
            for change in ("upload", "replace", "recompress", "prune"):
                CHANGES[change](path, folders)
            assert set(names(path)) == {*before, "more"}
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def unprivileged(path, results):
    """What a process sees that may read the store and not write it."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    said = {}
    for name, act in {
        "write": lambda: Writer(path),
        "keep house": lambda: Keeper(path),
        "recompress": lambda: take_in(path),
        "roll back": lambda: revert(path, 1),
        "delete": lambda: delete(path, "old"),
    }.items():
        try:
            act()
        except StoreError as error:
            said[name] = str(error)
    engine = Recorded(path)
    swaps = Swaps(engine)
    asyncio.run(swaps.follow())
    results.put((said, swaps.fault, len(read_fleet(path).entries)))


def test_a_store_that_may_only_be_read(made):
    folder = Path(tempfile.mkdtemp())  # where others may look into
    try:
        path = shutil.copytree(made, folder / "s")
        folder.chmod(0o755)
        for each in [path, *path.rglob("*")]:
            each.chmod(0o555 if each.is_dir() else 0o444)
        results = FORK.SimpleQueue()
        process = FORK.Process(target=unprivileged, args=(path, results))
        process.start()
        process.join(60)
        said, fault, entries = results.get()
        assert said.keys() == {"write", "keep house", "recompress", "roll back", "delete"}
        assert all("cannot be written" in each and str(path) in each for each in said.values())
        assert fault is None and entries == 2
    finally:
        for each in [path, *path.rglob("*")]:
            if each.is_dir():
                each.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_disk_that_fails(path, folders, change, call, monkeypatch):
    """Each call of that kind in turn; what is said to be done is done, all else is as it was."""
    real = getattr(os, call)
    before = names(path)
    for nth in range(40):
        count = 0

        def failing(*arguments, nth=nth, **options):
            nonlocal count
            count += 1
            if count == nth + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))
            return real(*arguments, **options)

        monkeypatch.setattr(os, call, failing)
        try:
            CHANGES[change](path, folders)
        except (StoreError, OSError) as error:
            assert os.strerror(errno.EIO) in str(error)
            failed = True
        else:
            failed = False
        monkeypatch.undo()
        found = names(path)
        if count <= nth:
            break
        if failed and found != before:
            # The last call of all failed, after the change could be seen: as after a kill.
            assert found.keys() - before.keys() <= {"more"}
            assert before.keys() - found.keys() <= {"old"}
            break
    CHANGES[change](path, folders)
    Store.open(path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_generation_is_not_served(path, folders, damage):
    engine = Recorded(path)
    swaps = Swaps(engine)
    new = take_in(path).store
    for file in sorted(new.folder.iterdir()):
        if file.stat().st_nlink > 1 and damage != "gone":
            continue  # the served generation's too, which was checked when it was opened
        good = file.read_bytes()
        file.unlink()  # links of it stay as they are
        if damage == "flipped":
            file.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        elif damage == "cut":
            file.write_bytes(good[:-3])
        swaps._seen = None
        assert not asyncio.run(swaps.follow())
        assert str(file) in swaps.fault
        file.unlink(missing_ok=True)
        file.write_bytes(good)
    assert engine.calls == []
    swaps._seen = None
    assert asyncio.run(swaps.follow())


def test_two_servers_follow_one_store(path, folders):
    engines = [Recorded(path), Recorded(path)]
    both = [Swaps(engine) for engine in engines]
    take_in(path)
    for swaps, engine in zip(both, engines, strict=True):
        assert asyncio.run(swaps.follow())
        assert engine.calls[-1] == ("serve", 3)
    assert isinstance(meaning(path, "new"), Compressed)
    revert(path, 1)
    assert isinstance(meaning(path, "new"), Uploaded)
