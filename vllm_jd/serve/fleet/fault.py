"""What a client is told of a request about the fleet that was not carried out."""

from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from vllm_jd.plugin.api.errors import error_response


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
    def answer(self) -> Any:
        """OpenAI's error object."""
        return error_response(str(self), self.status, self.param)


async def answer_fault(request: Request, fault: FleetFault) -> JSONResponse:
    """The HTTP answer to a request that ended in a FleetFault."""
    return JSONResponse(fault.answer.model_dump(), status_code=fault.status)
