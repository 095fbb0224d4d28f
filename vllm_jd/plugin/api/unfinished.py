"""What a server that stops says to requests that it has not finished."""

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError

from vllm_jd.plugin.on_objects import replace_shutdown


def end_unfinished(engine_client: Any) -> None:
    """Have requests end with an error that the engine has not answered when it is stopped
    (`--shutdown-timeout`): of vLLM's own they hear no more, and their connections stay open. Call
    it in the server's loop. Harmless when repeated."""
    processor = getattr(engine_client, "output_processor", None)
    if processor is None:
        return
    loop = asyncio.get_running_loop()

    def before_the_end() -> None:
        engine_client.vllm_jd_stops = True

    def after_the_end() -> None:
        with suppress(RuntimeError):  # the loop has ended, and all requests with it
            loop.call_soon_threadsafe(processor.propagate_error, _unfinished())

    replace_shutdown(engine_client, before=before_the_end, after=after_the_end)


def raise_unfinished(engine_client: Any, output: Any) -> None:
    """Raise that a request was not finished which an engine has given up as it stops: one that
    came to it too late is an answer without tokens, of status 200, to vLLM.

    Raises:
        GracefulHTTPError: it was; 503.
    """
    if getattr(engine_client, "vllm_jd_stops", False) and any(
        each.finish_reason == "abort" for each in getattr(output, "outputs", ())
    ):
        raise _unfinished()


def _unfinished() -> GracefulHTTPError:
    return GracefulHTTPError(
        "the server stops, and has not finished this request in the time that it had for that "
        "(--shutdown-timeout); send it again",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
