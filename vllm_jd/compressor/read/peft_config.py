"""PEFT's `adapter_config.json`: what of it changes the numbers, and what is not supported."""

import math
import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_jd.compressor.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Transformers' Conv1D layers: the only ones that `fan_in_fan_out` is meant for.
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc"}

# Starting values that leave the base model as it is; the others (PiSSA, OLoRA, LoftQ, CorDA …)
# change its weights, so that the factors alone do not give the adapted model.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}

# PEFT's get_pattern_key: a key is a module's whole name, or the end of it after a dot.
_EXPRESSION = r"(.*\.)?({})$"


class PeftConfig(BaseModel):
    """The fields of an `adapter_config.json` that the compressor reads, whatever the method."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    METHOD: ClassVar[str]
    """What people call the method."""

    base_model_name_or_path: str | None = None
    r: int = Field(gt=0)
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None

    @field_validator("base_model_name_or_path")
    @classmethod
    def _is_text(cls, name: str | None) -> str | None:
        (name or "").encode()  # half of a surrogate pair is a ValueError
        return name

    def faults(self) -> list[str]:
        """Every feature in use that a product of two factors a module cannot express."""
        found = []
        if self.bias != "none":
            found.append(f"bias is {self.bias!r}, expected 'none': trained biases are not kept")
        if self.modules_to_save:
            found.append(
                f"modules_to_save is {self.modules_to_save}, expected none: "
                "whole trained modules are not kept"
            )
        if self.fan_in_fan_out and not self._targets_conv1d():
            found.append(
                "fan_in_fan_out is true, but the target modules are linear layers, not Conv1D: "
                "expected false"
            )
        return found

    def rank_of(self, module: str) -> int:
        """Rank of a module."""
        return self.r

    def _targets_conv1d(self) -> bool:
        targets = self.target_modules
        names = targets if isinstance(targets, list) else [targets or ""]
        return any(name.rsplit(".", 1)[-1] in _CONV1D_MODULES for name in names)


class LoraConfig(PeftConfig):
    """Those of LoRA."""

    METHOD = "LoRA"

    lora_alpha: float
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: Any = True
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    trainable_token_indices: Any = None
    use_qalora: bool = False
    use_bdlora: Any = None
    target_parameters: list[str] | None = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_expressions(cls, pattern: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in pattern or {}:
            try:
                re.compile(_EXPRESSION.format(key))
            except (re.error, OverflowError) as error:
                raise ValueError(f"{key!r} is no regular expression: {error}") from None
        return pattern

    def faults(self) -> list[str]:
        """See `PeftConfig`."""
        found = super().faults()
        if self.use_dora:
            found.append("use_dora is true: DoRA rescales the base weights; retrain without it")
        if self.lora_bias:
            found.append("lora_bias is true, expected false: biases are not kept")
        if isinstance(self.init_lora_weights, str) and (
            self.init_lora_weights.lower() not in _PLAIN_INITS
        ):
            found.append(
                f"init_lora_weights is {self.init_lora_weights!r}: it changes the base weights; "
                "convert the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        for name, used in {
            "layer_replication": self.layer_replication,
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "trainable_token_indices": self.trainable_token_indices,
            "use_qalora": self.use_qalora,
            "use_bdlora": self.use_bdlora,
            "target_parameters": self.target_parameters,
        }.items():
            if used:
                found.append(f"{name} is set: not supported")
        return found

    def rank_of(self, module: str) -> int:
        """Rank of a module, `rank_pattern` considered."""
        return _match(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """α/r of a module, or α/√r with rsLoRA; both patterns considered."""
        alpha = _match(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class VeraConfig(PeftConfig):
    """Those of VeRA, which has no scale."""

    METHOD = "VeRA"

    r: int = Field(default=256, gt=0)
    projection_prng_key: int = 0


METHODS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "VERA": VeraConfig}
"""The methods that can be read, by their `peft_type`."""


def parse_config(raw: Any) -> PeftConfig:
    """The config of an adapter, by its `peft_type`.

    Args:
        raw: `adapter_config.json` as JSON reads it.

    Raises:
        AdapterError: a field is wrong, or the method is another one.
    """
    if not isinstance(raw, dict):
        raise AdapterError([f"{CONFIG_FILE}: found {type(raw).__name__}, expected a JSON object"])
    found = raw.get("peft_type")
    config = METHODS.get(found) if isinstance(found, str) else None
    if config is None:
        expected = " or ".join(map(repr, METHODS))
        raise AdapterError([f"{CONFIG_FILE}: peft_type is {found!r}, expected {expected}"])
    try:
        return config.model_validate(raw)
    except ValidationError as error:
        raise AdapterError(_described(error)) from None


def _described(error: ValidationError) -> list[str]:
    """One line a wrong field, in the user's words."""
    return [
        f"{CONFIG_FILE}: {'.'.join(map(str, item['loc'])) or 'file'}: "
        + item["msg"].removeprefix("Value error, ")
        for item in error.errors()
    ]


def _match(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What the first matching key of a pattern says."""
    for key, value in (pattern or {}).items():
        if re.match(_EXPRESSION.format(key), module):
            return value
    return default
