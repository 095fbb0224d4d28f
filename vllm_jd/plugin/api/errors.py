"""OpenAI's error object, as every route of ours answers it."""

from http import HTTPStatus

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
