"""Several servers of one store: what one of them is told, all serve."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from tests.serve.fleet.conftest import serving
from tests.serve.fleet.test_life import NEVER, told
from tests.serve.fleet.test_live import digest_of, error_of, eventually, left
from vllm_jd.compressor.change.uploads import take_in
from vllm_jd.plugin.api.requests import split_upload_path, store_path
from vllm_jd.serve.fleet import life, live
from vllm_jd.store.fleet import read_fleet
from vllm_jd.store.uploads import Writer


def test_any_server_of_a_store_changes_it_and_the_others_follow(path, folders):
    with serving(path, max_blend=4) as first, serving(path, max_blend=4) as second:
        assert first.upload("x", folders[3]).status_code == 201
        eventually(lambda: "x" in second.models.lora_requests)
        assert second.path("x") == first.path("x")
        assert second.put("x", folders[4]).status_code == 200
        eventually(lambda: second.path("x") == first.path("x"))
        assert split_upload_path(first.path("x"))[0] == digest_of(folders[4])
        assert first.http.post("/v1/adapters/x/pin").status_code == 200
        eventually(lambda: second.entry("x")["pinned"] and len(second.engine.pinned) == 1)
        body = {"name": "ab", "blend": {"x": 0.5, folders[0].name: 0.5}}
        assert second.http.post("/v1/adapters", json=body).status_code == 201
        eventually(lambda: first.entry("ab").get("state") == "blend")
        assert second.http.delete("/v1/adapters/x").status_code == 200
        eventually(lambda: "x" not in first.models.lora_requests)
        eventually(lambda: first.entry("ab")["state"] == "broken")
        assert first.http.delete("/v1/adapters/ab").status_code == 200


def test_a_server_that_has_not_looked_yet_refuses_what_another_has_given(
    path, folders, monkeypatch
):
    monkeypatch.setattr(life, "_FOLLOW_SECONDS", 60)
    with serving(path) as first, serving(path) as second:
        assert first.upload("x", folders[3]).status_code == 201
        assert "x" not in second.models.lora_requests
        assert "PUT" in error_of(second.upload("x", folders[4]), 409)["message"]
        assert read_fleet(path).entries["x"].digest == digest_of(folders[3])
        assert second.upload("y", folders[4]).status_code == 201
        assert "x" in second.models.lora_requests, "it has looked before it changed something"
        assert first.http.delete("/v1/adapters/y").status_code == 200
        assert first.upload("y", folders[5]).status_code == 201
        assert second.put("y", folders[6]).status_code == 200
        assert first.http.post("/v1/adapters/y/pin").json()["sha256"] == digest_of(folders[6])
        assert read_fleet(path).entries.keys() == {"x", "y"}


def test_servers_change_one_store_at_once_and_lose_nothing(path, folders):
    with serving(path) as first, serving(path) as second, ThreadPoolExecutor(8) as pool:
        jobs = [
            (server, f"{number}-{i}", folders[3 + (i + number) % 5])
            for number, server in enumerate((first, second))
            for i in range(12)
        ]
        replies = pool.map(lambda job: job[0].upload(*job[1:]), jobs)
        assert [reply.status_code for reply in replies] == [201] * len(jobs)
        given = {name: digest_of(folder) for _, name, folder in jobs}
        assert {n: e.digest for n, e in read_fleet(path).entries.items()} == given
        for server in (first, second):
            found = server.models.lora_requests
            eventually(lambda found=found: given.keys() <= found.keys())
            for name, digest in given.items():
                assert split_upload_path(server.path(name))[0] == digest
        assert not [*(path / "incoming").glob("*/*")]


def test_another_server_keeps_house_when_the_first_has_ended(path, folders):
    with serving(path) as first:
        eventually(lambda: first.live.keeps_house)
        with serving(path) as second:
            eventually(lambda: second.live.keeper)
            assert not second.live.keeps_house
            assert second.http.get("/v1/store").json()["keeper"] == first.live.keeper
            first.live.close()
            eventually(lambda: second.live.keeps_house)
            second.upload("x", folders[3])
            second.http.delete("/v1/adapters/x")
            eventually(lambda: left(path) == [])


def test_a_change_waits_for_others_but_not_for_ever(path, folders, monkeypatch):
    with serving(path) as server:
        other = Writer(path)
        threading.Timer(0.3, other.close).start()
        assert server.upload("x", folders[3]).status_code == 201
        monkeypatch.setattr(live, "_WAIT", 0.1)
        other = Writer(path)
        error = error_of(server.upload("y", folders[4]), 503)
        assert f"process {os.getpid()}" in error["message"] and "try again" in error["message"]
        other.close()
        assert server.upload("y", folders[4]).status_code == 201


# ---------------------------------------------------------------- generations


def test_generations_are_taken_over_server_by_server_when_asked(path, folders):
    options = {"recompress": NEVER, "follow_generations": False}
    with serving(path, **options) as first, serving(path, **options) as second:
        first.upload("new", folders[4])
        eventually(lambda: "new" in second.models.lora_requests)
        take_in(path, max_adapter_error=2.0)
        first.upload("newer", folders[5])
        eventually(lambda: "newer" in second.models.lora_requests)
        time.sleep(0.1)
        for server in (first, second):
            assert split_upload_path(server.path("new"))[0] == digest_of(folders[4])
            store = told(server)
            assert (store["generation"], store["generations"], store["fault"]) == (1, [1, 2], None)
            assert store["follows_generations"] is False
        for done, server in enumerate((first, second), 1):
            reply = server.http.post("/v1/store/reload")
            assert (reply.status_code, reply.json()["generation"]) == (200, 2)
            assert server.path("new") == store_path(path, 2)
            assert [told(each)["generation"] for each in (first, second)] == [2, done]
            assert server.http.post("/v1/store/reload").json()["generation"] == 2
            assert server.engine.generations == [("open", 2), ("serve", 2)]
        # Who is told to go back serves that, the other when it is asked.
        assert second.http.post("/v1/store/rollback").json()["generation"] == 3
        assert [told(each)["generation"] for each in (first, second)] == [2, 3]


def test_a_generation_that_cannot_be_served_is_told_to_who_asks_for_it(path, folders):
    options = {"recompress": NEVER, "follow_generations": False}
    with serving(path, **options) as server:
        server.upload("new", folders[4])
        take_in(path, max_adapter_error=2.0)
        server.engine.refusal = "found bases of rank 9, expected 3 at most"
        for _ in range(2):
            message = error_of(server.http.post("/v1/store/reload"), 409)["message"]
            assert "rank 9" in message and "generation 1 is served on" in message
        server.engine.refusal = None
        assert server.http.post("/v1/store/reload").json()["generation"] == 2
        assert told(server)["fault"] is None


def test_a_server_that_is_behind_recompresses_nothing(path, folders, monkeypatch):
    started = []

    async def start(self, **options):
        started.append(options)

    monkeypatch.setattr(life.Recompressions, "start", start)
    options = {"recompress": {"count": 1, "age": None}, "follow_generations": False}
    with serving(path, **options) as server:
        server.upload("new", folders[4])
        eventually(lambda: started)
        take_in(path, max_adapter_error=2.0)
        time.sleep(0.1)
        started.clear()
        time.sleep(0.2)
        assert not started, "the upload has been compressed"
        server.http.post("/v1/store/reload")
        server.upload("newer", folders[5])
        eventually(lambda: started)


def test_one_server_recompresses_by_itself(path, folders, monkeypatch):
    started = []

    async def start(self, **options):
        started.append(self)

    monkeypatch.setattr(life.Recompressions, "start", start)
    options = {"recompress": {"count": 1, "age": None}}
    with serving(path, **options) as first, serving(path, **options) as second:
        second.upload("new", folders[4])
        eventually(lambda: len(started) > 3)
        keeper = next(each for each in (first, second) if each.live.keeps_house)
        assert {*started} == {keeper.http.app.state.vllm_jd_life.recompressions}
