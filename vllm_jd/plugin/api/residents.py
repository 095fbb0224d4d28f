"""Ask a running engine what it has of adapters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.lora.request import LoRARequest

CALL = "vllm_jd_tell"
"""The engine core's method, see `vllm_jd.plugin.install`."""


class Resident(NamedTuple):
    """What an engine says of one adapter.

    Attributes:
        known: whether it has the adapter's source open.
        resident: whether all of it lies in slots: it is served without reading anything.
        references: requests that wait or run with it.
        last_used: when its name was last asked for, in seconds since 1970; None: not since the
            start.
    """

    known: bool
    resident: bool
    references: int
    last_used: float | None


async def ask_residents(engine_client: Any, requests: Sequence[LoRARequest]) -> list[Resident]:
    """What the engine says of each, in one call."""
    if not requests:
        return []
    adapters = [(request.lora_name, request.lora_path) for request in requests]
    told = await engine_client.engine_core.call_utility_async(CALL, adapters)
    return [Resident(*each) for each in told]
