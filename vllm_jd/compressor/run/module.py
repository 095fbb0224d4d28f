"""Compress one module: fit a method, round to the store's type, and measure what was lost."""

from dataclasses import dataclass, replace

import torch

from vllm_jd.compressor.algebra.approximation import Shared, best_cores, relative_errors
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.method import Start
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.run.experts import folded, normalised, of_entries
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import BLOCK, RANK, STORED_FIELDS, U_START, V_START, Row
from vllm_jd.store.part import Matrix, ModulePart
from vllm_jd.store.quantise import dequantise, quantise


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

    fitted: Shared | ModuleFactors
    """Bases that adapters share, or factors of their own."""
    cores: torch.Tensor
    written: dict[str, Matrix]
    """`u`, `v`, `scales` and `cores`, as in `ModulePart`."""
    core_width: int
    """Numbers of one core as it lies in the store."""


@dataclass(frozen=True)
class FittedModule:
    """A module as a method has it, before its numbers are rounded to the store's type.

    Args:
        raw: the factors of all adapters; of experts, of all entries.
        fitted: what the method made of them.
        experts: how many the module has; 0: it is a plain linear layer.
        joint: all experts share their bases.
    """

    raw: ModuleFactors
    fitted: Shared | ModuleFactors
    experts: int
    joint: bool

    def part(self, rounding: Rounding) -> ModulePart:
        """Everything that the store keeps of it, and what was lost."""
        raw = self.raw
        stored = _round(raw, self.fitted, rounding)
        norms = raw.squared_norms().clamp_min(0).sqrt()
        rows, chosen, shared_rows = _rows(raw, stored)
        exact_error = None
        if rounding.quantised:
            exact = _round(raw, self.fitted, Rounding("float32", None))
            exact_error = _error_of(raw, norms, exact).float().cpu()
        part = ModulePart(
            **stored.written,
            rows=rows,
            chosen=chosen,
            rank=raw.ranks.to(torch.int32).cpu(),
            norm=norms.float().cpu(),
            error=_error_of(raw, norms, stored).float().cpu(),
            shared=shared_rows,
            shared_rank=stored.fitted.rank if shared_rows else 0,
            core_size=stored.core_width,
            exact_error=exact_error,
        )
        return folded(part, self.experts, joint=self.joint) if self.experts else part


def fit_module(
    raw: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    *,
    start: Start | None = None,
    experts: int = 0,
) -> FittedModule:
    """Run the method of `settings` on one module; see `compress_module`."""
    joint = settings.experts == "joint"
    assignment, settings = of_entries(assignment, settings, experts)
    method = METHODS[settings.method]
    factors = normalised(raw, experts) if method.normalise else raw
    fitted = method.fit(factors, assignment, settings.options, start, settings.seed)
    return FittedModule(raw, fitted, experts, joint)


def compress_module(
    raw: ModuleFactors,
    assignment: torch.Tensor,
    settings: Settings,
    *,
    start: Start | None = None,
    experts: int = 0,
) -> ModulePart:
    """Everything that the store keeps of one module.

    Args:
        raw: the factors of all adapters; of experts, of all entries (`…run.experts`).
        assignment: int64 `[n]`, the cluster of each adapter, for methods with clusters.
        settings: method, parameters and type.
        start: bases to start from.
        experts: how many the module has; 0: it is a plain linear layer.
    """
    fitted = fit_module(raw, assignment, settings, start=start, experts=experts)
    return fitted.part(Rounding.of(settings))


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


def _round(raw: ModuleFactors, fitted: Shared | ModuleFactors, rounding: Rounding) -> _Stored:
    """Round what the method made of the adapters, and fit cores to the rounded bases.

    Rounding costs U and V their orthonormality: `best_cores` is right for any bases.
    """

    written: dict[str, Matrix] = {}

    def keep(name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Store a matrix; returns it as it will be read."""
        written[name], value = rounding.store(matrix)
        return value

    n, device = len(raw), raw.ranks.device
    own = isinstance(fitted, ModuleFactors)
    u, v = (fitted.b, fitted.a) if own else (fitted.u.flatten(0, 1), fitted.v.flatten(0, 1))
    u, v = keep("u", u), keep("v", v)
    if own:
        keep("scales", torch.zeros(0, raw.d_out))
        cores = keep("cores", torch.zeros(n, 0, device=device))
        return _Stored(ModuleFactors(v, u, fitted.ranks), cores, written, 0)
    scales = fitted.scales
    stored_scales = keep("scales", torch.zeros(0, raw.d_out) if scales is None else scales)
    shared = replace(
        fitted,
        u=u.view(fitted.u.shape),
        v=v.view(fitted.v.shape),
        scales=None if scales is None else stored_scales,
    )
    width = -(-shared.core_size // BLOCK) * BLOCK if rounding.quantised else shared.core_size
    padded = torch.zeros(n, width, device=device)
    padded[:, : shared.core_size] = best_cores(raw, shared)
    return _Stored(shared, keep("cores", padded)[:, : shared.core_size], written, width)


def _error_of(factors: ModuleFactors, norms: torch.Tensor, stored: _Stored) -> torch.Tensor:
    if isinstance(stored.fitted, ModuleFactors):
        return relative_errors(factors.minus(stored.fitted), norms, None, None)
    return relative_errors(factors, norms, stored.fitted, stored.cores)


def _rows(raw: ModuleFactors, stored: _Stored) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(the module's table of rows, the one that each adapter has, how many rows are shared)."""
    fitted = stored.fitted
    if isinstance(fitted, ModuleFactors):
        owners = fitted.ranks > 0
        starts = (fitted.ranks.cumsum(0) - fitted.ranks)[owners]
        table, shared = _private_rows(fitted.ranks[owners].cpu(), starts.cpu()), 0
        chosen = torch.where(owners, owners.cumsum(0) - 1, -1)
    else:
        table = _stored_rows(
            [
                Row(
                    v_start=min(c, len(fitted.v) - 1) * fitted.rank,
                    u_start=min(c, len(fitted.u) - 1) * fitted.rank,
                    rank=fitted.rank,
                    core_kind=fitted.core,
                    scale_row=-1 if fitted.scales is None else c,
                )
                for c in range(fitted.clusters)
            ]
        )
        # With cores that stay as they are each row is one adapter's own.
        shared = len(table) if fitted.cores is None else 0
        chosen = torch.where(raw.ranks > 0, fitted.assignment, -1)
    return table, chosen[:, None].to(torch.int32).cpu(), shared


def _stored_rows(rows: list[Row]) -> torch.Tensor:
    """Rows as a store's table has them: int32 `[rows, 5]`."""
    fields = [row[: len(STORED_FIELDS)] for row in rows]
    return torch.tensor(fields, dtype=torch.int32).view(-1, len(STORED_FIELDS))


def _private_rows(ranks: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Rows without core or scale, which begin at `starts` in U and in V: int32 `[n, 5]`."""
    table = _stored_rows([Row(0, 0, 0)]).repeat(len(ranks), 1)
    table[:, V_START] = table[:, U_START] = starts
    table[:, RANK] = ranks
    return table
