"""Adapters that come, change and go over HTTP: what names stand for, now and after a start."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.models.protocol import LoRAModulePath

from tests.serve.fleet.conftest import files, serving
from vllm_jd.plugin.api.requests import split_upload_path, store_path
from vllm_jd.serve.fleet import watched
from vllm_jd.store.fleet import DELETED, change_fleet, read_fleet, uploaded
from vllm_jd.store.uploads import Incoming, Keeper, Writer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def digest_of(folder):
    return hashlib.sha256(
        (folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes()
    ).hexdigest()


def error_of(reply, status):
    """The error object of an answer of that status."""
    assert reply.status_code == status, reply.text
    (error,) = reply.json().values()
    assert error["code"] == status
    return error


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def left(path):
    """Folders of uploads on a store's disk, those that are coming in among them."""
    return [*path.glob("uploads/*"), *path.glob("incoming/*/*")]


def read_only(*args):
    raise OSError(30, "Read-only file system")


@pytest.fixture
def server(path):
    with serving(path) as server:
        yield server


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize(
    "name", ["new", "../../etc/passwd", "org/name@main", "ü 雪", "a/pin", "a?b#c"]
)
def test_an_upload_is_served_and_is_there_after_a_start(path, folders, tree, name):
    quoted = quote(name, safe="")
    with serving(path) as server:
        reply = server.upload(name, folders[3])
        assert reply.status_code == 201, reply.text
        entry = reply.json()
        digest = digest_of(folders[3])
        assert entry["id"] == name
        assert (entry["state"], entry["sha256"], entry["error"]) == ("uploaded", digest, 0)
        assert entry["bytes"] == (folders[3] / WEIGHTS).stat().st_size
        assert server.engine.serves() == {digest}
        where = split_upload_path(server.path(name))
        assert where == (digest, str(path / "uploads" / digest))
        assert name in [card["id"] for card in server.http.get("/v1/models").json()["data"]]
        assert name in server.names()
        assert server.entry(quoted) == entry
    assert tree(path / "uploads") == {
        f"{digest}/{file}": (folders[3] / file).read_bytes() for file in (CONFIG, WEIGHTS)
    }
    with serving(path) as server:
        assert split_upload_path(server.path(name)) == where
        assert server.entry(quoted)["sha256"] == digest
        assert server.http.delete(f"/v1/adapters/{quoted}").json()["deleted"] is True
        assert error_of(server.http.get(f"/v1/adapters/{quoted}"), 404)["param"] == "name"
        assert name not in server.models.lora_requests
        assert server.http.delete(f"/v1/adapters/{quoted}").status_code == 404
    with serving(path) as server:
        assert name not in server.models.lora_requests
        eventually(lambda: left(path) == [])


def test_a_name_that_is_taken_is_refused(path, folders):
    modules = [LoRAModulePath("plain", str(folders[5]))]
    with serving(path, modules=modules) as server:
        assert server.upload("x", folders[3]).status_code == 201
        before = (path / "fleet.json").read_bytes()
        for name in ("x", folders[0].name, "base", "plain"):
            error = error_of(server.upload(name, folders[4]), 409)
            assert (error["type"], error["param"]) == ("ConflictError", "name")
            assert repr(name) in error["message"]
        for name in ("base", "plain"):
            assert server.put(name, folders[4]).status_code == 409
            assert server.http.delete(f"/v1/adapters/{name}").status_code == 409
        assert (path / "fleet.json").read_bytes() == before
        assert split_upload_path(server.path("x"))[0] == digest_of(folders[3])


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a" * 513])
def test_what_is_no_name_is_refused(server, folders, name, path):
    error = error_of(server.upload(name, folders[3]), 400)
    assert error["param"] == "name" and "found" in error["message"]
    assert left(path) == []


def bad_config(text):
    return lambda folder: (folder / CONFIG).write_text(text)


def changed_config(**fields):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return change


def truncated(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])


def with_nan(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    (folder / WEIGHTS).write_bytes(data)


BAD = [
    (bad_config("{"), "cannot be read as JSON"),
    (bad_config("[" * 100_000), "adapter_config"),
    (changed_config(r=9), "rank"),
    (changed_config(use_dora=True), "use_dora"),
    (changed_config(base_model_name_or_path="org/another"), "another.*expected.*tiny-llama"),
    (truncated, "truncated"),
    (with_nan, "NaN"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    server, folders, tmp_path, path, spoil, said
):
    folder = shutil.copytree(folders[3], tmp_path / "spoilt")
    spoil(folder)
    message = error_of(server.upload("x", folder), 400)["message"]
    assert re.search(said, message), message
    assert "Traceback" not in message and str(path) not in message
    assert "x" not in server.models.lora_requests and server.engine.loaded == {}
    assert left(path) == []
    assert not (path / "fleet.json").exists()


def test_what_the_engine_refuses_leaves_nothing(server, folders, path):
    server.engine.fault = "adapter 'x' cannot be served: found rank 32, expected 16 at most"
    error = error_of(server.upload("x", folders[3]), 400)
    assert error["message"] == "adapter 'x' cannot be served: found rank 32, expected 16 at most"
    assert "x" not in server.models.lora_requests
    assert not (path / "fleet.json").exists()
    eventually(lambda: left(path) == [])
    assert server.upload("x", folders[3]).status_code == 201


def test_what_cannot_be_written_is_not_acknowledged(server, folders, path, monkeypatch):
    assert server.upload("x", folders[3]).status_code == 201
    before = (path / "fleet.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("vllm_jd.store.fleet.replace_text", full)
        for reply in (
            server.upload("y", folders[4]),
            server.put("x", folders[4]),
            server.http.delete("/v1/adapters/x"),
            server.http.post("/v1/adapters/x/pin"),
        ):
            error = error_of(reply, 507)
            assert (
                "No space left" in error["message"] and error["type"] == "InsufficientStorageError"
            )
    assert (path / "fleet.json").read_bytes() == before
    assert "y" not in server.models.lora_requests
    assert split_upload_path(server.path("x"))[0] == digest_of(folders[3])
    assert server.engine.serves() == {digest_of(folders[3])} and server.engine.pinned == set()
    assert server.upload("y", folders[4]).status_code == 201


def test_an_upload_is_on_disk_before_it_is_acknowledged(server, folders, path, monkeypatch):
    """Files, their folder, the folder that names it, fleet.json and its folder: flushed in that
    order, and all of it before the answer."""
    done = []
    real = os.fsync

    def fsync(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    eventually(lambda: server.live.keeps_house)
    server.upload("y", folders[4])  # which makes the folder
    monkeypatch.setattr(os, "fsync", fsync)
    server.upload("x", folders[3])
    short = [str(each).replace(str(path), "") for each in done]
    incoming = short[0].rsplit("/", 1)[0]
    assert incoming.startswith("/incoming/")
    assert short == [
        f"{incoming}/{CONFIG}",
        f"{incoming}/{WEIGHTS}",
        incoming,
        "/uploads",
        "/.fleet.json.tmp",
        "",
    ]


# ---------------------------------------------------------------- versions


def test_another_version_takes_the_name_and_the_old_one_drains(server, folders, path):
    name = "x"
    server.upload(name, folders[3])
    old = server.models.lora_requests[name]
    reply = server.put(name, folders[4])
    assert reply.status_code == 200
    new = server.models.lora_requests[name]
    assert new.lora_int_id != old.lora_int_id
    assert split_upload_path(new.lora_path)[0] == digest_of(folders[4])
    assert server.engine.serves() == {digest_of(folders[3]), digest_of(folders[4])}
    assert server.engine.removed == []
    eventually(lambda: server.engine.removed == [old.lora_int_id])
    eventually(
        lambda: [each.name for each in (path / "uploads").iterdir()] == [digest_of(folders[4])]
    )
    assert server.put("y", folders[5]).status_code == 201, "PUT of a new name is an upload"
    assert server.put(name, folders[4]).status_code == 200, "the same once more"
    assert server.models.lora_requests[name] is new


def test_files_stay_while_requests_use_them(server, folders, path):
    server.upload("x", folders[3])
    server.engine.told["_"] = (True, True, 1, None)  # the engine has it in use
    server.http.delete("/v1/adapters/x")
    eventually(lambda: len(server.engine.removed) == 1)
    time.sleep(0.8)
    assert [each.name for each in (path / "uploads").iterdir()] == [digest_of(folders[3])]
    del server.engine.told["_"]
    eventually(lambda: left(path) == [])


def test_an_adapter_of_the_store_can_be_replaced_and_brought_back(path, folders):
    name = folders[0].name
    with serving(path) as server:
        compressed = server.path(name)
        assert compressed == store_path(path, 1)
        assert server.entry(name)["state"] == "compressed"
        assert server.put(name, folders[4]).status_code == 200
        assert server.entry(name)["state"] == "uploaded"
        assert server.names()[0] == name, "it keeps its place"
        # What the store holds of it is what is put: served from the store.
        assert server.put(name, folders[0]).status_code == 200
        assert server.path(name) == compressed
        assert server.http.delete(f"/v1/adapters/{name}").status_code == 200
        assert name not in server.names()
    with serving(path) as server:
        assert name not in server.names()
        assert server.upload(name, folders[0]).status_code == 201
        assert server.path(name) == compressed


# ---------------------------------------------------------------- listing


def test_pages_cover_everything_once_with_one_call_to_the_engine_each(server, folders):
    for name in ("z", "m", "a"):
        server.upload(name, folders[3])
    expected = [folder.name for folder in folders[:3]] + ["a", "m", "z"]
    assert server.names() == expected
    server.engine.told["m"] = (True, False, 7, 1234.5)
    server.engine.asked = 0
    page = server.http.get("/v1/adapters").json()
    assert server.engine.asked == 1
    assert [entry["id"] for entry in page["data"]] == expected
    assert (page["first_id"], page["last_id"], page["has_more"]) == (expected[0], "z", False)
    entry = page["data"][4]
    assert (entry["resident"], entry["references"], entry["last_used"]) == (False, 7, 1234.5)
    assert page["data"][0]["clusters"] == [0] and 0 < page["data"][0]["error"] < 1
    assert page["data"][0]["sha256"] == digest_of(folders[0])
    for query in ("after=nobody", "limit=0", "limit=x", "limit=1001"):
        reply = server.http.get(f"/v1/adapters?{query}")
        assert reply.status_code in (400, 404)
        assert "message" in reply.json()["error"]
    store = server.http.get("/v1/store").json()
    assert (store["generation"], store["adapters"], store["uploads"]) == (1, 6, 3)
    eventually(lambda: server.live.keeps_house)
    store = server.http.get("/v1/store").json()
    assert store["writable"] is True and str(os.getpid()) in store["keeper"]


# ---------------------------------------------------------------- pins


def test_a_pin_holds_until_it_is_undone_whatever_is_started_or_replaced(path, folders):
    name = folders[0].name
    with serving(path) as server:
        server.upload("x", folders[3])
        for each in ("x", name):
            reply = server.http.post(f"/v1/adapters/{each}/pin")
            assert reply.status_code == 200 and reply.json()["pinned"] is True
        assert len(server.engine.pinned) == 2
        server.put("x", folders[4])
        now = {server.models.lora_requests[each].lora_int_id for each in ("x", name)}
        eventually(lambda: server.engine.pinned == now)
    with serving(path) as server:
        eventually(lambda: len(server.engine.pinned) == 2)
        before = server.path("x")
        reply = server.http.post("/v1/adapters/x/unpin")
        assert reply.status_code == 200 and reply.json()["pinned"] is False
        assert len(server.engine.pinned) == 1
        assert server.path("x") == before and digest_of(folders[4]) in server.engine.serves()
        assert server.http.post("/v1/adapters/nobody/pin").status_code == 404
    with serving(path) as server:
        eventually(lambda: len(server.engine.pinned) == 1)
        time.sleep(0.1)
        assert len(server.engine.pinned) == 1


def test_a_pin_without_room_is_refused_and_not_kept(server, folders, path):
    server.upload("x", folders[3])
    server.engine.slots = 0
    error = error_of(server.http.post("/v1/adapters/x/pin"), 409)
    assert "all slots are held" in error["message"]
    assert not read_fleet(path).entries["x"].pinned


# ---------------------------------------------------------------- who may change it


def test_without_leave_nothing_changes_but_everything_is_told(path, folders, monkeypatch):
    with serving(path) as server:
        server.upload("x", folders[3])
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    with serving(path) as server:
        for reply in (
            server.upload("y", folders[4]),
            server.put("x", folders[4]),
            server.http.delete("/v1/adapters/x"),
            server.http.post("/v1/adapters/x/pin"),
            server.http.post("/v1/adapters", json={"name": "y", "source": str(folders[4])}),
        ):
            assert "--adapter-root" in error_of(reply, 403)["message"]
        assert server.entry("x")["sha256"] == digest_of(folders[3])
        assert server.http.get("/v1/store").json()["writable"] is False
        Keeper(path).close()  # nobody else does


def test_a_store_that_cannot_be_written_is_served_and_says_so(path, folders, monkeypatch):
    monkeypatch.setattr("vllm_jd.store.uploads.fsync", read_only)
    with serving(path) as server:
        error = error_of(server.upload("x", folders[3]), 503)
        assert "Read-only file system" in error["message"]
        assert len(server.names()) == 3


def test_a_fleet_that_is_damaged_meanwhile_changes_nothing_and_is_told(server, path, folders):
    assert server.upload("x", folders[3]).status_code == 201
    good = (path / "fleet.json").read_bytes()
    (path / "fleet.json").write_text("{")
    assert "fleet.json" in error_of(server.upload("y", folders[4]), 503)["message"]
    assert "fleet.json" in error_of(server.http.delete("/v1/adapters/x"), 503)["message"]
    assert server.entry("x")["sha256"] == digest_of(folders[3])
    (path / "fleet.json").write_bytes(good)
    assert server.upload("y", folders[4]).status_code == 201


def test_a_damaged_fleet_ends_the_start(path):
    from vllm_jd.store import StoreError

    (path / "fleet.json").write_text("{")
    with pytest.raises(StoreError, match=r"fleet\.json"), serving(path):
        pass


def test_a_name_of_the_fleet_that_is_a_modules_ends_the_start(path, folders):
    change_fleet(path, lambda entries: entries.update(x=uploaded("a" * 64)))
    modules = [LoRAModulePath("x", str(folders[5]))]
    with pytest.raises(ValueError, match=r"used twice.*'x'"), serving(path, modules=modules):
        pass


def test_a_name_that_was_deleted_is_free_for_a_module(path, folders):
    name = folders[0].name
    change_fleet(path, lambda entries: entries.update({name: DELETED}))
    with serving(path, modules=[LoRAModulePath(name, str(folders[5]))]) as server:
        assert split_upload_path(server.path(name))[1] == str(folders[5])
        assert server.names() == [folder.name for folder in folders[1:3]]
        assert server.http.delete(f"/v1/adapters/{name}").status_code == 409


def test_a_start_clears_away_what_a_killed_server_left(path, folders):
    writer, coming = Writer(path), Incoming(path)
    for name in ("kept", "lost"):
        incoming = coming.folder()
        (incoming / CONFIG).write_text(name)
        (incoming / WEIGHTS).write_text(name)
        digest = writer.accept(incoming)
        if name == "kept":
            change_fleet(path, lambda entries, d=digest: entries.update(kept=uploaded(d)))
            kept = digest
    (coming.folder() / CONFIG).write_text("half")
    writer.close()
    with serving(path) as server:
        eventually(lambda: [each.name for each in (path / "uploads").iterdir()] == [kept])
        time.sleep(0.1)
        assert len([*(path / "incoming").glob("*/*")]) == 1, "its process lives"
        os.close(coming._lock)  # as when it is killed
        eventually(lambda: not [*(path / "incoming").iterdir()])
        assert server.upload("x", folders[3]).status_code == 201


# ---------------------------------------------------------------- from where


def test_a_source_is_taken_from_where_it_may_be(path, folders, tmp_path):
    root = folders[0].parent
    outside = shutil.copytree(folders[4], tmp_path / "outside")
    with serving(path, adapter_roots=[str(root)]) as server:
        reply = server.http.post("/v1/adapters", json={"name": "x", "source": str(folders[3])})
        assert reply.status_code == 201
        assert reply.json()["source"] == str(folders[3])
        assert split_upload_path(server.path("x"))[0] == digest_of(folders[3])
        for source in (str(outside), "/etc", "s3://bucket/x", "hf://org/name", "org/name"):
            reply = server.http.post("/v1/adapters", json={"name": "y", "source": source})
            error = error_of(reply, 403)
            assert (error["param"], error["type"]) == ("source", "PermissionDeniedError")
            assert source in error["message"] and str(root) in error["message"]
        missing = server.http.post("/v1/adapters", json={"name": "y", "source": str(root / "no")})
        assert error_of(missing, 404)["param"] == "source"
        reply = server.http.put("/v1/adapters/x", json={"source": str(folders[4])})
        assert (reply.status_code, reply.json()["source"]) == (200, str(folders[4]))


BODIES = [
    ("{", "the body"),
    ("[]", "the body"),
    ('{"name": "x"}', "source"),
    ('{"name": 7, "source": "/x"}', "name"),
    ('{"name": "x", "source": "/x", "more": 1}', "more"),
    ('{"name": "x", "source": "/\\u0000x"}', "source"),
]


@pytest.mark.parametrize(("body", "said"), BODIES)
def test_a_json_body_of_another_form_is_refused(server, body, said):
    headers = {"content-type": "application/json; charset=utf-8"}
    error = error_of(server.http.post("/v1/adapters", content=body, headers=headers), 400)
    assert said in error["message"]


def test_other_content_is_refused(server, path):
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        reply = server.http.post("/v1/adapters", content=b"x", headers={"content-type": kind})
        assert "multipart/form-data" in error_of(reply, 415)["message"]
    huge = b'{"name": "' + b"x" * 70_000
    reply = server.http.post(
        "/v1/adapters", content=huge, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413


def test_weights_larger_than_allowed_are_refused(path, folders):
    size = (folders[3] / WEIGHTS).stat().st_size
    with serving(path, adapter_roots=["/"], max_adapter_bytes=size - 1) as server:
        for reply in (
            server.upload("x", folders[3]),
            server.http.post("/v1/adapters", json={"name": "x", "source": str(folders[3])}),
        ):
            error = error_of(reply, 413)
            assert f"{size - 1:,} bytes" in error["message"]
            assert "--max-adapter-size" in error["message"]
        assert left(path) == []
    with serving(path, max_adapter_bytes=size) as server:
        assert server.upload("x", folders[3]).status_code == 201


def test_an_upload_that_breaks_off_leaves_nothing(server, folders, path):
    whole = httpx.Request("POST", "http://x/", data={"name": "x"}, files=files(folders[3]))
    body = whole.read()
    for size in (0, 10, len(body) // 2, len(body) - 3):
        reply = server.http.post(
            "/v1/adapters",
            content=body[:size],
            headers={"content-type": whole.headers["content-type"]},
        )
        assert "found" in error_of(reply, 400)["message"]
    assert left(path) == []
    assert "x" not in server.models.lora_requests


# ---------------------------------------------------------------- vLLM's own routes


def test_what_vllms_own_route_loads_is_there_after_a_start(path, folders, tmp_path):
    root = str(folders[0].parent)

    def load(server, name, folder, **options):
        body = {"lora_name": name, "lora_path": str(folder), **options}
        return server.http.post("/v1/load_lora_adapter", json=body)

    with serving(path, adapter_roots=[root]) as server:
        assert load(server, "x", folders[3]).status_code == 200
        assert load(server, "x", folders[4]).status_code == 400, "it is loaded already"
        assert load(server, "x", folders[4], load_inplace=True).status_code == 200
        assert load(server, "y", folders[5]).status_code == 200
        error = error_of(load(server, "z", tmp_path), 403)
        assert error["param"] == "lora_path"
        assert load(server, "z", f"{root}/missing").status_code == 404
        server.engine.fault = "adapter 'z' cannot be served: found rank 32"
        assert "found rank 32" in error_of(load(server, "z", folders[6]), 400)["message"]
        unload = {"lora_name": "y"}
        assert server.http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
        assert server.http.post("/v1/unload_lora_adapter", json=unload).status_code == 404
    with serving(path) as server:
        assert split_upload_path(server.path("x"))[0] == digest_of(folders[4])
        assert server.entry("x")["source"] == str(folders[4])
        assert server.names() == [*(folder.name for folder in folders[:3]), "x"]


def test_weights_that_a_store_does_not_take_are_loaded_as_vllm_does(path, folders, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(folders[3] / CONFIG, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with serving(path, adapter_roots=[str(tmp_path)]) as server:
        body = {"lora_name": "x", "lora_path": str(folder)}
        assert server.http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert split_upload_path(server.path("x"))[1] == str(folder)
        assert server.http.get("/v1/adapters/x").status_code == 409, "none of the fleet's"
        reply = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
        assert reply.status_code == 200
        assert "x" not in server.models.lora_requests


# ---------------------------------------------------------------- a watched folder


def test_a_folder_is_followed(path, folders, tmp_path):
    watched = tmp_path / "watched"
    watched.mkdir()
    shutil.copytree(folders[3], watched / "x")
    (watched / "readme").write_text("no adapter")
    bad = shutil.copytree(folders[5], watched / "bad")
    truncated(bad)
    config = {"adapter_dir": str(watched)}

    def digests(server):
        return {
            name: split_upload_path(request.lora_path)[0]
            for name, request in server.models.lora_requests.items()
        }

    with serving(path, **config) as server:
        eventually(lambda: digests(server).get("x") == digest_of(folders[3]))
        shutil.copytree(folders[4], watched / "y")
        eventually(lambda: digests(server).get("y") == digest_of(folders[4]))
        shutil.copy(folders[6] / WEIGHTS, watched / "x" / WEIGHTS)
        eventually(lambda: digests(server).get("x") == digest_of(watched / "x"))
        for reply in (
            server.put("x", folders[5]),
            server.http.delete("/v1/adapters/x"),
            server.upload("x", folders[5]),
        ):
            assert str(watched) in error_of(reply, 409)["message"]
        assert "bad" not in server.models.lora_requests
        shutil.copy(folders[5] / WEIGHTS, bad / WEIGHTS)
        eventually(lambda: digests(server).get("bad") == digest_of(folders[5]))
        shutil.rmtree(watched / "y")
        eventually(lambda: "y" not in server.models.lora_requests)
    counter = read_fleet(path).counter
    shutil.rmtree(watched / "bad")  # while no server runs
    with serving(path, **config) as server:
        eventually(lambda: "bad" not in server.models.lora_requests)
        time.sleep(0.2)
        assert read_fleet(path).counter == counter + 1, "what has not changed is left alone"
        for each in watched.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        time.sleep(0.3)
        assert "x" in server.models.lora_requests, "an empty folder may be a missing disk"


def test_a_folder_is_followed_where_clients_may_change_nothing(
    path, folders, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    shutil.copytree(folders[3], tmp_path / "watched" / "x")
    with serving(path, adapter_dir=str(tmp_path / "watched")) as server:
        eventually(lambda: "x" in server.models.lora_requests)
        assert server.upload("y", folders[4]).status_code == 403


def test_a_folder_that_cannot_be_followed_is_told_once(path, folders, tmp_path, monkeypatch):
    """What is wrong with the store; where another server follows it there is nothing wrong."""
    said = []
    for level in ("debug", "warning"):
        monkeypatch.setattr(
            watched.logger, level, lambda text, *args, its=level: said.append((its, text % args))
        )
    shutil.copytree(folders[3], tmp_path / "watched" / "x")
    config = {"adapter_dir": str(tmp_path / "watched")}
    with monkeypatch.context() as patched:
        patched.setattr("vllm_jd.store.uploads.Lock", read_only)
        with serving(path, **config):
            eventually(lambda: said)
            time.sleep(0.2)
    ((level, text),) = [each for each in said if "not followed" in each[1]]
    assert level == "warning" and "Read-only file system" in text
    said.clear()
    with serving(path, **config), serving(path, **config):
        eventually(lambda: len([each for each in said if "another server" in each[1]]) > 1)
    assert {level for level, text in said if "not followed" in text} == {"debug"}
