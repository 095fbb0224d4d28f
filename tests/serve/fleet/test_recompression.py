"""When a server recompresses its store, and that it does so in a process that gives way."""

import asyncio
import shutil
import signal
import sys
import time

import psutil
import pytest
import uvloop

from tests.compressor.change.test_uploads import delete, meaning, upload
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.progress import Recorder, read_recompression, recording
from vllm_jd.compressor.change.uploads import TakenIn, bases_digest, take_in
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.config import RecompressConfig
from vllm_jd.serve.fleet import recompression
from vllm_jd.serve.fleet.recompression import AlreadyRunning, Recompressions
from vllm_jd.store import Store
from vllm_jd.store.fleet import Compressed, change_fleet, read_fleet, uploaded


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_adapters):
    return write_adapters(tmp_path_factory.mktemp("in"), 12, kind="real", ranks=(2, 3), shared=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    path = tmp_path_factory.mktemp("made") / "s"
    compress(read_adapters(folders[:6]), path, Settings(rank=6, max_adapter_error=0.5))
    return path


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s")


def due(path, **settings):
    found = Recompressions(path, RecompressConfig(**{"count": None, "age": None} | settings))
    return found.due(read_fleet(path), Store.open(path))


def test_by_count_age_and_unsuited_uploads(path, folders, write_adapters, tmp_path):
    assert due(path, count=1, age=1e-9, refit_share=0.01) is None, "nothing waits"
    upload(path, ("a", folders[6]), ("b", folders[7]))
    assert due(path, count=3) is None
    assert due(path, count=2) is False
    assert due(path, age=60) is None
    entry = uploaded(read_fleet(path).entries["a"].digest)
    old = entry.model_copy(update={"uploaded_at": time.time() - 61})
    change_fleet(path, lambda entries: entries.update(a=old))
    assert due(path, age=60) is False
    delete(path, "a")
    assert due(path, age=60) is None
    odd = write_adapters(tmp_path / "odd", 2, prefix="odd-", seed=9)
    digests = upload(path, ("odd-0", odd[0]), ("odd-1", odd[1]))
    with recording(path, refit=False) as recorder:
        assert due(path, count=1) is None, "somebody recompresses it"
        recorder.finish(take_in(path))
    assert read_recompression(path).kept.keys() == set(digests)
    assert due(path, count=1, age=1e-9) is None, "these bases were tried"
    # 2 of 7 adapters that are served compressed.
    assert due(path, refit_share=0.3) is None
    assert due(path, refit_share=0.2) is True
    store = Store.open(path)
    Recorder(path, refit=True).finish(TakenIn(store, bases=bases_digest(store), refitted=True))
    assert due(path, refit_share=0.2) is None, "new bases did not suit them either"
    file = path / "recompress.json"
    file.write_text(file.read_text().replace(bases_digest(store), "0" * 64))
    assert due(path, count=2) is False, "other bases were tried"


def test_a_process_of_its_own_that_gives_way(path, folders):
    upload(path, ("a", folders[6]), ("b", folders[7]))
    recompressions = Recompressions(path, RecompressConfig(threads=1))

    async def live():
        await recompressions.start()
        process = psutil.Process(recompressions._process.pid)
        with pytest.raises(AlreadyRunning, match=str(process.pid)):
            await recompressions.start()
        assert recompressions.due(read_fleet(path), Store.open(path)) is None
        nice = set()
        while recompressions.runs:
            try:
                nice.add(process.nice())
                assert process.environ().get("OMP_NUM_THREADS", "1") == "1"
            except psutil.NoSuchProcess:
                pass
            await asyncio.sleep(0.01)
        assert 19 in nice
        await recompressions._ended
        store = Store.open(path)
        assert recompressions.status(read_fleet(path), store)["waiting"] == 0
        last = recompressions.status(read_fleet(path), store)["last"]
        assert (last["state"], last["generation"], last["compressed"]) == ("done", 2, 2)

    asyncio.run(live())
    assert isinstance(meaning(path, "a"), Compressed)


def test_one_that_fails_is_told_and_waits_and_one_that_is_stopped_leaves_nothing(path, folders):
    upload(path, ("a", folders[6]))
    recompressions = Recompressions(path, RecompressConfig(count=1))

    async def live():
        await recompressions.start(refit=True)
        await recompressions._ended
        last = read_recompression(path)
        assert last.state == "failed" and "--originals" in last.message
        # Only what failed waits.
        assert recompressions.due(read_fleet(path), Store.open(path)) is False
        await recompressions.start()
        await asyncio.sleep(0.2)
        pid = recompressions._process.pid
        await recompressions.stop()
        await recompressions.stop()
        assert not recompressions.runs and not psutil.pid_exists(pid)
        assert recompressions.due(read_fleet(path), Store.open(path)) is False

    asyncio.run(live())
    assert [entry.name for entry in (path / "generations").iterdir()] == ["1"]
    assert take_in(path).store.generation == 2


STUBBORN = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])  # has stderr, too
if sys.argv[1] == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop])
@pytest.mark.parametrize("how", ["ends", "ignores"])
def test_one_that_ends_before_what_it_has_started_is_stopped(path, monkeypatch, how, loop):
    """Found by a soak: a process that had ended could not be killed, and a rollback was a 500."""
    monkeypatch.setattr(recompression, "_STOP_SECONDS", 1)
    recompressions = Recompressions(path, RecompressConfig())

    async def live():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", STUBBORN, how),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await process.stdout.readline()
        recompressions._process = process
        recompressions._ended = asyncio.create_task(recompressions._wait(process, False))
        await recompressions.stop()
        assert not recompressions.runs
        assert process.returncode == -(signal.SIGTERM if how == "ends" else signal.SIGKILL)
        await recompressions._ended
        assert recompressions._failures[False] == 0, "it was stopped, and has not failed"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(live())


def test_one_that_has_just_ended_is_not_signalled(path):
    """What a signal to it raises, when nobody has been told yet that it has ended."""
    recompressions = Recompressions(path, RecompressConfig())

    class Gone:
        returncode = None

        def terminate(self):
            raise ProcessLookupError

        async def wait(self):
            self.returncode = 0
            return 0

    recompressions._process = Gone()
    asyncio.run(recompressions.stop())
    assert not recompressions.runs
