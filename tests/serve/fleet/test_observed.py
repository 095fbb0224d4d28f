"""What a server shows of itself, with an engine that says what it is told to."""

import time

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY

from tests.serve.fleet.conftest import serving
from tests.serve.fleet.test_live import eventually
from vllm_jd.compressor.change.progress import recording
from vllm_jd.serve.fleet import observed
from vllm_jd.store import StoreError
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.fleet import blended, change_fleet, uploaded


def value(name, **labels):
    return REGISTRY.get_sample_value(f"vllm_jd:{name}", {"model_name": "base", **labels})


@pytest.fixture(autouse=True)
def often(soon, monkeypatch):
    monkeypatch.setattr(observed, "_EVERY", 0.02)


def states():
    return [int(value("adapters", state=state) or 0) for state in observed.STATES]


def test_adapters_are_counted_by_state_whatever_changes(path, folders):
    def give(fleet):
        names = {"ab": {folders[0].name: 0.5, "gone": 0.5}, "aa": {folders[0].name: 1.0}}
        fleet |= {name: blended(of_mapping(each), pinned=False) for name, each in names.items()}

    change_fleet(path, give)
    with serving(path, max_blend=8) as server:
        eventually(lambda: states() == [3, 0, 0, 1, 1])
        assert server.upload("new", folders[3]).status_code == 201
        eventually(lambda: states() == [3, 0, 1, 1, 1])
        server.http.delete(f"/v1/adapters/{folders[1].name}")
        eventually(lambda: states() == [2, 0, 1, 1, 1])
        told = server.http.get("/v1/store").json()
        assert told["states"] == {"compressed": 2, "uploaded": 1, "blend": 2}
        assert sum(told["clusters"]) == 3
        assert value("uploads_waiting") == 1 and 0 <= value("oldest_waiting_seconds") < 60
        since = told["recompression"]["waiting_since"]
        assert told["recompression"]["waiting"] == 1 and abs(since - time.time()) < 60


def test_the_engines_numbers_are_in_the_store_and_in_the_metrics(path):
    with serving(path) as server:
        server.engine.measures |= {"draining": [(1, 3)], "waiting": 2}
        eventually(lambda: value("requests_waiting_for_slots") == 2)
        told = server.http.get("/v1/store").json()["engine"]
        assert told["slots"]["basis"] == {"held": 1, "idle": 2, "free": 3}
        assert told["bases"] == {"resident": 4, "all": 6} and told["whole"] is True
        assert told["draining"] == [{"generation": 1, "requests": 3}]
        assert value("bases", state="paged") == 2
        assert value("draining_requests", what="generation") == 3
        server.engine.measures |= {"draining": []}
        eventually(lambda: value("draining", what="generation") == 0)


def test_an_engine_that_does_not_answer_is_asked_again(path, caplog):
    with serving(path) as server:
        eventually(lambda: server.http.get("/v1/store").json()["engine"] is not None)
        measures, server.engine.measures = server.engine.measures, None
        eventually(lambda: "could not be brought up to date" in caplog.text)
        time.sleep(0.2)
        said = [r for r in caplog.records if "could not be brought up" in r.message]
        assert len(said) == 1, "once, not every time"
        server.engine.measures = measures | {"waiting": 7}
        eventually(lambda: value("requests_waiting_for_slots") == 7)


def test_a_recompression_is_shown_as_it_goes_and_counted_once(path):
    with serving(path, recompress={"count": None, "age": None}):
        ended = [value("recompressions_total", result=each) or 0 for each in ("failed", "done")]
        with pytest.raises(StoreError), recording(path, refit=False) as recorder:
            recorder.on_progress("projecting", 1, 4)
            recorder.write()
            eventually(lambda: value("recompression_progress") == 0.25)
            assert value("recompression_running") == 1
            raise StoreError("no room")
        eventually(lambda: value("recompression_failed") == 1)
        assert value("recompression_running") == value("recompression_progress") == 0
        time.sleep(0.2)
        assert value("recompressions_total", result="failed") == ended[0] + 1
        assert (value("recompressions_total", result="done") or 0) == ended[1]


def test_a_generation_that_cannot_be_served_is_told(path):
    with serving(path) as server:
        eventually(lambda: value("generation_unserved") == 0)
        (path / "CURRENT").write_text("9 " + "0" * 64 + "\n")
        eventually(lambda: value("generation_unserved") == 1)
        assert server.http.get("/v1/store").json()["fault"]


def test_search_is_by_a_part_of_a_name(path, folders):
    entries = {name: uploaded("0" * 64, pinned=False) for name in ("Straße", "STRASSE-2", "x")}
    change_fleet(path, lambda fleet: fleet.update(entries))
    with serving(path) as server:

        def found(search, **params):
            page = server.http.get("/v1/adapters", params={"search": search, **params}).json()
            return [entry["id"] for entry in page["data"]], page["total"], page["has_more"]

        assert found("strasse") == (["STRASSE-2", "Straße"], 2, False)
        assert found("strasse", limit=1) == (["STRASSE-2"], 2, True)
        assert found("strasse", limit=1, after="STRASSE-2") == (["Straße"], 2, False)
        assert found("nobody") == ([], 0, False)
        assert found("")[1] == 6
        reply = server.http.get("/v1/adapters", params={"search": "strasse", "after": "x"})
        assert reply.status_code == 404 and reply.json()["error"]["param"] == "after"
