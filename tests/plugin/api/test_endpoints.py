"""`/v1/models` of a server with ten thousand adapters."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.endpoints import router
from vllm_jd.plugin.api.requests import store_path


@pytest.fixture
def client():
    base = [BaseModelPath("base", "/models/base")]
    registry = OpenAIModelRegistry(SimpleNamespace(max_model_len=512), base)
    path = store_path("/store", 3)
    names = [f"adapter-{i:05d}" for i in range(10_000)]
    app = FastAPI()
    app.include_router(router)
    app.state.openai_serving_models = SimpleNamespace(
        registry=registry,
        is_base_model=registry.is_base_model,
        base_model_paths=base,
        lora_requests={name: LoRARequest(name, i + 1, path) for i, name in enumerate(names)},
    )
    return TestClient(app)


def test_pages_cover_everything_once(client):
    whole = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert whole == ["base", *(f"adapter-{i:05d}" for i in range(10_000))]
    paged, params = [], {"limit": 3_000}
    while True:
        page = client.get("/v1/models", params=params).json()
        paged += [card["id"] for card in page["data"]]
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    assert paged == whole


def test_a_small_page_is_small_whatever_the_number_of_adapters(client):
    page = client.get("/v1/models", params={"limit": 2, "after": "adapter-04999"}).json()
    assert [card["id"] for card in page["data"]] == ["adapter-05000", "adapter-05001"]
    assert page["data"][0]["root"] == "vllm-jd:/store@3"
    assert page["data"][0]["parent"] == "base"


def test_unknown_models_get_openais_404(client):
    for url in ("/v1/models/nobody", "/v1/models?after=nobody"):
        reply = client.get(url)
        assert reply.status_code == 404
        assert reply.json()["error"]["type"] == "NotFoundError"
