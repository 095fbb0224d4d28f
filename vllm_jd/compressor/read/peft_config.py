"""PEFT's `adapter_config.json`: what of it changes the numbers, and what is not supported."""

import math
import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_jd.compressor.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Transformers' Conv1D layers: the only ones that `fan_in_fan_out` is meant for.
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc"}

# Starting values that leave the base model as it is; the others (PiSSA, OLoRA, LoftQ, CorDA …)
# change its weights, so that the factors alone do not give the adapted model. LoRA-GA changes them
# while it trains, but PEFT and vLLM put what it saved on the unchanged base.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}

MOST_RANK = 1 << 20
"""More is no rank of a layer, and not every integer is a number to divide by."""

CONVERTIBLE = ("pissa", "olora")
"""Starting values that follow from the base model's weights alone."""

_MERGE = "merge it into a model of its own (PEFT's merge_and_unload), or train again without"
_SAVED_BASE = (
    "or, if the model that you serve has the changed weights already, set init_lora_weights to "
    f"true in {CONFIG_FILE}"
)
_INITIAL = (
    "save it again where it was trained, with PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…)"
)
_CONVERSIONS = {
    **dict.fromkeys(
        CONVERTIBLE,
        "convert it with `vllm-jd compress --convert --base-model FOLDER`, or with PEFT's "
        "path_initial_model_for_weight_conversion",
    ),
    "loftq": "serve the quantised model that it was trained on, or train again without LoftQ",
}

# PEFT's get_pattern_key: a key is a module's whole name, or the end of it after a dot.
_EXPRESSION = r"(.*\.)?({})$"


class PeftConfig(BaseModel):
    """The fields of an `adapter_config.json` that the compressor reads, whatever the method."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    METHOD: ClassVar[str]
    """What people call the method."""

    base_model_name_or_path: str | None = None
    r: int = Field(gt=0, le=MOST_RANK)
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, raw: Any) -> Any:
        """A null stands for what a field is by default, as a falsy value does in PEFT."""
        if not isinstance(raw, dict):
            return raw
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            key: value for key, value in raw.items() if value is not None or key not in optional
        }

    @field_validator("base_model_name_or_path")
    @classmethod
    def _is_text(cls, name: str | None) -> str | None:
        (name or "").encode()  # half of a surrogate pair is a ValueError
        return name

    def faults(self, *, convert: bool = False) -> list[str]:
        """Every feature in use that a product of two factors a module cannot express.

        `convert`: whether a change of the base model's weights that follows from these will be
        undone (`CONVERTIBLE`).
        """
        found = []
        if self.bias != "none":
            found.append(
                f"bias is {self.bias!r}, expected 'none': trained biases are not kept; "
                f"{_MERGE} them"
            )
        if self.modules_to_save:
            found.append(
                f"modules_to_save is {self.modules_to_save}, expected none: "
                f"whole trained modules are not kept; {_MERGE} them"
            )
        if self.fan_in_fan_out and not self._targets_conv1d():
            found.append(
                "fan_in_fan_out is true, but the target modules are linear layers, not Conv1D: "
                "expected false"
            )
        return found

    def explains(self, key: str) -> bool:
        """Whether one of `faults` is about this tensor, which is no factor."""
        saved = any(f".{module}." in f".{key}" for module in self.modules_to_save or ())
        return saved or (self.bias != "none" and key.endswith(".bias"))

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
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=MOST_RANK)]] | None = None
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
    arrow_config: Any = None
    kasa_config: Any = None
    target_parameters: list[str] | None = None
    peft_version: str | None = None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_expressions(cls, pattern: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in pattern or {}:
            try:
                re.compile(_EXPRESSION.format(key))
            except (re.error, OverflowError) as error:
                raise ValueError(f"{key!r} is no regular expression: {error}") from None
        return pattern

    def faults(self, *, convert: bool = False) -> list[str]:
        """See `PeftConfig`."""
        found = super().faults(convert=convert)
        if self.use_dora:
            found.append(f"use_dora is true: DoRA rescales the base weights; {_MERGE} it")
        if self.lora_bias:
            found.append(f"lora_bias is true, expected false: biases are not kept; {_MERGE} it")
        undone = convert and self.base_change in CONVERTIBLE and not self.fan_in_fan_out
        if self.base_change is not None and not undone:
            what_to_do = _CONVERSIONS.get(self.base_change, _INITIAL)
            found.append(
                f"init_lora_weights is {self.init_lora_weights!r}: training began by changing the "
                f"base model's weights; {what_to_do}; {_SAVED_BASE}"
            )
        for name, used in {
            "layer_replication": self.layer_replication,
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "trainable_token_indices": self.trainable_token_indices,
            "use_qalora": self.use_qalora,
            "use_bdlora": self.use_bdlora,
            "arrow_config": self.arrow_config,
            "kasa_config": self.kasa_config,
        }.items():
            if used:
                found.append(
                    f"{name} is set, which is not supported: it is more than two factors for each "
                    "linear layer; train again without it"
                )
        return found

    @property
    def old_stacks(self) -> bool:
        """Whether PEFT was older than 0.19, which stacks experts the other way round. Only 0.18 and
        later say which they are."""
        return (self.peft_version or "").startswith("0.18.")

    @property
    def base_change(self) -> str | None:
        """The starting values by which training changed the base model's weights, in lower case;
        None: it did not, or the adapter was converted since."""
        init = self.init_lora_weights
        if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
            return None
        return init.lower()

    def explains(self, key: str) -> bool:
        """See `PeftConfig`."""
        words = {
            "lora_magnitude_vector": self.use_dora,
            "lora_B.bias": self.lora_bias,
            "token_adapter": self.trainable_token_indices,
            "lora_diag": self.kasa_config,
        }
        return super().explains(key) or any(word in key for word, used in words.items() if used)

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

    r: int = Field(default=256, gt=0, le=MOST_RANK)
    projection_prng_key: int = 0


METHODS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "VERA": VeraConfig}
"""The methods that can be read, by their `peft_type`."""


def parse_config(raw: Any) -> PeftConfig:
    """The config of an adapter, by its `peft_type`; without one it is LoRA's.

    Args:
        raw: `adapter_config.json` as JSON reads it.

    Raises:
        AdapterError: a field is wrong, or the method is another one.
    """
    if not isinstance(raw, dict):
        raise AdapterError([f"{CONFIG_FILE}: found {type(raw).__name__}, expected a JSON object"])
    found = raw.get("peft_type")
    if found is None and "r" in raw:
        found = "LORA"  # as vLLM takes it, which does not look at peft_type
    config = METHODS.get(found.upper()) if isinstance(found, str) else None
    if config is None:
        expected = " or ".join(map(repr, METHODS))
        raise AdapterError([f"{CONFIG_FILE}: peft_type is {found!r}, expected {expected}"])
    try:
        return config.model_validate(raw)
    except ValidationError as error:
        raise AdapterError(described(error)) from None


def described(error: ValidationError) -> list[str]:
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
