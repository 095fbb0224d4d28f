"""Adapters of mlx-lm, as the LoRA adapters that they are.

mlx-lm computes `y + scale · (x · lora_a) · lora_b`, lora_a `[d_in, r]`, lora_b `[r, d_out]`: the
transposes of PEFT's A and B, and a scale that stands in the config as it is.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.keys import Factor
from vllm_jd.compressor.read.peft_config import CONFIG_FILE, MOST_RANK, LoraConfig, described

MLX_WEIGHTS_FILE = "adapters.safetensors"
OLD_WEIGHTS_FILE = "adapters.npz"

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    rank: int = Field(gt=0, le=MOST_RANK)
    scale: float
    alpha: float | None = None


class _MlxConfig(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    fine_tune_type: str | None = None
    lora_parameters: _Parameters


def is_mlx(raw: Any) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's."""
    return (
        isinstance(raw, dict)
        and "peft_type" not in raw
        and bool({"fine_tune_type", "lora_parameters"} & raw.keys())
    )


def parse_mlx_config(raw: dict[str, Any]) -> LoraConfig:
    """The config of an mlx-lm adapter, as PEFT would have written it.

    Raises:
        AdapterError: a field is wrong, or it is something else than a LoRA adapter.
    """
    kind = raw.get("fine_tune_type")
    if kind not in (None, "lora"):
        raise AdapterError(
            [
                f"{CONFIG_FILE}: found fine_tune_type {kind!r} of mlx-lm, expected 'lora': "
                "it is not a product of two factors for each linear layer; train again with "
                "--fine-tune-type lora, or fuse it into a model of its own (mlx_lm.fuse)"
            ]
        )
    try:
        config = _MlxConfig.model_validate(raw)
        found = config.lora_parameters
        # Releases that write fine_tune_type keep an alpha of their defaults in the config that
        # they do not use; the first ones multiplied the scale by alpha/rank.
        if kind is None and found.alpha not in (None, found.rank):
            raise AdapterError(
                [
                    f"{CONFIG_FILE}: lora_parameters has alpha {found.alpha:g} and scale "
                    f"{found.scale:g}, and no fine_tune_type: early releases of mlx-lm multiply "
                    "that scale by alpha/rank, later ones do not; write the scale that it was "
                    "trained with, and leave alpha out"
                ]
            )
        return LoraConfig(
            base_model_name_or_path=config.model,
            r=found.rank,
            lora_alpha=found.scale * found.rank,
        )
    except ValidationError as error:
        raise AdapterError(described(error)) from None


def mlx_factor_of(key: str) -> Factor | None:
    """What a tensor's key means; None: it is no factor of a linear layer."""
    match = _FACTOR.fullmatch(key)
    return Factor(match["module"], match["side"].upper(), None) if match else None
