"""What the plugin is told through vLLM's `--additional-config '{"vllm_jd": {…}}'`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

KEY = "vllm_jd"


class PluginConfig(BaseModel):
    """The store to serve, and room for adapters that are served uncompressed.

    `max_loras` uncompressed adapters are resident at once, and up to `max_cpu_loras` of them kept
    in the worker's memory (as vLLM's flags of these names mean it; compressed adapters are always
    resident and count for neither).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str
    store_base_model: str | None = None
    max_loras: int = Field(default=8, ge=1)
    max_cpu_loras: int = Field(default=64, ge=1)


def plugin_config(additional_config: Any) -> PluginConfig | None:
    """The plugin's part of a VllmConfig's `additional_config`, or None: the plugin stays inert.

    Raises:
        ValueError: it is there, but not of the right form.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    return PluginConfig.model_validate(additional_config[KEY])
