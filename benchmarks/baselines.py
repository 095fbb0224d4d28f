"""What the compressor is compared with: the paper's algorithm as a plain loop, and two packages.

`plain_jd` is Compress then Serve, Appendix A.1 (case 1), adapter by adapter. `lorashare` and
`vlora` run the packages of that name (`pip install vlora-dev lorashare`; imported on use) with as
many components as come closest to a number of parameters. `measure` runs any of them, or ours, in
a process of its own:

    measure(partial(lorashare, parameters=10**6), load=make_pairs, summarise=report)
"""

import ctypes
import gc
import importlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""(A float32 `[r, d_in]`, B float32 `[d_out, r]`) of one adapter, PEFT's scale folded in."""

_OVERSAMPLING = 8


class MissingPackage(ImportError):
    """A package to compare with is not installed."""


@dataclass(frozen=True)
class Compressed:
    """What a package made of the adapters.

    `parameters` and `stored_bytes` count every tensor that is needed to get the adapters back.
    `reconstruct(i)` gives adapter i as the package rebuilds it: module → (A, B).
    """

    components: int
    parameters: int
    stored_bytes: int
    reconstruct: Callable[[int], Mapping[str, Pair]]


class Report(NamedTuple):
    """Size and error of a `Compressed`; `error` as in `mean_error`."""

    components: int
    parameters: int
    stored_bytes: int
    error: float


class Measured(NamedTuple):
    """Wall seconds, bytes of resident memory at the peak beyond those before, and the result."""

    seconds: float
    peak_bytes: int
    result: Any


def plain_jd(
    pairs: Sequence[Pair], rank: int, iterations: int = 10, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """JD-Full of one module by alternating updates, written as the paper has them (A.1, case 1).

    The r eigenvectors of M = Σ_i B_iA_iV(B_iA_iV)ᵀ with the largest eigenvalues are the top left
    singular vectors of [B_1A_1V … B_nA_nV], the "SVD problem" of A.1: here by a randomised SVD.
    V starts as random orthonormal columns (A.3 starts so, too).

    Args:
        pairs: one (A, B) an adapter, normalised to ‖B_iA_i‖_F = 1 if that is wanted (§6.1).
        rank: columns of U and V, at most min(d_in, d_out).
        iterations: updates of both; the paper's setting is ten.
        seed: of the start and of the randomised SVD.

    Returns:
        U float32 `[d_out, rank]`, V float32 `[d_in, rank]`, both with orthonormal columns, and
        the cores Σ_i = UᵀB_iA_iV, float32 `[rank, rank]` each.

    Raises:
        ValueError: no adapters, a rank out of range, or no iteration.
    """
    if not pairs:
        raise ValueError("no adapters to compress: pass at least one (A, B)")
    d_in, d_out = pairs[0][0].shape[1], pairs[0][1].shape[0]
    if not 1 <= rank <= min(d_in, d_out):
        raise ValueError(f"rank is {rank}; choose 1 to {min(d_in, d_out)} for {d_in}→{d_out}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; choose at least 1")
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(seed)
        v = torch.linalg.qr(torch.randn(d_in, rank)).Q
        for _ in range(iterations):
            u = _top_left_singular([b @ (a @ v) for a, b in pairs], rank)
            v = _top_left_singular([a.T @ (b.T @ u) for a, b in pairs], rank)
    return u, v, [(u.T @ b) @ (a @ v) for a, b in pairs]


def lorashare(pairs: Mapping[str, Sequence[Pair]], parameters: int) -> Compressed:
    """Compress with lorashare (SHARE): the steps of its `SHAREModel.from_adapters`, in memory.

    For each module and each of A and B, k components are the top eigenvectors of the centred d×d
    covariance of all adapters' rows; an adapter is its k×r loadings. Stored: k(d_in + d_out) a
    module and 2kr a module and adapter, in float32.

    Args:
        pairs: module → one (A, B) an adapter, all of one rank.
        parameters: k is chosen so that the stored parameters come closest to this.

    Raises:
        MissingPackage: lorashare is not installed.
        ValueError: fewer than two adapters, or pairs that do not fit together.
    """
    n, rank = _checked(pairs, "lorashare")
    share = _import("lorashare.compression")
    each = sum(a.shape[1] + b.shape[0] + 2 * n * rank for (a, b), *_ in pairs.values())
    most = min(min(a.shape[1], b.shape[0]) for (a, b), *_ in pairs.values())
    k = min(max(round(parameters / each), 1), most)
    adapters = {str(i): {} for i in range(n)}
    for module, of_module in pairs.items():
        for i, (a, b) in enumerate(of_module):
            adapters[str(i)][share.build_lora_key(module, "A")] = a
            adapters[str(i)][share.build_lora_key(module, "B")] = b
    components, _, k = share.compute_shared_components(
        share.combine_adapter_weights(adapters), num_components=k, device="cpu"
    )
    loadings = [share.compute_adapter_loadings(components, one) for one in adapters.values()]

    def reconstruct(adapter: int) -> dict[str, Pair]:
        weights = share.reconstruct_adapter_weights(components, loadings[adapter])
        return {
            module: (
                weights[share.build_lora_key(module, "A")],
                weights[share.build_lora_key(module, "B")],
            )
            for module in pairs
        }

    stored = [*components.values(), *(t for one in loadings for t in one.values())]
    return Compressed(k, *_size(stored), reconstruct)


def vlora(pairs: Mapping[str, Sequence[Pair]], parameters: int) -> Compressed:
    """Compress with vlora-dev: its `SharedSubspace.from_adapters`.

    For each module and each of A and B, every adapter's matrix is flattened to one vector; k
    components are the top principal components of these n vectors, an adapter is k numbers.
    Stored: (k + 1)·r(d_in + d_out) a module (the mean is kept, too) and 2k a module and adapter.

    Args:
        pairs: module → one (A, B) an adapter, all of one rank.
        parameters: k is chosen so that the stored parameters come closest to this. The least that
            it can store is k = 1, as much as two adapters.

    Raises:
        MissingPackage: vlora-dev is not installed.
        ValueError: fewer than two adapters, or pairs that do not fit together.
    """
    n, rank = _checked(pairs, "vlora-dev")
    package = _import("vlora")
    mean = sum(rank * (a.shape[1] + b.shape[0]) for (a, b), *_ in pairs.values())
    k = min(max(round((parameters - mean) / (mean + 2 * n * len(pairs))), 1), n)
    names = list(pairs)
    adapters = [
        package.LoRAWeights(
            layer_names=names,
            lora_a={module: of_module[i][0] for module, of_module in pairs.items()},
            lora_b={module: of_module[i][1] for module, of_module in pairs.items()},
            rank=rank,
        )
        for i in range(n)
    ]
    subspace = package.SharedSubspace.from_adapters(adapters, num_components=k)

    def reconstruct(adapter: int) -> dict[str, Pair]:
        weights = subspace.reconstruct(f"task_{adapter}")
        return {module: (weights.lora_a[module], weights.lora_b[module]) for module in names}

    shared = [
        subspace.components_a,
        subspace.components_b,
        subspace.means_a,
        subspace.means_b,
    ]
    private = [
        side for task in subspace.tasks.values() for side in (task.loadings_a, task.loadings_b)
    ]
    stored = [tensor for side in [*shared, *private] for tensor in side.values()]
    return Compressed(subspace.num_components, *_size(stored), reconstruct)


def mean_error(
    pairs: Mapping[str, Sequence[Pair]], reconstruct: Callable[[int], Mapping[str, Pair]]
) -> float:
    """Mean of ‖BA − B̂Â‖²_F / ‖BA‖²_F over adapters and modules; those with BA = 0 do not count.

    Each adapter is as it came: not normalised, and no d×d product is formed.
    """
    errors = []
    for i in range(len(next(iter(pairs.values())))):
        rebuilt = reconstruct(i)
        for module, of_module in pairs.items():
            a, b = (factor.double() for factor in of_module[i])
            new_a, new_b = (factor.double() for factor in rebuilt[module])
            norm = _squared_norm(a, b)
            if norm > 0:
                difference = _squared_norm(torch.cat([a, new_a]), torch.cat([b, -new_b], dim=1))
                errors.append(max(difference, 0.0) / norm)
    return math.fsum(errors) / len(errors)


def report(compressed: Compressed, pairs: Mapping[str, Sequence[Pair]]) -> Report:
    """Size and error of what a package made of `pairs`; for `measure`'s `summarise`."""
    return Report(
        compressed.components,
        compressed.parameters,
        compressed.stored_bytes,
        mean_error(pairs, compressed.reconstruct),
    )


def measure(
    function: Callable[..., Any],
    *,
    load: Callable[[], Any] | None = None,
    summarise: Callable[..., Any] | None = None,
) -> Measured:
    """Run `function` once in a fresh process; its wall time and its peak of resident memory.

    Time and memory are those of `function` alone: making the input (`load`) comes before the clock
    starts, `summarise` after it has stopped. The process has as many torch threads as this one.
    Memory of further processes that `function` starts does not count. Linux only.

    Args:
        function: called with what `load` gives, or with nothing. A function that a new process can
            import (`functools.partial` of one is fine, a lambda is not); so are the other two.
        load: makes the input in the new process.
        summarise: called with the result and the input; what it gives is the `result` handed
            back. Without it the result itself is, for which a small one is best.

    Raises:
        RuntimeError: the process died (out of memory, a crash). What `function` raises is raised
            here, too.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(
                _measured, function, load, summarise, torch.get_num_threads()
            ).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"the process that ran {function} died before it was done: most likely it was out "
                "of memory (`dmesg` says so); run it on fewer modules or adapters"
            ) from error


def _measured(
    function: Callable[..., Any],
    load: Callable[[], Any] | None,
    summarise: Callable[..., Any] | None,
    threads: int,
) -> Measured:
    torch.set_num_threads(threads)
    # Starting LAPACK and the thread pool takes some 10 ms once: no algorithm should pay for that.
    torch.linalg.svd(torch.eye(64) @ torch.ones(64, 64))
    inputs = () if load is None else (load(),)
    # What `load` has freed goes back to the system, or `function` would get it for nothing.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # ru_maxrss would not do: it starts at the parent's peak, and at what `load` took for a moment.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.perf_counter()
    result = function(*inputs)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    if summarise is not None:
        result = summarise(result, *inputs)
    return Measured(seconds, max(peak, 0), result)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status (proc(5)): `VmRSS`, or `VmHWM` for the peak.

    Inside of `measure` the peak is that since the function was called: 5 in clear_refs sets VmHWM
    to VmRSS.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1])


def _top_left_singular(blocks: list[torch.Tensor], rank: int) -> torch.Tensor:
    # Exact eigenvectors took 7 times as long (d 768, n 64, ten iterations) and ended no higher.
    x = torch.cat(blocks, dim=1)
    u, _, _ = torch.svd_lowrank(x, q=min(rank + _OVERSAMPLING, *x.shape), niter=2)
    return u[:, :rank]


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖BA‖²_F."""
    return float(((b.T @ b) * (a @ a.T)).sum())


def _size(tensors: list[torch.Tensor]) -> tuple[int, int]:
    parameters = sum(tensor.numel() for tensor in tensors)
    return parameters, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"{name.partition('.')[0]} cannot be imported ({error}). It is only compared with; "
            "to have it: pip install vlora-dev lorashare"
        ) from error


def _checked(pairs: Mapping[str, Sequence[Pair]], package: str) -> tuple[int, int]:
    """Number of adapters and their rank; raises ValueError where `package` could not work."""
    if not pairs:
        raise ValueError("no modules to compress: pass at least one")
    n = {len(of_module) for of_module in pairs.values()}
    if len(n) > 1:
        raise ValueError(
            f"{package} needs every adapter in every module; found {sorted(n)} of them"
        )
    if min(n) < 2:
        raise ValueError(f"{package} needs at least 2 adapters; found {min(n)}")
    ranks = {a.shape[0] for of_module in pairs.values() for a, _ in of_module}
    if len(ranks) > 1:
        raise ValueError(f"{package} needs adapters of one rank; found {sorted(ranks)}")
    return n.pop(), ranks.pop()
