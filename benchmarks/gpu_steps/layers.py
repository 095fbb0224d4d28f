"""One layer's adapters on a device: random pools, tokens that ask for them, and what is timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from shapes import FIGURE_1, LORA_RANK, Layer

from vllm_jd.kernels import ModulePools, tiles
from vllm_jd.kernels.triton import backend
from vllm_jd.kernels.triton.plan import CONFIGS, Config
from vllm_jd.row import CORE_FULL, ROW_FIELDS

ADAPTERS, RANK, CLUSTERS = 1024, *FIGURE_1[1024]
PREFILL_REQUESTS = 16  # of a batch of more than 256 tokens
ROWS, TILES = ", rows", ", tiles"
Call = Callable[[], None]


def candidates(tokens: int) -> dict[str, Config]:
    """The fixed list: each configuration as it is, and with either variant for so many tokens."""
    found = {}
    for config in CONFIGS:
        found[config.name] = config
        found[config.name + ROWS] = replace(config, row_tokens=tokens)
        found[config.name + TILES] = replace(config, row_tokens=0)
    return found


def draw(
    tokens: int, adapters: int, device: str, *, clusters: int = CLUSTERS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slot of each token, order): int32 [tokens], uniform adapters; int32 [places], tiles of
    tokens of one cluster (slot modulo `clusters`). More than 256 tokens belong to PREFILL_REQUESTS
    requests."""
    generator = torch.Generator().manual_seed(seed)
    requests = PREFILL_REQUESTS if tokens > 256 else tokens
    picks = torch.randint(adapters, (requests,), generator=generator)
    slots = picks.repeat_interleave(-(-tokens // requests))[:tokens].int()
    return slots.to(device), packed(slots, clusters).to(device)


def packed(slots: torch.Tensor, clusters: int) -> torch.Tensor:
    """int32 [places]: which token each place of the tiles has, as the plugin packs them; adapter a
    has the bases of cluster a % clusters, -1 has none."""
    given = slots.long().numpy()
    keys, n = tiles.keys_of(given % clusters, given), len(given)
    return torch.from_numpy(tiles.pack(keys, tiles.places(n), tiles.tile_of(n)))


def make_pools(
    layer: Layer, adapters: int, rank: int, clusters: int, device: str, dtype: torch.dtype
) -> ModulePools:
    """Random pools of a layer: adapter a in cluster a % clusters, a full core in each slice."""
    slices = len(layer.d_out)
    rows = torch.zeros(adapters, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
    adapter = torch.arange(adapters)
    cluster = adapter % clusters
    for s in range(slices):
        fields = {
            "v_start": (s * clusters + cluster) * rank,
            "u_start": cluster * rank,
            "rank": torch.tensor(rank),
            "core_slot": adapter,
            "core_offset": torch.tensor(s * rank**2),
            "core_kind": torch.tensor(CORE_FULL),
            "scale_row": torch.tensor(-1),
        }
        for name, values in fields.items():
            rows[:, s, 0, ROW_FIELDS.index(name)] = values.int()

    def normal(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(std=shape[-1] ** -0.5)

    return ModulePools(
        v=normal(slices * clusters * rank, layer.d_in),
        u=[normal(clusters * rank, width) for width in layer.d_out],
        cores=normal(adapters, slices * rank**2),
        rows=rows.to(device),
    )


def our_call(
    layer: Layer,
    tokens: int,
    pools: ModulePools,
    config: Config | None,
    slots: torch.Tensor,
    order: torch.Tensor | None,
) -> tuple[Call, torch.Tensor, torch.Tensor]:
    """(what adds the adapters, its x, its y). Without a configuration, that of `prepare`."""
    like = {"dtype": pools.dtype, "device": pools.device}
    x = torch.randn(tokens, layer.d_in, **like)
    y = torch.zeros(tokens, sum(layer.d_out), **like)
    rank = int(pools.rows[..., ROW_FIELDS.index("rank")].max())

    def call() -> None:
        backend.add_adapters(y, x, pools, slots, order)

    backend.prepare(pools, rank, **({} if config is None else {"config": config}))
    return call, x, y


@dataclass
class StockPools:
    """A and B of a layer in vLLM's slots: for each slice [slots, 1, rank, d_in] and
    [slots, 1, d_out, rank]."""

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]

    @classmethod
    def random(cls, layer: Layer, slots: int, device: str, dtype: torch.dtype) -> "StockPools":
        """Numbers of the size that adapters have."""
        like = {"dtype": dtype, "device": device}
        return cls(
            tuple(
                torch.empty(slots, 1, LORA_RANK, layer.d_in, **like).normal_(std=layer.d_in**-0.5)
                for _ in layer.d_out
            ),
            tuple(torch.empty(slots, 1, n, LORA_RANK, **like).normal_() for n in layer.d_out),
        )

    def add(self, ops: Any, meta: Any, x: torch.Tensor, y: torch.Tensor, specialised: bool) -> None:
        """What vLLM's wrapper does for a layer: shrink into zeros, expand into y."""
        tokens = len(x)
        z = torch.empty(len(self.a), tokens, LORA_RANK, dtype=torch.float32, device=x.device)
        arguments = meta.meta_args(tokens, specialised)
        ops.lora_shrink(x, list(self.a), z, *arguments, 1.0)
        ops.lora_expand(z, list(self.b), y, *arguments, offset_start=0, add_inputs=True)


def captured_counts(max_loras: int, specialised: bool) -> list[int]:
    """The numbers of adapters for which vLLM captures graphs (`get_captured_lora_counts`)."""
    last = max_loras + 1
    if not specialised:
        return [last]
    return [n for n in range(1, last + 1) if n & (n - 1) == 0 or n == last]


def stock_call(
    ops: Any,
    layer: Layer,
    tokens: int,
    max_loras: int,
    device: str,
    dtype: torch.dtype,
    slots: torch.Tensor,
    *,
    specialised: bool,
) -> tuple[Call, torch.Tensor, torch.Tensor, StockPools]:
    """(what vLLM's operators do for the layer, its x, its y, its A and B of all slots)."""
    pools = StockPools.random(layer, max_loras, device, dtype)
    x = torch.randn(tokens, layer.d_in, dtype=dtype, device=device)
    y = torch.zeros(tokens, sum(layer.d_out), dtype=dtype, device=device)
    counts = captured_counts(max_loras, specialised)
    meta = ops.LoRAKernelMeta.make(max_loras, tokens, device=device, captured_lora_counts=counts)
    meta.prepare_tensors(slots % max_loras)

    def call() -> None:
        pools.add(ops, meta, x, y, specialised)

    return call, x, y, pools
