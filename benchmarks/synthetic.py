"""Random LoRA adapters of a real model's shapes, made on the fly: a `Collection` without files."""

import hashlib
import json
from pathlib import Path

import torch

from vllm_jd.compressor.factors import ModuleFactors


class RandomCollection:
    """`n` adapters with normal factors, the same for the same arguments.

    Args:
        model: folder with the base model's `config.json` (Llama-like).
        n: adapters.
        rank: of each.
        scale: standard deviation of a delta's entries. Small enough, the model still writes text.
        targets: which linear layers.
        seed: of all numbers.
    """

    def __init__(
        self,
        model: Path,
        n: int,
        *,
        rank: int = 16,
        scale: float = 2e-4,
        targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
        seed: int = 0,
    ):
        config = json.loads((model / "config.json").read_text())
        hidden = config["hidden_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries = head * config["num_attention_heads"]
        keys = head * config["num_key_value_heads"]
        known = {
            "q_proj": ("self_attn", hidden, queries),
            "k_proj": ("self_attn", hidden, keys),
            "v_proj": ("self_attn", hidden, keys),
            "o_proj": ("self_attn", queries, hidden),
            "gate_proj": ("mlp", hidden, config["intermediate_size"]),
            "up_proj": ("mlp", hidden, config["intermediate_size"]),
            "down_proj": ("mlp", config["intermediate_size"], hidden),
        }
        self.base_model = model.name
        self.names = [f"random-{i:05d}" for i in range(n)]
        self.shapes = {
            f"model.layers.{layer}.{known[target][0]}.{target}": known[target][1:]
            for layer in range(config["num_hidden_layers"])
            for target in targets
        }
        self._rank, self._scale, self._seed = rank, scale, seed
        elements = n * rank * sum(d_in + d_out for d_in, d_out in self.shapes.values())
        self.factor_bytes = 4 * elements
        key = f"{rank} {scale} {seed}"
        self.source_sha256 = [
            hashlib.sha256(f"{name} {key}".encode()).hexdigest() for name in self.names
        ]
        # As bfloat16 files would have it.
        self.source_bytes = [2 * elements // n] * n

    def factors(self, module: str) -> ModuleFactors:
        """All adapters' factors for one module."""
        d_in, d_out = self.shapes[module]
        n, rank = len(self.names), self._rank
        digest = hashlib.sha256(f"{self._seed} {module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        a = torch.randn(n * rank, d_in, generator=generator)
        b = torch.randn(n * rank, d_out, generator=generator) * (self._scale / rank**0.5)
        return ModuleFactors(a, b, torch.full((n,), rank))

    def write_peft(self, index: int, folder: Path) -> None:
        """Write adapter `index` as a PEFT adapter in bfloat16."""
        from safetensors.torch import save_file

        tensors = {}
        rows = slice(index * self._rank, (index + 1) * self._rank)
        for module in self.shapes:
            factors = self.factors(module)
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = factors.a[rows].bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = factors.b[rows].T.bfloat16().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_model,
            "r": self._rank,
            "lora_alpha": self._rank,
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in self.shapes}),
            "bias": "none",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
