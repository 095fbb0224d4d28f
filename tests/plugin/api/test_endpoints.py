"""`/v1/models` of a server with ten thousand adapters."""

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import ClassVar

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from vllm_jd.plugin.api.endpoints import refuse_warmup_path, router
from vllm_jd.plugin.api.requests import WARMUP_PATH, store_path


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


def test_the_path_of_warm_up_runs_is_not_found_as_any_folder_that_is_not_there():
    """Against what vLLM's own handler answers when the worker finds no adapter."""
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
    from vllm.exceptions import LoRAAdapterNotFoundError

    class Engine:
        asked: ClassVar = []

        async def add_lora(self, request):
            self.asked.append(request.lora_path)
            raise RuntimeError(LoRAAdapterNotFoundError(request.lora_name, request.lora_path))

    models = OpenAIServingModels.__new__(OpenAIServingModels)
    models.engine_client = Engine()
    models.registry = SimpleNamespace(is_base_model=lambda name: False)
    models.lora_requests = {}
    models.lora_id_counter = AtomicCounter(0)
    models.lora_resolver_lock = defaultdict(asyncio.Lock)
    refuse_warmup_path(models)

    def load(path):
        request = LoadLoRAAdapterRequest(lora_name="x", lora_path=path)
        return asyncio.run(models.load_lora_adapter(request)).error

    missing = load("/no/such/folder")
    refused = load(WARMUP_PATH)
    assert refused.code == missing.code == 404
    assert refused.type == missing.type
    assert refused.message == missing.message.replace("/no/such/folder", WARMUP_PATH)
    assert Engine.asked == ["/no/such/folder"], "the worker must not see the path"
    assert models.lora_requests == {}
