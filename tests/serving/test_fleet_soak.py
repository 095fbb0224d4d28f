"""A server whose collection changes all the time, under as many requests as it can answer: every
answer is that of a version which its name stood for, and none fails."""

import asyncio
import hashlib
import json
import random
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.serving.conftest import MAX_MODEL_LEN, NEW_TOKENS, SHIPPED, write_short_adapter
from tests.serving.replica import Replica
from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store, read_base_model, read_current
from vllm_jd.store.files import sha256_files
from vllm_jd.store.fleet import UPLOAD_FILES, Compressed, read_fleet

pytestmark = pytest.mark.slow

SWAPS = 20
CLIENTS = 8


@dataclass
class Version:
    """What a name stood for, and when: from `begin` (surely from `known` on) to `end`."""

    folder: object
    begin: float
    known: float = float("inf")
    end: float = float("inf")


@dataclass
class Answer:
    name: str
    prompt: tuple
    sent: float
    first: float = 0.0
    tokens: list = field(default_factory=list)
    error: str | None = None


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Folders of adapters that say different things: each shipped one in three versions."""
    folder = tmp_path_factory.mktemp("variants")
    found = {}
    for source in sorted(each for each in SHIPPED.iterdir() if each.is_dir())[:8]:
        for number, scale in enumerate((3.0, -5.0, 8.0)):
            target = folder / f"v{number}" / source.name
            write_short_adapter(source, target, scale)
            found[source.name, number] = target
    return found


@pytest.fixture
def store(tmp_path, variants, short):
    """A float32 store of six of them, clearly lossy, whose bases suit all of a family."""
    folders = [folder for (_, number), folder in variants.items() if number == 0][:6]
    base = read_base_model(short)
    settings = Settings(rank=24, clusters=2, store_dtype="float32", max_adapter_error=1.0)
    compress(read_adapters(folders), tmp_path / "store", settings, base_model=base)
    return tmp_path / "store"


@contextmanager
def serving(store, model, log):
    flags = ["--max-model-len", str(MAX_MODEL_LEN)]
    server = Replica(store, model, log, *flags, max_num_seqs=16, adapter_roots=[str(store.parent)])
    server.start()
    try:
        server.wait(300)
        yield server
    finally:
        server.kill()


class Fleet:
    """The server's fleet as its only client knows it: versions of each name."""

    def __init__(self, url, store, exports):
        self.http = httpx.AsyncClient(base_url=url, timeout=120)
        self.path, self.exports = store, exports
        self.versions = {}
        self.folders = {}  # digest → folder
        now = time.monotonic()
        self._note(now, now)

    def _meaning(self, name, fleet, opened):
        meaning = fleet.meaning(name, opened)
        if meaning is None:
            return None
        if not isinstance(meaning, Compressed):
            return self.folders.get(meaning.digest, meaning.digest)
        factors = [each for pair in opened.factors(name).values() for each in pair]
        numbers = hashlib.sha256(b"".join(each.numpy().tobytes() for each in factors))
        folder = self.exports / numbers.hexdigest()
        if not folder.exists():
            export_adapter(opened, name, folder)
        return folder

    def _note(self, begin, known):
        """Write down what names stand for now, on disk: since some moment after `begin`."""
        with Store.open(self.path, verify=False) as opened:
            fleet = read_fleet(self.path)
            for name in {*opened.names, *fleet.entries, *self.versions}:
                folder = self._meaning(name, fleet, opened)
                versions = self.versions.setdefault(name, [])
                if versions and versions[-1].folder == folder:
                    continue
                if versions:
                    versions[-1].end = known
                versions.append(Version(folder, begin, known))

    @asynccontextmanager
    async def changing(self):
        begin = time.monotonic()
        yield
        await asyncio.to_thread(self._note, begin, time.monotonic())

    async def put(self, name, folder):
        digest = sha256_files(*(folder / file for file in UPLOAD_FILES))
        self.folders[digest] = folder
        files = {
            part: (folder / file).read_bytes()
            for part, file in zip(("adapter_config", "adapter_model"), UPLOAD_FILES, strict=True)
        }
        async with self.changing():
            reply = await self.http.put(f"/v1/adapters/{name}", files=files)
        assert reply.status_code in (200, 201), reply.text

    async def delete(self, name):
        async with self.changing():
            reply = await self.http.delete(f"/v1/adapters/{name}")
        assert reply.status_code == 200, reply.text

    async def swapped(self, act):
        """Carry out what publishes a generation, and wait until it is served."""
        async with self.changing():
            before = (await self.state())["swaps"]
            await act()
            number = read_current(self.path)[0]
            for _ in range(6000):
                state = await self.state()
                assert state["fault"] is None
                running = (state["recompression"]["last"] or {}).get("state") == "running"
                number = read_current(self.path)[0]
                if state["generation"] == number and state["swaps"] > before and not running:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError(f"generation {number} is not served: {state}")

    async def state(self):
        return (await self.http.get("/v1/store")).json()

    def alive(self):
        return sorted(n for n, versions in self.versions.items() if versions[-1].folder)

    def possible(self, answer):
        """Folders of the versions that a request may have been given: its name was looked up
        between when it was sent and its first token."""
        return [
            version.folder
            for version in self.versions[answer.name]
            if version.begin <= answer.first and answer.sent <= version.end
        ]


async def keep_asking(fleet, prompts, answers, until, seed):
    """One client: requests one after the other, streamed."""
    choose = random.Random(seed)
    while not until.is_set():
        answer = Answer(choose.choice(fleet.alive()), choose.choice(prompts), time.monotonic())
        answers.append(answer)
        body = {
            "model": answer.name,
            "prompt": list(answer.prompt),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        async with fleet.http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                answer.error = f"{reply.status_code}: {(await reply.aread())[:300]}"
                answer.first = time.monotonic()
                continue
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    answer.error = json.dumps(event["error"])
                    answer.first = answer.first or time.monotonic()
                for choice in event.get("choices", ()):
                    answer.first = answer.first or time.monotonic()
                    answer.tokens += choice.get("token_ids") or []


def test_twenty_swaps_with_uploads_and_deletions_under_load(
    store, variants, short, prompts, short_reference, tmp_path
):
    prompts = [tuple(prompt) for prompt in prompts[:2]]
    choose = random.Random(3)
    shipped = sorted({name for name, _ in variants})

    async def live(url):
        fleet = Fleet(url, store, tmp_path / "exports")
        answers, until = [], asyncio.Event()
        clients = [
            asyncio.ensure_future(keep_asking(fleet, prompts, answers, until, seed))
            for seed in range(CLIENTS)
        ]
        for swap in range(SWAPS):
            for _ in range(2):
                name = f"mine-{choose.randrange(4)}"
                if name in fleet.alive() and choose.random() < 0.3:
                    await fleet.delete(name)
                await fleet.put(name, variants[choose.choice(shipped), choose.randrange(3)])
            if swap == 7:  # one of the store's own
                await fleet.delete(shipped[0])
                await asyncio.sleep(0.3)
                await fleet.put(shipped[0], variants[shipped[0], 2])
            if swap % 10 == 0:
                await fleet.swapped(lambda: fleet.http.post("/v1/recompress"))
            elif swap % 4 == 2:
                await fleet.swapped(lambda: asyncio.to_thread(take_in, store))
            else:
                await fleet.swapped(lambda: fleet.http.post("/v1/store/rollback"))
            await asyncio.sleep(0.5)
        until.set()
        await asyncio.gather(*clients)
        state = await fleet.state()
        await fleet.http.aclose()
        return fleet, answers, state

    with serving(store, short, tmp_path / "log") as server:
        fleet, answers, state = asyncio.run(live(server.url))
    assert state["swaps"] >= SWAPS
    distinct, failed, sure = {}, [], 0
    for answer in answers:
        folders = fleet.possible(answer)
        sure += len(folders) == 1
        if answer.error is not None:
            if None not in folders:  # of a name that was deleted meanwhile it is right
                failed.append(answer)
            continue
        distinct.setdefault((answer.name, answer.prompt, tuple(answer.tokens)), []).append(folders)
    assert failed == []
    assert len(answers) > 100 and sure > 0.5 * len(answers)
    wrong = [
        (name, tokens, folders)
        for (name, prompt, tokens), many in distinct.items()
        for folders in {tuple(dict.fromkeys(map(str, each))) for each in many}
        if not any(
            folder != "None" and short_reference.says(folder, list(prompt), list(tokens))
            for folder in folders
        )
    ]
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[:2]}"
    assert len({tokens for _, _, tokens in distinct}) > 20, "all say the same: this shows nothing"


def kill(server, victim):
    """`kill -9` of one of a server's processes."""
    first = psutil.Process(server.pid)
    changing = [each for each in first.children() if "recompress" in each.cmdline()]
    (engine,) = set(first.children()) - set(changing)
    (found,) = {"recompression": changing, "engine": [engine], "server": [first]}[victim]
    found.kill()


def test_killed_while_it_changes_everything_acknowledged_is_there_after_a_start(
    store, variants, short, prompts, short_reference, tmp_path
):
    shipped = sorted({name for name, _ in variants})
    stand = {name: variants[name, 0] for name in shipped[:6]}

    async def change(url, *changes):
        fleet = Fleet(url, store, tmp_path / "exports")
        for name, folder in changes:
            if folder is None:
                await fleet.delete(name)
                del stand[name]
            else:
                await fleet.put(name, folder)
                stand[name] = folder
        reply = await fleet.http.post("/v1/recompress")
        assert reply.status_code == 202
        while ((await fleet.state())["recompression"]["last"] or {}).get("state") != "running":
            await asyncio.sleep(0.05)
        await fleet.http.aclose()

    def check(url):
        """All names, of the right files, and what one of them says."""
        listed = httpx.get(f"{url}/v1/adapters", timeout=60).json()["data"]
        found = {entry["id"]: entry["sha256"] for entry in listed}
        assert found == {
            name: sha256_files(*(folder / file for file in UPLOAD_FILES))
            for name, folder in stand.items()
        }
        for entry in listed[-2:]:
            body = {"model": entry["id"], "prompt": prompts[0], "max_tokens": NEW_TOKENS}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()
            tokens, folder = reply["choices"][0]["token_ids"], stand[entry["id"]]
            if entry["state"] == "compressed":
                with Store.open(store) as opened:
                    folder = tmp_path / f"now-{time.monotonic()}"
                    export_adapter(opened, entry["id"], folder)
            assert tokens == short_reference.greedy(folder, prompts[0], guess=tokens)

    with serving(store, short, tmp_path / "log-1") as server:
        changes = [("a", variants[shipped[6], 0]), (shipped[0], variants[shipped[0], 2])]
        asyncio.run(change(server.url, *changes, (shipped[1], None)))
        kill(server, "recompression")
        check(server.url)
        changes = [("b", variants[shipped[7], 1]), ("a", variants[shipped[6], 1])]
        asyncio.run(change(server.url, *changes))
        kill(server, "engine")
        time.sleep(1)
    with serving(store, short, tmp_path / "log-2") as server:
        check(server.url)
        asyncio.run(change(server.url, ("b", None), ("c", variants[shipped[7], 2])))
        kill(server, "server")
        time.sleep(1)
    with serving(store, short, tmp_path / "log-3") as server:
        check(server.url)
