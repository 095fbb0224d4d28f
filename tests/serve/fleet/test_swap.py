"""Which generation a server serves while others are published, damaged and gone back to."""

import asyncio

import pytest

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.compressor.run.compress import compress
from vllm_jd.serve.fleet import swap
from vllm_jd.serve.fleet.swap import Swaps
from vllm_jd.store import Store
from vllm_jd.store.generations import prune, revert


class Recorded:
    """A server that notes what it is asked, and may refuse."""

    def __init__(self, path):
        self.store = Store.open(path)
        self.calls = []
        self.refuse = ""

    async def open_generation(self, path, generation):
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.calls.append(("open", generation))
        await asyncio.sleep(0)

    async def serve_generation(self, path, generation):
        self.calls.append(("serve", generation))

    async def point(self, store):
        self.calls.append(("point", store.generation))
        self.store.close()
        self.store = store


@pytest.fixture
def folders(tmp_path, write_adapters):
    return write_adapters(tmp_path / "in", 6, kind="real", ranks=(2, 4))


@pytest.fixture
def path(tmp_path, folders):
    compress(read_adapters(folders[:4]), tmp_path / "s", Settings(rank=3))
    return tmp_path / "s"


def test_a_new_generation_is_opened_then_pointed_to_then_the_old_one_let_go(path, folders):
    engine = Recorded(path)
    swaps = Swaps(engine)

    async def live():
        assert not await swaps.follow()
        add(path, read_adapters([folders[4]]))
        assert await swaps.follow()
        assert not await swaps.follow()
        assert engine.calls == [("open", 2), ("point", 2), ("serve", 2)]
        assert folders[4].name in swaps.store
        revert(path)
        assert await swaps.follow()
        assert engine.calls[3:] == [("open", 3), ("point", 3), ("serve", 3)]
        assert folders[4].name not in swaps.store
        remove(path, [folders[0].name])
        add(path, read_adapters([folders[5]]))
        assert await swaps.follow()  # the latest of two
        assert engine.calls[-1] == ("serve", 5)
        assert (swaps.count, swaps.fault) == (3, None)

    asyncio.run(live())
    # What is served is held, what was served before is not.
    assert prune(path, 0).deleted == [1, 2, 3, 4]
    add(path, read_adapters([folders[0]]))
    assert prune(path, 0).held.keys() == {5}


def test_what_is_damaged_or_refused_is_left_alone_until_it_changes(path, folders, monkeypatch):
    engine = Recorded(path)
    swaps = Swaps(engine)

    async def live():
        new = add(path, read_adapters([folders[4]]))
        file = max(new.folder.glob("cores-*"))
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert not await swaps.follow()
        assert str(file) in swaps.fault and "sha256" in swaps.fault
        assert not await swaps.follow()
        assert engine.calls == [] and swaps.store.generation == 1
        file.write_bytes(good)
        assert not await swaps.follow(), "not at once"
        monkeypatch.setattr(swap.time, "monotonic", lambda: 1e12)
        assert await swaps.follow()
        assert swaps.fault is None
        monkeypatch.undo()
        engine.refuse = "it adapts 3 modules more"
        add(path, read_adapters([folders[5]]))
        assert not await swaps.follow()
        assert swaps.fault == "generation 3 cannot be served: it adapts 3 modules more"
        assert swaps.store.generation == 2
        engine.refuse = ""
        revert(path, 2)
        assert await swaps.follow()
        assert (swaps.store.generation, swaps.fault) == (4, None)

    asyncio.run(live())


@pytest.mark.parametrize("content", [b"", b"3 " + b"0" * 64 + b"\n", b"7 x\n", None])
def test_a_current_that_is_no_good_changes_nothing(path, content):
    engine = Recorded(path)
    swaps = Swaps(engine)
    good = (path / "CURRENT").read_bytes()

    async def live():
        if content is None:
            (path / "CURRENT").unlink()
        else:
            (path / "CURRENT").write_bytes(content)
        assert not await swaps.follow()
        assert swaps.fault and engine.calls == []
        (path / "CURRENT").unlink(missing_ok=True)
        (path / "CURRENT").write_bytes(good)
        assert not await swaps.follow()
        assert swaps.fault is None

    asyncio.run(live())


def test_files_that_were_checked_before_are_not_read_again(path, folders, monkeypatch):
    engine = Recorded(path)
    swaps = Swaps(engine)
    before = {file.stat().st_ino for file in swaps.store.folder.iterdir()}
    hashed = []
    real = swap.check_file
    monkeypatch.setattr(swap, "check_file", lambda file, *a: (hashed.append(file), real(file, *a)))
    new = add(path, read_adapters([folders[4]]))
    assert asyncio.run(swaps.follow())
    files = {file for file in new.folder.iterdir() if file.name != "manifest.json"}
    assert {*hashed} == {file for file in files if file.stat().st_ino not in before}
    assert 0 < len(hashed) < len(files)
