"""Any process that changes a store is killed at any moment: nothing acknowledged is lost."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import pytest

from tests.compressor.change.test_uploads import check_numbers
from tests.serve.fleet import actors
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.uploads import drop_refit, take_in
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store, read_current
from vllm_jd.store.files import sha256_files
from vllm_jd.store.fleet import (
    UPLOAD_FILES,
    Compressed,
    Uploaded,
    read_fleet,
    source_of,
    upload_folder,
)
from vllm_jd.store.generations import generations_on_disk, open_number, prune
from vllm_jd.store.settling import settle

LIMIT = 0.5
CONTEXT = multiprocessing.get_context("forkserver")


class World:
    """A store, everything that may come into it, and what is known to have."""

    def __init__(self, folder, family, strangers):
        self.path = folder / "s"
        self.log = folder / "log"
        self.faults = folder / "faults"
        base = family[:6]
        compress(
            read_adapters(base), self.path, Settings(rank=6, clusters=2, max_adapter_error=LIMIT)
        )
        self.folders = {}
        for each in [*family, *strangers]:
            digest = sha256_files(*(each / name for name in UPLOAD_FILES))
            self.folders[digest] = each
        self.stand = {
            each.name: next(d for d, f in self.folders.items() if f == each) for each in base
        }
        self.names = [*self.stand, *(f"new-{i}" for i in range(6)), "org/name with spaces"]
        self.originals = str(family[0].parent)
        self.read = 0
        self.choose = random.Random(5)

    def actors(self, seed):
        """What to start: a function of `actors` and its arguments."""
        path, sources = str(self.path), [(d, str(f)) for d, f in self.folders.items()]
        return [
            (actors.change, (path, seed, sources, self.names, str(self.log))),
            (actors.recompress, (path, seed, [self.originals])),
            (actors.roll_back, (path, seed)),
            (actors.prune, (path, seed)),
            (actors.follow, (path, seed)),
        ]

    def check(self, peft_deltas):
        """What every name stands for is what was acknowledged, and its numbers are right."""
        assert not self.faults.exists(), self.faults.read_text()
        store, fleet = Store.open(self.path), read_fleet(self.path)
        for number in generations_on_disk(self.path):
            open_number(self.path, number, verify=False).close()
        found = {}
        for name, meaning in fleet.meanings(store):
            compressed = isinstance(meaning, Compressed)
            digest = source_of(store, meaning.index) if compressed else meaning.digest
            found[name] = digest
            if not compressed:
                files = [upload_folder(self.path, digest) / each for each in UPLOAD_FILES]
                assert sha256_files(*files) == digest
        begun = {}
        entries = self.log.read_text().splitlines() if self.log.exists() else []
        for entry in map(json.loads, entries[self.read :]):
            if entry["done"]:
                self.stand[entry["name"]] = entry["digest"]
                begun.pop(entry["name"], None)
            else:
                begun[entry["name"]] = entry["digest"]
        self.read = len(entries)
        for name, digest in begun.items():  # killed in between: either is right
            assert found.get(name) in (digest, self.stand.get(name)), name
            self.stand[name] = found.get(name)
        self.stand = {name: digest for name, digest in self.stand.items() if digest}
        assert found == self.stand
        for name in self.choose.sample(sorted(found), min(3, len(found))):
            if isinstance(fleet.meaning(name, store), Compressed):
                error = check_numbers(store, name, self.folders[found[name]], peft_deltas)
                assert error <= LIMIT * 1.01
        store.close()

    def check_disk(self):
        """Of what is not needed nothing stays."""
        take_in(self.path).store.close()
        prune(self.path, 0)
        drop_refit(self.path)
        settle(self.path, originals=True)
        store, fleet = Store.open(self.path), read_fleet(self.path)
        files = {self.path / "generations" / str(store.generation) / "manifest.json"}
        files |= {store.folder / name for name in store.manifest.files}
        for meaning in dict(fleet.meanings(store)).values():
            if isinstance(meaning, Uploaded):
                files |= {upload_folder(self.path, meaning.digest) / n for n in UPLOAD_FILES}
        store.close()
        there = {file for file in self.path.rglob("*") if file.is_file()}
        small = {file for file in there - files if file.parent == self.path}
        assert there == files | small
        assert sum(file.stat().st_size for file in small) < 1 << 16


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("sources")
    family = write_adapters(folder / "family", 12, kind="real", ranks=(2, 3), shared=3)
    return family, write_adapters(folder / "strangers", 2, prefix="stranger-", seed=9)


def killed(world, rounds, peft_deltas, seed, among=frozenset()):
    """Start everybody, kill one at a random moment, the others a moment later, and check. Once
    more, up to three times as often, until one was killed in the middle of each of `among`."""
    CONTEXT.set_forkserver_preload(
        ["tests.serve.fleet.actors", "vllm_jd.compressor.change.uploads", "vllm_jd.store.settling"]
    )
    choose = random.Random(seed)
    points = Counter()
    for round_ in range(3 * rounds):
        if round_ >= rounds and among <= points.keys():
            break
        processes = []
        for function, arguments in world.actors(choose.randrange(1 << 30)):
            processes.append(CONTEXT.Process(target=function, args=arguments))
            processes[-1].start()
        # Once they are at it, however long this machine takes to start them.
        number, until = read_current(world.path)[0], time.monotonic() + 20
        while read_current(world.path)[0] == number and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.5))
        choose.shuffle(processes)
        processes[0].kill()
        time.sleep(choose.choice([0, 0, 0.05, 0.2]))
        for process in processes[1:]:
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL, "it ended by itself"
        for file in world.path.parent.glob("doing-*"):
            points[file.read_text().strip()] += 1
            file.unlink()
        world.check(peft_deltas)
        if round_ % 8 == 7:
            world.check_disk()
            world.check(peft_deltas)
    return points


def test_killed_at_some_moments(tmp_path, sources, peft_deltas):
    world = World(tmp_path, *sources)
    points = killed(world, 6, peft_deltas, seed=1)
    assert world.read > 20, "nothing went on"
    assert sum(points.values()) - points[""] > 5, "all were idle"


@pytest.mark.slow
def test_killed_at_more_moments(tmp_path, sources, peft_deltas):
    """`VLLM_JD_KILLS=200` for as many rounds as docs/operations.md tells of."""
    rounds = int(os.environ.get("VLLM_JD_KILLS", "24"))
    world = World(tmp_path, *sources)
    points = killed(world, rounds, peft_deltas, seed=2, among={"upload", "replace", "delete"})
    idle = points.pop("")
    print(f"killed in the middle of: {dict(points)}; between two: {idle}")
    assert sum(points.values()) >= rounds
    assert {"upload", "replace", "delete"} <= points.keys()
    assert {"recompress", "refit", "publish", "rollback", "prune", "settle"} & points.keys()
    assert Store.open(world.path).generation > rounds
