"""A family's tiny model, adapters that PEFT makes on it, and what PEFT says with them."""

import copy
from contextlib import contextmanager

import torch

MIXED = "mixed"
UPLOAD = "upload"


def make_model(family, folder, tokenizer):
    """Write a random model of a family into `folder`; its norms and biases are random, too."""
    import transformers

    made = getattr(transformers, family.model)
    config = made.config_class(**_config(family, made, transformers))
    config.architectures = [family.model]
    torch.manual_seed(0)
    model = made(config).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data = parameter.data + noise
        # So that a bfloat16 engine computes with the same numbers.
        parameter.data = parameter.data.bfloat16().float()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(family, made, transformers):
    if not family.text:
        return copy.deepcopy(family.sizes)
    text = getattr(transformers, family.text)(**copy.deepcopy(family.sizes))
    return copy.deepcopy(family.wrapper) | {"text_config": text.to_dict()}


def make_adapters(family, model, folder):
    """Adapter name → folder: four of several ranks and targets, and one to upload.

    Args:
        family: the model's.
        model: its folder.
        folder: where to write them.
    """
    from peft import LoraConfig, get_peft_model

    attention = list(family.attention)
    experts = list(family.experts)
    mlp = list(family.mlp) or attention[:2]
    kinds = {
        "attention": {"r": 4, "lora_alpha": 8, "targets": attention},
        MIXED: {
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {attention[0]: 6},
            "alpha_pattern": {mlp[-1]: 9},
            "targets": [*attention[:2], mlp[-1]],
        },
        "mlp": {"r": 2, "lora_alpha": 3, "use_rslora": True, "targets": [] if experts else mlp},
        "wide": {"r": 5, "lora_alpha": 5, "targets": [*attention, *family.mlp, *family.heads]},
        UPLOAD: {"r": 4, "lora_alpha": 6, "targets": [*attention, *family.mlp, *family.heads]},
    }
    for name in ("mlp", "wide", UPLOAD) if experts else ():
        kinds[name]["target_parameters"] = experts
    folders = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        targets = sorted(set(kind.pop("targets")))
        if family.text:  # the tower's layers have such names, too
            targets = rf".*language_model.*\.({'|'.join(targets)})"
        torch.manual_seed(seed)
        adapted = get_peft_model(
            load(model), LoraConfig(target_modules=targets, init_lora_weights=False, **kind)
        )
        folders[name] = folder / name
        adapted.save_pretrained(folders[name])
    return folders


def load(folder):
    """A model's folder as transformers reads it, in float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    made = getattr(transformers, config.architectures[0])
    # Its sdpa leaves out the soft-caps of Gemma 2.
    return made.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Reference:
    """PEFT's forward pass, in float32.

    Args:
        model: a model's folder.
        folders: adapter name → folder.
        apart: whether each has a model of its own: PEFT has no two adapters in one of which only
            one adapts experts.
    """

    def __init__(self, model, folders, *, apart=False):
        from peft import PeftModel

        self._models = {}
        for name, folder in folders.items():
            if apart or not self._models:
                made = PeftModel.from_pretrained(load(model), folder, adapter_name=name)
            else:
                made.load_adapter(folder, adapter_name=name)
            self._models[name] = made

    @contextmanager
    def _with(self, name):
        if name is None:
            made = next(iter(self._models.values()))
            with made.disable_adapter():
                yield made
        else:
            self._models[name].set_adapter(name)
            yield self._models[name]

    @torch.inference_mode()
    def log_probabilities(self, name, ids):
        """Of all tokens after each of `ids`, with an adapter or with none: float64 `[len(ids),
        vocabulary]`."""
        with self._with(name) as model:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits.double(), -1)
