"""What the plugin is told through vLLM's `--additional-config '{"vllm_jd": {…}}'`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vllm_jd.plugin.defaults import (
    MAX_CPU_LORAS,
    MAX_LORAS,
    RECOMPRESS_AGE,
    RECOMPRESS_COUNT,
    RECOMPRESS_DEVICE,
    RECOMPRESS_THREADS,
)
from vllm_jd.store import Store

KEY = "vllm_jd"


class RecompressConfig(BaseModel):
    """When a server recompresses its store by itself, and with what.

    By the number of uploads that wait, by the age in seconds of the oldest of them, or, with new
    bases, by the share of adapters that the bases do not suit (of what is served, those which stay
    uncompressed uploads because they would lose too much). None: not for this reason.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int | None = Field(default=RECOMPRESS_COUNT, ge=1)
    age: float | None = Field(default=RECOMPRESS_AGE, gt=0)
    refit_share: float | None = Field(default=None, gt=0)
    threads: int = Field(default=RECOMPRESS_THREADS, ge=1)
    device: str = RECOMPRESS_DEVICE
    originals: tuple[str, ...] = ()


class PluginConfig(BaseModel):
    """The store to serve, and room for adapters that are served uncompressed.

    `max_loras` uncompressed adapters are resident at once, and up to `max_cpu_loras` of them kept
    in the worker's memory (as vLLM's flags of these names mean it; compressed adapters count for
    neither). Of the store, all bases are resident and the cores of `core_slots` adapters; None: as
    many as fit into 1 GiB. With `adapter_memory`, bases and cores share so many bytes of each
    worker, see `vllm_jd.plugin.engine.capacity`. A request may ask for a blend of up to `max_blend`
    adapters (0: of none, which takes no memory). `generation` and `manifest_sha256` pin one
    generation for all processes of a server, whatever is published while it starts; without them
    it is the live one. `verified` says that who made this has compared that generation with its
    hashes a moment ago.
    Clients may load adapters from inside of `adapter_roots` and `adapter_addresses` only, and from
    the Hub if `allow_remote_adapters`, where vLLM lets them load any
    (`VLLM_ALLOW_RUNTIME_LORA_UPDATING`); their weights may have `max_adapter_bytes`. `adapter_dir`
    is a folder of adapters that the server follows. `recompress` says when uploads are compressed,
    `follow_generations` whether a new generation is served as soon as it is published, or when it
    is asked for (`POST /v1/store/reload`).
    `api_keys` is a file of keys without which nothing is answered; of one tenant's requests,
    `max_queued_requests` may wait then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str
    store_base_model: str | None = None
    generation: int | None = None
    manifest_sha256: str | None = None
    verified: bool = False
    max_loras: int = Field(default=MAX_LORAS, ge=1)
    max_cpu_loras: int = Field(default=MAX_CPU_LORAS, ge=1)
    core_slots: int | None = Field(default=None, ge=1)
    max_blend: int = Field(default=0, ge=0, le=64)
    adapter_memory: int | None = Field(default=None, ge=1)
    adapter_roots: tuple[str, ...] = ()
    adapter_addresses: tuple[str, ...] = ()
    adapter_dir: str | None = None
    max_adapter_bytes: int = Field(default=4 << 30, ge=1)
    allow_remote_adapters: bool = False
    recompress: RecompressConfig = RecompressConfig()
    follow_generations: bool = True
    api_keys: str | None = None
    max_queued_requests: int = Field(default=128, ge=0)

    def open_store(self, *, verify: bool) -> Store:
        """Open the store, see `Store.open`. Raises StoreError."""
        if self.generation is None or self.manifest_sha256 is None:
            return Store.open(self.store, verify=verify)
        return Store.open_generation(
            Path(self.store), self.generation, self.manifest_sha256, verify=verify
        )


@lru_cache(maxsize=1)  # asked once for each layer of a model
def adapts_experts(config: PluginConfig) -> bool:
    """Whether any adapter of the store adapts experts. Raises StoreError."""
    with config.open_store(verify=False) as store:
        return any(module.experts for module in store.manifest.modules)


def plugin_config(additional_config: Any) -> PluginConfig | None:
    """The plugin's part of a VllmConfig's `additional_config`, or None: the plugin stays inert.

    Raises:
        ValueError: it is there, but not of the right form.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    return PluginConfig.model_validate(additional_config[KEY])
