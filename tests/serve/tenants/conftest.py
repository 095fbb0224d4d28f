"""A server with keys: vLLM's own routes and lookups, the fleet's, and an engine that counts."""

import asyncio
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.openai.completion import api_router as completions
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor

from tests.serve.fleet.conftest import (  # noqa: F401 - fixtures
    Engine,
    folders,
    path,
    serving,
    small_store,
    soon,
)
from vllm_jd.serve.tenants.keys import add_key

PROMPT, ANSWER = 3, 2  # tokens of each sequence, by default


class GeneratingEngine(Engine):
    """An engine that answers at once, unless `held`: then it answers when that is set."""

    def __init__(self, places=4):
        super().__init__()
        self.vllm_config.scheduler_config = SimpleNamespace(
            max_num_seqs=places, max_num_batched_tokens=1024
        )
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.model_config.model = "/base"
        self.stopped = None
        self.held = None
        self.inside = self.most = self.aborted = 0
        self.salts = []  # of the prompts that came
        self.answered = []  # names of the adapters that were asked for

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None, **kwargs):
        self.salts.append(prompt.get("cache_salt"))
        self.inside += sampling_params.n
        self.most = max(self.most, self.inside)
        try:
            if self.held is not None:
                await self.held.wait()
            for i in range(ANSWER):
                last = i == ANSWER - 1
                if sampling_params.output_kind == RequestOutputKind.DELTA:
                    ids = [i]
                elif last:
                    ids = list(range(ANSWER))
                else:
                    continue
                yield SimpleNamespace(
                    outputs=[
                        SimpleNamespace(index=n, token_ids=ids, finish_reason=None)
                        for n in range(sampling_params.n)
                    ]
                )
            self.answered.append(lora_request.lora_name if lora_request else None)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.inside -= sampling_params.n

    def shutdown(self, timeout=None):
        self.stopped = timeout


class Completions(BaseServing):
    """As much of vLLM's OpenAIServingCompletion as asks for names and for the engine."""

    def __init__(self, models, engine):
        super().__init__(models, SimpleNamespace())
        self.engine = engine

    async def create_completion(self, request, raw_request):
        refused = await self._check_model(request)
        if refused is not None:
            return refused
        lora = self._maybe_get_adapters(request)
        name = self.models.model_name(lora)
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        params = SimpleNamespace(n=request.n or 1, output_kind=kind)
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        generators = []
        for i, _ in enumerate(prompts):
            prompt = {"type": "token", "prompt_token_ids": list(range(PROMPT))}
            if request.cache_salt:
                prompt["cache_salt"] = request.cache_salt
            generators.append(self.engine.generate(prompt, params, str(i), lora_request=lora))
        if request.stream:
            return self.stream(generators)

        async def drain(generator):
            async for _ in generator:
                pass

        await asyncio.gather(*map(drain, generators))
        return CompletionResponse(model=name, choices=[], usage=UsageInfo())

    async def stream(self, generators):
        for generator in generators:
            async for output in generator:
                yield f"data: {json.dumps(output.outputs[0].token_ids)}\n\n"


@contextmanager
def guarded(path, file, *, engine=None, modules=None, **config):  # noqa: F811 - not the fixture
    """A server that asks for a key of `file`."""
    engine = engine or GeneratingEngine()

    def more(app):
        completions.attach_router(app)

        @app.get("/health")
        @app.get("/metrics")
        @app.get("/version")
        async def said():
            return {}

    settings = {"api_keys": str(file), "max_blend": 3, **config}
    with serving(path, engine=engine, modules=modules, more=more, **settings) as server:
        state = server.http.app.state
        state.openai_serving_completion = Completions(server.models, engine)
        # What `serve_blends` does when vLLM has made the object, which is later here.
        from vllm_jd.plugin.api.blends import serve_blends

        serve_blends(state, state.vllm_jd_blends)
        yield server


class Client:
    """Whoever has a key."""

    def __init__(self, server, text):
        self.server, self.text = server, text
        self.headers = {"Authorization": f"Bearer {text}"}

    def __getattr__(self, method):
        def request(url, **options):
            headers = self.headers | options.pop("headers", {})
            return getattr(self.server.http, method)(url, headers=headers, **options)

        return request

    def ask(self, model, **body):
        return self.post("/v1/completions", json={"model": model, "prompt": "x", **body})

    def upload(self, name, folder):
        return self.server.upload(name, folder, headers=self.headers)

    def models(self):
        return [card["id"] for card in self.get("/v1/models").json()["data"]]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def key(file):
    """Make a key; its text."""

    def make(name, **fields):
        return add_key(file, name=name, **fields)[0]

    return make
