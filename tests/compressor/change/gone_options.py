"""A store that an earlier version made with options that there are no more.

`gone_options/` holds it: ranks that differ between modules (`rank_allocation` spectrum), a row of
each adapter's own beside its core (`residual_rank` 1), a mean that all share (`mean_rank` 1), two
clusters, and an adapter that is kept as it was (`max_adapter_error`).
"""

import shutil
from pathlib import Path

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
