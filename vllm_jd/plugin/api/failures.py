"""What a client is told of a request that failed for its adapter's sake."""

from typing import Any

from vllm.exceptions import GenerationError, VLLMValidationError

from vllm_jd.plugin.placed import BAD_BLEND, FAILED


def raise_failure(output: Any) -> None:
    """Raise what a RequestOutput says of its adapter; vLLM's own words would be "Internal server
    error".

    Raises:
        VLLMValidationError: the request asked for a blend that cannot be.
        GenerationError: the adapter could not be had; the message says why.
    """
    for each in getattr(output, "outputs", ()):
        reason = getattr(each, "stop_reason", None)
        if each.finish_reason == "error" and isinstance(reason, str) and reason.startswith(FAILED):
            reason = reason.removeprefix(FAILED)
            if reason.startswith(BAD_BLEND):
                raise VLLMValidationError(reason, parameter="adapters")
            raise GenerationError(reason)
