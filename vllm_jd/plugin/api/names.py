"""What names stand for in one of vLLM's API servers, and what its engine is told of them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.callers import whole_names
from vllm_jd.plugin.api.requests import upload_path
from vllm_jd.plugin.api.residents import Resident, ask_residents

_CALL_FAILED = "Call to add_lora method failed: "


def changes_allowed() -> bool:
    """Whether clients may change adapters: VLLM_ALLOW_RUNTIME_LORA_UPDATING of this process."""
    return bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING)


class NotLoaded(Exception):
    """The engine has refused an adapter; the message says why."""


class Names(Mapping[str, LoRARequest]):
    """vLLM's table of names: name → the LoRARequest by which the engine is asked for it. All of it,
    whoever asks.

    Args:
        engine: vLLM's client of the engine.
        state: of the server's app, with vLLM's own objects in it.
    """

    def __init__(self, engine: Any, state: State):
        self.engine = engine
        self._models: OpenAIServingModels = state.openai_serving_models

    def __getitem__(self, name: str) -> LoRARequest:
        return whole_names(self._models)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(whole_names(self._models))

    def __len__(self) -> int:
        return len(whole_names(self._models))

    def is_base_model(self, name: str) -> bool:
        """Whether a name is the base model's."""
        return self._models.is_base_model(name)

    def new(self, name: str, path: str) -> LoRARequest:
        """A request that the engine tells from all others, by an id of its own: what it is told of
        one means no other. The name does not stand for it yet."""
        return LoRARequest(name, self._models.lora_id_counter.inc(1), path)

    def point(self, requests: Mapping[str, LoRARequest]) -> None:
        """Have names stand for these from now on."""
        whole_names(self._models).update(requests)

    def drop(self, name: str) -> LoRARequest | None:
        """Have a name stand for nothing; what it stood for, if anything."""
        return whole_names(self._models).pop(name, None)

    # --- the engine ---

    async def load(self, request: LoRARequest) -> None:
        """Have an upload loaded.

        Raises:
            NotLoaded: it cannot be.
            Exception: the engine is not there.
        """
        try:
            await self.engine.add_lora(request)
        except Exception as error:
            message = refusal_of(str(error))
            if message is None:
                raise
            raise NotLoaded(message) from None

    async def unload(self, request: LoRARequest) -> None:
        """Let an upload go, or what is pinned, once the last request with it has ended."""
        await self.engine.remove_lora(request.lora_int_id)

    async def pin(self, request: LoRARequest) -> None:
        """Load an adapter, and have it stay in its slots.

        Raises:
            Exception: there is no room, or it cannot be loaded; the message says which.
        """
        await self.engine.add_lora(request)
        await self.engine.pin_lora(request.lora_int_id)

    async def residents_of(self, folders: Iterable[Path]) -> list[Resident]:
        """What the engine has of uploads, whose folders are called by their digests."""
        paths = [upload_path(folder.name, str(folder)) for folder in folders]
        return await ask_residents(self.engine, [LoRARequest("_", 1, path) for path in paths])


def refusal_of(message: str) -> str | None:
    """What an engine found wrong with an adapter, from the message of its failed call; None: that
    is not what the message says."""
    _, called, refusal = message.partition(_CALL_FAILED)
    return refusal if called else None
