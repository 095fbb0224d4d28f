"""Who a request comes from: what its names stand for, and what it shares with others.

Where a server knows nothing of callers, names stand for themselves. With a caller, a name is looked
for in the caller's own name space first (`mine` is `acme/mine`), then as it is; what the caller may
not see is not there. It is so for every route of vLLM's, as they all ask one table of names.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from vllm_jd.plugin.on_objects import (
    replace_generating,
    replace_names,
    replace_shutdown,
    tell_first_outputs,
)


@dataclass(frozen=True)
class Caller:
    """Who a request comes from.

    Attributes:
        group: whose requests have what they share: blocks of the prefix cache, turns at the door.
        space: its name space: the adapters `space/…` are its own. None: it has none, and a name
            that it gives an adapter is that.
        sees: whether it may know of the adapter of a (full) name.
        admin: whether it runs the server, rather than uses it.
        most_adapters: in its name space; None: any number.
        most_bytes: of their weights; None: any number.
    """

    group: str
    space: str | None
    sees: Callable[[str], bool]
    admin: bool = False
    most_adapters: int | None = None
    most_bytes: int | None = None

    def own(self, name: str) -> str:
        """The full name of what it calls `name` in its own name space."""
        if self.space is None or name.startswith(f"{self.space}/"):
            return name
        return f"{self.space}/{name}"


caller: ContextVar[Caller | None] = ContextVar("vllm_jd_caller", default=None)
"""Who the request comes from that is being answered; None: the server itself, or nobody asks."""


def full_name(name: str, exists: Callable[[str], bool]) -> str | None:
    """The full name of what `name` stands for to whoever asks; None: for nothing that they know of.

    Args:
        name: as it was asked for.
        exists: whether there is something of a full name.
    """
    who = caller.get()
    if who is None:
        return name if exists(name) else None
    for full in (who.own(name), name):
        if exists(full) and who.sees(full):
            return full
    return None


def may_know(name: str) -> bool:
    """Whether whoever asks may know whether there is an adapter of a full name."""
    who = caller.get()
    return who is None or who.sees(name)


class SeenNames(MutableMapping[str, LoRARequest]):
    """vLLM's table of names, as whoever asks sees it.

    Args:
        whole: the table itself, to which changes go as they are.
        is_base_model: whether a name is the base model's, which means that to everybody.
    """

    def __init__(self, whole: dict[str, LoRARequest], is_base_model: Callable[[str], bool]):
        self.whole = whole
        self._is_base_model = is_base_model

    def _full(self, name: object) -> str | None:
        if not isinstance(name, str) or self._is_base_model(name):
            return None
        return full_name(name, self.whole.__contains__)

    def __getitem__(self, name: str) -> LoRARequest:
        full = self._full(name)
        if full is None:
            raise KeyError(name)
        return self.whole[full]

    def __contains__(self, name: object) -> bool:
        return self._full(name) is not None

    def __iter__(self) -> Iterator[str]:
        who = caller.get()
        return iter(self.whole) if who is None else filter(who.sees, self.whole)

    def __len__(self) -> int:
        return len(self.whole) if caller.get() is None else sum(1 for _ in self)

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        self.whole[name] = request

    def __delitem__(self, name: str) -> None:
        del self.whole[name]


def whole_names(models: OpenAIServingModels) -> dict[str, LoRARequest]:
    """vLLM's table of names, whoever asks."""
    names = models.lora_requests
    return names.whole if isinstance(names, SeenNames) else names


def show_names_to_callers(models: OpenAIServingModels) -> None:
    """Have a server's names be what its callers may see. Harmless when repeated.

    Raises:
        ValueError: vLLM would look for names elsewhere, whoever asks.
    """
    if models.lora_resolvers:
        raise ValueError(
            "found API keys, and a plugin of vLLM's that resolves adapters by their names "
            "(VLLM_LORA_RESOLVER_CACHE_DIR, VLLM_LORA_RESOLVER_HF_REPO_LIST), which knows no keys; "
            "expected one of them"
        )
    replace_names(models, SeenNames(whole_names(models), models.is_base_model))


_GO_IN_SECONDS = 0.2  # until those who waited have told the engine of their requests


class Admission(Protocol):
    """Who lets requests into the engine."""

    def place(self, sequences: int, tokens: int) -> AbstractAsyncContextManager[Callable[[], None]]:
        """Wait until whoever asks may have so many sequences in the engine, with a prompt of so
        many tokens, and hold them. Gives what to call when there is output."""

    def charge(self) -> Callable[[int], None]:
        """What to call with every token that is computed for whoever asks."""

    def open(self) -> None:
        """Have nobody wait any more."""


def admit(engine_client: Any, admission: Admission) -> None:
    """Have every request to the engine wait for its place, be charged, and share blocks of the
    prefix cache with its own group only. Call it in the server's loop. Harmless when repeated."""

    unread: dict[str, Callable[[], None]] = {}
    """What to call when there is output, by request ids."""

    def heard(request_id: str) -> None:
        if has_output := unread.pop(request_id, None):
            has_output()

    def generate(
        stock: Callable[[Any], AsyncGenerator[Any, None]], prompt: Any, params: Any, request_id: str
    ) -> AsyncGenerator[Any, None]:
        who = caller.get()
        if who is None:
            return stock(prompt)
        charge = admission.charge()
        prompt = _salted(prompt, who.group)
        tokens = len(prompt.get("prompt_token_ids") or ())
        place = admission.place(getattr(params, "n", 1) or 1, tokens)
        inside = _listening(place, unread, request_id)
        return _admitted(lambda: stock(prompt), tokens, params, inside, charge)

    replace_generating(engine_client, generate)
    tell_first_outputs(engine_client, heard)
    loop = asyncio.get_running_loop()

    async def go_in() -> None:
        admission.open()
        await asyncio.sleep(_GO_IN_SECONDS)

    def before_the_end() -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # in another thread, as vLLM stops an engine that answers first
            with suppress(TimeoutError, RuntimeError):
                asyncio.run_coroutine_threadsafe(go_in(), loop).result(10 * _GO_IN_SECONDS)

    replace_shutdown(engine_client, before=before_the_end)


@asynccontextmanager
async def _listening(
    place: AbstractAsyncContextManager[Callable[[], None]],
    unread: dict[str, Callable[[], None]],
    request_id: str,
) -> AsyncIterator[None]:
    """A place, whose first output is listened for."""
    async with place as has_output:
        # Of two with one id the first is heard: the other's prompt counts to its end.
        unread.setdefault(request_id, has_output)
        try:
            yield
        finally:
            if unread.get(request_id) is has_output:
                del unread[request_id]


async def _admitted(
    generate: Callable[[], AsyncGenerator[Any, None]],
    tokens: int,
    params: Any,
    place: AbstractAsyncContextManager[None],
    charge: Callable[[int], None],
) -> AsyncGenerator[Any, None]:
    async with place:
        charge(tokens)
        deltas = getattr(params, "output_kind", None) == RequestOutputKind.DELTA
        counted: dict[int, int] = {}
        # A client that goes away ends this generator; the engine must be told at once.
        async with aclosing(generate()) as outputs:
            async for output in outputs:
                for each in getattr(output, "outputs", ()):
                    before = counted.get(each.index, 0)
                    now = len(each.token_ids) + (before if deltas else 0)
                    counted[each.index] = now
                    charge(now - before)
                yield output


def _salted(prompt: Any, group: str) -> Any:
    """A prompt whose blocks in the prefix cache are used by its group only, whatever salt the
    client gave."""
    if not isinstance(prompt, dict):  # as no route of vLLM's has it
        raise TypeError(f"found a prompt of type {type(prompt).__name__}, expected a dict")
    said = json.dumps([group, prompt.get("cache_salt")])
    return {**prompt, "cache_salt": hashlib.sha256(said.encode()).hexdigest()}
