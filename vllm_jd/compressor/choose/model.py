"""The base model itself, run with transformers."""

from typing import Any

import torch
from safetensors import SafetensorError

from vllm_jd.compressor.errors import ModelError
from vllm_jd.compressor.read.names import layer_key
from vllm_jd.store import Store


def load_model(model: str, device: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(a base model, by default in its checkpoint's dtype, its tokenizer).

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"the base model is run with transformers, which cannot be imported ({error}); "
            "`pip install 'vllm-jd[train]'`"
        ) from None
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the caller shows progress
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return loaded.to(device).eval(), tokenizer
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the base model {model!r} cannot be loaded: {lines[0]}; expected the folder or the "
            "Hub id of a causal language model with its tokenizer (--base-model)"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()


def layers_of(store: Store, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's layer of each of the store's modules, by its name or another spelling of it.

    Raises:
        ModelError: it lacks one.
    """
    named = dict(model.named_modules())
    spelled = {layer_key(name): layer for name, layer in named.items()}
    found = {}
    for module in store.manifest.modules:
        layer = named.get(module.name, spelled.get(layer_key(module.name)))
        if layer is None:
            raise ModelError(
                f"the store adapts the module {module.name}, which this base model does not "
                f"have; give the model that it was made for ({store.manifest.base_model.name})"
            )
        found[module.name] = layer
    return found
