"""A store that an earlier version made with options that there are no more.

`gone_options/` holds it: ranks that differ between modules (`rank_allocation` spectrum), a row of
each adapter's own beside its core (`residual_rank` 1), a mean that all share (`mean_rank` 1), two
clusters, and an adapter that is kept as it was (`max_adapter_error`).
"""

import shutil
from pathlib import Path

import torch

from tests.store.stores import rewrite_tensors
from vllm_jd.compressor import read_adapters

LAYER = {
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (24, 8),
    "self_attn.v_proj": (24, 8),
    "self_attn.o_proj": (24, 24),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}


def old_store(path):
    """A copy of it."""
    return Path(shutil.copytree(Path(__file__).with_suffix(""), path))


def take_for_its_own(store, folders):
    """Have the store say that these files are what it was made of: other processors than the one
    it was made on round the same adapters otherwise."""
    digests = [list(bytes.fromhex(each)) for each in read_adapters(folders).source_sha256]
    rewrite_tensors(
        store,
        "adapters.safetensors",
        lambda table: table.update(source_sha256=torch.tensor(digests, dtype=torch.uint8)),
    )


def its_adapters(folder, make_factors, write_adapter):
    """The folders of the adapters that it was made of."""
    layers = []
    for i, shared in enumerate((2, 12)):
        shapes = {f"model.layers.{i}.{name}": shape for name, shape in LAYER.items()}
        like = {"ranks": (2, 3), "seed": i, "kind": "real", "shared": shared}
        layers.append(make_factors(6, shapes=shapes, **like))
    return [
        write_adapter(folder / f"a{i}", one | two, lora_alpha=0.1)
        for i, (one, two) in enumerate(zip(*layers, strict=True))
    ]
