"""A fleet behind vLLM's own table of names and routes, with an engine that only remembers."""

import asyncio
import shutil
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config import ParallelConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.lora import api_router

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.endpoints import StoreEndpoints
from vllm_jd.plugin.api.requests import parse_store_path, split_upload_path
from vllm_jd.serve.fleet import leaving, life, live, observed, pins, watched
from vllm_jd.serve.fleet.endpoints import FleetEndpoints


class Engine:
    """As much of vLLM's EngineClient as a fleet needs.

    `fault` is what it says to the next upload, `slots` how many adapters can be pinned.
    """

    renderer = input_processor = None

    def __init__(self):
        self.model_config = SimpleNamespace(served_model_name="base", max_model_len=64)
        self.vllm_config = SimpleNamespace(parallel_config=ParallelConfig())
        self.logger_manager = None
        self.loaded, self.removed, self.pinned = {}, [], set()
        self.fault, self.slots = None, 100
        self.engine_core = SimpleNamespace(
            call_utility_async=self.call, call_utility_all_async=self.call_all
        )
        self.told = {}  # name → what is told of it
        self.asked = 0
        self.generations = []  # what it was asked to do about them
        self.refusal = None
        kinds = ("basis", "upload", "core", "blend")
        self.measures = {
            "slots": dict.fromkeys(kinds, (1, 2, 3)),
            **{what: dict.fromkeys(kinds, 0) for what in ("hits", "misses", "evictions")},
            "bases": (4, 6),
            "cores": (3, 3),
            "whole": True,
            "page_in_seconds": [],
            "swaps": 0,
            "draining": [],
            "recent": [],
            "waiting": 0,
        }

    async def add_lora(self, request):
        if not request.lora_name:  # a generation
            if self.refusal:
                raise RuntimeError(self.refusal)
            self.generations.append(("open", parse_store_path(request.lora_path)[1]))
            return True
        if self.fault:
            fault, self.fault = self.fault, None
            raise RuntimeError(f"Call to add_lora method failed: {fault}")
        self.loaded[request.lora_int_id] = request
        return True

    async def remove_lora(self, number):
        self.removed.append(number)
        self.pinned.discard(number)
        return self.loaded.pop(number, None) is not None

    async def pin_lora(self, number):
        if number not in self.loaded or len(self.pinned) >= self.slots:
            raise RuntimeError("Call to pin_lora method failed: all slots are held")
        self.pinned.add(number)
        return True

    async def call(self, name, *arguments):
        if name == "vllm_jd_serve_generation":
            self.generations.append(("serve", arguments[1]))
            return None
        assert name == "vllm_jd_tell"
        (adapters,) = arguments
        self.asked += 1
        known = {request.lora_path for request in self.loaded.values()}
        return [
            self.told.get(name, (path in known, path in known, 0, None)) for name, path in adapters
        ]

    async def call_all(self, name, *arguments):
        assert name == "vllm_jd_measure"
        return [self.measures]

    async def generate(self, *args, **kwargs):
        yield None

    def serves(self):
        """Digests of the uploads that it has."""
        return {split_upload_path(request.lora_path)[0] for request in self.loaded.values()}


class Server:
    """A running server's HTTP, what it says to the engine, and the names it has."""

    def __init__(self, client, engine, models):
        self.http, self.engine, self.models = client, engine, models

    @property
    def live(self):
        return self.http.app.state.vllm_jd_fleet

    def upload(self, name, folder, **options):
        return self.http.post("/v1/adapters", data={"name": name}, files=files(folder), **options)

    def put(self, name, folder):
        return self.http.put(f"/v1/adapters/{name}", files=files(folder))

    def names(self):
        """Of all adapters, page by page."""
        found, after = [], None
        while True:
            params = {"limit": 2} | ({"after": after} if after else {})
            page = self.http.get("/v1/adapters", params=params).json()
            found += [entry["id"] for entry in page["data"]]
            after = page["last_id"]
            if not page["has_more"]:
                return found

    def entry(self, name):
        return self.http.get(f"/v1/adapters/{name}").json()

    def path(self, name):
        """What requests with a name ask the engine for."""
        return self.models.lora_requests[name].lora_path


def files(folder):
    return {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }


def application(path, *, modules=None, engine=None, more=lambda app: None, **config):
    """(ASGI application, engine, models) of a server on the store at `path`; `more` may change its
    app before it is wrapped."""
    engine = engine or Engine()
    models = OpenAIServingModels(engine, [BaseModelPath("base", "/base")], lora_modules=modules)
    settings = {"vllm_jd": {"store": str(path), **config}}
    args = SimpleNamespace(additional_config=settings, log_error_stack=False)
    endpoints = StoreEndpoints(), FleetEndpoints()

    @asynccontextmanager
    async def lifespan(app):
        await models.init_static_loras()
        for each in endpoints:
            await each.init_state(engine, app.state, args)
        yield
        app.state.vllm_jd_observing.cancel()
        app.state.vllm_jd_living.cancel()
        await asyncio.gather(app.state.vllm_jd_living, return_exceptions=True)
        app.state.vllm_jd_fleet.close()
        if watch := getattr(app.state, "vllm_jd_watch", None):
            watch.cancel()

    app = FastAPI(lifespan=lifespan)
    app.state.args, app.state.openai_serving_models = args, models
    api_router.attach_router(app)
    more(app)
    for each in endpoints:
        each.attach_router(app)
    init_exception_handler(app)
    return app, engine, models


@contextmanager
def serving(path, **options):
    """A server on the store at `path`, until the block ends."""
    app, engine, models = application(path, **options)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Server(client, engine, models)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What a server does later, it does soon; clients may change adapters."""
    monkeypatch.setattr(live, "_TICK", 0.02)
    monkeypatch.setattr(pins, "_AGAIN", 0.3)
    monkeypatch.setattr(leaving, "_DRAIN", 0.3)
    monkeypatch.setattr(leaving, "_SWEEP", 0.5)
    monkeypatch.setattr(watched, "_EVERY", 0.02)
    monkeypatch.setattr(observed, "_EVERY", 60)
    monkeypatch.setattr(life, "_FOLLOW_SECONDS", 0.02)
    monkeypatch.setattr(life, "_DUE_SECONDS", 0.02)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory, write_adapters):
    """Eight adapters of one base model."""
    return write_adapters(tmp_path_factory.mktemp("fleet"), 8, kind="real")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory, folders):
    """Of the first three."""
    path = tmp_path_factory.mktemp("fleet-store") / "store"
    return compress(read_adapters(folders[:3]), path, Settings(rank=3))


@pytest.fixture
def path(small_store, tmp_path):
    return shutil.copytree(small_store.path, tmp_path / "store")
