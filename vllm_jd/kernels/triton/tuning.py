"""Which configuration a call is launched with: the fastest that was measured on this GPU.

A table is a file of `tuned/`, named after the device, as the step `tuned` of
`benchmarks/gpu_first.py` writes it. Devices, layers and types that no table has are served with the
default configuration. What is chosen depends on the layer's shape and the number of tokens alone,
so that CUDA graphs stay valid.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vllm_jd.kernels.triton.plan import DEFAULT, Config, LayerShape

FOLDER = Path(__file__).with_name("tuned")
_PAIRS = ("programs", "tile_k", "tile_n", "warps")


@dataclass(frozen=True)
class Entry:
    """The best configuration for calls of a layer with up to `tokens` tokens."""

    d_in: int
    widths: tuple[int, ...]
    block_r: int
    element_size: int
    tokens: int
    config: Config

    def fits(self, shape: LayerShape) -> bool:
        """Whether it was measured on such a layer: ranks count by the block that they need."""
        mine = (self.d_in, self.widths, self.block_r, self.element_size)
        return mine == (shape.d_in, shape.widths, shape.block_r, shape.element_size)


def table_path(device_name: str) -> Path:
    """Where the table of a device would be: `NVIDIA H100 80GB HBM3` →
    `tuned/nvidia-h100-80gb-hbm3.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return FOLDER / f"{slug or 'unknown'}.json"


@functools.lru_cache(maxsize=8)
def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table, with those of fewer tokens first; none if there is no such file.

    Raises:
        ValueError: the file is not one that the step `tuned` writes; says what is wrong.
    """
    if not path.is_file():
        return ()
    try:
        entries = [_entry(one) for one in json.loads(path.read_text(encoding="utf-8"))["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of configurations ({type(error).__name__}: {error}); write it "
            "anew with benchmarks/gpu_first.py run --only tuned, or remove it for the defaults"
        ) from error
    return tuple(sorted(entries, key=lambda entry: entry.tokens))


def of_layer(entries: Sequence[Entry], shape: LayerShape) -> tuple[Entry, ...]:
    """Those of such a layer."""
    return tuple(entry for entry in entries if entry.fits(shape))


def choose(entries: Sequence[Entry], n_tokens: int) -> Config:
    """The configuration for a call, of the entries of its layer: that of the next larger number of
    tokens that was measured, or of the largest; the default without any."""
    for entry in entries:
        if entry.tokens >= n_tokens:
            return entry.config
    return entries[-1].config if entries else DEFAULT


def row(shape: LayerShape, n_tokens: int, config: Config) -> dict[str, Any]:
    """An entry as the file has it."""
    return {
        "d_in": shape.d_in,
        "widths": list(shape.widths),
        "block_r": shape.block_r,
        "element_size": shape.element_size,
        "tokens": n_tokens,
        "config": asdict(config),
    }


def _entry(row: dict[str, Any]) -> Entry:
    config = dict(row["config"])
    for name in _PAIRS:
        first, second = config[name]
        config[name] = (int(first), int(second))
    numbers = {field.name: field.type for field in fields(Config) if field.type is int}
    for name in numbers:
        if not isinstance(config[name], int):
            raise TypeError(f"{name} must be a whole number, not {config[name]!r}")
    return Entry(
        d_in=int(row["d_in"]),
        widths=tuple(int(width) for width in row["widths"]),
        block_r=int(row["block_r"]),
        element_size=int(row["element_size"]),
        tokens=int(row["tokens"]),
        config=Config(**config),
    )
