"""HTTP: a request may ask for several adapters with weights, and a blend may have a name.

    {"model": "a", "adapters": [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]}

`model` is what the answer says that it is of. `"blend": {"way": "ties", "density": 0.5}` beside it
says how they are put together.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.datastructures import State
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.blend_requests import blend_request, is_blend_request
from vllm_jd.plugin.api.callers import caller, full_name, whole_names
from vllm_jd.plugin.api.errors import error_response
from vllm_jd.plugin.on_objects import replace_adapter_lookup
from vllm_jd.store.blend import Blend, BlendError, UnknownPart, flat, of_mapping

SERVING = (
    "openai_serving_chat",
    "openai_serving_chat_batch",
    "openai_serving_completion",
    "openai_serving_responses",
)
"""The objects of a server that take requests with blends, by their names in its state."""


class Blends:
    """The blends of one API server.

    Args:
        models: vLLM's, whose `lora_requests` says which names there are; named blends are put
            among them.
        most: how many parts a blend may have (`--max-blend`).
    """

    def __init__(self, models: OpenAIServingModels, most: int):
        self._models, self._most = models, most
        self._named: dict[str, Blend] = {}
        self.faults: dict[str, str] = {}
        """Of named blends that cannot be served now: why."""
        self.look: Callable[[], Awaitable[None]] | None = None
        """What may bring a name that is not known yet."""

    # --- named ones ---

    def set_named(self, named: Mapping[str, Blend]) -> None:
        """Have these names, and no others, stand for blends; of the models' names as they are now.

        To be called again when all of those may have come to stand for something else (`follow`:
        when some have). What cannot be served (a part is gone, say) is in `faults` until it can.
        """
        before, self._named, self.faults = self._named, dict(named), {}
        for name in before.keys() - named.keys():
            self._take_back(name)
        self._name(self._named)

    def follow(self, changed: Iterable[str]) -> None:
        """Have the blends that these names are part of, however far down, be of what the names
        stand for now."""
        reached, users = set(changed), set()
        while True:
            found = {name for name, its in self._named.items() if reached & its.parts.keys()}
            if found <= users:
                break
            users |= found
            reached |= found
        self._name(users)

    def give(self, name: str, blend: Blend) -> LoRARequest | None:
        """Have one name more stand for a blend; those that it is part of: `follow`.

        Returns:
            Its LoRARequest, or None: see `faults`.
        """
        self._named[name] = blend
        self._name([name])
        return None if name in self.faults else whole_names(self._models)[name]

    def forget(self, name: str) -> None:
        """Have a name stand for no blend any more. Harmless where it does not."""
        if self._named.pop(name, None) is not None:
            self._take_back(name)
            self.faults.pop(name, None)

    def _name(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                request = self._request(name, self._named[name])
            except BlendError as error:
                self.faults[name] = str(error)
                self._take_back(name)
                continue
            self.faults.pop(name, None)
            before = whole_names(self._models).get(name)
            if before is None or before.lora_path != request.lora_path:
                # Names of one content are pinned each for itself.
                request.lora_int_id = self._models.lora_id_counter.inc(1)
                whole_names(self._models)[name] = request

    def _take_back(self, name: str) -> None:
        names = whole_names(self._models)
        request = names.get(name)
        if request is not None and is_blend_request(request):
            del names[name]

    def check_named(self, name: str, blend: Blend) -> None:
        """Whether a name may be given to a blend.

        Raises:
            UnknownPart: a part of it does not exist.
            BlendError: it would be part of itself, or cannot be for another reason.
        """
        before = self._named.get(name)
        self._named[name] = blend
        try:
            self._request(name, blend)
        finally:
            del self._named[name]
            if before is not None:
                self._named[name] = before

    # --- requests ---

    def asked(self, request: Any) -> LoRARequest | None:
        """The LoRARequest of a request that asks for a blend; None: it does not.

        Raises:
            UnknownPart: a part does not exist.
            BlendError: the request does not say a blend, or says one that cannot be.
        """
        extra = getattr(request, "model_extra", None) or {}
        adapters, how = extra.get("adapters"), extra.get("blend")
        if adapters is None:
            if how is not None:
                raise BlendError("found `blend`, but no `adapters`, expected both")
            return None
        model = request.model or self._models.base_model_paths[0].name
        return self._request(model, self.as_seen(_parsed(adapters, how)))

    def is_unknown(self, request: Any) -> bool:
        """Whether a request is for a name that stands for nothing, or has one among its parts."""
        model = getattr(request, "model", None)
        try:
            self.asked(request)
        except UnknownPart:
            return True
        except BlendError:
            return False
        known = not isinstance(model, str) or self._models.is_base_model(model)
        return not known and full_name(model, self._exists) is None

    def refusal(self, request: Any) -> ErrorResponse | None:
        """What to answer a request whose blend cannot be; None: it can, or it asks for none."""
        model = getattr(request, "model", None)
        broken = full_name(model, self._exists) if isinstance(model, str) else None
        if broken in self.faults:
            return error_response(
                f"The blend `{model}` cannot be served now: {self.faults[broken]}",
                HTTPStatus.NOT_FOUND,
                "model",
            )
        try:
            self.asked(request)
        except UnknownPart as error:
            return error_response(str(error), HTTPStatus.NOT_FOUND, "adapters")
        except BlendError as error:
            return error_response(str(error), HTTPStatus.BAD_REQUEST, "adapters")
        return None

    def as_seen(self, blend: Blend) -> Blend:
        """The same blend with the full names of its parts, as whoever asks calls them.

        Raises:
            UnknownPart: they know of no such part.
            BlendError: two names are of the same part.
        """
        if caller.get() is None:
            return blend
        weights: dict[str, float] = {}
        for part, weight in blend.parts.items():
            full = part if self._models.is_base_model(part) else full_name(part, self._exists)
            if full is None:
                raise UnknownPart(f"found the part {part!r}, which does not exist")
            if full in weights:
                raise BlendError(f"found {full!r} by two names, expected it once")
            weights[full] = weight
        return blend.model_copy(update={"weights": weights})

    def _exists(self, name: str) -> bool:
        return name in self._named or name in whole_names(self._models)

    def _request(self, name: str, blend: Blend) -> LoRARequest:
        requests = whole_names(self._models)

        def known(part: str) -> bool:
            if self._models.is_base_model(part):
                raise BlendError(
                    f"found the part {part!r}, which is the base model, expected adapters; all of "
                    "them are added to it"
                )
            return part in requests

        whole = flat(blend, self._named.get, known)
        whole.check_size(self._most)
        return blend_request(name, whole, {part: requests[part].lora_path for part in whole.parts})


def _parsed(adapters: Any, how: Any) -> Blend:
    if not isinstance(adapters, list) or not adapters:
        raise BlendError(
            'adapters: expected a list such as [{"name": "a", "weight": 0.7}], found '
            f"{_told(adapters)}"
        )
    weights: dict[str, float] = {}
    for i, each in enumerate(adapters):
        where = f"adapters[{i}]"
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise BlendError(f"{where}: expected an object with a name, found {_told(each)}")
        unknown = sorted(set(each) - {"name", "weight"})
        if unknown:
            raise BlendError(f"{where}: expected name and weight, found {unknown[0]!r} too")
        name, weight = each["name"], each.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise BlendError(f"{where}: expected a number as weight, found {_told(weight)}")
        if name in weights:
            raise BlendError(f"{where}: found {name!r} a second time, expected it once")
        weights[name] = _float(weight, where)
    if not isinstance(how, dict | None):
        raise BlendError(f"blend: expected an object, found {_told(how)}")
    return of_mapping(weights, **{str(key): value for key, value in (how or {}).items()})


def _float(weight: float, where: str) -> float:
    try:
        return float(weight)
    except OverflowError:
        raise BlendError(f"{where}: found a weight that is too large") from None


def _told(found: Any) -> str:
    return repr(found)[:80]


def serve_blends(state: State, blends: Blends, serving: Sequence[str] = SERVING) -> None:
    """Have a server's objects that take requests understand blends. Harmless when repeated."""

    async def refusal(request: Any) -> Any:
        if blends.look is not None and blends.is_unknown(request):
            await blends.look()
        return blends.refusal(request)

    def adapter(request: Any) -> LoRARequest | None:
        try:
            return blends.asked(request)
        except BlendError as error:  # it could be until a moment ago
            raise VLLMValidationError(str(error), parameter="adapters") from None

    for name in serving:
        found = getattr(state, name, None)
        if found is not None:
            replace_adapter_lookup(found, refusal, adapter)
