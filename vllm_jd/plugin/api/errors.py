"""OpenAI's error object, as every route of ours answers it."""

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestEntityTooLargeError",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "UnsupportedMediaTypeError",
    HTTPStatus.BAD_GATEWAY: "BadGatewayError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
    HTTPStatus.INSUFFICIENT_STORAGE: "InsufficientStorageError",
}
_LOADING = "InvalidUserInput"  # as vLLM's own routes for loading say


def error_response(
    message: str, status: HTTPStatus, param: str | None = None, *, loading: bool = False
) -> ErrorResponse:
    """What to answer a request that is not carried out.

    Not by vLLM's create_error_response, which puts <path> for every path: the client has to learn
    which one is meant.

    Args:
        message: what was found, what was expected, what to do.
        status: HTTP's.
        param: the field of the request that is meant.
        loading: whether one of vLLM's own routes for loading answers it.
    """
    kind = _LOADING if loading and status == HTTPStatus.BAD_REQUEST else _TYPES[status]
    error = ErrorInfo(message=message, type=kind, param=param, code=status.value)
    return ErrorResponse(error=error)


class Route(APIRoute):
    """A route of ours: whatever it was sent that cannot be read or has not the types that it says,
    the answer is OpenAI's error object with status 400. FastAPI's own is `{"detail": …}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except RequestValidationError as error:
                return _misfit(error)
            except HTTPException as error:  # of reading the body: routes of ours raise none
                message = f"{error.detail}; expected JSON in UTF-8"
                return _answer(message, HTTPStatus(error.status_code), "body")

        return answered


def _misfit(error: RequestValidationError) -> Response:
    """What is said of the first thing that does not fit."""
    first = error.errors()[0]
    place, *where = map(str, first["loc"])
    name = ".".join(where) if first["type"] != "json_invalid" else ""
    message = str(first["msg"])
    if first["type"] == "json_invalid":
        message += f" at character {first['loc'][-1]}: {first['ctx']['error']}"
    return _answer(f"{name or f'the {place}'}: {message}", HTTPStatus.BAD_REQUEST, name or place)


def _answer(message: str, status: HTTPStatus, param: str) -> Response:
    return JSONResponse(error_response(message, status, param).model_dump(), status)
