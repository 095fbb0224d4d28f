"""How a blend is named in vLLM's LoRARequest: its path says what its parts are, and where."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm.lora.request import LoRARequest

from vllm_jd.store.blend import Blend
from vllm_jd.store.errors import told

_BLEND = "vllm-jd-blend:"


class Part(NamedTuple):
    """A part of a blend: the name and the `lora_path` of its own LoRARequest, and its weight."""

    name: str
    path: str
    weight: float


class Blended(NamedTuple):
    """A blend and where its parts are."""

    parts: tuple[Part, ...]
    blend: Blend


def blend_request(name: str, blend: Blend, paths: Mapping[str, str]) -> LoRARequest:
    """The LoRARequest for a blend.

    Args:
        name: by which it is asked for.
        blend: of adapters (see `vllm_jd.store.blend.flat`).
        paths: the `lora_path` of each of its parts, by their names.
    """
    parts = [[part, paths[part], weight] for part, weight in blend.parts.items()]
    how = blend.model_dump(exclude={"weights"}, exclude_defaults=True)
    path = _BLEND + json.dumps([parts, how])
    number = 1 + int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "big")
    return LoRARequest(name, number, path)


def is_blend_request(request: LoRARequest) -> bool:
    """Whether the request asks for a blend."""
    return request.lora_path.startswith(_BLEND)


def parse_blend_path(path: str) -> Blended | None:
    """What a `lora_path` says of a blend, or None: it names none.

    Raises:
        ValueError: it names one, but not a good one.
    """
    if not path.startswith(_BLEND):
        return None
    try:
        parts, how = json.loads(path.removeprefix(_BLEND))
        made = tuple(Part(str(name), str(place), float(weight)) for name, place, weight in parts)
        return Blended(made, Blend(weights=_summed(made), **how))
    except (TypeError, ValueError) as error:
        reason = told(error) if isinstance(error, ValueError) else error
        raise ValueError(f"found the adapter path {path[:80]!r}: {reason}") from None


def _summed(parts: Sequence[Part]) -> dict[str, float]:
    return {part.name: part.weight for part in parts}
