"""Have a running engine serve another generation of its store."""

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.requests import store_path

CALL = "vllm_jd_serve_generation"
"""The engine core's method, see `vllm_jd.plugin.install`."""


def serve_generation(engine: Any, store: Path | str, generation: int) -> None:
    """Open a generation on an engine and all its workers; what is served of the store otherwise
    goes when its last request ends.

    Requests go on to name the generation that they want (`adapter_request`): those that run keep
    theirs, and none waits.

    Args:
        engine: a `vllm.LLM`'s `llm_engine`.
        store: the store's folder.
        generation: its number.

    Raises:
        Exception: it cannot be served beside what the server was started with; the message says
            why, and everything is as it was.
    """
    client = engine.engine_core
    arguments = str(Path(store).resolve()), generation
    if hasattr(client, "call_utility"):
        client.call_utility(CALL, *arguments)
    else:  # in this process
        getattr(client.engine_core, CALL)(*arguments)


async def serve_generation_async(engine_client: Any, store: Path | str, generation: int) -> None:
    """The same of a server's engine client."""
    client = engine_client.engine_core
    await client.call_utility_async(CALL, str(Path(store).resolve()), generation)


async def open_generation_async(engine_client: Any, store: Path | str, generation: int) -> None:
    """Open a generation beside the one that is served, so that requests may name it.

    Raises:
        Exception: as `serve_generation`.
    """
    await engine_client.add_lora(LoRARequest("", 1, store_path(store, generation)))
