"""HTTP: every adapter of the store is a model of the server, and `/v1/models` is paged."""

import asyncio
from argparse import Namespace
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.adapter_paths import AdapterPaths
from vllm_jd.plugin.api.blends import Blends, serve_blends
from vllm_jd.plugin.api.callers import whole_names
from vllm_jd.plugin.api.errors import Route, error_response
from vllm_jd.plugin.api.metrics import count_requests, publish_store
from vllm_jd.plugin.api.names import refusal_of
from vllm_jd.plugin.api.requests import (
    split_upload_path,
    store_path,
    upload_digest,
    upload_path,
)
from vllm_jd.plugin.api.routing import Residency
from vllm_jd.plugin.api.unfinished import end_unfinished
from vllm_jd.plugin.config import PluginConfig, plugin_config
from vllm_jd.plugin.faults import faults_told
from vllm_jd.plugin.on_objects import replace_load_check, replace_loading
from vllm_jd.store.fleet import Compressed, read_fleet

router = APIRouter(route_class=Route)

_IDS_OF_A_PROCESS = 1 << 40


class StoreEndpoints:
    """A `vllm.endpoint_plugins` entry point; does nothing unless a store is configured."""

    name = "vllm_jd"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replace GET /v1/models by the paged listing, and add GET /v1/models/{model}."""
        if plugin_config(getattr(app.state.args, "additional_config", None)) is not None:
            app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Make the store's adapters known to the server, but for what its fleet says otherwise of.

        Raises:
            ValueError: `--lora-modules` or the base model has the name of one of them.
        """
        config = plugin_config(getattr(args, "additional_config", None))
        if config is None or engine_client is None:
            return
        _take_ids(state.openai_serving_models, engine_client)
        with faults_told():
            self._init(engine_client, state.openai_serving_models, config)
        state.vllm_jd_residency = Residency(engine_client)
        state.vllm_jd_blends = blends = Blends(state.openai_serving_models, config.max_blend)
        serve_blends(state, blends)

    def _init(
        self, engine_client: EngineClient, models: OpenAIServingModels, config: PluginConfig
    ) -> None:
        # The server command, or else the worker, has hashed every file of this generation.
        store = config.open_store(verify=False)
        meanings = read_fleet(store.path).meanings(store)
        names = [name for name, meaning in meanings if isinstance(meaning, Compressed)]
        taken = [name for name in names if name in models.lora_requests]
        taken += [name for name in names if models.is_base_model(name)]
        if taken:
            raise ValueError(
                f"{len(taken)} names are used twice: by adapters of the store {store.path} and by "
                f"--lora-modules or the base model (such as {taken[0]!r}); rename those"
            )
        path = store_path(config.store, store.generation)
        for name in names:
            models.lora_requests[name] = LoRARequest(name, models.lora_id_counter.inc(1), path)
        allowed = AdapterPaths(
            config.adapter_roots, config.allow_remote_adapters, config.adapter_addresses
        )
        _guard_loading(models, allowed)
        _follow_loading(models, engine_client)
        publish_store(store, engine_client)
        count_requests(engine_client)
        end_unfinished(engine_client)


def _take_ids(models: OpenAIServingModels, engine_client: EngineClient) -> None:
    """Have this process give ids that no other API server of its engine gives
    (`--api-server-count`): by them the engine tells what one has loaded and pinned."""
    rank = engine_client.vllm_config.parallel_config._api_process_rank
    models.lora_id_counter.inc(rank * _IDS_OF_A_PROCESS)


def _follow_loading(models: OpenAIServingModels, engine_client: EngineClient) -> None:
    """Have uploads named by what is in their files, so that a name that comes to stand for other
    files is another adapter, and have the engine told of what is unloaded."""

    async def load(
        stock: Any, request: LoadLoRAAdapterRequest, base_model_name: str | None
    ) -> ErrorResponse | str:
        # Before a byte of it is read; stock asks again.
        refusal = await models._check_load_lora_adapter_request(request)
        if refusal is not None:
            return refusal
        folder = Path(request.lora_path).expanduser()
        named = request
        try:
            digest = await asyncio.to_thread(upload_digest, folder)
        except (OSError, ValueError):
            pass  # vLLM says what is wrong with it, or fetches it from the Hub
        else:
            path = upload_path(digest, str(folder.absolute()))
            # Not a copy: vLLM's routes for SageMaker hand in an object of another class.
            named = LoadLoRAAdapterRequest(
                lora_name=request.lora_name,
                lora_path=path,
                load_inplace=request.load_inplace,
                is_3d_lora_weight=request.is_3d_lora_weight,
            )
        answer = await stock(named, base_model_name)
        if isinstance(answer, ErrorResponse):
            return _plainly(answer, request.lora_name)
        loaded = models.lora_requests[request.lora_name]
        loaded.load_inplace = False  # it has been, once
        return answer

    async def unload(stock: Any, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        loaded = models.lora_requests.get(request.lora_name)
        answer = await stock(request)
        if loaded is not None and not isinstance(answer, ErrorResponse):
            await engine_client.remove_lora(loaded.lora_int_id)
        return answer

    replace_loading(models, load, unload)


def _plainly(answer: ErrorResponse, name: str) -> ErrorResponse:
    """What the engine found wrong with an upload is the user's to mend: not an internal error."""
    message = refusal_of(answer.error.message)
    if message is None:
        return answer
    return error_response(message, HTTPStatus.BAD_REQUEST, "lora_path", loading=True)


def _guard_loading(models: OpenAIServingModels, paths: AdapterPaths) -> None:
    """Have `load_lora_adapter` refuse what the rule does not allow, with OpenAI's error object."""

    def refused(lora_path: str) -> ErrorResponse | None:
        refusal = paths.refusal(split_upload_path(lora_path)[1])
        if refusal is None:
            return None
        status = HTTPStatus.FORBIDDEN if refusal.forbidden else HTTPStatus.BAD_REQUEST
        return error_response(refusal.message, status, "lora_path", loading=True)

    replace_load_check(models, refused)


@router.get("/v1/models")
async def list_models(
    raw_request: Request,
    limit: Annotated[int | None, Query(ge=1)] = None,
    after: Annotated[str | None, Query()] = None,
) -> JSONResponse:
    """The base models, then all adapters. `limit` and `after` (a model's id) page through them,
    as in OpenAI's other listings; without `limit` all are listed."""
    models: OpenAIServingModels = raw_request.app.state.openai_serving_models
    base = [card.model_dump() for card in (await models.registry.show_available_models()).data]
    names = [card["id"] for card in base] + list(models.lora_requests)
    first = 0
    if after is not None:
        if not models.is_base_model(after):
            if after not in models.lora_requests:
                return _unknown(after, "after")
            after = models.lora_requests[after].lora_name
        first = names.index(after) + 1
    last = len(names) if limit is None else min(first + limit, len(names))
    template = ModelCard(id="").model_dump()
    data = [
        base[i] if i < len(base) else _card(template, models, names[i]) for i in range(first, last)
    ]
    page: dict[str, Any] = {"object": "list", "data": data}
    if limit is not None or after is not None:
        page |= {
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": last < len(names),
        }
    return JSONResponse(page)


@router.get("/v1/models/{model:path}")
async def retrieve_model(raw_request: Request, model: str) -> JSONResponse:
    """One base model or adapter."""
    models: OpenAIServingModels = raw_request.app.state.openai_serving_models
    for card in (await models.registry.show_available_models()).data:
        if card.id == model:
            return JSONResponse(card.model_dump())
    if model not in models.lora_requests:
        return _unknown(model, "model")
    name = models.lora_requests[model].lora_name
    return JSONResponse(_card(ModelCard(id="").model_dump(), models, name))


def _card(template: dict[str, Any], models: OpenAIServingModels, name: str) -> dict[str, Any]:
    request = whole_names(models)[name]
    parent = request.base_model_name or models.base_model_paths[0].name
    root = split_upload_path(request.lora_path)[1]
    return template | {"id": name, "root": root, "parent": parent}


def _unknown(name: str, param: str) -> JSONResponse:
    error = error_response(f"The model `{name}` does not exist.", HTTPStatus.NOT_FOUND, param)
    return JSONResponse(error.model_dump(), status_code=HTTPStatus.NOT_FOUND)
