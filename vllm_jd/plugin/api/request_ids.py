"""Log lines say which HTTP request they are about, and which adapter that asks for.

With `--logging-config.formatter json`, vLLM's own JSON log, each line is an object; `request_id`
and `adapter` are fields of those that are written while a request is handled, the line of the
access log among them. The id is the client's `X-Request-Id`, or else a new one; vLLM makes its own
names of it (`cmpl-…`, `chatcmpl-…`), and with `--enable-request-id-headers` the answer has it.
"""

import logging
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

_HEADER = b"x-request-id"
_LONGEST = 200  # characters of an id in a log line

_request: ContextVar[dict[str, str] | None] = ContextVar("vllm_jd_request", default=None)


class RequestIds:
    """ASGI middleware, for `--middleware`: gives each request an id, and log lines their fields.

    Args:
        app: what handles the requests.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        factory = logging.getLogRecordFactory()
        if not isinstance(factory, _Records):
            logging.setLogRecordFactory(_Records(factory))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == _HEADER), None)
        if given is None:
            given = uuid.uuid4().hex.encode()
            scope = {**scope, "headers": [*scope["headers"], (_HEADER, given)]}
        told = _request.set({"request_id": given.decode("latin-1")[:_LONGEST]})
        try:
            await self._app(scope, receive, send)
        finally:
            _request.reset(told)


def tell_adapter(name: str | None) -> None:
    """Have the lines of the request that is handled now say which adapter it asks for."""
    its = _request.get()
    if its is not None and name is not None:
        its["adapter"] = name


class _Records:
    """Makes log records as another does, with the fields of the request that is handled."""

    def __init__(self, factory: Callable[..., logging.LogRecord]):
        self._factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        for name, value in (_request.get() or {}).items():
            setattr(record, name, value)
        return record
