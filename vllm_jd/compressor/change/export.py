"""Turn an adapter of a store back into a PEFT adapter."""

import json
from pathlib import Path

from safetensors.torch import save_file

from vllm_jd.compressor.read.adapters import CONFIG_FILE, WEIGHTS_FILE
from vllm_jd.store import Store


def export_adapter(store: Store, name: str, out: Path) -> Path:
    """Write a PEFT LoRA adapter whose deltas equal those of `name` in the store.

    Its factors are A = Vᵀ and B = U·Σ, in float32, with alpha = r (scale 1). A VeRA adapter becomes
    a LoRA adapter of its rank, in which λ_b and λ_d are multiplied out.

    Args:
        store: the open store.
        name: the adapter.
        out: the folder to write; made if it is not there.

    Returns:
        `out`.

    Raises:
        KeyError: the store has no such adapter.
        FileExistsError: `out` holds something already.
    """
    factors = store.factors(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: already there and not an empty folder; choose another --out")
    ranks = {module: b.shape[1] for module, (b, _) in factors.items()}
    rank = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": store.manifest.base_model.name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: r for module, r in ranks.items() if r != rank},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out
