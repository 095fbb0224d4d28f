"""Compress one module: fit a method, round to the store's type, and measure what was lost."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_jd.compressor.algebra.approximation import (
    Shared,
    best_cores,
    relative_errors,
)
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.calibrate.calibration import Metric
from vllm_jd.compressor.methods.method import Start
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.run.experts import adapter_norms, folded, of_entries
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import BLOCK, RANK, STORED_FIELDS, U_START, V_START, Row
from vllm_jd.store.part import Matrix, ModulePart
from vllm_jd.store.quantise import dequantise, quantise

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

    def store(self, matrix: torch.Tensor) -> tuple[Matrix, torch.Tensor]:
        """(what to write, what it stands for as float32) of a matrix `[n, width]`."""
        if self.quantised is None:
            rounded = matrix.to(getattr(torch, self.dtype))
            return Matrix(rounded.cpu()), rounded.float()
        codes, steps = quantise(matrix, self.quantised)
        value = dequantise(codes, steps, matrix.shape[1])
        # As the reader gives it out, in a type that the engine takes.
        value = value.to(getattr(torch, self.dtype)).float()
        return Matrix(codes.cpu(), steps.cpu()), value


@dataclass(frozen=True)
class _Stored:
    """A module as it will be read back, and what is written of it."""

    shared: Shared | None
    cores: torch.Tensor
    private: ModuleFactors | None
    mean: ModuleFactors | None
    written: dict[str, Matrix]
    """`u`, `v`, `scales` and `cores`, as in `ModulePart`."""
    core_width: int
    """Numbers of one core as it lies in the store."""


def compress_module(
    raw: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    *,
    metric: Metric | None = None,
    start: Start | None = None,
    experts: int = 0,
) -> ModulePart:
    """Everything that the store keeps of one module.

    Args:
        raw: the factors of all adapters; of experts, of all entries (`…run.experts`).
        assignment: int64 `[n]`, the cluster of each adapter, for methods with clusters.
        settings: method, parameters and type.
        metric: where the error of an input matters by how often it occurs.
        start: bases to start from.
        experts: how many the module has; 0: it is a plain linear layer.
    """
    joint = settings.experts == "joint"
    assignment, settings = of_entries(assignment, settings, experts)
    rounding = Rounding.of(settings)
    measure = metric
    if settings.method == "none":
        metric = None  # there is nothing to choose, and the way there and back would cost digits
    weighted = raw if metric is None else metric.seen(raw)
    mean = _mean(weighted, settings) if settings.mean_rank else None
    shared, private = _fit(weighted, mean, assignment, settings, start, experts)
    stored = _round(weighted, shared, private, mean, rounding, metric)
    norms = raw.squared_norms().clamp_min(0).sqrt()
    rows, chosen, shared_rows = _rows(raw, stored)
    exact_error = input_error = None
    if rounding.quantised:
        exact = _round(weighted, shared, private, mean, Rounding("float32", None), metric)
        exact_error = _error_of(raw, norms, exact).float().cpu()
    if measure is not None:
        parts = ("shared", "private", "mean")
        seen = replace(stored, **{name: _seen(getattr(stored, name), measure) for name in parts})
        inputs = measure.seen(raw)
        own = inputs.squared_norms().clamp_min(0).sqrt()
        input_error = _error_of(inputs, own, seen).float().cpu()
    part = ModulePart(
        **stored.written,
        rows=rows,
        chosen=chosen,
        rank=raw.ranks.to(torch.int32).cpu(),
        norm=norms.float().cpu(),
        error=_error_of(raw, norms, stored).float().cpu(),
        shared=shared_rows,
        shared_rank=stored.shared.rank if shared_rows and stored.shared is not None else 0,
        core_size=stored.core_width,
        exact_error=exact_error,
        input_error=input_error,
    )
    return folded(part, experts, joint=joint) if experts else part


def of_embedding(part: ModulePart, metrics: Mapping[str, Metric]) -> ModulePart:
    """The part of an embedding as it is stored beside those that inputs were measured of: its own
    are not, and its error is the one in which all tokens are alike."""
    return replace(part, input_error=part.error.clone()) if metrics else part


def range_faults(part: ModulePart, module: str, names: list[str], dtype: str) -> list[str]:
    """Adapters whose numbers leave the range of the store's dtype: one sentence each."""
    finite = part.norm.isfinite() & part.error.isfinite()
    if part.cores.data.is_floating_point():
        finite &= part.cores.data.isfinite().all(dim=1)
    return [
        f"{names[i]}: {module}: too large for {dtype} (norm {float(part.norm[i]):.3g}); "
        "compress with a wider --store-dtype"
        for i in (~finite).nonzero()[:, 0].tolist()
    ]


def _fit(
    weighted: ModuleFactors,
    mean: ModuleFactors | None,
    assignment: torch.Tensor,
    settings: Settings,
    start: Start | None,
    experts: int,
) -> tuple[Shared | None, ModuleFactors | None]:
    """What the method makes of the adapters: bases that they share, or factors of their own."""
    method = METHODS[settings.method]
    factors = weighted if mean is None else weighted.minus(mean)
    if method.normalise:
        norms = adapter_norms(weighted, experts)
        factors = factors.scaled(torch.where(norms > 0, 1 / norms.clamp_min(_EPSILON), 0.0))
    fitted = method.fit(factors, assignment, settings.options, start, settings.seed)
    if isinstance(fitted, ModuleFactors):
        # A mean was taken from those without factors, too.
        return None, fitted if mean is None else fitted.where(weighted.ranks > 0)
    return fitted, None


def _round(
    weighted: ModuleFactors,
    shared: Shared | None,
    private: ModuleFactors | None,
    mean: ModuleFactors | None,
    rounding: Rounding,
    metric: Metric | None,
) -> _Stored:
    """Round bases, and fit cores to the rounded ones.

    Rounding costs U and V their orthonormality: `best_cores` is right for any bases.
    """
    d_in, d_out, device = weighted.d_in, weighted.d_out, weighted.ranks.device
    stored_u: list[Matrix] = []
    stored_v: list[Matrix] = []

    def keep(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store vectors of U and V; returns them as they will be read."""
        written_u, value_u = rounding.store(u)
        written_v, value_v = rounding.store(v if metric is None else metric.undo(v))
        stored_u.append(written_u)
        stored_v.append(written_v)
        return value_u, value_v

    stored_mean = stored_shared = stored_private = None
    left = weighted
    cores = torch.zeros(len(weighted), 0, device=device)
    stored_scales = stored_cores = None
    width = 0
    if shared is not None:
        u, v = keep(shared.u.flatten(0, 1), shared.v.flatten(0, 1))
        scales = shared.scales
        if scales is not None:
            stored_scales, scales = rounding.store(scales)
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
        padded[:, : shared.core_size] = best_cores(left, seen)
        stored_cores, cores = rounding.store(padded)
        cores = cores[:, : shared.core_size]
    if private is not None:
        b, a = keep(private.b, private.a)
        stored_private = ModuleFactors(a, b, private.ranks)
    if stored_scales is None:
        stored_scales, _ = rounding.store(torch.zeros(0, d_out))
    if stored_cores is None:
        stored_cores, _ = rounding.store(cores)
    written = {
        "u": Matrix.cat(stored_u) if stored_u else rounding.store(torch.zeros(0, d_out))[0],
        "v": Matrix.cat(stored_v) if stored_v else rounding.store(torch.zeros(0, d_in))[0],
        "scales": stored_scales,
        "cores": stored_cores,
    }
    return _Stored(stored_shared, cores, stored_private, stored_mean, written, width)


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


def _rows(raw: ModuleFactors, stored: _Stored) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(the module's table of rows, those that each adapter adds up, how many rows are shared)."""
    present = raw.ranks > 0
    rows: list[Row] = []
    columns: list[torch.Tensor] = []
    shared, u_start, v_start = stored.shared, 0, 0
    if shared is not None:
        rank = shared.rank
        rows = [
            Row(
                v_start=min(c, len(shared.v) - 1) * rank,
                u_start=min(c, len(shared.u) - 1) * rank,
                rank=rank,
                core_kind=shared.core,
                scale_row=-1 if shared.scales is None else c,
            )
            for c in range(shared.clusters)
        ]
        u_start, v_start = len(shared.u) * rank, len(shared.v) * rank
        columns.append(torch.where(present, shared.assignment, -1))
    if stored.mean is not None:
        width = int(stored.mean.ranks.max())
        columns.append(torch.where(stored.mean.ranks > 0, len(rows), -1))
        rows.append(Row(v_start, u_start, width))
        u_start, v_start = u_start + width, v_start + width
    shared_rows = len(rows)
    table = stored_rows(rows)
    if stored.private is not None:
        ranks = stored.private.ranks
        owners = (ranks > 0) & present
        starts = (ranks.cumsum(0) - ranks)[owners]
        own = private_rows(ranks[owners].cpu(), starts.cpu(), u_start=u_start, v_start=v_start)
        columns.append(torch.where(owners, owners.cumsum(0) - 1 + shared_rows, -1))
        table = torch.cat([table, own])
    if shared is not None and shared.cores is not None:
        shared_rows = 0  # each is one adapter's own
    return table, torch.stack(columns, dim=1).to(torch.int32).cpu(), shared_rows


def stored_rows(rows: list[Row]) -> torch.Tensor:
    """Rows as a store's table has them: int32 `[rows, 5]`."""
    fields = [row[: len(STORED_FIELDS)] for row in rows]
    return torch.tensor(fields, dtype=torch.int32).view(-1, len(STORED_FIELDS))


def private_rows(
    ranks: torch.Tensor, starts: torch.Tensor, *, u_start: int = 0, v_start: int = 0
) -> torch.Tensor:
    """Rows without core or scale: int32 `[n, 5]`.

    Args:
        ranks: `[n]`, of each.
        starts: `[n]`, where each begins among the private vectors.
        u_start: where these begin in the pool of U.
        v_start: where they begin in the pool of V.
    """
    table = stored_rows([Row(0, 0, 0)]).repeat(len(ranks), 1)
    table[:, V_START] = starts + v_start
    table[:, U_START] = starts + u_start
    table[:, RANK] = ranks
    return table


def _mean(factors: ModuleFactors, settings: Settings) -> ModuleFactors | None:
    """The mean delta's best approximation of rank `mean_rank`, once for each adapter.

    Adapters of norm 0 have no part in it, and it no part in them: they stay 0. None: all are.
    """
    kept = factors.squared_norms() > 0
    n = int(kept.sum())
    if n == 0:
        return None
    u, s, v = _top_singular(factors.b.cpu().numpy(), factors.a.cpu().numpy(), settings)
    vectors = (torch.from_numpy(part.copy()).to(factors.a) for part in ((u * (s / n)).T, v))
    return ModuleFactors.repeated(*vectors, kept)


def _top_singular(
    b: np.ndarray, a: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U `[d_out, q]`, s `[q]`, V `[q, d_in]`) of bᵀa, q at most `mean_rank`."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds  # takes a while

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
