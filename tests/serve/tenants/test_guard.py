"""Over HTTP: who may ask for what, and how much."""

import asyncio
import json

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from tests.serve.fleet.conftest import files
from tests.serve.fleet.test_live import eventually
from tests.serve.tenants.conftest import ANSWER, PROMPT, Client, GeneratingEngine, guarded
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.serve.tenants import ring
from vllm_jd.serve.tenants.keys import remove_key
from vllm_jd.serve.tenants.rights import right_for


def error_of(reply, status):
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


# ---------------------------------------------------------------- keys and rights


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic {key}", "{key}", "bearer"]
)
@pytest.mark.parametrize("url", ["/v1/models", "/v1/store", "/metrics", "/nothing", "/v1/adapters"])
def test_without_a_key_it_is_vllms_401(path, file, key, header, url):
    text = key("a", rights=["admin"])
    headers = {} if header is None else {"Authorization": header.format(key=text)}
    with guarded(path, file) as server:
        reply = server.http.get(url, headers=headers)

        async def app(scope, receive, send):
            raise AssertionError("not asked for")

        stock = asyncio.run(answer_of(AuthenticationMiddleware(app, [text]), "GET", "/v1/models"))
    assert (reply.status_code, reply.content) == stock == (401, b'{"error":"Unauthorized"}')


async def answer_of(app, method, path, headers=(), receive=None, body=b""):
    """(status, body) that an ASGI app answers."""
    found = []

    async def send(message):
        found.append(message)

    async def once():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json"), *headers]}
    await app(scope, receive or once, send)
    return found[0]["status"], b"".join(message.get("body", b"") for message in found[1:])


def test_health_and_version_are_open_and_a_scheme_is_of_any_case(path, file, key):
    text = key("a")
    with guarded(path, file) as server:
        assert [server.http.get(url).status_code for url in ("/health", "/version")] == [200, 200]
        for scheme in ("bearer", "BEARER"):
            headers = {"Authorization": f"{scheme} {text}"}
            assert server.http.get("/v1/models", headers=headers).status_code == 200


CALLS = [
    ("get", "/v1/models", "use"),
    ("get", "/v1/models/base", "use"),
    ("get", "/v1/adapters", "use"),
    ("post", "/v1/completions", "use"),
    ("post", "/v1/adapters", "upload"),
    ("put", "/v1/adapters/x", "upload"),
    ("delete", "/v1/adapters/x", "upload"),
    ("get", "/metrics", "metrics"),
    ("post", "/v1/adapters/x/pin", "admin"),
    ("post", "/v1/adapters/x/unpin", "admin"),
    ("get", "/v1/store", "admin"),
    ("post", "/v1/recompress", "admin"),
    ("post", "/v1/store/rollback", "admin"),
    ("post", "/v1/store/reload", "admin"),
    ("post", "/v1/load_lora_adapter", "admin"),
    ("post", "/v1/unload_lora_adapter", "admin"),
    ("get", "/openapi.json", "admin"),
]


def test_each_right_opens_its_own_routes_and_admin_all(path, file, key):
    keys = {
        "use": key("u"),
        "upload": key("up", tenant="t", rights=["upload"]),
        "metrics": key("m", rights=["metrics"]),
        "admin": key("a", rights=["admin"]),
    }
    with guarded(path, file) as server:
        for right, text in keys.items():
            client = Client(server, text)
            for method, url, needed in CALLS:
                reply = getattr(client, method)(url)
                if right in (needed, "admin"):
                    assert reply.status_code not in (401, 403), (right, method, url, reply.text)
                else:
                    error = error_of(reply, 403)
                    assert error["type"] == "PermissionDeniedError" and error["code"] == 403
                    assert error["message"].endswith(f"expected {needed}")
            assert client.get("/no/such/route").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/v1/adapters/../store", "/v1/modelsx", "/v1/models/..", "/V1/models", "//v1/models", "/v1"],
)
def test_odd_paths_open_nothing(path):
    assert right_for("POST", path) == right_for("DELETE", path.replace("adapters/", "")) == "admin"
    assert right_for("PATCH", "/v1/adapters") == "admin"


def test_a_key_is_refused_once_it_is_gone(path, file, key, monkeypatch):
    monkeypatch.setattr(ring, "_LOOK_SECONDS", 0)
    text = key("a")
    key("b")
    with guarded(path, file) as server:
        client = Client(server, text)
        assert client.ask("base").status_code == 200
        remove_key(file, "a")
        assert client.ask("base").status_code == 401
        file.write_text("broken")
        assert client.ask("base").status_code == 401


# ---------------------------------------------------------------- limits


def test_tokens_a_minute_are_those_of_prompts_and_answers(path, file, key):
    each = PROMPT + ANSWER
    limits = {"tokens_per_minute": 4 * each, "requests": 9}
    client_key, other = key("a", limits=limits), key("b", limits=limits)
    with guarded(path, file) as server:
        client = Client(server, client_key)
        first = client.ask("base")
        assert first.headers["x-ratelimit-limit-tokens"] == str(4 * each)
        assert first.headers["x-ratelimit-limit-requests"] == "9"
        assert first.headers["x-ratelimit-remaining-requests"] == "8"
        assert client.ask("base", stream=True).text.count("data:") == ANSWER
        assert client.ask("base", prompt=["x", "y"]).status_code == 200
        refused = client.ask("base")
        error = error_of(refused, 429)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "tokens")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert Client(server, other).ask("base").status_code == 200
        assert client.get("/v1/models").status_code == 200, "which takes no tokens"


def test_an_answer_of_several_sequences_is_charged_for_all(path, file, key):
    text = key("a", limits={"tokens_per_minute": 1000})
    with guarded(path, file) as server:
        for stream in (False, True):
            before = server.http.app.state.vllm_jd_tenants
            left = before.meter.tokens_left(before.ring.find(text)[0])
            assert Client(server, text).ask("base", n=3, stream=stream).status_code == 200
            now = before.meter.tokens_left(before.ring.find(text)[0])
            assert left - now == PROMPT + 3 * ANSWER


def held(scenario, path, file, *, places=4, **config):
    """Run `scenario(server, ask, engine)` in the server's own loop, with an engine that holds on to
    requests. `ask(text, **body)` starts one, and gives its task and what makes the client go."""
    engine = GeneratingEngine(places)
    with guarded(path, file, engine=engine, **config) as server:
        app = server.http.app

        async def run():
            engine.held = asyncio.Event()
            tasks = []

            def ask(text, **body):
                gone = asyncio.Event()
                said = json.dumps({"model": "base", "prompt": "x", **body}).encode()
                bodies = [{"type": "http.request", "body": said, "more_body": False}]

                async def receive():
                    if bodies:
                        return bodies.pop()
                    await gone.wait()
                    return {"type": "http.disconnect"}

                headers = [(b"authorization", f"Bearer {text}".encode())]
                task = asyncio.create_task(
                    answer_of(app, "POST", "/v1/completions", headers, receive)
                )
                tasks.append(task)
                return task, gone

            try:
                await scenario(server, ask, engine)
            finally:
                engine.held.set()
                await asyncio.gather(*tasks, return_exceptions=True)
            tenants = app.state.vllm_jd_tenants
            assert (tenants.door.inside, tenants.door.waiting(), engine.inside) == (0, 0, 0)
            assert not tenants._queued

        server.http.portal.call(run)


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


def test_requests_in_flight_are_bounded(path, file, key):
    text, other = key("a", limits={"requests": 2}), key("b")

    async def scenario(server, ask, engine):
        first = [ask(text) for _ in range(2)]
        await until(lambda: engine.inside == 2)
        status, body = await ask(text)[0]
        error = json.loads(body)["error"]
        assert (status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "requests")
        others, _ = ask(other)
        await until(lambda: engine.inside == 3)
        engine.held.set()
        assert [(await task)[0] for task, _ in first] == [200, 200]
        assert (await others)[0] == (await ask(text)[0])[0] == 200

    held(scenario, path, file)


def test_a_flood_is_refused_beyond_its_queue_and_starves_nobody(path, file, key):
    loud, quiet = key("loud", tenant="l"), key("quiet", tenant="q")
    key_of_the_same = key("louder", tenant="l")

    before = REGISTRY.get_sample_value("vllm_jd:requests_refused_total", {"reason": "queue"}) or 0

    async def scenario(server, ask, engine):
        flood = [ask(loud if i % 2 else key_of_the_same)[0] for i in range(60)]
        await until(lambda: sum(task.done() for task in flood) == 60 - 3 - 10)
        assert {task.result()[0] for task in flood if task.done()} == {429}
        assert engine.inside == 3, "a place is left to others"
        assert REGISTRY.get_sample_value("vllm_jd:door_waiting") == 10
        told = server.http.app.state.vllm_jd_tenants.status()["door"]
        assert told == {
            "inside": 3,
            "waiting": 10,
            "busiest": [{"group": "tenant l", "inside": 3, "waiting": 10}],
        }
        asked, _ = ask(quiet)
        await until(lambda: engine.inside == 4)
        assert not asked.done()
        engine.held.set()
        assert (await asked)[0] == 200
        statuses = [(await task)[0] for task in flood]
        assert statuses.count(200) == 13 and engine.most == 4
        assert REGISTRY.get_sample_value("vllm_jd:door_waiting") == 0
        refused = REGISTRY.get_sample_value("vllm_jd:requests_refused_total", {"reason": "queue"})
        assert refused - before == 47

    held(scenario, path, file, max_queued_requests=10)


def test_without_a_queue_places_are_given_all_the_same(path, file, key):
    text = key("a")

    async def scenario(server, ask, engine):
        asked = [ask(text)[0] for _ in range(9)]
        await until(lambda: sum(task.done() for task in asked) == 5)
        assert engine.inside == 4, "there is nobody else to leave one to"
        engine.held.set()
        assert sorted([(await task)[0] for task in asked]) == [200] * 4 + [429] * 5

    held(scenario, path, file, max_queued_requests=0)


def test_a_request_of_many_sequences_waits_for_each(path, file, key):
    loud, quiet = key("loud"), key("quiet")

    async def scenario(server, ask, engine):
        many, _ = ask(loud, prompt=["x"] * 40)
        await until(lambda: engine.inside == 3)
        several, _ = ask(quiet, n=2)
        await asyncio.sleep(0.05)
        assert engine.inside == 3 and not several.done(), "it needs two places"
        engine.held.set()
        assert (await several)[0] == (await many)[0] == 200
        assert engine.most <= 4

    held(scenario, path, file)


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_goes_away_frees_place_and_work(path, file, key, stream):
    text = key("a")
    key("b")

    async def scenario(server, ask, engine):
        asked = [ask(text, stream=stream) for _ in range(6)]
        await until(lambda: engine.inside == 3)
        door = server.http.app.state.vllm_jd_tenants.door
        assert door.waiting() == 3
        for _, gone in asked:
            gone.set()
        await until(lambda: all(task.done() for task, _ in asked))
        await until(lambda: (engine.inside, engine.aborted, door.waiting()) == (0, 3, 0))
        assert len(engine.salts) == 3, "the engine has not heard of the others"

    held(scenario, path, file)


def test_who_waits_goes_in_before_the_engine_stops(path, file, key):
    text = key("a")
    key("b")

    async def scenario(server, ask, engine):
        asked = [ask(text)[0] for _ in range(9)]
        await until(lambda: engine.inside == 3)
        stop = asyncio.to_thread(engine.shutdown, timeout=7)
        await stop
        assert engine.stopped == 7 and engine.inside == 9
        engine.held.set()
        assert [(await task)[0] for task in asked] == [200] * 9

    held(scenario, path, file)


# ---------------------------------------------------------------- the prefix cache


def test_tenants_share_no_cached_prefixes(path, file, key):
    keys = [key("a1", tenant="a"), key("a2", tenant="a"), key("b", tenant="b"), key("c"), key("d")]
    with guarded(path, file) as server:
        salts = {}
        for text in keys:
            for body in ({}, {"cache_salt": "s"}, {"cache_salt": "tenant a"}):
                assert Client(server, text).ask("base", **body).status_code == 200
                salts.setdefault(text, []).append(server.engine.salts[-1])
        # Nor can one make another's: not with what it sees, not with what it guesses.
        for salt in salts[keys[0]]:
            Client(server, keys[2]).ask("base", cache_salt=salt)
            assert server.engine.salts[-1] not in salts[keys[0]]
    assert salts[keys[0]] == salts[keys[1]], "keys of one tenant share"
    del salts[keys[1]]
    every = [salt for each in salts.values() for salt in each]
    assert None not in every and len(set(every)) == len(every) == 12


# ---------------------------------------------------------------- uploads


def test_the_number_of_a_tenants_adapters_is_bounded(path, file, key, folders):
    text = key("a", tenant="t", rights=["use", "upload"], limits={"adapters": 2})
    other = key("b", tenant="u", rights=["use", "upload"], limits={"adapters": 1})
    with guarded(path, file) as server:
        client = Client(server, text)
        assert client.upload("x", folders[3]).status_code == 201
        blend = {"blend": {"x": 1.0}}
        assert client.put("/v1/adapters/y", json=blend).status_code == 201
        for reply in (client.upload("z", folders[4]), client.put("/v1/adapters/z", json=blend)):
            error = error_of(reply, 403)
            assert "found 2 adapters of 't', expected 2 at most" in error["message"]
        assert client.put("/v1/adapters/x", files=files(folders[4])).status_code == 200
        assert Client(server, other).upload("x", folders[3]).status_code == 201
        assert client.delete("/v1/adapters/y").status_code == 200
        assert client.upload("z", folders[4]).status_code == 201


def test_the_bytes_of_a_tenants_adapters_are_bounded(path, file, key, folders):
    """As they came: what is compressed by now, replaced, deleted and somebody else's."""
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in folders]
    most = sizes[3] + sizes[4]
    text = key("a", tenant="t", rights=["use", "upload"], limits={"bytes": most})
    ops = key("ops", rights=["admin"])
    with guarded(path, file) as server:
        client, admin = Client(server, text), Client(server, ops)
        assert client.upload("x", folders[3]).status_code == 201
        assert client.put("/v1/adapters/y", files=files(folders[4])).status_code == 201
        error = error_of(client.upload("z", folders[5]), 403)
        assert f"{sizes[5]:,} bytes of weights beside {most:,} of 't'" in error["message"]
        assert f"expected {most:,} at most" in error["message"]
        assert error["param"] == "adapter_model"
        assert client.models()[-2:] == ["t/x", "t/y"], "and it is as it was"
        assert admin.upload("u/x", folders[5]).status_code == 201, "others' do not count"
        blend = {"blend": {"x": 0.5, "y": 0.5}}
        assert client.put("/v1/adapters/z", json=blend).status_code == 201, "it has no weights"
        # A new version takes the place of the one before.
        assert client.put("/v1/adapters/y", files=files(folders[4])).status_code == 200
        assert client.delete("/v1/adapters/z").status_code == 200
        assert admin.get("/v1/store").json()["door"] == {"inside": 0, "waiting": 0, "busiest": []}
        # Compressed ones count as they came.
        take_in(path, max_adapter_error=2.0)
        eventually(lambda: admin.get("/v1/store").json()["generation"] == 2)
        assert admin.get("/v1/adapters/t%2Fx").json()["state"] == "compressed"
        assert error_of(client.upload("z", folders[5]), 403) == error
        assert client.delete("/v1/adapters/x").status_code == 200
        assert client.upload("z", folders[3]).status_code == 201


def test_what_lies_on_the_server_is_no_tenants_to_load(path, file, key, folders, tmp_path):
    text, admin = key("a", tenant="t", rights=["use", "upload"]), key("ops", rights=["admin"])
    with guarded(path, file, adapter_roots=[str(folders[3].parent)]) as server:
        body = {"name": "x", "source": str(folders[3])}
        error = error_of(Client(server, text).post("/v1/adapters", json=body), 403)
        assert "upload files only" in error["message"] and error["param"] == "source"
        absent = body | {"source": str(tmp_path / "none")}
        again = error_of(Client(server, text).post("/v1/adapters", json=absent), 403)
        assert again == error, "and it is not told what is there"
        assert Client(server, admin).post("/v1/adapters", json=body).status_code == 201


def test_a_key_file_that_is_broken_at_the_start_is_told(path, file):
    file.write_text("{")
    with pytest.raises(ValueError, match=r"keys\.json"), guarded(path, file):
        pass


def test_plugins_that_resolve_names_for_everybody_are_refused(path, file, key, monkeypatch):
    key("a")
    from vllm.entrypoints.openai.models import serving as stock

    registry = stock.LoRAResolverRegistry
    monkeypatch.setattr(registry, "get_supported_resolvers", lambda: {"x"})
    monkeypatch.setattr(registry, "get_resolver", lambda name: object())
    with pytest.raises(ValueError, match="knows no keys"), guarded(path, file):
        pass
