"""Adapter folders that PEFT itself makes of a tiny Llama, and what PEFT's forward pass says."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_jd.compressor import read_adapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "org/tiny-llama"
TOKENS = torch.tensor([[1, 5, 9, 2, 33, 47, 8]])
Q = "model.layers.0.self_attn.q_proj"


def base_model(dtype=torch.float32, **config):
    """The same each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=32,
            **config,
        )
    )
    return model.to(dtype).eval()


def train(model, seed, size=0.2):
    """Move every trainable number of a PEFT model from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = size * torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn.to(parameter.dtype))
    return model.eval()


def trained(seed=1, *, model=None, size=0.2, **config):
    """A PEFT model with one trained LoRA adapter."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | config
    model = get_peft_model(model or base_model(), LoraConfig(task_type="CAUSAL_LM", **fields))
    return train(model, seed, size)


def save(model, folder, **options):
    """`save_pretrained`; the base model's name comes after it, else PEFT asks the Hub for it."""
    model.save_pretrained(folder, **options)
    for name in model.peft_config:
        edit_config(folder if name == "default" else folder / name, base_model_name_or_path=BASE)
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.double()


def loaded(folder, model=None):
    """What PEFT says with an adapter that it loads from a folder."""
    return logits(PeftModel.from_pretrained(model or base_model(), folder).eval())


def with_deltas(collection, i, model=None):
    """What the base model says with an adapter of a collection added to its weights."""
    model = model or base_model()
    for module in collection.shapes:
        found = collection.factors(module).subset(torch.tensor([i]))
        weight = model.get_submodule(module).weight.data
        delta = (found.b.T.double() @ found.a.double()).to(weight.dtype)
        weight += delta.T if isinstance(model.get_submodule(module), torch.nn.Embedding) else delta
    return logits(model)


def same(found, expected, bound=1e-5, base=None):
    """Compare, and make sure that there is an adapter to speak of."""
    away = float((expected - logits(base or base_model())).abs().max())
    assert away > 100 * bound, "the adapter does next to nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def read_like_peft(folder, *, reference=None, bound=1e-5, **options):
    """Read one folder, and compare with PEFT's forward pass on it (or on `reference`)."""
    collection = read_adapters([folder], **options)
    assert len(collection.names) == 1
    same(with_deltas(collection, 0), loaded(reference or folder), bound)
    return collection


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def drop_config(folder, *fields):
    config = json.loads((folder / CONFIG).read_text())
    left = {key: value for key, value in config.items() if key not in fields}
    (folder / CONFIG).write_text(json.dumps(left))


def rename_keys(folder, change):
    """Give the tensors other keys."""
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def as_mlx(folder, out, *, scale=1.5, **config):
    """Write a PEFT adapter of one rank as mlx-lm does, by what its LoRALinear computes:
    `y + scale · (x @ lora_a) @ lora_b`. PEFT's own α/r must be `scale`."""
    tensors = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name, side, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        tensors[f"{name}.{side.lower()}"] = tensor.T.contiguous()
    rank = json.loads((folder / CONFIG).read_text())["r"]
    fields = {
        "model": BASE,
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": scale},
    } | config
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapters.safetensors")
    (out / CONFIG).write_text(json.dumps(fields))
    return out
