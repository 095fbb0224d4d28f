"""The base model itself, run with transformers, alone or with something beside its layers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def beside(
    deltas: Iterable[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]],
) -> Iterator[None]:
    """The model with something added to what some of its layers say, until the block ends.

    Args:
        deltas: a layer, and what is added for its input: `[…, d_in]`, of an embedding the numbers
            of tokens `[…]` → `[…, d_out]`.
    """

    def adding(delta: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def hook(layer: torch.nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
            # Some embeddings multiply what they have for a token; so does PEFT.
            return y + (delta(args[0]) * getattr(layer, "embed_scale", 1.0)).to(y.dtype)

        return hook

    hooks = [layer.register_forward_hook(adding(delta)) for layer, delta in deltas]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def seen_by(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A·x of A `[r, d_in]`, float32 `[…, r]`; of the numbers of tokens, columns of A."""
    return x.float() @ a.T if x.is_floating_point() else a.T[x]
