"""A server that follows its store, over HTTP: compressed later, swapped, rolled back."""

import time

import pytest

pytest.importorskip("vllm")

from tests.serve.fleet.conftest import serving
from tests.serve.fleet.test_live import digest_of, error_of, eventually
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.plugin.api.requests import split_upload_path, store_path
from vllm_jd.store import Store, read_current
from vllm_jd.store.generations import revert

NEVER = {"count": None, "age": None}


@pytest.fixture
def server(path):
    with serving(path, recompress=NEVER) as server:
        yield server


def told(server):
    reply = server.http.get("/v1/store")
    assert reply.status_code == 200
    return reply.json()


def serves(server, path, generation):
    eventually(lambda: told(server)["generation"] == generation)
    assert read_current(path)[0] == generation
    assert told(server)["fault"] is None


def test_an_upload_is_compressed_then_and_as_it_came_after_a_rollback(server, path, folders):
    server.upload("new", folders[4])
    digest = digest_of(folders[4])
    assert split_upload_path(server.path("new"))[0] == digest
    recompression = told(server)["recompression"]
    assert time.time() - 60 < recompression.pop("waiting_since") <= time.time()
    assert recompression == {"waiting": 1, "last": None}
    before = server.path(folders[0].name)
    take_in(path, max_adapter_error=2.0)
    serves(server, path, 2)
    assert server.engine.generations == [("open", 2), ("serve", 2)]
    assert server.path("new") == store_path(path, 2)
    assert server.path(folders[0].name) == store_path(path, 2) != before
    entry = server.entry("new")
    assert entry["state"] == "compressed" and entry["error"] > 0 and entry["sha256"] == digest
    assert (told(server)["generations"], told(server)["swaps"]) == ([1, 2], 1)
    assert told(server)["recompression"]["waiting"] == 0

    server.put(folders[0].name, folders[5])
    server.http.delete(f"/v1/adapters/{folders[1].name}")
    reply = server.http.post("/v1/store/rollback")
    assert (reply.status_code, reply.json()["generation"]) == (200, 3)
    assert told(server)["generation"] == 3, "it is served when that returns"
    assert split_upload_path(server.path("new"))[0] == digest
    assert split_upload_path(server.path(folders[0].name))[0] == digest_of(folders[5])
    assert folders[1].name not in server.names()
    assert server.path(folders[2].name) == store_path(path, 3)
    assert server.engine.generations[2:] == [("open", 3), ("serve", 3)]
    reply = server.http.post("/v1/store/rollback", json={"generation": 2})
    assert reply.json()["generation"] == 4
    assert server.path("new") == store_path(path, 4)


def test_what_cannot_be_gone_back_to_is_refused(server, path, monkeypatch):
    error = error_of(server.http.post("/v1/store/rollback"), 409)
    assert "no generation before 1" in error["message"]
    error = error_of(server.http.post("/v1/store/rollback", json={"generation": 7}), 409)
    assert "no generation 7 on disk; found 1" in error["message"]
    error = error_of(server.http.post("/v1/store/rollback", json={"generation": 1}), 409)
    assert "is the live one already" in error["message"]
    for body in ({"generation": 0}, {"generation": "x"}, {"number": 1}):
        error_of(server.http.post("/v1/store/rollback", json=body), 400)
    error_of(server.http.post("/v1/recompress", json={"refit": 7}), 400)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    with serving(path) as closed:
        error_of(closed.http.post("/v1/store/rollback"), 403)
        error_of(closed.http.post("/v1/recompress"), 403)


def test_a_generation_that_the_engine_refuses_is_told_and_the_old_one_served_on(
    server, path, folders
):
    server.upload("new", folders[4])
    server.engine.refusal = "found bases of rank 9, expected 3 at most"
    take_in(path, max_adapter_error=2.0)
    eventually(lambda: told(server)["fault"])
    assert told(server)["fault"].endswith("found bases of rank 9, expected 3 at most")
    assert told(server)["generation"] == 1
    assert split_upload_path(server.path("new"))[0] == digest_of(folders[4])
    error = error_of(server.http.post("/v1/store/rollback"), 409)
    assert "is not served: generation 3 cannot be served" in error["message"]
    server.engine.refusal = None
    assert server.http.post("/v1/store/rollback").json()["generation"] == 4


def test_recompression_on_request_and_by_itself(path, folders):
    """By a real process each time."""
    with serving(path, recompress={"count": 2, "age": None}) as server:
        assert server.http.post("/v1/recompress").status_code == 202
        error = error_of(server.http.post("/v1/recompress"), 409)
        assert "runs already" in error["message"]
        eventually(lambda: (told(server)["recompression"]["last"] or {}).get("state") == "done", 90)
        assert told(server)["generation"] == 1, "there was nothing to do"
        for i in (3, 4):
            assert server.upload(f"new-{i}", folders[i]).status_code == 201

        def over():
            last = told(server)["recompression"]["last"]
            waiting = told(server)["recompression"]["waiting"]
            return last["state"] == "done" and not waiting

        eventually(over, 90)
        last = told(server)["recompression"]["last"]
        assert last["compressed"] + last["kept"] == 2
        with Store.open(path) as store:
            assert store.generation == told(server)["generation"] == last["generation"]


def test_a_second_server_follows_generations_too(server, path, folders):
    with serving(path, recompress=NEVER) as other:
        server.upload("new", folders[4])
        eventually(lambda: "new" in other.names())
        take_in(path, max_adapter_error=2.0)
        for each in (server, other):
            serves(each, path, 2)
            assert each.path("new") == store_path(path, 2)
        assert other.http.post("/v1/store/rollback").json()["generation"] == 3
        revert(path, 1)
        for each in (server, other):
            serves(each, path, 4)
            assert split_upload_path(each.path("new"))[0] == digest_of(folders[4])
