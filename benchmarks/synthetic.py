"""Random LoRA adapters of a real model's shapes, made on the fly: a `Collection` without files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors

MODELS = {
    "smollm2": {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
    },
    "mistral-7b": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
    },
}
"""What `config.json` says of the models that need no folder."""


@dataclass(frozen=True)
class Structure:
    """What adapters have in common, and how they decay, much as trained ones do.

    Adapter i belongs to one of `families`, the same in all modules. Its B is (L·X + noise·E)·S and
    its A is Y·R + noise·F: L `[d_out, shared]` and R `[shared, d_in]` are its family's in this
    module, X, Y, E and F its own, all of them normal, but column k of L and row k of R are
    scaled by k^−½. S scales column j by j^−decay.

    The defaults are fitted to 50 adapters of rank 16 trained on SmolLM2 (in brackets), by relative
    squared errors: 0.32 (0.30), 0.16 (0.15) and 0.05 (0.07) of the best approximation of each
    adapter by rank 1, 2 and 4; 0.59 (0.61) and 0.34 (0.38) of JD-Full of rank 16 and 32.
    """

    families: int = 4
    shared: int = 32
    noise: float = 0.5
    decay: float = 1.0


class RandomCollection:
    """`n` adapters with normal factors, the same for the same arguments.

    Args:
        model: folder with the base model's `config.json` (Llama-like), or a name of `MODELS`.
        n: adapters.
        rank: of each.
        scale: standard deviation of a delta's entries. Small enough, the model still writes text.
        targets: which linear layers.
        seed: of all numbers.
        structure: what the adapters have in common; None: nothing, and a flat spectrum.
        layers: so many evenly spaced layers alone; None: all of them.

    Raises:
        ValueError: more layers than there are.
    """

    def __init__(
        self,
        model: Path | str,
        n: int,
        *,
        rank: int = 16,
        scale: float = 2e-4,
        targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
        seed: int = 0,
        structure: Structure | None = None,
        layers: int | None = None,
    ):
        if isinstance(model, str):
            config, self.base_model = MODELS[model], model
        else:
            config, self.base_model = json.loads((model / "config.json").read_text()), model.name
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
        depth = config["num_hidden_layers"]
        layers = depth if layers is None else layers
        if not 1 <= layers <= depth:
            raise ValueError(f"layers is {layers}; choose 1 to {depth} for {self.base_model}")
        self.names = [f"random-{i:05d}" for i in range(n)]
        self.shapes = {
            f"model.layers.{layer}.{known[target][0]}.{target}": known[target][1:]
            for layer in (int((i + 0.5) * depth / layers) for i in range(layers))
            for target in targets
        }
        self._rank, self._scale, self._seed, self._structure = rank, scale, seed, structure
        elements = n * rank * sum(d_in + d_out for d_in, d_out in self.shapes.values())
        self.factor_bytes = 4 * elements
        key = f"{rank} {scale} {seed}" + ("" if structure is None else f" {structure}")
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
        b = torch.randn(n * rank, d_out, generator=generator)
        if self._structure is not None:
            self._share(a, b, generator)
        b *= self._scale / rank**0.5
        return ModuleFactors(a, b, torch.full((n,), rank))

    def _share(self, a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> None:
        """Give normal factors the structure, in place; a delta's entries keep their size."""
        given, n, rank = self._structure, len(self.names), self._rank
        # Not from this module's generator: an adapter has one family in all modules.
        families = torch.Generator().manual_seed(self._seed)
        family = torch.randint(given.families, (n,), generator=families)
        weights = torch.arange(1, given.shared + 1) ** -0.5
        unit = (weights.square().sum() + given.noise**2) ** -0.5
        for rows in (a, b):
            rows *= given.noise
            common = torch.randn(given.families, given.shared, rows.shape[1], generator=generator)
            common *= weights[:, None]
            mix = torch.randn(n, rank, given.shared, generator=generator)
            for i, own in enumerate(rows.view(n, rank, -1)):
                own.addmm_(mix[i], common[family[i]])
            rows *= unit
        decay = torch.arange(1, rank + 1).float() ** -given.decay
        decay *= (rank / decay.square().sum()).sqrt()
        b *= decay.repeat(n)[:, None]

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
