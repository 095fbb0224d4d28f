"""`/v1/models` of a server with ten thousand adapters."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.exceptions import GenerationError, LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api import endpoints
from vllm_jd.plugin.api.adapter_paths import AdapterPaths
from vllm_jd.plugin.api.endpoints import _card, _follow_loading, _guard_loading, router
from vllm_jd.plugin.api.failures import raise_failure
from vllm_jd.plugin.api.requests import split_upload_path, store_path, upload_digest


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


class Engine:
    """As much of vLLM's EngineClient as loading needs; `fault` is what the engine says."""

    renderer = input_processor = None

    def __init__(self):
        self.model_config = SimpleNamespace(served_model_name="base", max_model_len=64)
        self.added, self.removed, self.fault = [], [], None

    async def add_lora(self, request):
        if self.fault:
            raise RuntimeError(f"Call to add_lora method failed: {self.fault}")
        self.added.append(request)

    async def remove_lora(self, lora_id):
        self.removed.append(lora_id)
        return True


@pytest.fixture
def loading(tmp_path):
    """(the engine, vLLM's own models with our loading, an adapter's folder, load, unload)."""
    engine = Engine()
    models = OpenAIServingModels(engine, [BaseModelPath("base", "/base")])
    for _ in range(2):  # harmless when repeated
        _guard_loading(models, AdapterPaths((str(tmp_path),)))
        _follow_loading(models, engine)
    folder = tmp_path / "up"
    folder.mkdir()
    write(folder, "one")

    def load(path, name="x", **options):
        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(path), **options)
        return asyncio.run(models.load_lora_adapter(request))

    def unload(name="x"):
        return asyncio.run(models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name)))

    return engine, models, folder, load, unload


def write(folder, text):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(text)


def test_what_is_loaded_is_named_by_its_files(loading):
    engine, models, folder, load, _ = loading
    assert "Success" in load(folder)
    (first,) = engine.added
    assert split_upload_path(first.lora_path) == (upload_digest(folder), str(folder))
    write(folder, "two")
    assert load(folder).error.code == 400, "it is loaded already"
    assert "Success" in load(folder, load_inplace=True)
    second = models.lora_requests["x"]
    assert second.lora_int_id == first.lora_int_id and second.lora_path != first.lora_path
    assert not second.load_inplace, "or every request would say so"
    assert _card({}, models, "x")["root"] == str(folder)


def test_the_engine_is_told_of_what_is_unloaded_and_of_nothing_else(loading):
    engine, models, folder, load, unload = loading
    load(folder)
    number = models.lora_requests["x"].lora_int_id
    assert unload("y").error.code == 404
    assert engine.removed == []
    assert "Success" in unload()
    assert engine.removed == [number] and models.lora_requests == {}


def test_what_the_engine_finds_wrong_is_the_users_to_mend(loading):
    engine, models, folder, load, _ = loading
    engine.fault = "adapter 'x' cannot be served: found rank 32, expected 16 at most"
    error = load(folder).error
    assert (error.code, error.type, error.param) == (400, "InvalidUserInput", "lora_path")
    assert error.message == engine.fault
    assert models.lora_requests == {}


def test_a_folder_that_is_not_there_is_not_found(loading):
    engine, models, folder, load, _ = loading
    missing = folder / "missing"
    engine.fault = LoRAAdapterNotFoundError("x", str(missing))
    assert load(missing).error.code == 404
    assert models.lora_requests == {}


def test_nothing_is_read_of_what_may_not_be_loaded(loading, tmp_path_factory, monkeypatch):
    engine, _, folder, load, _ = loading
    outside = tmp_path_factory.mktemp("outside")
    write(outside, "secret")
    read = []
    monkeypatch.setattr(endpoints, "upload_digest", lambda path: read.append(path) or "0" * 64)
    for path in (outside, f"vllm-jd-upload:{'0' * 64}:{outside}", "vllm-jd:/store@1"):
        assert load(path).error.code == 403
    assert read == engine.added == []
    assert "Success" in load(folder)
    assert read == [folder]


@pytest.mark.parametrize(
    ("reason", "finish", "said"),
    [
        ("vllm-jd: the files are gone", "error", "the files are gone"),
        ("vllm-jd: the files are gone", "stop", None),
        ("stop", "error", None),
        (7, "error", None),
        (None, "error", None),
    ],
)
def test_a_request_that_failed_for_its_adapter_says_why(reason, finish, said):
    each = SimpleNamespace(stop_reason=reason, finish_reason=finish)
    output = SimpleNamespace(outputs=[each])
    if said is None:
        raise_failure(output)
        return
    with pytest.raises(GenerationError) as caught:
        raise_failure(output)
    assert str(caught.value) == said
