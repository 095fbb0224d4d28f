"""Files of uploads: how they come in, who may add and remove them, and what nobody needs."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest

from vllm_jd.store import StoreError
from vllm_jd.store.fleet import DELETED, UPLOAD_FILES, change_fleet, upload_folder, uploaded
from vllm_jd.store.uploads import (
    Incoming,
    Keeper,
    NotTheKeeper,
    NotTheWriter,
    Writer,
    clear_abandoned,
    unnamed_uploads,
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    return path


def come_in(folder, config=b"{}", weights=b"w"):
    incoming = Incoming(folder).folder()
    for name, content in zip(UPLOAD_FILES, (config, weights), strict=True):
        (incoming / name).write_bytes(content)
    return incoming


def test_an_upload_is_known_by_its_files(folder, tree):
    writer = Writer(folder)
    digest = writer.accept(come_in(folder, b'{"r": 1}', b"numbers"))
    assert digest == hashlib.sha256(b'{"r": 1}numbers').hexdigest()
    files = {"adapter_config.json": b'{"r": 1}', "adapter_model.safetensors": b"numbers"}
    assert tree(upload_folder(folder, digest)) == files
    assert writer.accept(come_in(folder, b'{"r": 1}', b"numbers")) == digest
    other = writer.accept(come_in(folder, b'{"r": 1}', b"others"))
    assert sorted(each.name for each in (folder / "uploads").iterdir()) == sorted([digest, other])


def test_what_was_damaged_on_disk_is_mended_by_the_same_upload(folder, tree):
    writer = Writer(folder)
    digest = writer.accept(come_in(folder))
    (upload_folder(folder, digest) / UPLOAD_FILES[1]).write_bytes(b"W")
    assert writer.accept(come_in(folder)) == digest
    assert tree(upload_folder(folder, digest))[UPLOAD_FILES[1]] == b"w"
    (upload_folder(folder, digest) / UPLOAD_FILES[0]).unlink()
    assert writer.accept(come_in(folder)) == digest
    assert [each.name for each in (folder / "uploads").iterdir()] == [digest]


def test_folders_that_nothing_names_are_found_and_removed(folder):
    writer = Writer(folder)
    kept, left = writer.accept(come_in(folder)), writer.accept(come_in(folder, weights=b"v"))
    half = folder / "uploads" / ".removed-1"  # as a kill leaves it
    half.mkdir()
    fleet = change_fleet(folder, lambda entries: entries.update(x=uploaded(kept), y=DELETED))
    assert {each.name for each in unnamed_uploads(folder, fleet)} == {left, half.name}
    assert {each.name for each in unnamed_uploads(folder, fleet, {left})} == {half.name}
    for each in unnamed_uploads(folder, fleet):
        writer.remove(each)
    assert [each.name for each in (folder / "uploads").iterdir()] == [kept]


HOLDS = """
import pathlib, sys, time
from vllm_jd.store.uploads import Incoming, Keeper, Writer

held = globals()[sys.argv[2]](pathlib.Path(sys.argv[1]))
if sys.argv[2] == "Incoming":
    (held.folder() / "half").write_text("an upload")
print("has it", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(folder):
    """A process that has a right of the store: its kind → the process."""
    started = []

    def start(kind):
        command = [sys.executable, "-c", HOLDS, str(folder), kind]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "has it\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("kind", "fault"), [(Writer, NotTheWriter), (Keeper, NotTheKeeper)])
def test_one_process_has_the_right_until_it_ends(folder, holder, kind, fault):
    process = holder(kind.__name__)
    for _ in range(2):  # who asks takes nothing away from who has it
        with pytest.raises(fault, match=rf"process {process.pid} on .* has .*\.lock"):
            kind(folder)
    process.kill()
    process.wait()
    held = kind(folder)
    with pytest.raises(fault, match=f"process {os.getpid()} on"):
        kind(folder)
    held.close()
    held.close()
    kind(folder)


@pytest.mark.parametrize("kind", [Writer, Keeper, Incoming])
def test_a_folder_that_cannot_be_written_gives_no_right(tmp_path, kind):
    with pytest.raises((StoreError, OSError), match=r"cannot be written|No such file"):
        kind(tmp_path / "nowhere")


def test_a_writer_waits_for_the_one_before(folder):
    first = Writer(folder)
    started = time.monotonic()
    with pytest.raises(NotTheWriter, match="try again"):
        Writer(folder, wait=0.2)
    assert 0.2 <= time.monotonic() - started < 5
    threading.Timer(0.2, first.close).start()
    Writer(folder, wait=30).close()


def test_what_comes_in_is_left_alone_until_its_process_ends(folder, holder):
    mine = Incoming(folder)
    (mine.folder() / "half").write_text("mine")
    process = holder("Incoming")
    lost = folder / "incoming" / "copied"  # by a backup, without the lock
    lost.mkdir()
    (lost / "half").write_text("lost")
    assert clear_abandoned(folder) == 4
    assert sorted(each.read_text() for each in folder.rglob("half")) == ["an upload", "mine"]
    process.kill()
    process.wait()
    assert clear_abandoned(folder) == 9
    assert [each.read_text() for each in folder.rglob("half")] == ["mine"]
    mine.close()
    mine.close()
    assert clear_abandoned(folder) == 0
    assert list((folder / "incoming").iterdir()) == []
