"""Memory, load time and forward time of LoRA, JD-Full, JD-Diag and F-LoRA, by rank, clusters and
number of adapters in the batch: Figure 5 of Compress then Serve (App. D, E and F).

- Memory: bytes for the q, k, v of all layers, from the formulas of App. F, which the tensors that
  the forward pass computes with must have, too.
- Load: one adapter's q, k, v of all layers are brought to where the forward pass reads them. Either
  from a safetensors file whose pages are in memory, or from memory (pinned, with a GPU).
- Forward: q, k, v of one layer in bfloat16, one token each of so many adapters. JD and one of the
  LoRA paths run the product's kernel; the other LoRA paths are vLLM's torch operators, which vLLM
  uses on CPU, and a gathered bmm. F-LoRA is W ∘ (B·A), computed with element-wise products.

Before every timed call 64 MiB are read, and then the same is done with tiny tensors: the data are
as cold as in a model whose other layers came between, the code is warm as it is there. What is
compared takes turns; times are medians over rounds, ratios are medians of each round's ratio.
Before each forward timing the result is compared with float64, and bit by bit after each load.
A mismatch stops the script. Prints JSON, draws a figure. One command:

    python benchmarks/timing.py --out out/timing.json
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import machine
import matplotlib
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import MODELS, RandomCollection
from torch.nn.functional import linear

from vllm_jd.kernels import ModulePools, add_adapters, backend_name
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_NONE, ROW_FIELDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

console = Console(stderr=True)

DTYPE = torch.bfloat16
COLD_BYTES = 64 << 20
TINY = ((32, 32), (32, 16), (32, 16))  # shapes of what only warms the code
MEMORY_ADAPTERS = tuple(2**k for k in range(11))
SLICES = 3  # of a layer: q, k and v
STORED_ROWS = 64  # adapters in the file that one adapter's cores are read from
CHECKED_TOKENS = 8
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
VLLM, BMM, KERNEL = "LoRA, vLLM's torch ops", "LoRA, gathered bmm", "LoRA, our kernel"
HAS_VLLM = find_spec("vllm") is not None  # without it, its operators are left out
LORA_PATHS = (VLLM, BMM, KERNEL)
F_LORA, FULL, DIAGONAL = "F-LoRA", "JD-Full", "JD-Diag"

Model = StrEnum("Model", {name: name for name in MODELS})
Shapes = Sequence[tuple[int, int]]
Natural = Annotated[int, typer.Option(min=1)]


class Stopped(Exception):
    """There is nothing to measure; says why."""


class Mismatch(Stopped):
    """A path computed or loaded something else than it should; its time would mean nothing."""


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; the figure goes beside it.")],
    model: Annotated[Model, typer.Option(help="Whose shapes.")] = Model["mistral-7b"],
    rank: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="May be repeated; default: 16, 32 and 64. The least one's LoRA is "
            "what ratios are to, besides LoRA of the same rank.",
        ),
    ] = None,
    clusters: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated; default: 1, 7 and 25.")
    ] = None,
    adapters: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=1024, help="In the batch; may be repeated; default: 1, 4, 16 and 32."
        ),
    ] = None,
    rounds: Natural = 7,
    threads: Natural = 1,
) -> None:
    ranks, cluster_counts = sorted(set(rank or [16, 32, 64])), sorted(set(clusters or [1, 7, 25]))
    modules = list(RandomCollection(str(model), 1).shapes.values())
    narrowest = min(map(min, modules))
    if ranks[-1] > narrowest:
        raise typer.BadParameter(
            f"found {ranks[-1]}, expected at most {narrowest}, the width of {model}'s narrowest "
            "q, k or v",
            param_hint="--rank",
        )
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    try:
        device = _forward_device()
        result = {
            "date": date.today().isoformat(),
            "machine": machine.describe(),
            "versions": {name: version(name) for name in ("torch", "vllm-jd")},
            "threads": threads,
            "model": str(model),
            "modules": len(modules),
            "dtype": str(DTYPE).split(".")[-1],
            "rounds": rounds,
            "memory": memory_table(modules, ranks, cluster_counts),
            "load": time_loads(modules, ranks, rounds),
            "forward": time_forwards(
                modules[:SLICES],
                ranks,
                cluster_counts,
                sorted(set(adapters or [1, 4, 16, 32])),
                rounds,
                device,
            ),
        }
    except Stopped as error:
        console.print(f"stopped: {error}")
        raise typer.Exit(1) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    _draw(result, out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


# --- memory ---


def lora_numbers(shapes: Shapes, rank: int, adapters: int) -> int:
    """Numbers of A and B of all modules (App. F.1; F-LoRA has as many)."""
    return adapters * rank * sum(d_in + d_out for d_in, d_out in shapes)


def jd_numbers(shapes: Shapes, rank: int, clusters: int, adapters: int, *, diagonal: bool) -> int:
    """Numbers of U, V and the cores of all modules, and each adapter's cluster in each module
    where there is more than one (App. F.2 and F.3)."""
    bases = clusters * rank * sum(d_in + d_out for d_in, d_out in shapes)
    own = (rank if diagonal else rank**2) + (clusters > 1)
    return bases + adapters * len(shapes) * own


def memory_table(
    shapes: Shapes, ranks: Sequence[int], clusters: Sequence[int]
) -> list[dict[str, Any]]:
    """Bytes of all modules; ratios are to LoRA of the first rank, as in App. F."""
    rows = []
    for n in MEMORY_ADAPTERS:
        baseline = lora_numbers(shapes, ranks[0], n)
        sizes: list[tuple[str, int, int | None, int]] = []
        for rank in ranks:
            sizes.append(("LoRA, F-LoRA", rank, None, lora_numbers(shapes, rank, n)))
            for c in clusters:
                for name in (FULL, DIAGONAL):
                    size = jd_numbers(shapes, rank, c, n, diagonal=name == DIAGONAL)
                    sizes.append((name, rank, c, size))
        rows += [
            {
                "system": name,
                "rank": rank,
                "clusters": c,
                "adapters": n,
                "bytes": DTYPE.itemsize * size,
                f"over_lora_rank_{ranks[0]}": round(size / baseline, 5),
            }
            for name, rank, c, size in sizes
        ]
    return rows


# --- one layer, its adapters, and the ways to compute with them ---


class Batch(NamedTuple):
    """Inputs [n, d_in], and of each token the adapter: int32 for the kernel, int64 for torch."""

    x: torch.Tensor
    slots: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """The base weight `[sum of d_out, d_in]` of slices (q, k, v) with a common input."""

    weight: torch.Tensor
    d_out: tuple[int, ...]

    @classmethod
    def random(cls, shapes: Shapes, dtype: torch.dtype, device: str = "cpu") -> "Layer":
        """Shapes are (d_in, d_out) of each slice."""
        (d_in,) = {d_in for d_in, _ in shapes}
        d_out = tuple(width for _, width in shapes)
        return cls(_normal(sum(d_out), d_in, scale=d_in**-0.5, dtype=dtype, device=device), d_out)

    def batch(self, n: int, residents: int) -> Batch:
        """`n` tokens, each of another of `residents` adapters."""
        index = torch.randperm(residents)[:n].to(self.weight.device)
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        return Batch(torch.randn(n, self.weight.shape[1], **like), index.int(), index)


class System(Protocol):
    """A way to compute what adapters do to a layer."""

    name: str
    rank: int
    clusters: int | None

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        """Add what the adapters contribute to y [n, sum of d_out], the base layer's output.

        F-LoRA has no base output to add to: it overwrites y.
        """

    def expected(self, y: torch.Tensor, batch: Batch, token: int) -> torch.Tensor:
        """Output of one token by the definition, float64 `[sum of d_out]`; y as before `run`."""


@dataclass(frozen=True)
class LoraWeights:
    """For each slice A `[n, rank, d_in]` and B `[n, d_out, rank]`."""

    a: list[torch.Tensor]
    b: list[torch.Tensor]

    @classmethod
    def random(cls, layer: Layer, rank: int, adapters: int) -> "LoraWeights":
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        d_in = layer.weight.shape[1]
        return cls(
            [_normal(adapters, rank, d_in, scale=d_in**-0.5, **like) for _ in layer.d_out],
            [_normal(adapters, width, rank, scale=rank**-0.5, **like) for width in layer.d_out],
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.a, *self.b))


class _Lora:
    """What the LoRA paths have in common: y += B·(A·x)."""

    name = ""
    clusters = None

    def __init__(self, weights: LoraWeights):
        self.rank = weights.a[0].shape[1]
        self.weights = weights

    def expected(self, y: torch.Tensor, batch: Batch, token: int) -> torch.Tensor:
        adapter, x = int(batch.index[token]), batch.x[token].double()
        pairs = zip(self.weights.a, self.weights.b, strict=True)
        delta = [b[adapter].double() @ (a[adapter].double() @ x) for a, b in pairs]
        return y[token].double() + torch.cat(delta)


class VllmLora(_Lora):
    """vLLM's operators for a machine without GPU, called as its `PunicaWrapperCPU` does."""

    name = VLLM

    def __init__(self, weights: LoraWeights):
        from vllm.lora.ops import torch_ops

        super().__init__(weights)
        self._ops = torch_ops
        self._a = [a.unsqueeze(1) for a in weights.a]
        self._b = [b.unsqueeze(1) for b in weights.b]

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        column = 0
        for a, b in zip(self._a, self._b, strict=True):
            h = torch.zeros(len(y), self.rank, dtype=torch.float32, device=y.device)
            self._ops.bgmv_shrink(batch.x, a, h, batch.index, 1.0)
            width = b.shape[2]
            self._ops.bgmv_expand_slice(h, b, y, batch.index, column, width, add_inputs=True)
            column += width


class BmmLora(_Lora):
    """Each token's A and B gathered, and multiplied by torch's bmm in the layer's dtype."""

    name = BMM

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        x = batch.x.unsqueeze(2)
        column = 0
        for a, b in zip(self.weights.a, self.weights.b, strict=True):
            delta = torch.bmm(b[batch.index], torch.bmm(a[batch.index], x)).squeeze(2)
            y[:, column : column + b.shape[1]] += delta
            column += b.shape[1]


class KernelLora(_Lora):
    """Uncompressed adapters in the product's kernel: bases of their own and no cores."""

    name = KERNEL

    def __init__(self, weights: LoraWeights):
        super().__init__(weights)
        n, slices = weights.a[0].shape[0], len(weights.a)
        rows = torch.zeros(n, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
        for s in range(slices):
            for field, values in (
                ("v_start", (s * n + torch.arange(n)) * self.rank),
                ("u_start", torch.arange(n) * self.rank),
                ("rank", self.rank),
                ("core_kind", CORE_NONE),
                ("scale_row", -1),
            ):
                rows[:, s, 0, ROW_FIELDS.index(field)] = values
        v = torch.cat([a.flatten(0, 1) for a in weights.a])
        u = [b.transpose(1, 2).flatten(0, 1).contiguous() for b in weights.b]
        self.pools = ModulePools(v, u, v.new_zeros(1, 1), rows.to(v.device))

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        add_adapters(y, batch.x, self.pools, batch.slots)


class FLora(_Lora):
    """y = (W ∘ (B·A))·x as Σ_k b_k ∘ (W·(a_k ∘ x)): no bmm, but W is applied to `rank` inputs of
    each token (App. D; Batched Low-Rank Adaptation of Foundation Models, Wen & Chaudhuri 2024)."""

    name = F_LORA

    def __init__(self, weights: LoraWeights, layer: Layer):
        super().__init__(weights)
        self._w = layer.weight.split(layer.d_out)
        self._bt = [b.transpose(1, 2).contiguous() for b in weights.b]

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        column = 0
        for w, a, bt in zip(self._w, self.weights.a, self._bt, strict=True):
            h = linear(batch.x.unsqueeze(1) * a[batch.index], w)
            y[:, column : column + len(w)] = (h * bt[batch.index]).sum(1)
            column += len(w)

    def expected(self, y: torch.Tensor, batch: Batch, token: int) -> torch.Tensor:
        adapter, x = int(batch.index[token]), batch.x[token].double()
        parts = zip(self._w, self.weights.a, self.weights.b, strict=True)
        return torch.cat(
            [(w.double() * (b[adapter].double() @ a[adapter].double())) @ x for w, a, b in parts]
        )


@dataclass(frozen=True)
class Bases:
    """V `[slices · clusters · rank, d_in]`, and U `[clusters · rank, d_out]` of each slice."""

    v: torch.Tensor
    u: list[torch.Tensor]
    rank: int
    clusters: int

    @classmethod
    def random(cls, layer: Layer, rank: int, clusters: int) -> "Bases":
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        d_in, rows = layer.weight.shape[1], clusters * rank
        v = _normal(len(layer.d_out) * rows, d_in, scale=d_in**-0.5, **like)
        u = [_normal(rows, width, scale=rank**-0.5, **like) for width in layer.d_out]
        return cls(v, u, rank, clusters)


class Jd:
    """y += U·core·V·x in the product's kernel; adapter a is in cluster a % clusters."""

    def __init__(self, bases: Bases, adapters: int, *, diagonal: bool):
        self.name = DIAGONAL if diagonal else FULL
        self.rank, self.clusters = rank, clusters = bases.rank, bases.clusters
        slices = len(bases.u)
        length = rank if diagonal else rank**2
        cluster = torch.arange(adapters) % clusters
        rows = torch.zeros(adapters, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
        for s in range(slices):
            for field, values in (
                ("v_start", (s * clusters + cluster) * rank),
                ("u_start", cluster * rank),
                ("rank", rank),
                ("core_slot", torch.arange(adapters)),
                ("core_offset", s * length),
                ("core_kind", CORE_DIAGONAL if diagonal else CORE_FULL),
                ("scale_row", -1),
            ):
                rows[:, s, 0, ROW_FIELDS.index(field)] = values
        scale = 1.0 if diagonal else rank**-0.5
        like = {"dtype": bases.v.dtype, "device": bases.v.device}
        self._cores = _normal(adapters, slices * length, scale=scale, **like)
        self._bases = bases
        self.pools = ModulePools(bases.v, bases.u, self._cores, rows.to(bases.v.device))

    @property
    def nbytes(self) -> int:
        """Of bases and cores."""
        return sum(t.nbytes for t in (self.pools.v, *self.pools.u, self.pools.cores))

    def run(self, y: torch.Tensor, batch: Batch) -> None:
        add_adapters(y, batch.x, self.pools, batch.slots)

    def expected(self, y: torch.Tensor, batch: Batch, token: int) -> torch.Tensor:
        adapter, x = int(batch.index[token]), batch.x[token].double()
        cluster = adapter % self.clusters
        v = self._bases.v.view(len(self._bases.u), self.clusters, self.rank, -1)[:, cluster]
        cores = self._cores[adapter].view(len(self._bases.u), -1)
        delta = []
        for v_s, u, core in zip(v, self._bases.u, cores, strict=True):
            core = core.double()
            core = core.diag() if self.name == DIAGONAL else core.view(self.rank, self.rank)
            u_s = u.view(self.clusters, self.rank, -1)[cluster].double()
            delta.append(u_s.T @ (core @ (v_s.double() @ x)))
        return y[token].double() + torch.cat(delta)


def make_systems(
    layer: Layer, ranks: Sequence[int], clusters: Sequence[int], residents: int
) -> list[System]:
    """All that are compared, with `residents` adapters each.

    Raises:
        Mismatch: the tensors have other sizes than App. F says.
    """
    shapes = [(layer.weight.shape[1], width) for width in layer.d_out]
    size = layer.weight.dtype.itemsize
    systems: list[System] = []
    for rank in ranks:
        lora = LoraWeights.random(layer, rank, residents)
        _check_bytes(
            f"LoRA of rank {rank}", lora.nbytes, lora_numbers(shapes, rank, residents), size
        )
        if HAS_VLLM:
            systems.append(VllmLora(lora))
        systems += [BmmLora(lora), KernelLora(lora), FLora(lora, layer)]
        for c in clusters:
            bases = Bases.random(layer, rank, c)
            for diagonal in (False, True):
                jd = Jd(bases, residents, diagonal=diagonal)
                numbers = jd_numbers(shapes, rank, c, residents, diagonal=diagonal)
                # Which cluster an adapter is in lies in the index rows, not among these tensors.
                numbers -= residents * len(shapes) * (c > 1)
                _check_bytes(f"{jd.name} of rank {rank}", jd.nbytes, numbers, size)
                systems.append(jd)
    return systems


def _check_bytes(what: str, found: int, numbers: int, size: int) -> None:
    if found != numbers * size:
        raise Mismatch(f"{what} takes {found} bytes, by the formula it is {numbers * size}")


def check(system: System, layer: Layer, batch: Batch) -> float:
    """Relative error (Frobenius) of `run` against float64, over at most `CHECKED_TOKENS` tokens.

    Raises:
        Mismatch: it is beyond what the dtype explains.
    """
    before = linear(batch.x, layer.weight)
    y = before.clone()
    system.run(y, batch)
    tokens = list(range(0, len(y), -(-len(y) // CHECKED_TOKENS)))
    wanted = torch.stack([system.expected(before, batch, token) for token in tokens])
    error = float((y[tokens].double() - wanted).norm() / wanted.norm())
    limit = TOLERANCE[layer.weight.dtype]
    if not error <= limit:
        raise Mismatch(
            f"{system.name}, rank {system.rank}, {len(y)} adapters: relative error {error:.2g} "
            f"against float64, expected at most {limit:g}"
        )
    return error


# --- forward ---


def time_forwards(
    shapes: Shapes,
    ranks: Sequence[int],
    clusters: Sequence[int],
    adapters: Sequence[int],
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """Milliseconds that adapters add to a layer of these slices, for each system and batch."""
    layer = Layer.random(shapes, DTYPE, device)
    residents = max(adapters)
    systems = make_systems(layer, ranks, clusters, residents)
    tiny = Layer.random(TINY, DTYPE, device)
    warmers = make_systems(tiny, ranks, clusters, residents)
    report: dict[str, Any] = {
        "device": device,
        "kernel": backend_name(device),
        "d_in": shapes[0][0],
        "d_out": list(layer.d_out),
        "resident_adapters": residents,
        "base_layer_ms": {},
        "rows": [],
    }
    for n in adapters:
        console.print(f"forward: {n} adapters in the batch")
        errors = [check(system, layer, layer.batch(n, residents)) for system in systems]
        base, times = _forward_rounds((systems, layer), (warmers, tiny), n, residents, rounds)
        report["base_layer_ms"][n] = _median_ms(base)
        loras = {
            (system.name, system.rank): own
            for system, own in zip(systems, times, strict=True)
            if system.name in LORA_PATHS
        }
        for system, own, error in zip(systems, times, errors, strict=True):
            row = {"system": system.name, "rank": system.rank, "clusters": system.clusters}
            row |= {"adapters": n, "added_ms": _median_ms(own), "relative_error": error}
            row["layer_over_base"] = _ratio([t + b for t, b in zip(own, base, strict=True)], base)
            row["added_over_same_rank"] = {
                name: _ratio(own, lora) for (name, r), lora in loras.items() if r == system.rank
            }
            row[f"added_over_rank_{ranks[0]}"] = {
                name: _ratio(own, lora) for (name, r), lora in loras.items() if r == ranks[0]
            }
            report["rows"].append(row)
    return report


def _forward_device() -> str:
    """`cuda` where there is one and a kernel for it, else `cpu`.

    Raises:
        Stopped: the product's kernel is not there, or its choice in the environment is wrong.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        try:
            kernel = backend_name(device)
        except NotImplementedError as error:
            console.print(f"forward runs on CPU: {error}")
            device, kernel = "cpu", backend_name("cpu")
    except (ValueError, RuntimeError) as error:
        raise Stopped(str(error)) from error
    if kernel == "reference":
        raise Stopped(
            "the kernel would be the slow torch reference; unset VLLM_JD_KERNEL, or see the log "
            "for why the CPU kernel could not be built"
        )
    return device


def _forward_rounds(
    real: tuple[Sequence[System], Layer],
    tiny: tuple[Sequence[System], Layer],
    n: int,
    residents: int,
    rounds: int,
) -> tuple[list[float], list[list[float]]]:
    """Seconds in each round of the base layer, and of what each system adds to it.

    Of F-LoRA, whose time has the base layer in it, the base's time is subtracted.
    """
    systems, layer = real
    device = layer.weight.device
    cold = torch.zeros(COLD_BYTES // 8, dtype=torch.int64, device=device)
    base: list[float] = []
    times: list[list[float]] = [[] for _ in systems]
    for number in range(rounds + 1):
        batch, tiny_batch = (each.batch(n, residents) for each in (layer, tiny[1]))
        y, tiny_y = linear(batch.x, layer.weight), linear(tiny_batch.x, tiny[1].weight)
        cold.sum()
        linear(tiny_batch.x, tiny[1].weight)
        own_base = _seconds(partial(linear, batch.x, layer.weight), device)
        order = range(len(systems)) if number % 2 else reversed(range(len(systems)))
        for i in order:
            out = y.clone()
            cold.sum()
            tiny[0][i].run(tiny_y, tiny_batch)
            taken = _seconds(partial(systems[i].run, out, batch), device)
            if number:  # the first round warms up
                times[i].append(taken - own_base if systems[i].name == F_LORA else taken)
        if number:
            base.append(own_base)
    return base, times


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _median_ms(seconds: Sequence[float]) -> float:
    return float(f"{1e3 * statistics.median(seconds):.4g}")


def _ratio(seconds: Sequence[float], other: Sequence[float]) -> float:
    pairs = zip(seconds, other, strict=True)
    return float(f"{statistics.median(one / two for one, two in pairs):.4g}")


def _normal(
    *shape: int, scale: float, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


# --- load ---


class Loadable:
    """One adapter in a file and in memory, and the place where it is to go.

    Args:
        tensors: what an adapter has, by name. One alone is row 0 of a tensor of `STORED_ROWS` rows
            in the file, as a store keeps cores; more are an adapter's file of its own, as PEFT's.
        device: of the place; the tensors are pinned in memory if it is a GPU.
    """

    def __init__(
        self, name: str, rank: int, tensors: Mapping[str, torch.Tensor], folder: Path, device: str
    ):
        self.name, self.rank = name, rank
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._file = folder / f"{name}-{rank}.safetensors"
        self._row = len(tensors) == 1
        if self._row:
            ((key, row),) = tensors.items()
            save_file(
                {key: torch.stack([row, *row.new_zeros(STORED_ROWS - 1, len(row))])}, self._file
            )
        else:
            save_file(dict(tensors), self._file)
        pin = device == "cuda"
        self._source = {key: t.pin_memory() if pin else t for key, t in tensors.items()}
        self._host = {key: torch.zeros_like(t) for key, t in tensors.items()}
        self._place = {key: torch.zeros_like(t, device=device) for key, t in tensors.items()}

    def read(self) -> None:
        """From the file into tensors in memory."""
        with safe_open(self._file, framework="pt") as file:
            for key, tensor in self._host.items():
                tensor.copy_(file.get_slice(key)[0] if self._row else file.get_tensor(key))

    def copy(self) -> None:
        """From memory to the place."""
        for key, tensor in self._place.items():
            tensor.copy_(self._source[key], non_blocking=True)

    def check(self) -> None:
        """Raise Mismatch unless `read` and `copy` have brought the adapter's own numbers."""
        for what, tensors in (("file", self._host), ("memory", self._place)):
            for key, tensor in tensors.items():
                if not torch.equal(tensor.cpu(), self._source[key]):
                    raise Mismatch(f"{self.name} of rank {self.rank}: {key} from {what} differs")


def make_loadables(
    shapes: Shapes, rank: int, folder: Path, device: str, dtype: torch.dtype = DTYPE
) -> list[Loadable]:
    """One adapter each of LoRA, JD-Full and JD-Diag, of all modules."""
    lora = {}
    for i, (d_in, d_out) in enumerate(shapes):
        lora[f"{i}.lora_A"] = torch.randn(rank, d_in).to(dtype)
        lora[f"{i}.lora_B"] = torch.randn(d_out, rank).to(dtype)
    full = {"cores": torch.randn(len(shapes) * rank**2).to(dtype)}
    diagonal = {"cores": torch.randn(len(shapes) * rank).to(dtype)}
    return [
        Loadable(name, rank, tensors, folder, device)
        for name, tensors in (("LoRA", lora), (FULL, full), (DIAGONAL, diagonal))
    ]


def time_loads(shapes: Shapes, ranks: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds to load one adapter of each kind and rank."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print("load")
    cold = torch.zeros(COLD_BYTES // 8, dtype=torch.int64)
    with tempfile.TemporaryDirectory(prefix="vllm-jd-bench-") as folder:
        cases = [
            case for rank in ranks for case in make_loadables(shapes, rank, Path(folder), device)
        ]
        (tiny_folder := Path(folder) / "tiny").mkdir()
        tiny = {case.name: case for case in make_loadables(TINY, 4, tiny_folder, device)}
        reads: list[list[float]] = [[] for _ in cases]
        copies: list[list[float]] = [[] for _ in cases]
        for number in range(rounds + 1):
            for i in range(len(cases)) if number % 2 else reversed(range(len(cases))):
                cold.sum()
                tiny[cases[i].name].read()
                read = _seconds(cases[i].read, torch.device("cpu"))
                cold.sum()
                tiny[cases[i].name].copy()
                copy = _seconds(cases[i].copy, torch.device(device))
                if number:
                    reads[i].append(read)
                    copies[i].append(copy)
                else:
                    cases[i].check()
    lora = {case.rank: i for i, case in enumerate(cases) if case.name == "LoRA"}
    rows = []
    for i, case in enumerate(cases):
        row = {"system": case.name, "rank": case.rank, "bytes": case.nbytes}
        row |= {"file_ms": _median_ms(reads[i]), "copy_ms": _median_ms(copies[i])}
        for key, base in (("same_rank", lora[case.rank]), (f"rank_{ranks[0]}", lora[ranks[0]])):
            row[f"file_over_{key}"] = _ratio(reads[i], reads[base])
            row[f"copy_over_{key}"] = _ratio(copies[i], copies[base])
        rows.append(row)
    return {
        "device": device,
        "note": "file: opened, read and copied in place, its pages in memory; copy: memory to "
        "memory, or pinned memory to GPU. The bases of JD, loaded once, are as many numbers as one "
        "LoRA adapter of that rank for each cluster",
        "rows": rows,
    }


# --- the figure: in each panel one group for each rank ---

GREYS = {VLLM: "#000000", BMM: "#606060", KERNEL: "#a0a0a0", F_LORA: "#d62728"}
MARKERS = {VLLM: "s", BMM: "v", KERNEL: "D", F_LORA: "x", FULL: "o", DIAGONAL: "^"}
MAPS = {FULL: plt.cm.Blues, DIAGONAL: plt.cm.Oranges}


def _draw(result: Mapping[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(
        1, 3, figsize=(17, 6.5), layout="constrained", width_ratios=(1.2, 0.8, 1.5)
    )
    _draw_memory(result, axes[0])
    _draw_load(result["load"], axes[1])
    _draw_forward(result["forward"], axes[2])
    for place in axes:
        place.set_yscale("log")
        bottom, top = place.get_ylim()
        place.set_ylim(bottom, 1.6 * top)  # room for the groups' names
        place.spines[["top", "right"]].set_visible(False)
        place.grid(axis="y", alpha=0.3)
        place.set_axisbelow(True)
    figure.suptitle(
        f"{result['model']}, q, k, v, {result['dtype']}; {result['machine']}, "
        f"threads: {result['threads']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_memory(result: Mapping[str, Any], axes: Axes) -> None:
    _draw_groups(axes, result["memory"], lambda row: row["bytes"] / 2**20)
    axes.set_xlabel("adapters")
    axes.set_ylabel("MiB")
    axes.set_title(f"memory of {result['modules']} modules")


def _draw_forward(forward: Mapping[str, Any], axes: Axes) -> None:
    _draw_groups(axes, forward["rows"], lambda row: max(row["added_ms"], 1e-3))
    base = forward["base_layer_ms"]
    axes.axhspan(min(base.values()), max(base.values()), color="green", alpha=0.15, lw=0)
    axes.axhline(max(base.values()), color="green", ls=":", label="base layer itself, all batches")
    axes.set_xlabel("adapters in the batch, one token each")
    axes.set_ylabel("ms added to the base layer")
    axes.set_title(f"forward of one layer on {forward['device']}")
    _legend(axes)


def _draw_groups(
    axes: Axes, rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> None:
    """Lines over the number of adapters, one group for each rank."""
    counts = sorted({row["adapters"] for row in rows})
    clusters = sorted({row["clusters"] for row in rows if row["clusters"]})
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    lines: dict[tuple[int, str, int | None], dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault((row["rank"], row["system"], row["clusters"]), {})
        line[row["adapters"]] = value(row)
    step = len(counts) + 1
    for (rank, system, c), line in lines.items():
        label = system if c is None else f"{system}, {c} cluster{'s' * (c > 1)}"
        colour = GREYS.get(system, "black")
        if c is not None:
            colour = MAPS[system](0.35 + 0.6 * (clusters.index(c) + 1) / len(clusters))
        axes.plot(
            [ranks.index(rank) * step + counts.index(n) for n in line],
            list(line.values()),
            color=colour,
            marker=MARKERS.get(system, "s"),
            markersize=4,
            label=label if rank == ranks[0] else None,
        )
    every = -(-len(counts) // 4)
    ticks = [g * step + i for g in range(len(ranks)) for i in range(0, len(counts), every)]
    axes.set_xticks(ticks, counts[::every] * len(ranks), fontsize=8)
    for g, rank in enumerate(ranks):
        _name_group(axes, g * step + (len(counts) - 1) / 2, rank)
    _legend(axes)


def _draw_load(load: Mapping[str, Any], axes: Axes) -> None:
    rows = load["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    target = "GPU, pinned" if load["device"] == "cuda" else "memory"
    for shift, key, alpha, what in (
        (0, "file_ms", 1.0, "file, in page cache"),
        (len(systems), "copy_ms", 0.45, f"memory to {target}"),
    ):
        for i, system in enumerate(systems):
            own = [row for row in rows if row["system"] == system]
            bars = axes.bar(
                [ranks.index(row["rank"]) * (2 * len(systems) + 1) + shift + i for row in own],
                [row[key] for row in own],
                0.9,
                color={FULL: plt.cm.Blues(0.75), DIAGONAL: plt.cm.Oranges(0.75)}.get(system, "0.2"),
                alpha=alpha,
                label=f"{system}: {what}",
            )
            axes.bar_label(bars, [f"{row[key]:.2g}" for row in own], fontsize=7)
    axes.set_xticks([])
    for g, rank in enumerate(ranks):
        _name_group(axes, g * (2 * len(systems) + 1) + len(systems) - 0.5, rank)
    axes.set_ylabel("ms")
    axes.set_title("load of one adapter, all layers")
    _legend(axes)


def _name_group(axes: Axes, x: float, rank: int) -> None:
    axes.text(x, 1.0, f"rank {rank}", transform=axes.get_xaxis_transform(), ha="center", va="top")


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


if __name__ == "__main__":
    typer.run(main)
