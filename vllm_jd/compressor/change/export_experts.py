"""What PEFT reads of an adapter's experts: the tensors and the config of an export."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_jd.store import ModuleInfo, Store

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer → (B `[d_out, r]`, A `[r, d_in]`)."""

_FUSED, _DOWN = "gate_up_proj", "down_proj"
_STACKED_ONLY = ("gpt_oss",)  # model types that never had an expert's layer


@dataclass
class ExpertTensors:
    """Of an exported adapter.

    Args:
        rank: of every expert's layer; those of lower rank are filled with zeros, since PEFT makes
            one tensor of all experts.
        tensors: PEFT's keys, without `base_model.model.`.
        layers: names of the experts' layers that the adapter has, for `target_modules`.
        parameters: names of weights of all experts in one, for `target_parameters`.
    """

    rank: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def take_experts(store: Store, factors: Factors) -> ExpertTensors:
    """Take the experts out of what `store.factors` gives, as PEFT keeps them.

    Layers of their own stay that; what was trained on the weights of all experts in one
    (`gate_up_proj`) is stacked again.
    """
    found: dict[str, tuple[ModuleInfo, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    for info in store.manifest.modules if factors else ():
        names = [info.layer(expert) for expert in range(info.experts)]
        if any(name in factors for name in names):
            nothing = torch.zeros(info.d_out, 0), torch.zeros(0, info.d_in)
            found[info.name] = info, [factors.pop(name, nothing) for name in names]
    made = ExpertTensors()
    made.rank = max((b.shape[1] for _, each in found.values() for b, _ in each), default=0)
    stacks = _stacked(store, found)
    for name, (info, each) in found.items():
        filled = [_filled(b, a, made.rank) for b, a in each]
        if name in stacks:
            made.parameters.append(name)
            b = torch.stack([b for b, _ in filled], dim=2).flatten(1)
            made.tensors |= _pair(stacks[name], b, torch.cat([a for _, a in filled]))
            continue
        for expert, (b, a) in enumerate(filled):
            made.layers.append(info.layer(expert))
            made.tensors |= _pair(info.layer(expert), b, a)
    return made


def _stacked(store: Store, modules: Iterable[str]) -> dict[str, str]:
    """Modules that PEFT has as one tensor a side, and the name of its wrapper: the weights that a
    model has first are wrapped first."""
    modules = list(modules)
    fused = [name for name in modules if name.endswith(f".{_FUSED}")]
    everywhere = bool(fused) or store.manifest.base_model.config.get("model_type") in _STACKED_ONLY
    found = {}
    for name in modules:
        layer, _, projection = name.rpartition(".")
        both = f"{layer}.{_FUSED}" in modules and f"{layer}.{_DOWN}" in modules
        apart = any(f"{layer}.{half}" in modules for half in ("gate_proj", "up_proj"))
        if projection == _FUSED:
            found[name] = f"{layer}.base_layer" if both else layer
        elif projection == _DOWN and everywhere and not apart:
            found[name] = layer
    return found


def _filled(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - b.shape[1]
    return pad(b, (0, missing)), pad(a, (0, 0, 0, missing))


def _pair(module: str, b: torch.Tensor, a: torch.Tensor) -> dict[str, Any]:
    return {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
