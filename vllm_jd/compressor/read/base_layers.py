"""Which modules of adapters `vllm-jd serve` cannot serve, by the base model's config alone.

The layers of the base model are those of its class in transformers, made without memory (torch's
meta device), in about 0.1 s. Where transformers lacks that class, or is not installed, names and
the sizes in the config tell less.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_jd.compressor.read.names import layer_key

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>\d{1,9})(\..+)?")
_EXPERT = re.compile(r"\.experts\.\d+\.")

_MOST_LAYERS = 1000  # a config that says more is no model's: do not make them all

# How the keys of layers of towers and of what joins them to the language model begin.
_TOWERS = re.compile(
    r"(visual|vision_\w+|vit|audio_\w+|speech_\w+|embed_vision|embed_audio|multi_modal_projector|"
    r"mm_projector|connector|aligner|talker|code2wav)(\.|$)"
)
_EMBEDDING = "a table of embeddings, not that of the language model's tokens"
_TOWER = "not of the language model: only its tokens have adapters"
_ONE_EXPERT = "of an expert: vLLM keeps all experts of a layer in one, which is not wrapped"
_UNSERVED = (_EMBEDDING, _TOWER, _ONE_EXPERT)


@dataclass(frozen=True)
class Misfit:
    """A module that the served model will not take an adapter for, and why.

    `certain`: False where the server may know the layer by a name that is not known here.
    """

    module: str
    reason: str
    certain: bool

    @property
    def of_another_model(self) -> bool:
        """Whether the base model has no such layer, rather than one that is not served."""
        return self.certain and self.reason not in _UNSERVED

    @property
    def of_a_tower(self) -> bool:
        """Whether it is a part of a tower, or of what joins one to the language model."""
        return self.reason == _TOWER


@dataclass
class BaseLayers:
    """The layers of a base model, by their keys (`vllm_jd.compressor.read.names.layer_key`)."""

    model: str
    """The class of the base model."""
    linear: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The linear layers of the language model, and its output layer: (d_in, d_out); of experts
    those of one of them, under the name of the module of all (`….mlp.experts.up_proj`). Its
    embedding is a layer of one input for each token."""
    refused: dict[str, str] = field(default_factory=dict)
    """All else that is known not to be served, and why."""
    inner: set[str] = field(default_factory=set)
    """Every part of the language model, the ones around its layers, too."""


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder; {} if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def misfits(modules: Iterable[tuple[str, int, int]], config: Mapping[str, Any]) -> list[Misfit]:
    """The modules that the model of a config will not take adapters for.

    Args:
        modules: name, d_in and d_out of each.
        config: the base model's `config.json`, or as much of it as is known.
    """
    layers = _base_layers(config)
    found = []
    for module, d_in, d_out in modules:
        key = layer_key(module)
        if layers is None:
            fault = _by_name(key, (d_in, d_out), config)
        else:
            fault = _by_layers(key, (d_in, d_out), layers)
        if fault is not None:
            found.append(Misfit(module, *fault))
    return found


def told(found: Iterable[Misfit]) -> list[str]:
    """One sentence for each reason, with one of the modules that it is said of."""
    reasons: dict[str, list[str]] = {}
    for misfit in found:
        reasons.setdefault(misfit.reason, []).append(misfit.module)
    return [
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]


def _by_layers(key: str, shape: tuple[int, int], layers: BaseLayers) -> tuple[str, bool] | None:
    if key in layers.refused:
        return layers.refused[key], True
    if key in layers.linear:
        expected = layers.linear[key]
        if shape == expected:
            return None
        return (
            f"adapts a layer of {shape[0]} → {shape[1]}, which is {expected[0]} → {expected[1]} "
            f"in {layers.model}",
            True,
        )
    if _TOWERS.match(key):
        return _TOWER, True
    if _EXPERT.search(key):
        return _ONE_EXPERT, True
    if key in layers.inner:
        return None  # such as the router of a mixture of experts: the server has it as it likes
    layer = _LAYER.fullmatch(key)
    if layer and layer["stack"] in layers.inner:
        count = sum(
            re.fullmatch(rf"{re.escape(layer['stack'])}\.\d+", part) is not None
            for part in layers.inner
        )
        if int(layer["index"]) >= count:
            return f"{layers.model} has {count} layers here", True
    return f"not in {layers.model} of transformers", False


def _by_name(
    key: str, shape: tuple[int, int], config: Mapping[str, Any]
) -> tuple[str, bool] | None:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    if _TOWERS.match(key):
        return _TOWER, True
    if _EXPERT.search(key):
        return _ONE_EXPERT, True
    layer = _LAYER.fullmatch(key)
    count = text.get("num_hidden_layers")
    known = layer is not None and layer["stack"] == "layers" and type(count) is int
    if known and int(layer["index"]) >= count:
        return f"the base model's config says {count} layers", True
    hidden = text.get("hidden_size")
    sides = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), 0)
    sides |= {"o_proj": 1, "down_proj": 1, "embed_tokens": 1}
    side = sides.get(key.rsplit(".", 1)[-1])
    if side is not None and type(hidden) is int and shape[side] != hidden:
        where = "outputs" if side else "inputs"
        return f"has {shape[side]} {where}; the base model's config says {hidden}", False
    return None


def _base_layers(config: Mapping[str, Any]) -> BaseLayers | None:
    """The layers of a config's model, or None where they cannot be told."""
    model = _skeleton(config)
    if model is None:
        return None
    found = BaseLayers(type(model).__name__)
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    inside = {id(part) for part in decoder.modules()}
    for name, part in model.named_modules(remove_duplicate=False):
        key = layer_key(name)
        if part is output and (shape := _shape(part)) is not None:
            found.linear[key] = shape
        elif part is embedding and isinstance(part, torch.nn.Embedding):
            found.linear[key] = part.num_embeddings, part.embedding_dim
        elif isinstance(part, torch.nn.Embedding):
            found.refused[key] = _EMBEDDING
        elif id(part) not in inside:
            if not any(id(below) in inside for below in part.modules()):
                found.refused[key] = _TOWER
        else:
            found.inner.add(key)
            if (shape := _shape(part)) is not None:
                found.linear[key] = shape
            for projection, shape in _expert_shapes(part).items():
                found.linear[f"{key}.{projection}"] = shape
    return found


def _expert_shapes(part: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Projection → (d_in, d_out) of an expert, of a module with the weights of all of them."""
    found = {}
    for name, weight in part.named_parameters(recurse=False):
        if weight.ndim == 3 and name in ("gate_up_proj", "down_proj"):
            turned = getattr(part, "is_transposed", False)
            found[name] = tuple(weight.shape[1:]) if turned else tuple(weight.shape[:0:-1])
    if (fused := found.get("gate_up_proj")) and fused[1] % 2 == 0:
        found |= dict.fromkeys(("gate_proj", "up_proj"), (fused[0], fused[1] // 2))
    return found


def _shape(part: torch.nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer."""
    if isinstance(part, torch.nn.Linear):
        return part.in_features, part.out_features
    if type(part).__name__ == "Conv1D":  # of transformers: a linear layer the other way round
        d_in, d_out = part.weight.shape
        return d_in, d_out
    return None


def _skeleton(config: Mapping[str, Any]) -> Any:
    """The model of a config on torch's meta device; None where that cannot be made, or says
    nothing of which of its layers are served."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None
    try:
        import transformers

        made = getattr(transformers, architectures[0])
        known = {key: value for key, value in config.items() if key != "quantization_config"}
        settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(known)
        layers = getattr(settings.get_text_config(), "num_hidden_layers", 0)
        if settings.is_encoder_decoder or layers > _MOST_LAYERS:
            return None
        with torch.device("meta"):
            model = made._from_config(settings)
        return None if model.get_decoder() is None else model
    # A config may say anything, and each class stumbles in its own way: then names must do.
    except Exception:
        return None
