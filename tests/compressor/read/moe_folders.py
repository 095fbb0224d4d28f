"""Tiny mixtures of experts, adapters of their experts that PEFT makes, and what PEFT says."""

import json

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from tests.compressor.read.peft_folders import save, train

TOKENS = torch.tensor([[1, 5, 9, 2, 33, 47, 8]])
EXPERTS, HIDDEN, INNER, LAYERS = 4, 24, 20, 2
BASE = "org/tiny-llama"
STACKED = ["experts.gate_up_proj", "experts.down_proj"]

_COMMON = {
    "vocab_size": 48,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "Qwen3Moe": {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "head_dim": 8},
    "Mixtral": {"intermediate_size": INNER, "num_local_experts": EXPERTS},
    "Olmoe": {"intermediate_size": INNER, "num_experts": EXPERTS, "eos_token_id": 0},
    "GptOss": {"intermediate_size": INNER, "num_local_experts": EXPERTS, "head_dim": 8},
}


def base_model(family):
    """The same each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**_COMMON | FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.double()


def stacked(family, folder, seed=1, **config):
    """Have PEFT train and save an adapter of all experts in one. Returns what it says with it."""
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": STACKED}
    lora = LoraConfig(task_type="CAUSAL_LM", **fields | config)
    model = train(get_peft_model(base_model(family), lora), seed)
    save(model, folder)
    return logits(model)


def own_layers(folder, names, *, seed=1, rank=3, alpha=6, experts=range(EXPERTS)):
    """Write an adapter with layers for each expert, as PEFT did of transformers 4.

    Args:
        names: format of a layer's experts' name, and the projections: gate, up, down.
    """
    prefix, (gate, up, down) = names
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for expert in experts:
            for projection, d_in, d_out in (
                (gate, HIDDEN, INNER),
                (up, HIDDEN, INNER),
                (down, INNER, HIDDEN),
            ):
                key = f"base_model.model.{prefix.format(layer)}.{expert}.{projection}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / 4
                tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) / 4
    return write(folder, tensors, rank, alpha, target_modules=[gate, up, down])


def write(folder, tensors, rank, alpha, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [],
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    return folder


QWEN = ("model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj"))
MIXTRAL = ("model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2"))


def deltas(collection, i):
    """(layer, projection) → the deltas of adapter i's experts, float64 `[E, d_out, d_in]`; gate and
    up of one layer under `gate_up_proj`."""
    found = {}
    for module, experts in collection.experts.items():
        factors = collection.factors(module)
        each = [factors.subset(torch.tensor([i * experts + e])) for e in range(experts)]
        layer, projection = int(module.split(".")[2]), module.rsplit(".", 1)[-1]
        projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(
            projection, projection
        )
        found[layer, projection] = torch.stack([f.b.T.double() @ f.a.double() for f in each])
    for layer in range(LAYERS):
        if (layer, "gate_proj") in found:
            halves = [found.pop((layer, half)) for half in ("gate_proj", "up_proj")]
            found[layer, "gate_up_proj"] = torch.cat(halves, dim=1)
    return found


def with_deltas(family, collection, i):
    """What the base model says with an adapter of a collection added to its weights."""
    model = base_model(family)
    for module in collection.shapes.keys() - collection.experts.keys():
        found = collection.factors(module).subset(torch.tensor([i]))
        model.get_submodule(module).weight.data += found.b.T @ found.a
    for (layer, projection), delta in deltas(collection, i).items():
        weight = getattr(model.get_submodule(f"model.layers.{layer}.mlp.experts"), projection)
        weight.data += (delta.mT if family == "GptOss" else delta).float()
    return logits(model)


def with_factors(family, factors):
    """The same with layer → (B, A), an expert's layer by its name (`….experts.5.gate_proj`)."""
    model = base_model(family)
    for layer, (b, a) in factors.items():
        delta = (b.double() @ a.double()).float()
        if ".experts." not in layer:
            model.get_submodule(layer).weight.data += delta
            continue
        experts, expert, projection = layer.rsplit(".", 2)
        projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(
            projection, projection
        )
        weights = model.get_submodule(experts.replace("block_sparse_moe", "mlp"))
        if projection in ("gate_proj", "up_proj"):
            half = weights.gate_up_proj.data[int(expert)].chunk(2)[projection == "up_proj"]
            half += delta
        else:
            weight = getattr(weights, projection).data[int(expert)]
            weight += delta.T if family == "GptOss" else delta
    return logits(model)
