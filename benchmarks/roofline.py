"""A model of what adapters cost on an H100: bytes, arithmetic and launches, and the time these take
at best. Nothing here is measured.

Each kernel takes as long as the slowest of these: its bytes at the bandwidth of the memory, and
those that programs share at that of the L2 cache; its tensor-core tiles at their peak; its programs
at the rate at which they can be started; the reads that wait for each other in its longest program.
A fixed time for its launch inside a CUDA graph comes on top. Kernels follow each other without
overlap. A step of the base model reads its weights once: attention, the KV cache, its launches and
the exchange between GPUs are left out, so that the adapters' share of a step is an upper bound of
what these kernels need, as far as they reach the bandwidths.

Our kernels are those of the launch plan in `vllm_jd.kernels.triton.plan`, and their bytes those of
`kernel_traffic.py`; vLLM's are its lora_shrink and lora_expand (0.32) with their default tiles.
Which adapters a batch asks for is uniform, as in the paper's §6.4, with its settings of Figure 1.
`roofline_report.py` prints and draws what comes out.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from kernel_traffic import Traffic, traffic, uniform_content
from shapes import FIGURE_1, LLAMA, LORA_RANK, MISTRAL, Layer, Model, slots_of_equal_memory

from vllm_jd.kernels.triton.plan import (
    DEFAULT,
    Config,
    Launch,
    LayerShape,
    Plan,
    plan,
)

BYTES = 2  # of a number: bfloat16
VLLM_VERSION = "0.32"  # whose tiles and grids `stock_kernels` has
SCRATCH_BYTES = 4  # of a number between shrink and expand: float32


@dataclass(frozen=True)
class Gpu:
    """What the model assumes of the machine: an H100 SXM's data sheet, and four guesses.

    Args:
        bytes_per_second: of HBM3.
        l2_bytes_per_second: a guess: of the L2 cache.
        flops_per_second: of dense bfloat16 on tensor cores.
        host_bytes_per_second: PCIe 5.0 x16, one way.
        memory_bytes: of one GPU.
        launch_seconds: a guess: what a kernel costs in a CUDA graph besides its work.
        program_seconds: a guess: what each program of a grid costs the whole GPU, if it leaves at
            once (132 multiprocessors, each one that starts and ends a program in about 120 cycles).
        round_seconds: a guess: a read of memory on whose result the next one depends.
    """

    bytes_per_second: float = 3.35e12
    l2_bytes_per_second: float = 5.5e12
    flops_per_second: float = 989e12
    host_bytes_per_second: float = 63e9
    memory_bytes: float = 80e9
    launch_seconds: float = 1e-6
    program_seconds: float = 0.5e-9
    round_seconds: float = 0.6e-6


QKV, ALL = ("qkv",), ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Setting:
    """A model, on how many GPUs, and which layers have adapters."""

    model: Model
    tp: int
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        where = "q, k, v" if self.targets == QKV else "all seven modules"
        gpus = f"TP {self.tp}, " if self.tp > 1 or self.model is LLAMA else ""
        return f"{self.model.name}, {gpus}{where}"

    def adapted(self) -> list[Layer]:
        """The layers with adapters, of one of the model's `layers`, on one GPU."""
        linear = self.model.linear(self.tp)
        return [linear[name] for name in self.targets]


SETTINGS = (
    Setting(MISTRAL, 1, QKV),
    Setting(MISTRAL, 1, ALL),
    Setting(LLAMA, 1, QKV),
    Setting(LLAMA, 1, ALL),
    Setting(LLAMA, 8, QKV),
    Setting(LLAMA, 8, ALL),
)


@dataclass(frozen=True)
class Batch:
    """Tokens of a step, and how many requests they belong to, each with an adapter."""

    phase: str
    tokens: int
    requests: int


BATCHES = (*(Batch("decode", n, n) for n in (1, 8, 32, 64, 128, 256)), Batch("prefill", 2048, 16))


# --- who is in a batch ---


def expected_distinct(draws: float, shares: Iterable[tuple[int, int]]) -> float:
    """Expected number of different groups among `draws` independent uniform draws of members.

    Args:
        draws: how many.
        shares: pairs (groups, members of each of them).

    Returns:
        The sum over groups of 1 − (1 − members / all)^draws.
    """
    shares = list(shares)
    total = sum(groups * members for groups, members in shares)
    return sum(groups * (1 - (1 - members / total) ** draws) for groups, members in shares)


def cluster_shares(adapters: int, clusters: int) -> list[tuple[int, int]]:
    """(clusters, adapters in each) where the adapters are spread as evenly as they can be."""
    members, larger = divmod(adapters, clusters)
    return [(larger, members + 1), (clusters - larger, members)]


def served_at_once(requests: int, adapters: int, slots: int) -> tuple[float, float]:
    """Expected (requests, different adapters) of a step of vLLM's LoRA with so many slots.

    Of `requests` that wait or run, each asks for one of `adapters`, uniformly. They are taken in
    turn; one whose adapter is not among those taken, while these fill all slots, has to wait.
    """
    slots = min(slots, adapters)
    found = [1.0] + [0.0] * slots  # probability of so many different adapters up to here
    served = 0.0
    for _ in range(requests):
        served += 1 - found[slots] * (1 - slots / adapters)
        for k in range(slots, 0, -1):
            more = found[k - 1] * (1 - (k - 1) / adapters)
            found[k] = more + (found[k] * (k / adapters) if k < slots else found[k])
        found[0] = 0.0
    return served, sum(k * probability for k, probability in enumerate(found))


# --- what a kernel does ---

SUMMED = (
    "basis_bytes",
    "core_bytes",
    "activation_bytes",
    "scratch_bytes",
    "l2_bytes",
    "flops",
    "tile_flops",
    "programs",
)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Args:
        name: of the kernel.
        basis_bytes: of bases (or of A and B); each that is needed comes from HBM once.
        core_bytes: of cores, the same.
        activation_bytes: x read once, y read and written once.
        scratch_bytes: what passes between stages, written and read once; it stays in the L2 cache.
        l2_bytes: all that programs load and store, as often as they do.
        flops: that the product needs.
        tile_flops: that whole tiles of the tensor cores do.
        programs: of the grid, those that leave at once among them.
        rounds: reads of the longest program that wait for one before them.
    """

    name: str
    basis_bytes: float = 0
    core_bytes: float = 0
    activation_bytes: float = 0
    scratch_bytes: float = 0
    l2_bytes: float = 0
    flops: float = 0
    tile_flops: float = 0
    programs: float = 0
    rounds: float = 0

    @property
    def hbm_bytes(self) -> float:
        return self.basis_bytes + self.core_bytes + self.activation_bytes

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each resource needs for it, alone."""
        return {
            "memory": self.hbm_bytes / gpu.bytes_per_second,
            "L2": self.l2_bytes / gpu.l2_bytes_per_second,
            "tensor cores": self.tile_flops / gpu.flops_per_second,
            "programs": self.programs * gpu.program_seconds,
            "latency": self.rounds * gpu.round_seconds,
        }

    def seconds(self, gpu: Gpu) -> float:
        """The time of the launch, by the model."""
        return gpu.launch_seconds + max(self.limits(gpu).values())


def total(kernels: Sequence[Kernel], layers: int, gpu: Gpu) -> dict[str, Any]:
    """What `layers` layers with these kernels each take: sums, and seconds by what bounds them."""
    bound = {"launches": layers * len(kernels) * gpu.launch_seconds}
    for kernel in kernels:
        limits = kernel.limits(gpu)
        slowest = max(limits, key=limits.__getitem__)
        bound[slowest] = bound.get(slowest, 0) + layers * limits[slowest]
    sums = {name: layers * sum(getattr(k, name) for k in kernels) for name in SUMMED}
    return {
        "launches": layers * len(kernels),
        "hbm_bytes": layers * sum(k.hbm_bytes for k in kernels),
        **sums,
        "seconds": layers * sum(k.seconds(gpu) for k in kernels),
        "seconds_by_bound": bound,
    }


# --- ours ---


def our_kernels(
    layer: Layer,
    tokens: int,
    adapters: float,
    clusters: float,
    rank: int,
    config: Config = DEFAULT,
) -> list[Kernel]:
    """The launches of our backend's plan for one layer.

    Args:
        layer: as one GPU holds it.
        tokens: each with an adapter, in the order of their clusters.
        adapters: (expected) different ones among them.
        clusters: the same of clusters.
        rank: of bases and cores.
        config: of the launches.
    """
    made, one = _with_one_adapter(layer, tokens, rank, config)
    tiles = ceil(tokens / made.block_m)
    # Tiles and the clusters and adapters in them, as pairs: they lie side by side.
    groups = min(tokens, clusters + tiles - 1)
    members = min(tokens, adapters + tiles - 1)
    kernels = []
    for launch, found in zip(made.launches, one, strict=True):
        distinct, stored = found.distinct.get, found.stored.get
        bases = distinct("v", 0) + distinct("u", 0)
        scratch = [distinct("z", 0), distinct("h", 0), stored("z", 0), stored("h", 0)]
        loaded_bases = found.loaded.get("v", 0) + found.loaded.get("u", 0)
        others = found.loaded_bytes - loaded_bases + found.stored_bytes
        if launch.kernel == "shrink_tiles":  # a tile reads a core once, the others for each token
            others += found.loaded["cores"] * (members / tiles - 1)
        kernels.append(
            Kernel(
                launch.kernel,
                basis_bytes=clusters * bases,
                core_bytes=adapters * distinct("cores", 0),
                activation_bytes=distinct("x", 0) + distinct("y", 0) + stored("y", 0),
                scratch_bytes=sum(scratch),
                l2_bytes=others + loaded_bases * groups / tiles,
                flops=found.flops,
                # A tile goes through its clusters; cores are applied token by token.
                tile_flops=found.executed * (1 if launch.kernel == "mix_rows" else groups / tiles),
                programs=prod(launch.grid),
                rounds=_rounds(made, launch, groups / tiles, members / tiles),
            )
        )
    return kernels


def _rounds(made: Plan, launch: Launch, groups: float, adapters: float) -> float:
    """Reads that follow each other: a token's slot (in tiles, its place in the order first), its
    row, and then for each cluster of a tile as many as the loop over its columns has, `stages` of
    which are under way at once. Cores that a tile applies are a read for each adapter in it."""
    tiles = launch.kernel.endswith("tiles")
    index = 3 if tiles else 2
    fused = bool(launch.constants.get("FUSE_MIX", False))
    if launch.kernel.startswith("shrink"):
        steps = ceil(made.split_width / int(launch.constants["BLOCK_K"]) / launch.num_stages)
        return index + max(1.0, groups) * steps + max(1.0, adapters) * fused
    if launch.kernel.startswith("expand"):
        return index + max(1.0, groups if tiles else 1.0) * made.shape.chunks + fused
    return index + 1


@functools.cache
def _with_one_adapter(
    layer: Layer, tokens: int, rank: int, config: Config
) -> tuple[Plan, list[Traffic]]:
    """The plan, and its traffic if all tokens have the same adapter: what grows with adapters or
    clusters is that of one."""
    made = plan(_shape(layer, rank), tokens, config)
    return made, traffic(made, uniform_content(made.shape, tokens, 1, 1))


# --- vLLM's own ---

STOCK_STAGES = 2
STOCK_EXPAND = {"block_m": 64, "block_n": 64, "block_n_of_one_slice": 128, "block_k": 32}


def stock_shrink_tiles(tokens: int) -> dict[str, int]:
    """vLLM's default tiles of lora_shrink (`get_lora_op_configs`; it ships no tuned ones)."""
    if tokens < 128:
        return {"block_m": 32, "block_n": 16, "block_k": 256, "split_k": 64}
    return {"block_m": 32, "block_n": 16, "block_k": 32, "split_k": 8}


def grid_rows(slots: int, active: float, *, specialised: bool) -> int:
    """Adapters that vLLM's grids are made for: all slots and the base model, or with
    --specialize-active-lora the next power of two of those in the batch."""
    if not specialised:
        return slots + 1
    return min(slots + 1, 1 << (ceil(active) - 1).bit_length())


def stock_kernels(
    layer: Layer, tokens: float, distinct: float, grid_rows: int, rank: int = LORA_RANK
) -> list[Kernel]:
    """The launches of vLLM's LoRA for one layer: the intermediate is set to zero, lora_shrink adds
    to it, lora_expand multiplies it with B.

    Of lora_shrink's 64 parts of d_in in decoding only d_in / 256 have work. Each adapter's A and B
    are read once, padded to `rank`, vLLM's max_lora_rank.

    Args:
        layer: as one GPU holds it.
        tokens: each with an adapter.
        distinct: different adapters among them.
        grid_rows: for how many adapters there are programs, with work or without (`grid_rows`).
        rank: of the slots.
    """
    slices, numbers = len(layer.d_out), len(layer.d_out) * rank
    whole = ceil(tokens)
    tiles = stock_shrink_tiles(whole)
    groups = distinct * ceil(tokens / distinct / tiles["block_m"])
    rank_tiles = ceil(rank / tiles["block_n"])
    added = SCRATCH_BYTES * tokens * numbers * tiles["split_k"]
    shrink = Kernel(
        "lora_shrink",
        basis_bytes=BYTES * distinct * numbers * layer.d_in,
        activation_bytes=BYTES * tokens * layer.d_in,
        scratch_bytes=SCRATCH_BYTES * tokens * numbers,
        l2_bytes=BYTES * groups * numbers * layer.d_in
        + BYTES * tokens * layer.d_in * slices * rank_tiles
        + added,  # every part of d_in adds to z, those without work add zeros
        flops=2 * tokens * numbers * layer.d_in,
        tile_flops=2 * groups * slices * rank_tiles * tiles["block_m"] * tiles["block_n"]
        * ceil(layer.d_in / tiles["block_k"]) * tiles["block_k"],
        programs=tiles["split_k"] * ceil(whole / tiles["block_m"]) * rank_tiles * slices
        * grid_rows,
        # The adapter's id, its part of the sorted tokens, the tokens; then the loop over d_in.
        rounds=3 + ceil(layer.d_in / tiles["block_k"] / tiles["split_k"] / STOCK_STAGES),
    )  # fmt: skip
    tiles = STOCK_EXPAND
    block_n = tiles["block_n" if slices > 1 else "block_n_of_one_slice"]
    groups = distinct * ceil(tokens / distinct / tiles["block_m"])
    columns = sum(ceil(width / block_n) for width in layer.d_out)
    outputs = BYTES * tokens * sum(layer.d_out)
    expand = Kernel(
        "lora_expand",
        basis_bytes=BYTES * distinct * rank * sum(layer.d_out),
        activation_bytes=2 * outputs,
        scratch_bytes=SCRATCH_BYTES * tokens * numbers,
        l2_bytes=BYTES * groups * rank * sum(layer.d_out) + 2 * outputs
        + SCRATCH_BYTES * tokens * rank * columns,
        flops=2 * tokens * rank * sum(layer.d_out),
        tile_flops=2 * groups * tiles["block_m"] * block_n * columns
        * ceil(rank / tiles["block_k"]) * tiles["block_k"],
        programs=ceil(whole / tiles["block_m"]) * ceil(max(layer.d_out) / block_n) * slices
        * grid_rows,
        rounds=4,
    )  # fmt: skip
    cleared = SCRATCH_BYTES * tokens * numbers
    return [Kernel("zero", scratch_bytes=cleared, l2_bytes=cleared), shrink, expand]


# --- the table ---

DECODE_STEPS = 9  # of a request: the paper's ten tokens, one of which comes with the prefill
CONCURRENCY = 256
SYSTEMS = ("ours", "stock_equal_memory", "stock_all_resident", "stock_specialised")
ONE = {"rate": 1.0}
STOCK_KEYS = ("launches", "hbm_bytes", "flops", "programs", "seconds", "seconds_by_bound")


def cell(setting: Setting, batch: Batch, adapters: int, gpu: Gpu) -> dict[str, Any]:
    """One row of the result: the base model, ours, and vLLM's LoRA with slots of equal memory, with
    a slot for each adapter, and so with --specialize-active-lora.

    `share` is the adapters' part of a step. `rate` is tokens a second as a part of the base
    model's at this batch. With fewer slots than adapters a step of vLLM's has fewer requests, and
    new ones wait for their adapter's copy to the GPU (`load_seconds` a step, its bytes at the
    bandwidth of PCIe; in decoding alone).
    """
    rank, clusters = FIGURE_1[adapters]
    model, layers = setting.model, setting.adapted()
    shapes = _modules(layers)
    distinct = expected_distinct(batch.requests, [(adapters, 1)])
    distinct_clusters = expected_distinct(batch.requests, cluster_shares(adapters, clusters))

    def base(tokens: float) -> float:
        """Seconds of the base model's step."""
        numbers = model.weights(setting.tp)
        return max(
            BYTES * numbers / gpu.bytes_per_second, 2 * tokens * numbers / gpu.flops_per_second
        )

    def stock(slots: int, *, specialised: bool = False) -> dict[str, Any]:
        requests, found = served_at_once(batch.requests, adapters, slots)
        tokens = batch.tokens / batch.requests * requests
        rows = grid_rows(slots, found, specialised=specialised)
        kernels = [k for layer in layers for k in stock_kernels(layer, tokens, found, rows)]
        cost = total(kernels, model.layers, gpu)
        seconds = base(tokens) + cost["seconds"]
        size = BYTES * LORA_RANK * model.layers * sum(d_in + d_out for d_in, d_out in shapes)
        missing = found * (1 - slots / adapters)
        load = missing / DECODE_STEPS * size / gpu.host_bytes_per_second
        load *= batch.phase == "decode"
        rate = tokens / (seconds + load) / (batch.tokens / base(batch.tokens))
        return {
            "slots": slots,
            "slot_bytes": slots * size,
            "fits": slots * size + BYTES * model.weights(setting.tp) < gpu.memory_bytes,
            "requests": requests,
            "distinct": found,
            **{key: cost[key] for key in STOCK_KEYS},
            "load_seconds": load,
            "share": cost["seconds"] / seconds,
            "rate": rate,
        }

    kernels = [
        kernel
        for layer in layers
        for kernel in our_kernels(layer, batch.tokens, distinct, distinct_clusters, rank)
    ]
    ours = total(kernels, model.layers, gpu)
    seconds = base(batch.tokens) + ours["seconds"]
    # Memory is compared as a whole, whatever a GPU has of it.
    whole = replace(setting, tp=1).adapted()
    room = slots_of_equal_memory(_modules(whole), adapters, rank, clusters)
    return {
        "setting": setting.name,
        "phase": batch.phase,
        "tokens": batch.tokens,
        "requests": batch.requests,
        "adapters": adapters,
        "rank": rank,
        "clusters": clusters,
        "distinct_adapters": distinct,
        "distinct_clusters": distinct_clusters,
        "base_seconds": base(batch.tokens),
        "ours": {
            "kernels_per_layer": [kernel.name for kernel in kernels],
            **ours,
            "share": ours["seconds"] / seconds,
            "rate": base(batch.tokens) / seconds,
        },
        "stock_equal_memory": stock(min(adapters, ceil(room))),
        "stock_all_resident": stock(adapters),
        "stock_specialised": stock(adapters, specialised=True),
    }


def _modules(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """d_in and d_out of the modules in these layers: each slice has an A of its own."""
    return [(layer.d_in, width) for layer in layers for width in layer.d_out]


def figure1(
    cells: Sequence[dict[str, Any]], setting: Setting, concurrency: int
) -> list[dict[str, Any]]:
    """Requests a second in the paper's experiment (§6.4), `concurrency` requests at a time.

    Prompts are those of the prefill batch; then `DECODE_STEPS` steps. Prefills and decoding follow
    each other, and the server's own work (HTTP, scheduling, sampling) takes no time, which is far
    from true: the differences between systems are upper bounds.
    """
    of_setting = [c for c in cells if c["setting"] == setting.name]
    rows = []
    for adapters in sorted({c["adapters"] for c in of_setting}):
        mine = [c for c in of_setting if c["adapters"] == adapters]
        prefill = next(c for c in mine if c["phase"] == "prefill")
        decode = next(c for c in mine if c["requests"] == concurrency and c is not prefill)
        row: dict[str, Any] = {"adapters": adapters}
        for system in ("base", *SYSTEMS):
            # A rate is of tokens that are served, however many requests wait beside them.
            row[system] = 1 / sum(
                steps * part["base_seconds"] / part["requests"] / part.get(system, ONE)["rate"]
                for part, steps in ((prefill, 1), (decode, DECODE_STEPS))
            )
        rows.append(row | {"ours_to_stock": row["ours"] / row["stock_equal_memory"]})
    return rows


def rows_or_tiles() -> list[dict[str, Any]]:
    """Microseconds of q, k, v of one layer of Mistral-7B with 1,024 adapters, if a program served a
    token, and if it served a tile: where the plan should change from one to the other."""
    adapters, layer = max(FIGURE_1), MISTRAL.linear()["qkv"]
    rank, clusters = FIGURE_1[adapters]
    found = []
    for batch in BATCHES[:-1]:
        distinct = expected_distinct(batch.requests, [(adapters, 1)])
        groups = expected_distinct(batch.requests, cluster_shares(adapters, clusters))
        row: dict[str, Any] = {"tokens": batch.tokens}
        for name, limit in (("rows", batch.tokens), ("tiles", 0)):
            config = replace(DEFAULT, row_tokens=limit)
            kernels = our_kernels(layer, batch.tokens, distinct, groups, rank, config)
            row[name] = 1e6 * sum(kernel.seconds(Gpu()) for kernel in kernels)
        found.append(row | {"plan": plan(_shape(layer, rank), batch.tokens).variant})
    return found


def _shape(layer: Layer, rank: int) -> LayerShape:
    return LayerShape(layer.d_in, layer.d_out, max_rank=rank)


GUESSES = {
    "as assumed": {},
    "a launch of 2 µs": {"launch_seconds": 2e-6},
    "reads of 0.3 µs": {"round_seconds": 0.3e-6},
    "programs cost nothing": {"program_seconds": 0.0},
    "L2 of 3 TB/s": {"l2_bytes_per_second": 3e12},
}


def sensitivity() -> list[dict[str, Any]]:
    """What other guesses would change: milliseconds that 1,024 adapters on q, k, v of Mistral-7B
    take of a step, ours and vLLM's specialised."""
    found = []
    for name, changes in GUESSES.items():
        row: dict[str, Any] = {"guess": name}
        for batch in BATCHES:
            c = cell(SETTINGS[0], batch, max(FIGURE_1), Gpu(**changes))
            for system in ("ours", "stock_specialised"):
                row[f"{system} {batch.phase} {batch.tokens}"] = 1e3 * c[system]["seconds"]
        found.append(row)
    return found


# --- what the first run must show ---


def predictions(cells: Sequence[dict[str, Any]], gpu: Gpu) -> list[dict[str, Any]]:
    """Numbers that the first run on an H100 confirms or refutes; `make gpu-check`
    prints them beside what it measures. `low` and `high` bound what still confirms the model."""
    launches = gpu.launch_seconds * 1e6
    idle = stock_kernels(MISTRAL.linear()["qkv"], 32, 1, 1025)[1].limits(gpu)["programs"] * 1e6
    found = [
        {
            "key": "launch",
            "what": "a launch in a CUDA graph without work (all tokens without adapter)",
            "unit": "µs",
            "model": launches,
            "low": 0.5 * launches,
            "high": 1.5 * launches,
            "refutes": "the guess of a launch; all shares in decoding move with it",
        },
        {
            "key": "programs",
            "what": "vLLM's lora_shrink, 1,024 slots, 32 tokens of one adapter (q, k, v)",
            "unit": "µs",
            "model": idle,
            "low": 0.5 * idle,
            "high": 2 * idle,
            "refutes": "the guess of a program's cost; it decides what 1,024 slots cost vLLM",
        },
    ]
    for c in cells:
        if c["setting"] != SETTINGS[0].name or c["adapters"] != max(FIGURE_1):
            continue
        for system, name in (("ours", "ours"), ("stock_equal_memory", "vLLM's, equal memory")):
            if system != "ours" and c["requests"] > c[system]["slots"]:
                continue  # not the same batch
            micro = 1e6 * c[system]["seconds"] / MISTRAL.layers
            found.append(
                {
                    "key": f"{system} {c['tokens']}",
                    "what": f"{name}: q, k, v of a layer, {c['phase']}, {c['tokens']} tokens",
                    "unit": "µs",
                    "model": micro,
                    "low": 0.9 * micro,
                    "high": 2 * micro,
                    "refutes": "below: the bytes; above: the guess of a read, or our kernels",
                }
            )
    return found
