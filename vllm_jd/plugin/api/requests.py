"""How a compressed adapter is named in vLLM's LoRARequest."""

from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_jd.store import Store

# vLLM keys its prefix cache by (lora_name, lora_path): with the generation in the path, blocks
# that were computed with an adapter's older numbers are not used again.
_SCHEME = "vllm-jd:"

WARMUP_PATH = "/not/a/real/path"
"""`lora_path` of the stand-ins that vLLM's warm-up runs ask for."""


def store_path(store: Path | str, generation: int) -> str:
    """The `lora_path` of every adapter in a generation of a store, however its path is spelled."""
    return f"{_SCHEME}{Path(store).resolve()}@{generation}"


def is_store_request(request: LoRARequest) -> bool:
    """Whether the request asks for a compressed adapter (rather than a PEFT folder)."""
    return request.lora_path.startswith(_SCHEME)


def is_warmup_request(request: LoRARequest) -> bool:
    """Whether the request is one of vLLM's own, made for a warm-up run."""
    return request.lora_path == WARMUP_PATH


def adapter_request(store: Store, name: str) -> LoRARequest:
    """The LoRARequest for a compressed adapter, for `vllm.LLM.generate(…, lora_request=…)`.

    Raises:
        KeyError: the store has no adapter of that name.
    """
    return LoRARequest(name, store.index(name) + 1, store_path(store.path, store.generation))
