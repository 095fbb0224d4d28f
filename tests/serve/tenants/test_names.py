"""What names mean to whom: own name spaces, shared adapters, and what is not there for others."""

import json
from urllib.parse import quote

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.models.protocol import LoRAModulePath

from tests.serve.fleet.conftest import files
from tests.serve.tenants.conftest import Client, GeneratingEngine, guarded
from tests.serve.tenants.test_guard import error_of
from vllm_jd.store.fleet import change_fleet, uploaded

ALL = ["use", "upload"]


@pytest.fixture
def server(path, file, key, small_store):
    """`acme` and `beta` may use the shared adapters but one; `guest` those of a team; `ops` all."""
    shown = small_store.names[:2]
    keys = {
        "acme": key("acme", tenant="acme", rights=ALL, adapters=[*shown, "team/*"]),
        "beta": key("beta", tenant="beta", rights=ALL, adapters=shown),
        "guest": key("guest", adapters=["team/*"]),
        "ops": key("ops", rights=["admin"]),
    }
    with guarded(path, file) as started:
        started.clients = {name: Client(started, text) for name, text in keys.items()}
        yield started


def clients(server, *names):
    return [server.clients[name] for name in names]


def test_two_tenants_give_one_name_and_each_means_its_own(server, folders, small_store):
    acme, beta, ops = clients(server, "acme", "beta", "ops")
    shared, other, hidden = small_store.names
    assert acme.upload("mine", folders[3]).json()["id"] == "acme/mine"
    assert beta.upload("mine", folders[4]).json()["id"] == "beta/mine"
    assert acme.ask("mine").json()["model"] == acme.ask("acme/mine").json()["model"] == "acme/mine"
    assert beta.ask("mine").json()["model"] == "beta/mine"
    assert server.engine.answered == ["acme/mine", "acme/mine", "beta/mine"]
    assert acme.ask(shared).json()["model"] == shared
    assert acme.models() == ["base", shared, other, "acme/mine"]
    assert ops.models() == ["base", shared, other, hidden, "acme/mine", "beta/mine"]
    listed = acme.get("/v1/adapters").json()
    assert [each["id"] for each in listed["data"]] == [shared, other, "acme/mine"]
    assert acme.get("/v1/adapters/mine").json()["id"] == "acme/mine"
    assert acme.get("/v1/models/mine").json()["id"] == "acme/mine"
    # A page goes on after a name, however it is said.
    for url in ("/v1/models", "/v1/adapters"):
        pages = [acme.get(url, params={"limit": 9, "after": a}).json() for a in ("mine", other)]
        assert [[each["id"] for each in page["data"]] for page in pages] == [[], ["acme/mine"]]
    assert acme.put("/v1/adapters/mine", files=files(folders[5])).status_code == 200
    assert acme.delete("/v1/adapters/mine").json() == {
        "id": "acme/mine", "object": "adapter", "deleted": True,
    }  # fmt: skip
    assert beta.ask("mine").json()["model"] == "beta/mine"
    assert ops.models()[-1] == "beta/mine"


def test_a_shared_name_is_not_taken_by_accident(server, folders, small_store):
    acme, ops = clients(server, "acme", "ops")
    shared, _, hidden = small_store.names
    for reply in (
        acme.upload(shared, folders[3]),
        acme.put(f"/v1/adapters/{shared}", files=files(folders[3])),
        acme.put(f"/v1/adapters/{shared}", json={"blend": {shared: 1.0}}),
        acme.upload("base", folders[3]),
    ):
        message = error_of(reply, 409)["message"]
        assert "not yours to change; choose another name, or 'acme/" in message
    error = error_of(acme.delete(f"/v1/adapters/{shared}"), 403)
    assert "none of the adapters of 'acme'" in error["message"]
    # One that it cannot see is in nobody's way.
    assert acme.upload(hidden, folders[3]).json()["id"] == f"acme/{hidden}"
    assert acme.ask(hidden).json()["model"] == f"acme/{hidden}"
    assert ops.ask(hidden).json()["model"] == hidden
    # On purpose it may be.
    assert acme.upload(f"acme/{shared}", folders[3]).status_code == 201
    assert acme.ask(shared).json()["model"] == f"acme/{shared}"
    assert acme.models()[1] == shared, "a listing has both, each as itself"
    assert acme.get("/v1/models").json()["data"][1]["root"] == acme.server.path(shared)
    assert acme.upload("acme/base", folders[3]).status_code == 201
    assert acme.ask("base").json()["model"] == "base", "which is the base model to everybody"
    assert acme.ask("acme/base").json()["model"] == "acme/base"


def calls(client, name):
    """Everything that may be asked of a name."""
    quoted = quote(name, safe="")
    part = {"adapters": [{"name": name, "weight": 1.0}]}
    yield client.ask(name)
    yield client.ask(name, stream=True)
    yield client.ask("base", **part)
    yield client.ask(name, **part)
    yield client.get(f"/v1/models/{quoted}")
    yield client.get("/v1/models", params={"after": name})
    yield client.get(f"/v1/adapters/{quoted}")
    yield client.get("/v1/adapters", params={"after": name})
    yield client.delete(f"/v1/adapters/{quoted}")
    yield client.put("/v1/adapters/ours", json={"blend": {name: 1.0}})
    yield client.post("/v1/adapters", json={"name": "ours", "blend": {name: 1.0}})
    yield client.post(f"/v1/adapters/{quoted}/pin")
    yield client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_anothers_adapter_cannot_be_told_from_one_that_is_not_there(server, folders, small_store):
    acme, beta, guest, ops = clients(server, "acme", "beta", "guest", "ops")
    assert beta.upload("there", folders[3]).status_code == 201
    assert beta.put("/v1/adapters/blend", json={"blend": {"there": 1.0}}).status_code == 201
    assert beta.upload("gone", folders[4]).status_code == 201
    assert beta.put("/v1/adapters/fault", json={"blend": {"gone": 1.0}}).status_code == 201
    assert beta.delete("/v1/adapters/gone").status_code == 200
    assert beta.ask("fault").json()["error"]["message"].startswith("The blend `fault` cannot be")
    assert ops.post("/v1/adapters/beta%2Fthere/pin").status_code == 200
    hidden = small_store.names[2]
    for client in (acme, guest):
        for there in ("beta/there", "beta/blend", "beta/fault", hidden):
            absent = there[:-1] + "~"
            for found, expected in zip(calls(client, there), calls(client, absent), strict=True):
                assert found.status_code == expected.status_code in (403, 404), found.text
                assert found.text.replace(there, absent) == expected.text
                assert found.headers == expected.headers
    assert acme.ask("beta/there").status_code == 404
    assert not [name for name in acme.models() if name.startswith("beta/")]
    # It may give that name, which then is another.
    assert acme.upload("beta/there", folders[5]).json()["id"] == "acme/beta/there"
    assert acme.ask("beta/there").json()["model"] == "acme/beta/there"
    assert beta.ask("beta/there").json()["model"] == "beta/there"


def test_blends_are_of_what_their_maker_sees(server, folders, small_store):
    acme, ops = clients(server, "acme", "ops")
    shared = small_store.names[0]
    assert acme.upload("mine", folders[3]).status_code == 201
    made = acme.put("/v1/adapters/both", json={"blend": {"mine": 0.5, shared: 0.5}})
    assert made.json()["id"] == "acme/both"
    assert made.json()["blend"]["weights"] == {"acme/mine": 0.5, shared: 0.5}
    assert acme.ask("both").json()["model"] == "acme/both"
    parts = [{"name": "mine", "weight": 0.5}, {"name": shared, "weight": 0.5}]
    assert acme.ask("base", adapters=parts).status_code == 200
    parts.append({"name": "acme/mine", "weight": 0.5})
    error = error_of(acme.ask("base", adapters=parts), 400)
    assert "found 'acme/mine' by two names" in error["message"]
    assert ops.ask("acme/both").json()["model"] == "acme/both"
    error = error_of(ops.ask("both"), 404)
    # What others do to the parts, the blend follows, whoever asks.
    assert ops.delete("/v1/adapters/acme%2Fmine").status_code == 200
    assert "cannot be served now" in error_of(acme.ask("both"), 404)["message"]


def test_a_glob_opens_a_name_space_and_nothing_else(server, folders):
    acme, beta, guest, ops = clients(server, "acme", "beta", "guest", "ops")
    assert ops.upload("team/x", folders[3]).json()["id"] == "team/x"
    assert ops.upload("team/sub/y", folders[4]).json()["id"] == "team/sub/y"
    assert guest.models() == ["base", "team/x"]
    assert acme.ask("team/x").json()["model"] == "team/x"
    assert error_of(beta.ask("team/x"), 404)
    assert error_of(guest.ask("team/sub/y"), 404)
    assert error_of(acme.delete("/v1/adapters/team%2Fx"), 403)
    # What others ask for is not told of shared ones.
    told = acme.get("/v1/adapters/team%2Fx").json()
    assert told["last_used"] is told["references"] is None
    assert ops.get("/v1/adapters/team%2Fx").json()["references"] == 0


def test_what_changes_meanwhile_is_seen_whole_by_the_server(path, file, key, folders):
    """What the server does for itself, within a tenant's request, sees every name."""
    text = key("a", tenant="acme", rights=ALL, adapters=["nothing"])
    ops = key("ops", rights=["admin"])
    with guarded(path, file) as server:
        client, admin = Client(server, text), Client(server, ops)
        before = admin.models()
        assert client.models() == ["base"]
        assert admin.upload("beta/x", folders[3]).status_code == 201
        # Another process changes the fleet; a tenant's change takes it over.
        digest = json.loads((path / "fleet.json").read_text())["entries"]["beta/x"]["digest"]
        change_fleet(path, lambda entries: entries.update({"beta/y": uploaded(digest)}))
        assert client.upload("x", folders[4]).json()["id"] == "acme/x"
        names = admin.models()
        assert set(before) < set(names) and {"beta/x", "beta/y", "acme/x"} <= set(names)
        assert client.models() == ["base", "acme/x"]


def test_lora_modules_are_names_like_others(path, file, key, folders):
    modules = [LoRAModulePath("plain", str(folders[5])), LoRAModulePath("beta/x", str(folders[6]))]
    text = key("a", tenant="acme", rights=ALL, adapters=["plain"])
    with guarded(path, file, engine=GeneratingEngine(), modules=modules) as server:
        client = Client(server, text)
        assert client.models() == ["base", "plain"]
        assert client.ask("plain").json()["model"] == "plain"
        assert error_of(client.delete("/v1/adapters/plain"), 409)
        assert error_of(client.delete("/v1/adapters/beta%2Fx"), 404)
        assert error_of(client.upload("plain", folders[3]), 409)
        assert client.upload("beta/x", folders[3]).json()["id"] == "acme/beta/x"


NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["beta/there", "acme/", "/", "//", "beta/", "base", "a/../beta/there", "../x"]),
    st.builds("beta/{}".format, st.text(max_size=5)),
    st.builds("acme/{}".format, st.text(max_size=5)),
)


@given(name=NAMES)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_name_leads_out_of_a_tenants_space(server, folders, name):
    acme, beta, ops = clients(server, "acme", "beta", "ops")
    if "beta/there" not in ops.models():
        assert beta.upload("there", folders[3]).status_code == 201
    before = [n for n in ops.models() if not n.startswith("acme/")]
    shown = set(acme.models())
    made = acme.upload(name, folders[4])
    assert made.status_code in (201, 400, 409), made.text
    if made.status_code == 201:
        assert made.json()["id"] in (name, f"acme/{name}")
        assert made.json()["id"].startswith("acme/")
        assert set(acme.models()) - shown == {made.json()["id"]}
    assert [n for n in ops.models() if not n.startswith("acme/")] == before
    asked = acme.ask(name)
    if asked.status_code == 200:
        assert asked.json()["model"] in acme.models()
    gone = acme.delete(f"/v1/adapters/{quote(name, safe='')}")
    assert gone.status_code in (200, 403, 404, 405, 409), gone.text
    assert [n for n in ops.models() if not n.startswith("acme/")] == before
