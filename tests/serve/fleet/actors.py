"""Processes that change one store all the time, until they are killed. Imports little: it is loaded
anew in each of them.

What is changed is noted in a log, each change twice: when it is begun, and when it is acknowledged.
"""

import asyncio
import json
import os
import random
import shutil
import time
from pathlib import Path

PASSING = ("another process", "no generation", "no adapter is left")
"""What may stand in the way of one process while others are at it, or once all was deleted."""


def doing(path, actor, what):
    """Note what an actor is at, empty: nothing."""
    handle = os.open(Path(path).parent / f"doing-{actor}", os.O_WRONLY | os.O_CREAT)
    os.pwrite(handle, what.ljust(20).encode(), 0)
    os.close(handle)


def quietly(path, actor, act):
    """Run `act`, which returns what it is about to do and does it, for ever; another process may
    be at it."""
    from vllm_jd.store import StoreError

    while True:
        what, run = act()
        doing(path, actor, what)
        try:
            run()
        except StoreError as error:
            if not any(each in str(error) for each in PASSING):
                note_fault(path, error)
        doing(path, actor, "")
        time.sleep(0.002)


def note(log, entry):
    """One line at the end of a log, in one write."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, (json.dumps(entry) + "\n").encode())
    os.close(handle)


def note_fault(path, error):
    note(Path(path).parent / "faults", {"fault": str(error), "kind": type(error).__name__})


def change(path, seed, sources, names, log):
    """A server that takes in uploads: new names, new versions, deletions."""
    from vllm_jd.store.fleet import (
        DELETED,
        UPLOAD_FILES,
        change_fleet,
        read_fleet,
        uploaded,
    )
    from vllm_jd.store.uploads import Incoming, Writer

    path = Path(path)
    choose = random.Random(seed)
    coming = Incoming(path)
    while True:
        name = choose.choice(names)
        if choose.random() < 0.3:
            doing(path, "change", "delete")
            note(log, {"name": name, "digest": None, "done": False})
            change_fleet(path, lambda entries, n=name: entries.update({n: DELETED}))
            note(log, {"name": name, "digest": None, "done": True})
            continue
        digest, folder = choose.choice(sources)
        new = read_fleet(path).entries.get(name) in (None, DELETED)
        doing(path, "change", "upload" if new else "replace")
        note(log, {"name": name, "digest": digest, "done": False})
        incoming = coming.folder()
        for file in UPLOAD_FILES:
            shutil.copy(Path(folder) / file, incoming)
        writer = Writer(path, wait=30)
        assert writer.accept(incoming) == digest
        change_fleet(path, lambda entries, n=name, d=digest: entries.update({n: uploaded(d)}))
        writer.close()
        note(log, {"name": name, "digest": digest, "done": True})
        doing(path, "change", "")
        time.sleep(choose.random() * 0.02)


def recompress(path, seed, originals):
    """What `vllm-jd recompress` does, one after the other, now and then with new bases."""
    import torch

    from vllm_jd.compressor.change import uploads
    from vllm_jd.compressor.change.uploads import refit, take_in

    torch.set_num_threads(1)
    choose = random.Random(seed)
    publish = uploads.publish_changed

    def publishing(*arguments, **options):
        doing(path, "recompress", "publish")
        return publish(*arguments, **options)

    uploads.publish_changed = publishing

    def act():
        if choose.random() < 0.2:
            return "refit", lambda: refit(Path(path), originals=originals).store.close()
        return "recompress", lambda: take_in(Path(path)).store.close()

    quietly(path, "recompress", act)


def roll_back(path, seed):
    """Goes back to any of the generations."""
    from vllm_jd.store.generations import generations_on_disk, revert

    choose = random.Random(seed)

    def act():
        time.sleep(choose.random() * 0.1)
        *older, _ = generations_on_disk(Path(path))
        number = choose.choice(older) if older else None
        return "rollback", lambda: revert(Path(path), number).close()

    quietly(path, "roll_back", act)


def prune(path, seed):
    """What `vllm-jd prune` does."""
    from vllm_jd.store.generations import prune as run
    from vllm_jd.store.settling import settle

    choose = random.Random(seed)

    def act():
        time.sleep(choose.random() * 0.1)
        if choose.random() < 0.5:
            return "prune", lambda: run(Path(path), 2)
        return "settle", lambda: settle(Path(path))

    quietly(path, "prune", act)


def follow(path, seed):
    """A server that serves whatever generation is live, and reads what names stand for."""
    from vllm_jd.serve.fleet.swap import Swaps
    from vllm_jd.store import Store
    from vllm_jd.store.fleet import Compressed, read_fleet
    from vllm_jd.store.generations import open_number

    class Server:
        def __init__(self):
            self.store = Store.open(Path(path))

        async def open_generation(self, path, generation):
            doing(path, "follow", "swap")
            open_number(path, generation, verify=False).close()

        async def serve_generation(self, path, generation):
            doing(path, "follow", "")

        async def point(self, store):
            for name, meaning in read_fleet(store.path).meanings(store):
                if isinstance(meaning, Compressed):
                    assert store.names[meaning.index] == name
            self.store.close()
            self.store = store

    async def live():
        swaps = Swaps(Server())
        while True:
            await swaps.follow()
            # It may be gone before it is opened: the one after that is next.
            if swaps.fault and "missing" not in swaps.fault and "deleted" not in swaps.fault:
                note_fault(path, swaps.fault)
            await asyncio.sleep(0.001)

    asyncio.run(live())
