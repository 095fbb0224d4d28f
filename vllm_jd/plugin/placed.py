"""LoRARequests that the engine has given a slot: what its scheduler hands on to the workers."""

from vllm.lora.request import LoRARequest

_PLACED = "vllm-jd-slot:"

BAD_BLEND = "the blend cannot be made: "
"""How the reason begins where its request asked for a blend that cannot be."""

FAILED = "vllm-jd: "
"""How the `stop_reason` of a request begins that failed for its adapter's sake."""


def known_by(identity: str) -> LoRARequest:
    """A request for the adapter of this identity, which has no slot yet.

    vLLM keys its prefix cache by name and path, and takes two requests of one name for one: here
    both say whose numbers are meant, and no other adapter has them.
    """
    return LoRARequest(identity, 1, _PLACED + identity)


def placed(identity: str, slot: int) -> LoRARequest:
    """The same, once it has a slot: its id, which the workers see of each token, is one more."""
    return LoRARequest(identity, slot + 1, _PLACED + identity, base_model_name=_PLACED)


def slot_of(request: LoRARequest) -> int | None:
    """The slot of a request that has one. Nothing that a user sends reaches the workers as it is,
    so that the others are vLLM's own, of a warm-up run."""
    return request.lora_int_id - 1 if request.base_model_name == _PLACED else None
