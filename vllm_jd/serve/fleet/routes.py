"""HTTP: adapters are listed, uploaded, blended, replaced, deleted and pinned while the server
runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import ClientDisconnect

from vllm_jd.plugin.api.callers import caller
from vllm_jd.plugin.api.errors import Route
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import CONFIG_BYTES, PARTS, Multipart, fetch, has_room, too_large
from vllm_jd.serve.fleet.life import Life
from vllm_jd.serve.fleet.listing import described, page, store_entry
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.serve.fleet.observed import Observed
from vllm_jd.serve.tenants.tenants import Tenants
from vllm_jd.store.blend import Blend, BlendError, of_mapping
from vllm_jd.store.errors import told

router = APIRouter(route_class=Route)

_JSON_BYTES = 1 << 16
_PIECE = 1 << 20
_PAGE, _MOST = 100, 1000  # adapters of a listing
_FORMS = (
    "multipart/form-data (files adapter_config and adapter_model) or application/json with a source"
)


class _Unnamed(BaseModel):
    """The JSON body of PUT, which has the name in its path: where an adapter is, or a blend."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: str | None = None
    blend: dict[str, float] | None = None
    way: str | None = None
    density: float | None = None
    sign: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> "_Unnamed":
        if (self.source is None) == (self.blend is None):
            raise ValueError("expected either a source or a blend")
        return self

    def blended(self) -> Blend:
        """The blend.

        Raises:
            FleetFault: it cannot be.
        """
        how = self.model_dump(include={"way", "density", "sign", "seed"}, exclude_none=True)
        try:
            return of_mapping(self.blend or {}, **how)
        except BlendError as error:
            raise FleetFault(str(error), param="blend") from None


class _Named(_Unnamed):
    """The JSON body of POST."""

    name: str


def _body(form: type[BaseModel], *, named: bool) -> dict[str, Any]:
    """What OpenAPI says of a body: JSON, or multipart/form-data."""
    files = {field: {"type": "string", "format": "binary"} for field in PARTS}
    fields = files | ({"name": {"type": "string"}} if named else {})
    multipart = {"type": "object", "properties": fields, "required": list(fields)}
    content = {
        "application/json": {"schema": form.model_json_schema()},
        "multipart/form-data": {"schema": multipart},
    }
    return {"requestBody": {"required": True, "content": content}}


def live_fleet(request: Request) -> LiveFleet:
    """The server's fleet."""
    return request.app.state.vllm_jd_fleet


@router.post("/v1/adapters", status_code=201, openapi_extra=_body(_Named, named=True))
async def upload(raw_request: Request) -> JSONResponse:
    """A new adapter: multipart/form-data with `name`, `adapter_config` and `adapter_model`, or JSON
    with `name` and `source`, or `blend`. Answered once it is on disk and loaded: it can be asked
    for."""
    live = live_fleet(raw_request)
    asked = await _asked(raw_request, live, _Named)
    if isinstance(asked, _Named) and asked.blend is not None:
        name = live.named_by_caller(asked.name)
        await live.blend(name, asked.blended(), replace=False)
        return await _answer(live, name, HTTPStatus.CREATED)
    async with _came_in(raw_request, live, asked, named=True) as (folder, said, source):
        assert said is not None
        name = live.named_by_caller(said)
        live.check_free(name)
        await live.check(folder)
        await live.give(name, folder, source=source, replace=False)
    return await _answer(live, name, HTTPStatus.CREATED)


@router.put("/v1/adapters/{name:path}", openapi_extra=_body(_Unnamed, named=False))
async def replace(raw_request: Request, name: str) -> JSONResponse:
    """Another version of an adapter (200), or a new adapter (201): as POST, without `name`.
    Requests that run keep the version that they began with."""
    live = live_fleet(raw_request)
    asked = await _asked(raw_request, live, _Unnamed)
    name = live.named_by_caller(name)
    if asked is not None and asked.blend is not None:
        new = await live.blend(name, asked.blended(), replace=True)
        return await _answer(live, name, HTTPStatus.CREATED if new else HTTPStatus.OK)
    async with _came_in(raw_request, live, asked, named=False) as (folder, _, source):
        live.check_giveable(name)
        await live.check(folder)
        new = await live.give(name, folder, source=source, replace=True)
    return await _answer(live, name, HTTPStatus.CREATED if new else HTTPStatus.OK)


@router.delete("/v1/adapters/{name:path}")
async def delete(raw_request: Request, name: str) -> JSONResponse:
    """Delete an adapter. Requests that run with it end as they would have."""
    live = live_fleet(raw_request)
    await live.may_change()
    name = live.callers_own(name)
    await live.delete(name)
    return JSONResponse({"id": name, "object": "adapter", "deleted": True})


@router.post("/v1/adapters/{name:path}/pin")
async def pin(raw_request: Request, name: str) -> JSONResponse:
    """Have an adapter stay resident."""
    return await _pinned(raw_request, name, True)


@router.post("/v1/adapters/{name:path}/unpin")
async def unpin(raw_request: Request, name: str) -> JSONResponse:
    """Undo a pin."""
    return await _pinned(raw_request, name, False)


async def _pinned(raw_request: Request, name: str, pinned: bool) -> JSONResponse:
    live = live_fleet(raw_request)
    await live.may_change()
    name = live.seen_by_caller(name)
    await live.pin(name, pinned)
    return await _answer(live, name, HTTPStatus.OK)


@router.get("/v1/adapters")
async def list_adapters(
    raw_request: Request,
    limit: Annotated[int, Query(ge=1, le=_MOST)] = _PAGE,
    after: Annotated[str | None, Query()] = None,
    search: Annotated[str | None, Query()] = None,
) -> JSONResponse:
    """A page of the adapters. `limit` and `after` (a name) are as in OpenAI's listings; `search` is
    a part of their names."""
    return JSONResponse(await page(live_fleet(raw_request), limit, after, search))


@router.get("/v1/adapters/{name:path}")
async def retrieve(raw_request: Request, name: str) -> JSONResponse:
    """One adapter."""
    live = live_fleet(raw_request)
    name = live.seen_by_caller(name)
    return await _answer(live, name, HTTPStatus.OK)


@router.get("/v1/store")
async def retrieve_store(raw_request: Request) -> JSONResponse:
    """The store that is served."""
    life: Life = raw_request.app.state.vllm_jd_life
    observed: Observed = raw_request.app.state.vllm_jd_observed
    entry = await asyncio.to_thread(store_entry, live_fleet(raw_request))
    entry |= await asyncio.to_thread(life.status) | observed.status()
    tenants: Tenants | None = getattr(raw_request.app.state, "vllm_jd_tenants", None)
    return JSONResponse(entry | (tenants.status() if tenants else {}))


async def _answer(live: LiveFleet, name: str, status: HTTPStatus) -> JSONResponse:
    found = await described(live, [name] if name in live.known else [])
    # Deleted meanwhile by somebody else: what was asked for has been done all the same.
    entry: dict[str, Any] = found[0] if found else {"id": name, "object": "adapter"}
    return JSONResponse(entry, status_code=status)


def _kind(raw_request: Request) -> str:
    return raw_request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _asked(raw_request: Request, live: LiveFleet, form: type[_Unnamed]) -> _Unnamed | None:
    """The body of a request for a change, if it is JSON.

    Raises:
        FleetFault: it is not what was expected, or nothing may be changed.
    """
    await live.may_change()
    if _kind(raw_request) != "application/json":
        return None
    try:
        return await _json(raw_request, form)
    except ClientDisconnect:
        raise _gone() from None


def _gone() -> FleetFault:
    return FleetFault("the client went away before all of the body had come")


@asynccontextmanager
async def _came_in(
    raw_request: Request, live: LiveFleet, asked: _Unnamed | None, *, named: bool
) -> AsyncIterator[tuple[Path, str | None, str | None]]:
    """(folder, name if it is in the body, where the files came from) of an upload, come in whole.
    The folder is gone afterwards, unless it was taken.

    Raises:
        FleetFault: it cannot be had.
    """
    kind = _kind(raw_request)
    try:
        if kind == "multipart/form-data":
            with live.coming() as folder:
                yield folder, await _receive(raw_request, live, folder, named=named), None
        elif asked is not None and asked.source is not None:
            name = asked.name if isinstance(asked, _Named) else None
            if name is not None:  # before anything is fetched
                live.check_free(live.named_by_caller(name))
            with live.coming() as folder:
                yield folder, name, await fetched(live, asked.source, folder, "source")
        else:
            raise FleetFault(
                f"found content of type {kind[:40]!r}, expected {_FORMS}",
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
    except ClientDisconnect:
        raise _gone() from None


async def fetched(live: LiveFleet, source: str, folder: Path, param: str) -> str:
    """Fetch an adapter's files from a place that a client names into a folder; see `fetch`.

    Raises:
        FleetFault: adapters may not be taken from there, or it cannot be had.
    """
    who = caller.get()
    if who is not None and not who.admin:
        raise FleetFault(
            "this key may upload files only: what can be fetched is everybody's (the right admin)",
            HTTPStatus.FORBIDDEN,
            param,
        )
    refusal = live.allowed.refusal(source)
    if refusal is not None:
        message = refusal.message.replace("lora_path", param, 1)
        status = HTTPStatus.FORBIDDEN if refusal.forbidden else HTTPStatus.BAD_REQUEST
        raise FleetFault(message, status, param)
    return await asyncio.to_thread(fetch, source, folder, live.config.max_adapter_bytes)


async def _receive(
    raw_request: Request, live: LiveFleet, folder: Path, *, named: bool
) -> str | None:
    most = live.config.max_adapter_bytes
    size = raw_request.headers.get("content-length", "")
    if size.isdecimal():
        if int(size) > most + CONFIG_BYTES + _JSON_BYTES:
            raise too_large("adapter_model", most)
        if not has_room(folder, int(size)):
            raise FleetFault(
                f"found an upload of {int(size):,} bytes, which the store's disk has no room for",
                HTTPStatus.INSUFFICIENT_STORAGE,
            )
    parts = Multipart(raw_request.headers["content-type"], folder, most)
    try:
        async for piece in _pieces(raw_request):
            await asyncio.to_thread(parts.write, piece)
        return await asyncio.to_thread(lambda: parts.finish(named=named))
    finally:
        parts.abandon()


async def _pieces(raw_request: Request) -> AsyncIterator[bytes]:
    """The body in larger pieces than it comes in."""
    buffer = bytearray()
    async for chunk in raw_request.stream():
        buffer += chunk
        if len(buffer) >= _PIECE:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


async def _json(raw_request: Request, form: type[_Unnamed]) -> _Unnamed:
    body = bytearray()
    async for chunk in raw_request.stream():
        body += chunk
        if len(body) > _JSON_BYTES:
            raise too_large("the JSON body", _JSON_BYTES)
    try:
        return form.model_validate_json(bytes(body))
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False)[0]["loc"])) or None
        message = told(error)
        raise FleetFault(message if where else f"the body: {message}", param=where) from None
