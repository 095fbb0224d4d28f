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

    def after_the_end() -> None:
        error = GracefulHTTPError(
            "the server stops, and has not finished this request in the time that it had for that "
            "(--shutdown-timeout); send it again",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
        with suppress(RuntimeError):  # the loop has ended, and all requests with it
            loop.call_soon_threadsafe(processor.propagate_error, error)

    replace_shutdown(engine_client, after=after_the_end)
