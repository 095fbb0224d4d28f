"""Put the guard before a server's app, and the door before its engine."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from vllm_jd.plugin.api.callers import admit, caller, show_names_to_callers
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.serve.tenants.guard import Guard, key_in_use
from vllm_jd.serve.tenants.tenants import Tenants


def guard(app: FastAPI, config: PluginConfig) -> None:
    """Have every request to an app asked for its key, if keys are configured.

    Raises:
        KeyFileError: the file of keys is broken.
    """
    if config.api_keys is not None:
        tenants = Tenants(Path(config.api_keys), config.max_queued_requests)
        app.state.vllm_jd_tenants = tenants
        app.add_middleware(Guard, tenants=tenants)


def start(engine_client: Any, state: State) -> None:
    """Have an engine's requests wait at a door, and names be what callers may see, where the app is
    guarded.

    Raises:
        ValueError: vLLM has plugins that know no keys.
    """
    tenants: Tenants | None = getattr(state, "vllm_jd_tenants", None)
    if tenants is None:
        return
    show_names_to_callers(state.openai_serving_models)
    config = engine_client.vllm_config.scheduler_config
    tenants.open_door(config.max_num_seqs, config.max_num_batched_tokens)
    admit(engine_client, _Admission(tenants))


class _Admission:
    def __init__(self, tenants: Tenants):
        self._tenants = tenants

    def place(self, sequences: int, tokens: int) -> AbstractAsyncContextManager[Callable[[], None]]:
        who, door = caller.get(), self._tenants.door
        assert who is not None and door is not None
        return door.place(who.group, sequences, tokens)

    def charge(self) -> Callable[[int], None]:
        return partial(self._tenants.meter.charge, key_in_use.get())

    def open(self) -> None:
        assert self._tenants.door is not None
        self._tenants.door.open()
