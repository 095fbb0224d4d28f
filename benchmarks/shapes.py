"""The shapes that the benchmarks are about: layers of models, and the settings of the paper."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FIGURE_1 = {
    4: (16, 1),
    8: (16, 1),
    16: (32, 1),
    32: (64, 1),
    64: (64, 1),
    128: (16, 7),
    256: (16, 10),
    512: (16, 25),
    1024: (16, 25),
}
"""Adapters → (rank, clusters): the settings of the paper's Figure 1 (App. F)."""

LORA_RANK = 16


@dataclass(frozen=True)
class Layer:
    """A linear layer as one GPU holds it: `d_out` has one width for each slice."""

    name: str
    d_in: int
    d_out: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The linear layers of a Llama-like model."""

    name: str
    layers: int
    hidden: int
    kv: int
    mlp: int
    vocabulary: int

    def linear(self, tp: int = 1) -> dict[str, Layer]:
        """Those of one of `layers` as one of `tp` GPUs holds them: o and down are cut by input,
        the others by output."""
        found = (
            Layer("qkv", self.hidden, (self.hidden // tp, self.kv // tp, self.kv // tp)),
            Layer("o", self.hidden // tp, (self.hidden,)),
            Layer("gate_up", self.hidden, (self.mlp // tp, self.mlp // tp)),
            Layer("down", self.mlp // tp, (self.hidden,)),
        )
        return {layer.name: layer for layer in found}

    def weights(self, tp: int = 1) -> int:
        """Numbers of the linear layers and the output head on one of `tp` GPUs."""
        of_a_layer = sum(layer.d_in * sum(layer.d_out) for layer in self.linear(tp).values())
        return self.layers * of_a_layer + self.vocabulary * self.hidden // tp


MISTRAL = Model("Mistral-7B", 32, 4096, 1024, 14336, 32000)
LLAMA = Model("Llama-3-70B", 80, 8192, 1024, 28672, 128256)


def slots_of_equal_memory(
    shapes: Iterator[tuple[int, int]] | Sequence[tuple[int, int]],
    adapters: int,
    rank: int,
    clusters: int,
    lora_rank: int = LORA_RANK,
) -> float:
    """How many uncompressed adapters take as much memory as a store (paper, App. F).

    Args:
        shapes: d_in and d_out of each module. The paper has d_in = d_out = D: then the result is
            (2·D·r·c + N·(r² + 1)) / (2·D·r_lora), without the + 1 if there is one cluster.
        adapters: N.
        rank: r, of the shared bases.
        clusters: c.
        lora_rank: r_lora, of the adapters.
    """
    widths = [d_in + d_out for d_in, d_out in shapes]
    core = rank**2 + (1 if clusters > 1 else 0)
    stored = sum(width * rank * clusters + adapters * core for width in widths)
    return stored / (sum(widths) * lora_rank)
