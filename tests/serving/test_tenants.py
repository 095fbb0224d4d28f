"""Keys, tenants and limits on a real server, asked by the openai client."""

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from urllib.parse import quote

import h11
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import SHIPPED
from tests.serving.test_http import serving
from vllm_jd.serve.tenants.keys import add_key, remove_key

pytestmark = pytest.mark.slow

PLACES = 4


@pytest.fixture(scope="module")
def server(lossy_store, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    path, file = shutil.copytree(lossy_store.path, folder / "store"), folder / "keys.json"
    use = ["use", "upload"]
    texts = {
        "acme": add_key(file, name="acme", tenant="acme", rights=use)[0],
        "beta": add_key(file, name="beta", tenant="beta", rights=use)[0],
        "slow": add_key(file, name="slow", tenant="slow", limits={"tokens_per_minute": 30})[0],
        "ops": add_key(file, name="ops", rights=["admin"])[0],
    }
    flags = ["--max-num-seqs", str(PLACES), "--allow-runtime-lora-updating"]
    flags += ["--adapter-root", str(SHIPPED), "--max-loras", "2", "--max-queued-requests", "6"]
    flags += ["--shutdown-timeout", "100"]  # busy machines too
    with serving(path, model, folder / "log", *flags, "--api-keys", str(file)) as started:
        started.keys_file, started.texts = file, texts
        yield started


def client(server, who):
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key=server.texts[who], max_retries=0)


def ask(server, who, model, prompt="Input: bright\nOutput:", tokens=4, **options):
    return client(server, who).completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, **options
    )


def headers(server, who):
    return {"Authorization": f"Bearer {server.texts[who]}"}


def metric(server, name):
    text = httpx.get(f"{server.url}/metrics", headers=headers(server, "ops")).text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return sum(sample.value for sample in samples if sample.name == name)


def test_the_series_of_a_server_with_keys_are_there(server):
    text = httpx.get(f"{server.url}/metrics", headers=headers(server, "ops")).text
    assert "\nvllm_jd:door_waiting" in text and "# TYPE vllm_jd:requests_refused_total" in text


def eventually(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def upload(server, who, name, folder):
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    return httpx.post(
        f"{server.url}/v1/adapters",
        data={"name": name},
        files=files,
        headers=headers(server, who),
        timeout=60,
    )


def test_the_openai_client_sees_its_own_fleet(server, sources, shipped):
    shared = next(iter(sources))
    assert upload(server, "acme", "mine", SHIPPED / shipped[8]).json()["id"] == "acme/mine"
    assert upload(server, "beta", "mine", SHIPPED / shipped[9]).json()["id"] == "beta/mine"
    answers = {who: ask(server, who, "mine", tokens=12) for who in ("acme", "beta")}
    assert {who: answer.model for who, answer in answers.items()} == {
        "acme": "acme/mine",
        "beta": "beta/mine",
    }
    assert answers["acme"].choices[0].text != answers["beta"].choices[0].text
    assert ask(server, "acme", shared).model == shared
    listed = [card.id for card in client(server, "acme").models.list()]
    assert "acme/mine" in listed and shared in listed and "beta/mine" not in listed
    chat = client(server, "acme").chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    assert chat.model == "acme/mine"
    told = []
    for name in ("beta/mine", "beta/none"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(server, "acme", name)
        told.append(caught.value.response.text.replace(name, "NAME"))
    assert told[0] == told[1]
    for text, error in (("sk-wrong", openai.AuthenticationError), ("", openai.AuthenticationError)):
        with pytest.raises(error):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=text or "x").models.list()
    with pytest.raises(openai.PermissionDeniedError, match="expected admin"):
        client(server, "acme").get("/store", cast_to=object)
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    said = server.process.log.read_text()
    assert "keys.json asked for, but for /dashboard, /health, /ping, /version" in said


def test_tokens_are_counted_as_usage_has_them(server):
    first = ask(server, "slow", server.base, tokens=12)
    usage = first.usage.total_tokens
    answered = [usage]
    with pytest.raises(openai.RateLimitError) as caught:
        while len(answered) < 10:
            answered.append(ask(server, "slow", server.base, tokens=12).usage.total_tokens)
    assert sum(answered[:-1]) < 30 <= sum(answered)
    response = caught.value.response
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["x-ratelimit-limit-tokens"] == "30"


def test_cached_prefixes_are_a_tenants_own(server):
    prompt = (
        "One tenant's long secret, which nobody else may find out about. " * 14
    )  # a block and more

    def hits(who, **options):
        before = metric(server, "vllm:prefix_cache_hits_total")
        ask(server, who, server.base, prompt=prompt, tokens=1, **options)
        eventually(lambda: metric(server, "vllm:num_requests_running") == 0)
        time.sleep(0.3)
        return metric(server, "vllm:prefix_cache_hits_total") - before

    assert hits("acme") == 0
    assert hits("acme") > 0, "its own are used"
    assert hits("beta") == 0
    assert hits("beta", extra_body={"cache_salt": "tenant acme"}) == 0
    assert hits("acme", extra_body={"cache_salt": "x"}) == 0
    assert hits("acme", extra_body={"cache_salt": "x"}) > 0


@contextmanager
def flood(server, who, count, tokens=200):
    """So many long requests at once, until the block ends; the statuses of those that ended."""
    statuses = []

    async def send(http):
        body = {"model": server.base, "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
        reply = await http.post(f"{server.url}/v1/completions", json=body)
        statuses.append(reply.status_code)

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            headers=headers(server, who), timeout=120, limits=limits
        ) as http:
            await asyncio.gather(*(send(http) for _ in range(count)))

    loop = asyncio.new_event_loop()
    task = loop.create_task(all_of_them())

    def run():
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield statuses
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def test_a_flood_waits_and_who_goes_away_frees_everything(server):
    # Longer than the test: those who went away would be running still.
    with flood(server, "acme", 40, tokens=230) as statuses:
        eventually(lambda: metric(server, "vllm:num_requests_running") == PLACES - 1)
        eventually(lambda: statuses.count(429) == 40 - (PLACES - 1) - 6)
        assert metric(server, "vllm:num_requests_waiting") == 0, "they wait before the engine"
        start = time.monotonic()
        assert ask(server, "beta", server.base).usage.completion_tokens == 4
        assert time.monotonic() - start < 10
        assert set(statuses) == {429}, "and no long one has ended meanwhile"
    eventually(lambda: metric(server, "vllm:num_requests_running") == 0, 5)
    assert ask(server, "acme", server.base).usage.completion_tokens == 4


def test_a_key_that_is_removed_is_refused(server):
    text, _ = add_key(server.keys_file, name="passing")
    server.texts["passing"] = text
    eventually(lambda: httpx.get(f"{server.url}/v1/models", headers=headers(server, "passing")))
    eventually(
        lambda: httpx.get(f"{server.url}/v1/models", headers=headers(server, "passing")).is_success
    )
    remove_key(server.keys_file, "passing")
    eventually(
        lambda: (
            httpx.get(f"{server.url}/v1/models", headers=headers(server, "passing")).status_code
            == 401
        )
    )


RAW = [
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\n{key}Content-Length: 99999999999\r\n\r\n{",
    b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\n{key}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"PUT /v1/adapters/%2e%2e%2f%00%ff HTTP/1.1\r\nHost: x\r\n{key}Content-Length: 0\r\n\r\n",
    b"DELETE /v1/adapters/beta%2Fmine HTTP/1.1\r\nHost: x\r\n{key}\r\n",
    b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: x\r\n{key}\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{key}Content-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n{]",
]


def test_what_no_client_sends_ends_nothing(server):
    host, port = server.url.removeprefix("http://").split(":")
    key = f"Authorization: Bearer {server.texts['acme']}\r\n".encode()
    for raw in RAW:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(raw.replace(b"{key}", key))
            connection.settimeout(2)
            try:
                found = connection.recv(4096)
            except TimeoutError:
                found = b""  # it waits for the rest
            assert b" 500 " not in found.split(b"\r\n")[0], raw
    bodies = [{}, [], None, {"model": {}}, {"model": "acme/\0", "prompt": "x"}]
    bodies += [{"model": "mine", "prompt": "x", "adapters": each} for each in ([], {}, [[]], [1])]
    for body in bodies:
        reply = httpx.post(
            f"{server.url}/v1/completions", json=body, headers=headers(server, "acme")
        )
        assert 400 <= reply.status_code < 500, (body, reply.text)
        assert json.loads(reply.text)["error"]["message"]
    assert ask(server, "acme", server.base).usage.completion_tokens == 4
    assert "Traceback" not in server.process.log.read_text()


def test_no_bad_input_is_answered_with_a_fault_of_ours(server):
    """The same inputs as an engine that only counts gets, to one that runs: `VLLM_JD_BAD_INPUTS`
    of them, a sixth of that by default."""
    from tests.serve.tenants import test_bad_input as bad

    count = bad.INPUTS if "VLLM_JD_BAD_INPUTS" in os.environ else bad.INPUTS // 6
    seen = Counter()
    limits = httpx.Limits(max_keepalive_connections=0)  # a bad request may end its connection
    with httpx.Client(base_url=server.url, timeout=60, limits=limits) as http:
        who_asks = [headers(server, who) for who in ("ops", "acme")]

        def send(method, url, heads, body, who):
            said = who_asks[who] if who is not None else {}
            heads = [*heads.items(), *said.items()]
            base = json.dumps(server.base).encode()
            body = body.encode() if isinstance(body, str) else body or b""
            reply = http.request(method, url, headers=heads, content=body.replace(b'"base"', base))
            return reply.status_code, reply.content

        # Others than HTTP's clients do not send.
        @bad.always
        @bad.given(**bad.REQUEST | {"method": bad.st.sampled_from(bad.METHODS)})
        @bad.settings(max_examples=count * 2 // 3, **bad.FUZZ)
        def once(method, path, parts, who, headers, kind, query, body):
            if "recompress" in path or "rollback" in path:
                return  # they would do what they say
            url = f"{quote(path.format(*parts))}?{quote(query)}"
            heads = dict([(b"content-type", kind), *headers])
            try:
                status, answer = send(method, url, heads, body, who)
            except (httpx.ProtocolError, h11.LocalProtocolError, ValueError):
                return  # no client sends that, nor does a server answer it
            seen[status] += 1
            if answer != b"Invalid HTTP request received.":
                bad.judge(status, answer, (method, url, heads, body), path.startswith(bad.OURS))

        once()
        assert {200, 400, 401, 404, 405} <= seen.keys(), seen
        described = http.get("/openapi.json", headers=who_asks[0]).json()
        left_out = ("rollback",) if count > 1000 else ("rollback", "completions")
        promised = bad.what_openapi_promises(described, left_out, count // 3, send)
    statuses = {status for _, status in promised}
    assert {400, 404} <= statuses and (count <= 1000 or {200, 403} <= statuses), promised
    print(f"{sum(seen.values())} and {sum(promised.values())} answers")
    assert ask(server, "acme", server.base).usage.completion_tokens == 4
    assert "Traceback" not in server.process.log.read_text()


def test_sigterm_answers_what_runs_and_what_waits(server):
    """Last in this file: it ends the server."""
    statuses, tokens = [], []

    def send():
        body = {"model": server.base, "prompt": "x", "max_tokens": 60, "ignore_eos": True}
        try:
            reply = httpx.post(
                f"{server.url}/v1/completions",
                json=body,
                headers=headers(server, "acme"),
                timeout=100,
            )
            statuses.append(reply.status_code)
            tokens.append(reply.json()["usage"]["completion_tokens"])
        except httpx.HTTPError as error:
            statuses.append(error)

    asking = [threading.Thread(target=send) for _ in range(6)]
    for each in asking:
        each.start()
    eventually(lambda: metric(server, "vllm:num_requests_running") == PLACES - 1)
    os.kill(server.process.pid, signal.SIGTERM)
    for each in asking:
        each.join(100)
    assert statuses == [200] * 6
    assert tokens == [60] * 6, "in whole"
    assert server.process.wait() == 0
