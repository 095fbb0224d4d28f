"""Compress one module: fit a method, round to the store's type, and measure what was lost."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, svds

from vllm_jd.compressor.algebra.approximation import (
    Shared,
    best_cores,
    cores_beside_residual,
    expanded,
    relative_errors,
)
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.calibrate.calibration import Metric
from vllm_jd.compressor.methods.method import Start
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.methods.svd import truncated
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import BLOCK, CORE_KIND, CORE_NONE, RANK, U_START, V_START
from vllm_jd.store.quantise import dequantise, quantise

_RESIDUAL_ROUNDS = 8
_EPSILON = 1e-300


@dataclass(frozen=True)
class Rounding:
    """The store's type of numbers: a torch dtype, or `int8` or `int4` with scales."""

    dtype: str
    quantised: str | None

    @classmethod
    def of(cls, settings: Settings) -> "Rounding":
        """That of `settings`."""
        return cls(settings.float_dtype, settings.quantised)

    def store(
        self, name: str, matrix: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(the tensors to write, what they stand for as float32) of a matrix `[rows, width]`."""
        if self.quantised is None:
            rounded = matrix.to(getattr(torch, self.dtype))
            return {name: rounded.cpu()}, rounded.float()
        codes, steps = quantise(matrix, self.quantised)
        value = dequantise(codes, steps, matrix.shape[1])
        # As the reader gives it out, in a type that the engine takes.
        value = value.to(getattr(torch, self.dtype)).float()
        return {name: codes.cpu(), f"{name}.steps": steps.cpu()}, value


@dataclass(frozen=True)
class _Stored:
    """A module as it will be read back, and the tensors of it."""

    shared: Shared | None
    cores: torch.Tensor
    private: ModuleFactors | None
    mean: ModuleFactors | None
    tensors: dict[str, torch.Tensor]
    core_width: int
    """Numbers of one core as it lies in the store."""


def compress_module(
    raw: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    *,
    metric: Metric | None = None,
    start: Start | None = None,
) -> dict[str, torch.Tensor]:
    """Everything that the store keeps of one module.

    Args:
        raw: the factors of all adapters.
        assignment: int64 `[n]`, the cluster of each adapter, for methods with clusters.
        settings: method, parameters and type.
        metric: where the error of an input matters by how often it occurs.
        start: bases to start from.

    Returns:
        `U`, `V`, `scales` (with `.steps` where they are quantised) and `clusters` as in
        `vllm_jd.store.bases`; `cores` `[n, core_size]`; `cluster` int32 `[n, rows]`, `rank` int32,
        `norm`, `error` (and `exact_error`, `input_error` where they are known) float32 `[n]`;
        `shape` int64 `[3]`: how many clusters are shared, their rank, and core_size.
    """
    rounding = Rounding.of(settings)
    measure = metric
    if settings.method == "none":
        metric = None  # there is nothing to choose, and the way there and back would cost digits
    weighted = raw if metric is None else metric.seen(raw)
    mean = _mean(weighted, settings) if settings.mean_rank else None
    shared, private = _fit(weighted, mean, assignment, settings, start)
    stored = _round(weighted, shared, private, mean, settings, rounding, metric)
    norms = raw.squared_norms().clamp_min(0).sqrt()
    tensors = stored.tensors | _index(raw, stored)
    tensors |= {
        "norm": norms.float().cpu(),
        "error": _error_of(raw, norms, stored).float().cpu(),
        "rank": raw.ranks.to(torch.int32).cpu(),
    }
    if rounding.quantised:
        exact = _round(weighted, shared, private, mean, settings, Rounding("float32", None), metric)
        tensors["exact_error"] = _error_of(raw, norms, exact).float().cpu()
    if measure is not None:
        parts = ("shared", "private", "mean")
        seen = replace(stored, **{name: _seen(getattr(stored, name), measure) for name in parts})
        inputs = measure.seen(raw)
        own = inputs.squared_norms().clamp_min(0).sqrt()
        tensors["input_error"] = _error_of(inputs, own, seen).float().cpu()
    return tensors


def range_faults(
    tensors: dict[str, torch.Tensor], module: str, names: list[str], dtype: str
) -> list[str]:
    """Adapters whose numbers leave the range of the store's dtype, in what `compress_module` gives:
    one sentence each."""
    finite = tensors["norm"].isfinite() & tensors["error"].isfinite()
    if tensors["cores"].is_floating_point():
        finite &= tensors["cores"].isfinite().all(dim=1)
    return [
        f"{names[row]}: {module}: too large for {dtype} (norm {float(tensors['norm'][row]):.3g}); "
        "compress with a wider --store-dtype"
        for row in (~finite).nonzero()[:, 0].tolist()
    ]


def _fit(
    weighted: ModuleFactors,
    mean: ModuleFactors | None,
    assignment: torch.Tensor,
    settings: Settings,
    start: Start | None,
) -> tuple[Shared | None, ModuleFactors | None]:
    """What the method makes of the adapters; with a residual, shared and private part in turn."""
    method = METHODS[settings.method]
    factors = weighted if mean is None else weighted.minus(mean)
    scale = None
    if method.normalise:
        norms = weighted.squared_norms().clamp_min(0).sqrt()
        scale = torch.where(norms > 0, 1 / norms.clamp_min(_EPSILON), 0.0)
        factors = factors.scaled(scale)
    fitted = method.fit(factors, assignment, settings.options, start, settings.seed)
    if isinstance(fitted, ModuleFactors):
        # A mean was taken from those without factors, too.
        return None, fitted if mean is None else fitted.where(weighted.ranks > 0)
    private = None
    if settings.residual_rank:
        for done in range(_RESIDUAL_ROUNDS):
            left = factors if private is None else factors.minus(private)
            if done:
                bases = [fitted.bases(c) for c in range(fitted.clusters)]
                fitted = method.fit(left, assignment, settings.options, bases, settings.seed)
            without = factors.minus(expanded(fitted, best_cores(left, fitted)))
            private = truncated(without, settings.residual_rank)
        if scale is not None:
            private = private.scaled(torch.where(scale > 0, 1 / scale.clamp_min(_EPSILON), 0.0))
    return fitted, private


def _round(
    weighted: ModuleFactors,
    shared: Shared | None,
    private: ModuleFactors | None,
    mean: ModuleFactors | None,
    settings: Settings,
    rounding: Rounding,
    metric: Metric | None,
) -> _Stored:
    """Round bases, and fit cores and residuals to the rounded ones.

    Rounding costs U and V their orthonormality: `best_cores` is right for any bases.
    """
    tensors: dict[str, torch.Tensor] = {}
    d_in, d_out, device = weighted.d_in, weighted.d_out, weighted.ranks.device
    rows_u, rows_v = [], []

    def keep(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store rows of U and V; returns them as they will be read."""
        stored_u, value_u = rounding.store("U", u)
        stored_v, value_v = rounding.store("V", v if metric is None else metric.undo(v))
        rows_u.append(stored_u)
        rows_v.append(stored_v)
        return value_u, value_v

    stored_mean = stored_shared = stored_private = None
    left = weighted
    cores = torch.zeros(len(weighted), 0, device=device)
    width = 0
    if shared is not None:
        u, v = keep(shared.u.flatten(0, 1), shared.v.flatten(0, 1))
        scales = shared.scales
        if scales is not None:
            kept, scales = rounding.store("scales", scales)
            tensors |= kept
        stored_shared = replace(
            shared, u=u.view(shared.u.shape), v=v.view(shared.v.shape), scales=scales
        )
    if mean is not None:
        q = int(mean.ranks.max())
        u, v = keep(mean.b[:q], mean.a[:q])
        stored_mean = ModuleFactors.repeated(u, v, mean.ranks > 0)
        left = left.minus(_seen(stored_mean, metric))
    if shared is not None:
        seen = _seen(stored_shared, metric)
        width = -(-shared.core_size // BLOCK) * BLOCK if rounding.quantised else shared.core_size
        padded = torch.zeros(len(left), width, device=device)
        # What overflowed is refused later, by the name of the adapter: not here, by eigh.
        finite = all(bool(x.isfinite().all()) for x in (seen.u, seen.v))
        residual_rank = 0 if private is None or not finite else settings.residual_rank
        padded[:, : shared.core_size] = cores_beside_residual(left, seen, residual_rank)
        kept, cores = rounding.store("cores", padded)
        cores = cores[:, : shared.core_size]
        tensors |= kept
        if private is not None:
            rest = left.minus(expanded(seen, cores))
            a, b = (rows.nan_to_num(0, posinf=0, neginf=0) for rows in (rest.a, rest.b))
            private = truncated(ModuleFactors(a, b, rest.ranks), settings.residual_rank)
            private = private.where(weighted.squared_norms() > 0)
    if private is not None:
        b, a = keep(private.b, private.a)
        stored_private = ModuleFactors(a, b, private.ranks)
    for name in rows_u[0] if rows_u else ():
        tensors[name] = torch.cat([part[name] for part in rows_u])
    for name in rows_v[0] if rows_v else ():
        tensors[name] = torch.cat([part[name] for part in rows_v])
    for name, columns in (("U", d_out), ("V", d_in), ("scales", d_out)):
        if name not in tensors:
            tensors |= rounding.store(name, torch.zeros(0, columns))[0]
    if "cores" not in tensors:
        tensors |= rounding.store("cores", cores)[0]
    return _Stored(stored_shared, cores, stored_private, stored_mean, tensors, width)


def _error_of(factors: ModuleFactors, norms: torch.Tensor, stored: _Stored) -> torch.Tensor:
    others = [part for part in (stored.mean, stored.private) if part is not None]
    left = factors.minus(*others) if others else factors
    return relative_errors(left, norms, stored.shared, stored.cores)


def _seen(part: Shared | ModuleFactors | None, metric: Metric | None) -> Any:
    """A part of what is stored, as the metric sees it."""
    if metric is None or part is None:
        return part
    if isinstance(part, ModuleFactors):
        return metric.seen(part)
    return replace(part, v=metric.see(part.v))


def _index(raw: ModuleFactors, stored: _Stored) -> dict[str, torch.Tensor]:
    """The module's cluster table, and each adapter's rows in it."""
    present = raw.ranks > 0
    lines: list[list[int]] = []
    columns: list[torch.Tensor] = []
    shared, u_start, v_start = stored.shared, 0, 0
    rank = 0
    if shared is not None:
        rank = shared.rank
        for c in range(shared.clusters):
            u_row = min(c, len(shared.u) - 1) * rank
            v_row = min(c, len(shared.v) - 1) * rank
            lines.append([v_row, u_row, rank, shared.core, -1 if shared.scales is None else c])
        u_start, v_start = len(shared.u) * rank, len(shared.v) * rank
        columns.append(torch.where(present, shared.assignment, -1))
    if stored.mean is not None:
        width = int(stored.mean.ranks.max())
        columns.append(torch.where(stored.mean.ranks > 0, len(lines), -1))
        lines.append([v_start, u_start, width, CORE_NONE, -1])
        u_start, v_start = u_start + width, v_start + width
    shared_lines = len(lines)
    table = torch.tensor(lines, dtype=torch.int32).view(-1, 5)
    if stored.private is not None:
        ranks = stored.private.ranks
        owners = (ranks > 0) & present
        starts = ranks.cumsum(0) - ranks
        own = torch.full((int(owners.sum()), 5), -1)
        own[:, V_START] = starts[owners] + v_start
        own[:, U_START] = starts[owners] + u_start
        own[:, RANK] = ranks[owners]
        own[:, CORE_KIND] = CORE_NONE
        columns.append(torch.where(owners, owners.cumsum(0) - 1 + shared_lines, -1))
        table = torch.cat([table, own.to(torch.int32).cpu()])
    if shared is not None and shared.cores is not None:
        shared_lines = rank = 0  # every cluster is one adapter's own
    return {
        "clusters": table,
        "cluster": torch.stack(columns, dim=1).to(torch.int32).cpu(),
        "shape": torch.tensor([shared_lines, rank, stored.core_width]),
    }


def _mean(factors: ModuleFactors, settings: Settings) -> ModuleFactors | None:
    """The mean delta's best approximation of rank `mean_rank`, once for each adapter.

    Adapters of norm 0 have no part in it, and it no part in them: they stay 0. None: all are.
    """
    kept = factors.squared_norms() > 0
    n = int(kept.sum())
    if n == 0:
        return None
    u, s, v = _top_singular(factors.b.cpu().numpy(), factors.a.cpu().numpy(), settings)
    rows = (torch.from_numpy(part.copy()).to(factors.a) for part in ((u * (s / n)).T, v))
    return ModuleFactors.repeated(*rows, kept)


def _top_singular(
    b: np.ndarray, a: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U `[d_out, q]`, s `[q]`, V `[q, d_in]`) of bᵀa, q at most `mean_rank`."""
    shape = (b.shape[1], a.shape[1])
    if settings.mean_rank < min(shape):
        product = LinearOperator(
            shape,
            matvec=lambda x: b.T @ (a @ x),
            rmatvec=lambda x: a.T @ (b @ x),
            dtype=a.dtype,
        )
        # ARPACK gives up where the rank of the product is lower than what is asked for.
        with contextlib.suppress(ArpackError):
            # Its starting vector must not depend on what other modules drew.
            return svds(product, k=settings.mean_rank, rng=settings.seed)
    u, s, v = np.linalg.svd(b.T @ a, full_matrices=False)
    q = settings.mean_rank
    return u[:, :q], s[:q], v[:q]
