"""`vllm-jd serve` whose collection changes while it runs, over HTTP, against PEFT in float32."""

import asyncio
import json
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.serving.conftest import NEW_TOKENS, SHIPPED
from tests.serving.test_http import serving

pytestmark = pytest.mark.slow

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLAGS = ["--max-loras", "3"]
LONG = 100  # tokens of an answer during which something else happens


@pytest.fixture(scope="module")
def place(lossless_store, tmp_path_factory):
    """A copy of the store that is changed, a root to load from, and a folder that is followed."""
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copytree(lossless_store.path, folder / "store")
    (folder / "watched").mkdir()
    return SimpleNamespace(path=folder / "store", watched=folder / "watched", logs=folder)


def start(place, model, name, *flags):
    """A server that needs no more than what issue and README say: a store, a base, a root."""
    flags = ["--adapter-root", str(SHIPPED), "--adapter-dir", str(place.watched), *FLAGS, *flags]
    return serving(place.path, model, place.logs / f"{name}.log", *flags)


@pytest.fixture(scope="module")
def server(place, model):
    with start(place, model, "first") as started:
        yield started


def files(folder):
    return {
        "adapter_config": (folder / CONFIG).read_bytes(),
        "adapter_model": (folder / WEIGHTS).read_bytes(),
    }


def upload(server, name, folder):
    return server.http.post("/v1/adapters", data={"name": name}, files=files(folder))


def put(server, name, folder):
    return server.http.put(f"/v1/adapters/{name}", files=files(folder))


def entry(server, name):
    return server.http.get(f"/v1/adapters/{name}").json()


def names(server):
    """Of all adapters, page by page."""
    found, after = [], None
    while True:
        params = {"limit": 5} | ({"after": after} if after else {})
        page = server.http.get("/v1/adapters", params=params).json()
        found += [each["id"] for each in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            return found


def eventually(condition, seconds=30):
    """What it is, once it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)
    return found


class Load(threading.Thread):
    """Requests one after another, from several clients at once, until it is left; they must all be
    answered the same."""

    def __init__(self, server, model, clients=6):
        super().__init__()
        self._server, self._model, self._clients = server, model, clients
        self._ended = threading.Event()
        self.answers, self.faults = set(), []

    def _ask(self):
        while not self._ended.is_set():
            try:
                completion = self._server.client.completions.create(
                    model=self._model, prompt="Input: under load\nOutput:", max_tokens=24,
                    temperature=0, extra_body={"ignore_eos": True},
                )  # fmt: skip
                self.answers.add(completion.choices[0].text)
            except openai.OpenAIError as error:
                self.faults.append(error)
                return

    def run(self):
        clients = [threading.Thread(target=self._ask) for _ in range(self._clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.join()


def test_an_upload_answers_the_first_request_after_its_acknowledgement_under_load(
    server, sources, shipped, prompts, peft_reference
):
    """How soon is measured by benchmarks/fleet.py."""
    with Load(server, next(iter(sources))) as load:
        time.sleep(1)
        for i, name in enumerate(shipped[9:14]):
            reply = upload(server, f"up-{i}", SHIPPED / name)
            assert reply.status_code == 201, reply.text
            assert reply.json()["state"] == "uploaded"
            completion = server.client.completions.create(
                model=f"up-{i}", prompt=prompts[0], max_tokens=1, temperature=0,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            wanted = peft_reference.greedy(SHIPPED / name, prompts[0], 1)
            assert completion.choices[0].token_ids == wanted
    assert load.faults == [] and len(load.answers) == 1


def test_uploads_and_compressed_adapters_are_one_batch(
    server, sources, shipped, prompts, peft_reference
):
    """More uploads than the server has places for (--max-loras 3)."""
    folders = {f"up-{i}": SHIPPED / name for i, name in enumerate(shipped[9:14])} | sources
    requests = [(name, prompt) for prompt in prompts for name in folders]
    found = server.tokens(requests)
    assert found == peft_reference.answers(folders, requests, found)


def test_requests_in_flight_keep_their_version(server, shipped, prompts, peft_reference):
    first, second = SHIPPED / shipped[14], SHIPPED / shipped[15]
    assert upload(server, "versions", first).status_code == 201

    def ask(tokens):
        return server.client.completions.create(
            model="versions", prompt=prompts[0], max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip

    def all_tokens(stream):
        return [token for part in stream for token in part.choices[0].token_ids or []]

    def running():
        """A long answer that has begun: its first tokens, and the stream of the others; nothing
        where it has ended by the time that somebody looks, on a machine that is busy."""
        stream = ask(LONG)
        begun = next(stream).choices[0].token_ids
        references = entry(server, "versions")["references"]
        assert references in (0, 1)
        return (begun, stream) if references else None

    def says(folder, answer, tokens=NEW_TOKENS):
        return answer == peft_reference.greedy(folder, prompts[0], tokens, guess=answer)

    begun, stream = eventually(running)
    reply = put(server, "versions", second)
    assert reply.status_code == 200, reply.text
    told = entry(server, "versions")
    new, old = all_tokens(ask(NEW_TOKENS)), begun + all_tokens(stream)
    assert says(second, new) and says(first, old, LONG)
    assert new != old[:NEW_TOKENS], "they say the same: this shows nothing"
    assert told["references"] == 0, "the one that runs has the version before"

    begun, stream = eventually(running)
    assert server.http.delete("/v1/adapters/versions").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(1)
    assert upload(server, "versions", first).status_code == 201
    new, old = all_tokens(ask(NEW_TOKENS)), begun + all_tokens(stream)
    assert says(first, new) and says(second, old, LONG)
    told = entry(server, "versions")
    assert abs(told["last_used"] - time.time()) < 60 and told["resident"] is True


def test_a_pin_stays_resident_whatever_is_asked_for(server, shipped, prompts):
    pinned = server.http.post("/v1/adapters/up-0/pin")
    assert pinned.status_code == 200 and pinned.json()["pinned"] is True
    for _ in range(2):
        server.tokens([(f"up-{i}", prompts[0]) for i in range(1, 5)])
        assert entry(server, "up-0")["resident"] is True
    assert [entry(server, f"up-{i}")["resident"] for i in range(1, 5)].count(True) == 2
    unpinned = server.http.post("/v1/adapters/up-0/unpin")
    assert unpinned.status_code == 200 and unpinned.json()["pinned"] is False
    server.tokens([(f"up-{i}", prompts[0]) for i in (1, 2, 3)])
    assert entry(server, "up-0")["resident"] is False
    assert server.http.post("/v1/adapters/up-1/pin").status_code == 200


def test_what_cannot_be_served_is_refused_and_harms_nobody(
    server, sources, shipped, prompts, tmp_path
):
    name = next(iter(sources))
    before, known = server.tokens([(name, prompts[0])]), names(server)
    good = SHIPPED / shipped[9]

    def spoilt(**config):
        folder = tmp_path / "-".join(config)
        shutil.copytree(good, folder)
        fields = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps(fields))
        return folder

    def reshaped(rank):
        """As `good`, of another rank: zeros more."""
        folder = spoilt(r=rank, lora_alpha=rank)
        tensors = load_file(good / WEIGHTS)
        for key, tensor in tensors.items():
            shape = (rank, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], rank)
            larger = tensor.new_zeros(shape)
            larger[: tensor.shape[0], : tensor.shape[1]] = tensor
            tensors[key] = larger
        save_file(tensors, folder / WEIGHTS)
        return folder

    for folder, said in (
        (spoilt(use_dora=True), "use_dora is true"),
        (spoilt(base_model_name_or_path="org/another"), "trained on base model 'org/another'"),
        (reshaped(64), "rank 64 is greater than max_lora_rank 16"),
    ):
        reply = upload(server, "bad", folder)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert said in error["message"] and error["type"] == "BadRequestError"
    reply = server.http.post("/v1/adapters", json={"name": "bad", "source": str(tmp_path)})
    assert reply.status_code == 403
    assert str(SHIPPED) in reply.json()["error"]["message"]
    assert upload(server, name, good).status_code == 409
    assert upload(server, server.base, good).status_code == 409
    assert names(server) == known
    assert server.tokens([(name, prompts[0])]) == before


def what_it_cannot_finish_ends_with_an_error(server):
    """More than it answers in two seconds, streamed or not, when it is told to stop."""
    body = {"model": server.base, "prompt": "x", "max_tokens": 240, "ignore_eos": True}

    async def send(http, stream):
        url = f"{server.url}/v1/completions"
        reply = await http.post(url, json=body | {"stream": stream}, timeout=60)
        return reply.status_code, reply.text

    async def every():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as http:
            asked = [asyncio.ensure_future(send(http, i % 2 == 1)) for i in range(32)]
            running_now = re.compile(r"^vllm:num_requests_running\{.*\} 32\.0", re.MULTILINE)
            while not running_now.search((await http.get(f"{server.url}/metrics")).text):
                await asyncio.sleep(0.02)
            os.kill(server.process.pid, signal.SIGTERM)
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    answers = asyncio.run(every())
    for i, (status, text) in enumerate(answers):
        assert status == (200 if i % 2 else 503), text
        if i % 2:
            *_, last, done = [line for line in text.splitlines() if line]
            assert done == "data: [DONE]"
            text = last.removeprefix("data: ")
        error = json.loads(text)["error"]
        assert error["code"] == 503 and "--shutdown-timeout" in error["message"]
    assert server.process.wait() == 0


def test_everything_is_there_after_a_start(
    server, place, model, sources, shipped, prompts, peft_reference
):
    """Last in this file: it ends the server. Uploads, one by vLLM's own route, one from a source,
    one in the place of a compressed adapter, one deleted, a followed folder, a pin."""
    replaced, deleted, *_ = sources
    assert put(server, "versions", SHIPPED / shipped[14]).is_success
    assert server.load("by-route", SHIPPED / shipped[15]).status_code == 200
    body = {"name": "../of a source", "source": str(SHIPPED / shipped[16])}
    assert server.http.post("/v1/adapters", json=body).status_code == 201
    assert put(server, replaced, SHIPPED / shipped[17]).status_code == 200
    assert server.http.delete(f"/v1/adapters/{deleted}").status_code == 200
    assert server.unload("up-4").status_code == 200
    shutil.copytree(SHIPPED / shipped[18], place.watched / "followed")
    eventually(lambda: "followed" in names(server))
    folders = sources | {f"up-{i}": SHIPPED / name for i, name in enumerate(shipped[9:13])}
    folders |= {
        "versions": SHIPPED / shipped[14],
        "by-route": SHIPPED / shipped[15],
        "../of a source": SHIPPED / shipped[16],
        replaced: SHIPPED / shipped[17],
        "followed": SHIPPED / shipped[18],
    }
    del folders[deleted]
    requests = [(name, prompts[0]) for name in folders]
    found = server.tokens(requests)
    assert found == peft_reference.answers(folders, requests, found)
    before = names(server)
    assert set(before) == set(folders)
    server.process.stop()
    flags = ["--no-enable-prefix-caching", "--shutdown-timeout", "2"]
    with start(place, model, "second", *flags) as again:
        assert names(again) == before
        assert set(folders) | {again.base} == {card.id for card in again.client.models.list()}
        assert again.tokens(requests) == found
        eventually(lambda: entry(again, "up-1")["resident"])
        assert entry(again, "up-1")["pinned"] is True
        assert entry(again, "../of a source".replace("/", "%2F"))["source"] == body["source"]
        with pytest.raises(openai.NotFoundError):
            again.client.completions.create(model=deleted, prompt="x", max_tokens=1)
        store = again.http.get("/v1/store").json()
        assert (store["adapters"], store["uploads"]) == (len(folders), 9)
        page = again.http.get("/v1/adapters").json()["data"]
        used = {each["sha256"] for each in page if each["state"] == "uploaded"}
        # What nobody names goes after a minute: another server may be answering with it.
        folder = place.path / "uploads"
        eventually(lambda: {each.name for each in folder.iterdir()} == used, 90)
        what_it_cannot_finish_ends_with_an_error(again)
    log = (place.logs / "second.log").read_text()
    # While it stops, vLLM itself may log that its engine has gone.
    assert "Traceback" not in log.partition("[shutdown]")[0]
