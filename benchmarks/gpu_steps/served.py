"""What the step `engine` serves: a tiny Llama, a lossy store, its exports, and a PEFT adapter.

Made where the bundle is filled, and carried in it: on the GPU machine nothing is compressed.
"""

from pathlib import Path

import torch

SERVED = "served"  # in the bundle
MODEL, UPLOAD = "tiny-llama", "upload"
ADAPTERS = 4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOUD = 0.15
"""Standard deviation of the weights, and of what adapters add to them: enough for other answers."""


def make(folder: Path) -> float:
    """Write all of it into a new folder. Returns the store's mean relative squared error."""
    from synthetic import RandomCollection
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm_jd.compressor import Settings, compress, export_adapter
    from vllm_jd.store import read_base_model

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=256,
        initializer_range=LOUD,
        tie_word_embeddings=False,
    )
    model = folder / MODEL
    model.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(model)
    adapters = RandomCollection(model, ADAPTERS, rank=4, scale=LOUD, targets=ALL)
    settings = Settings(rank=6, clusters=2, iterations=3, store_dtype="float32")
    store = compress(adapters, folder / "store", settings, base_model=read_base_model(model))
    for name in store.names:
        export_adapter(store, name, folder / "exports" / name)
    upload = RandomCollection(model, 1, rank=3, scale=LOUD, targets=("q_proj", "down_proj"), seed=1)
    upload.write_peft(0, folder / UPLOAD)
    return float(store.error.mean())
