"""Blends that have names: durable, listed, and of what their parts stand for now."""

import json

import pytest

pytest.importorskip("vllm")

from tests.serve.fleet.conftest import serving
from tests.serve.fleet.test_live import error_of, eventually
from vllm_jd.plugin.api.blend_requests import parse_blend_path
from vllm_jd.plugin.api.requests import split_upload_path, store_path
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.fleet import Blended, blended, change_fleet, read_fleet

A, B, C = (f"adapter-{i:03d}" for i in range(3))


@pytest.fixture
def server(path):
    with serving(path, max_blend=3) as server:
        yield server


def put(server, name, blend, **how):
    return server.http.put(f"/v1/adapters/{name}", json={"blend": blend, **how})


def parts(server, name):
    """Name of each part → (its path, its weight), as requests have them."""
    found = parse_blend_path(server.path(name))
    return {part.name: (part.path, part.weight) for part in found.parts}


def test_a_blend_is_listed_and_is_there_after_a_start(path, tree):
    with serving(path, max_blend=3) as server:
        reply = put(server, "ab", {A: 0.7, B: -0.3})
        assert reply.status_code == 201, reply.text
        store = store_path(path, 1)
        assert parts(server, "ab") == {A: (store, 0.7), B: (store, -0.3)}
        entry = server.entry("ab")
        assert entry == reply.json() | {"last_used": entry["last_used"]}
        assert entry["state"] == "blend" and entry["blend"] == {"weights": {A: 0.7, B: -0.3}}
        assert server.names() == [A, B, C, "ab"]
        assert server.http.get("/v1/store").json()["blends"] == 1
        assert put(server, "ab", {A: 1.0}).status_code == 200
        assert server.engine.loaded == {}, "it is nothing to load"
    with serving(path, max_blend=3) as server:
        assert parts(server, "ab") == {A: (store, 1.0)}
        assert server.http.get("/v1/models/ab").status_code == 200
    assert read_fleet(path).entries["ab"].blend == of_mapping({A: 1.0})


def test_a_way_is_kept(server, path):
    how = {"way": "dare_ties", "density": 0.5, "seed": 3}
    assert put(server, "ab", {A: 1, B: 1}, **how).status_code == 201
    assert parse_blend_path(server.path("ab")).blend == of_mapping({A: 1, B: 1}, **how)
    assert server.entry("ab")["blend"] == {"weights": {A: 1.0, B: 1.0}, **how}


def test_post_is_for_new_names(server):
    body = {"name": "ab", "blend": {A: 0.5}}
    assert server.http.post("/v1/adapters", json=body).status_code == 201
    error_of(server.http.post("/v1/adapters", json=body), 409)


def test_it_follows_its_parts(server, folders):
    put(server, "ab", {A: 0.7, B: 0.3})
    put(server, "abc", {"ab": 2.0, C: 1.0})
    assert {name: w for name, (_, w) in parts(server, "abc").items()} == {A: 1.4, B: 0.6, C: 1.0}
    assert server.put(B, folders[4]).status_code == 200
    for name in ("ab", "abc"):
        path, _ = parts(server, name)[B]
        assert split_upload_path(path)[0] == server.entry(B)["sha256"]
    assert put(server, "ab", {A: 1.0}).status_code == 200
    assert parts(server, "abc").keys() == {A, C}


def test_one_whose_part_is_deleted_says_so_until_it_is_back(path, folders):
    with serving(path, max_blend=3) as server:
        put(server, "ab", {A: 0.7, B: 0.3})
        put(server, "x", {"ab": 1.0})
        assert server.http.delete(f"/v1/adapters/{B}").status_code == 200
        for name in ("ab", "x"):
            entry = server.entry(name)
            assert entry["state"] == "broken" and B in entry["fault"]
            assert name not in server.models.lora_requests
        assert server.names() == [A, C, "ab", "x"]
        assert B in error_of(server.http.post("/v1/adapters/ab/pin"), 409)["message"]
    with serving(path, max_blend=3) as server:
        assert server.entry("ab")["state"] == "broken"
        assert server.upload(B, folders[1]).status_code == 201
        assert server.entry("ab")["state"] == server.entry("x")["state"] == "blend"
        assert B in parts(server, "x")


def test_it_is_deleted(path):
    with serving(path, max_blend=3) as server:
        put(server, "ab", {A: 0.7, B: 0.3})
        server.http.delete(f"/v1/adapters/{B}")
        put(server, "y", {A: 1.0})
        for name in ("ab", "y"):
            assert server.http.delete(f"/v1/adapters/{name}").status_code == 200
            error_of(server.http.get(f"/v1/adapters/{name}"), 404)
            assert name not in server.models.lora_requests
    with serving(path, max_blend=3) as server:
        assert server.names() == [A, C]


def test_a_name_may_come_to_stand_for_an_upload_and_back(server, folders):
    put(server, "ab", {A: 0.7, B: 0.3})
    put(server, "x", {"ab": 2.0})
    assert server.put("ab", folders[5]).status_code == 200
    assert server.entry("ab")["state"] == "uploaded"
    assert parts(server, "x") == {"ab": (server.path("ab"), 2.0)}
    assert put(server, "ab", {C: 1.0}).status_code == 200
    assert server.entry("ab")["state"] == "blend" and parts(server, "x").keys() == {C}
    assert put(server, C, {A: 1.0}).status_code == 200, "one of the store's own"
    assert parts(server, "x").keys() == {A}


def test_a_pinned_one_is_pinned_anew_when_it_changes(server, folders):
    put(server, "ab", {A: 0.7, B: 0.3})
    assert server.http.post("/v1/adapters/ab/pin").json()["pinned"]
    (first,) = server.engine.pinned
    assert server.put(B, folders[4]).status_code == 200
    eventually(lambda: server.engine.pinned and first not in server.engine.pinned)
    assert server.engine.loaded[next(iter(server.engine.pinned))].lora_path == server.path("ab")
    assert server.http.post("/v1/adapters/ab/unpin").status_code == 200
    eventually(lambda: not server.engine.pinned)


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        ({"blend": {"nobody": 1.0}}, 404, "'nobody', which does not exist"),
        ({"blend": {"new": 1.0}}, 400, "'new' → 'new'"),
        ({"blend": {"base": 1.0}}, 400, "base model"),
        ({"blend": {"x": 1.0}}, 400, "part of itself"),
        ({"blend": {}}, 400, "no parts"),
        ({"blend": {A: 1e6}}, 400, "at most 100"),
        ({"blend": {A: "1"}}, 400, "number"),
        ({"blend": {A: 1.0}, "way": "sum"}, 400, "way"),
        ({"blend": {A: 1.0}, "density": 0.5}, 400, "drops nothing"),
        ({"blend": {A: 1.0, B: 1.0, C: 1.0, "y": 1.0}}, 400, "4 parts, expected 3"),
        ({"blend": {A: 1.0}, "source": "/x"}, 400, "either a source or a blend"),
        ({}, 400, "either a source or a blend"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(server, path, folders, body, status, match):
    put(server, "x", {A: 1.0})
    assert server.upload("y", folders[3]).status_code == 201
    if match == "part of itself":
        put(server, "z", {"x": 1.0})
        body = {"blend": {"z": 1.0}}
    name = "new" if match in ("'new' → 'new'", "no parts") else "x"
    before = read_fleet(path)
    error = error_of(server.http.put(f"/v1/adapters/{name}", json=body), status)
    assert match in error["message"]
    assert read_fleet(path) == before and parts(server, "x") == {A: (store_path(path, 1), 1.0)}


def test_nan_is_no_weight(server):
    text = json.dumps({"blend": {A: float("nan")}})
    headers = {"content-type": "application/json"}
    reply = server.http.put("/v1/adapters/x", content=text, headers=headers)
    assert "nan" in error_of(reply, 400)["message"].lower()


def test_what_another_process_gives_is_taken_over(server, path):
    def change(entries):
        entries["ab"] = blended(of_mapping({A: 0.5, B: 0.5}))
        entries["bad"] = blended(of_mapping({"nobody": 0.5}))

    change_fleet(path, change)
    eventually(lambda: "ab" in server.models.lora_requests)
    assert parts(server, "ab").keys() == {A, B}
    assert server.entry("bad")["state"] == "broken"
    change_fleet(path, lambda entries: entries.clear())
    eventually(lambda: "ab" not in server.models.lora_requests)
    assert server.names() == [A, B, C]


def test_the_overlay_says_it(small_store, path):
    fleet = change_fleet(path, lambda entries: entries.update(ab=blended(of_mapping({A: 0.5}))))
    assert fleet.meaning("ab", small_store) == Blended(of_mapping({A: 0.5}))
    assert fleet.settled([small_store]) == fleet.entries, "it is said nowhere else"
