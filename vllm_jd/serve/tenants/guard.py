"""ASGI: every request is asked for its key, its right, and whether there is room for it."""

import json
import math
from contextlib import ExitStack
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_jd.plugin.api.callers import Caller, caller
from vllm_jd.plugin.api.errors import error_response
from vllm_jd.serve.tenants.keys import Key
from vllm_jd.serve.tenants.meter import ratelimit_headers
from vllm_jd.serve.tenants.metrics import refused_counter
from vllm_jd.serve.tenants.rights import OPEN, generates, right_for
from vllm_jd.serve.tenants.tenants import Tenants

key_in_use: ContextVar[Key] = ContextVar("vllm_jd_key")
"""Of the request that is being answered."""


class Guard:
    """Answers 401, 403 and 429, or has the app answer.

    Args:
        app: what it guards.
        tenants: who there are.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants):
        self._app, self._tenants = app, tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        # A preflight has no key, and is answered before it comes here.
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN:
            await self._app(scope, receive, send)
            return
        method = scope.get("method", "WEBSOCKET")
        found = self._tenants.ring.find(_bearer(Headers(scope=scope)))
        if found is None:  # as vLLM says it
            refused_counter().labels("key").inc()
            refusal: Response = JSONResponse({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
            await refusal(scope, receive, send)
            return
        key, who = found
        right = right_for(method, path)
        if not key.may(right) and self._is_route(scope):
            refused_counter().labels("right").inc()
            await _forbidden(key, right)(scope, receive, send)
            return
        await self._counted(key, who, generates(method, path), scope, receive, send)

    def _is_route(self, scope: Scope) -> bool:
        """Whether there is such a route; where there is none, the app may say so."""
        return any(route.matches(scope)[0] != Match.NONE for route in scope["app"].routes)

    async def _counted(
        self, key: Key, who: Caller, queues: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        meter = self._tenants.meter
        refusal = self._refusal(key, who, queues)
        if refusal is not None:
            refusal.headers.update(ratelimit_headers(meter, key))
            await refusal(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = ratelimit_headers(meter, key)
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in found.items()),
                ]
            await send(message)

        with ExitStack() as stack:
            stack.enter_context(meter.request(key))
            if queues:
                stack.enter_context(self._tenants.queued(who.group))
            used, asked = key_in_use.set(key), caller.set(who)
            try:
                await self._app(scope, receive, told)
            finally:
                caller.reset(asked)
                key_in_use.reset(used)

    def _refusal(self, key: Key, who: Caller, queues: bool) -> Response | None:
        meter = self._tenants.meter
        if meter.requests_left(key) == 0:
            return _too_many(
                f"found {key.limits.requests} requests of the key {key.name!r} that are being "
                "answered, expected no more at a time",
                "requests",
                "requests",
                1,
            )
        if not queues:
            return None
        if meter.tokens_left(key) == 0:
            return _too_many(
                f"the key {key.name!r} has had its {key.limits.tokens_per_minute:,} tokens a "
                "minute",
                "tokens",
                "tokens",
                math.ceil(meter.seconds_to_tokens(key)),
            )
        waiting = self._tenants.waiting(who.group)
        if waiting >= self._tenants.max_queued:
            return _too_many(
                f"found {waiting:,} requests of {who.group} that wait, expected "
                f"{self._tenants.max_queued:,} at most (--max-queued-requests)",
                "queue",
                "requests",
                self._tenants.seconds_for(who.group, waiting),
            )
        return None


def _bearer(headers: Headers) -> str:
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return text if scheme.lower() == "bearer" else ""


def _forbidden(key: Key, right: str) -> Response:
    error = error_response(
        f"the key {key.name!r} has the rights {', '.join(sorted(key.rights))}; expected {right}",
        HTTPStatus.FORBIDDEN,
    )
    return JSONResponse(error.model_dump(), HTTPStatus.FORBIDDEN)


def _too_many(message: str, reason: str, kind: str, seconds: int) -> Response:
    """OpenAI's answer to who asks too much, of which `kind`."""
    refused_counter().labels(reason).inc()
    error: dict[str, Any] = {"message": f"{message}; try again in {max(1, seconds)} s"}
    error |= {"type": kind, "param": None, "code": "rate_limit_exceeded"}
    return Response(
        json.dumps({"error": error}),
        HTTPStatus.TOO_MANY_REQUESTS,
        {"Retry-After": str(max(1, seconds))},
        "application/json",
    )
