"""What a client is told of a request about the fleet that was not carried out."""

from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse
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


class FleetFault(Exception):
    """Why something was not done: what was found, what was expected, what to do.

    Args:
        message: that, in words.
        status: HTTP's.
        param: the field of the request that is meant.
    """

    def __init__(
        self,
        message: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.param = status, param

    @property
    def answer(self) -> ErrorResponse:
        """OpenAI's error object."""
        # Not by vLLM's create_error_response, which puts <path> for every path.
        error = ErrorInfo(
            message=str(self), type=_TYPES[self.status], param=self.param, code=self.status.value
        )
        return ErrorResponse(error=error)


async def answer_fault(request: Request, fault: FleetFault) -> JSONResponse:
    """The HTTP answer to a request that ended in a FleetFault."""
    return JSONResponse(fault.answer.model_dump(), status_code=fault.status)
