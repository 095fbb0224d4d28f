"""JD-Full: min over orthonormal U, V and free Σ_i of Σ_i ‖B_iA_i − UΣ_iVᵀ‖²_F.

Compress then Serve, §3.1 and Appendix A.1 (case 1). For fixed U, V the best core is
Σ_i = UᵀB_iA_iV, and the error is Σ‖B_iA_i‖² − Σ‖Σ_i‖². Neither B_iA_i nor a d×d matrix is ever
formed: with W = A·V and P = Bᵀ·U (concatenated over all adapters), Σ_i = P_iᵀW_i, and

    Σ_i B_iA_iVVᵀA_iᵀB_iᵀ·Q = B · [W_i W_iᵀ · (Bᵀ·Q)_i]

costs two products with the concatenated factors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.jd import (
    REFERENCE,
    Bases,
    JdOptions,
    no_bases,
    shared_bases,
)
from vllm_jd.compressor.methods.method import Method
from vllm_jd.row import CORE_FULL

TOLERANCE = 1e-3  # eq. 19
_ROUGH_TOLERANCE = 5e-3  # what is above the noise of bfloat16
_OVERSAMPLING = 8
_START_STEPS = 4
_GROUP_NUMBERS = 1 << 23  # in the rows of clusters that are fitted at once
_FILLED = 0.7  # of the largest cluster of a group, the least of the others' sizes
_GRAM_NUMBERS = 1 << 22  # held as float32 at once

# On processors with AMX, torch 2.13's bfloat16 product of some matrices that are wider than this
# (32 × 49152) ends the process. Only vocabularies are.
_WIDEST_ROUGH = 32768


def jd_full(
    factors: ModuleFactors,
    rank: int,
    *,
    iterations: int = 10,
    seed: int = 0,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the bases of one module for one cluster of adapters.

    U, then V, is set to the top eigenvectors given the other (A.1), which a warm-started subspace
    iteration with Rayleigh–Ritz finds.

    Args:
        factors: normalised factors. Where they are bfloat16, so are all products with them.
        rank: columns of U and V.
        iterations: at most so many updates of both; fewer once eq. 19 holds (max relative change
            of U and V, outside of the old span, below 0.001).
        seed: of the random start of the subspace iteration.
        start: (U, V) to start from.

    Returns:
        U float32 `[d_out, rank]` and V float32 `[d_in, rank]`. Their columns are orthonormal, but
        for those beyond d_out or d_in, which are 0.
    """
    everyone = Group([0], [(factors.ranks > 0).nonzero()[:, 0]])
    known = None if start is None else [start]
    fitted = fit_group(factors, everyone, rank, iterations=iterations, seed=seed, start=known)
    return fitted.bases[0]


def cores(factors: ModuleFactors, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_i = UᵀB_iA_iV of every adapter: float32 `[n, rank, rank]`."""
    w = factors.per_adapter((factors.a @ v.to(factors.a.dtype)).float())
    p = factors.per_adapter((factors.b @ u.to(factors.b.dtype)).float())
    return p.mT @ w


class Group(NamedTuple):
    """Some clusters of one module whose bases are sought at once."""

    clusters: list[int]
    members: list[torch.Tensor]
    """int64, ascending: the adapters of each."""


class Fitted(NamedTuple):
    """What `fit_group` found."""

    bases: Bases
    kept: float
    """Σ‖UᵀB_iA_iV‖² over the adapters of the group."""


def grouped(factors: ModuleFactors, assignment: torch.Tensor, clusters: int) -> list[Group]:
    """The clusters that have a factor here, in groups of like size that are small enough.

    Many small clusters at once cost little more than one; of large ones the rows stay in a cache
    only if each is by itself.
    """
    present = ((factors.ranks > 0) & (assignment >= 0)).nonzero()[:, 0]
    chosen = assignment[present]
    order = present[chosen.argsort(stable=True)]
    members = order.split(torch.bincount(chosen, minlength=clusters).tolist())
    rows = [int(factors.ranks[own].sum()) for own in members]
    groups: list[Group] = []
    most = 0
    for cluster in sorted((c for c in range(clusters) if rows[c]), key=lambda c: -rows[c]):
        count = len(groups[-1].clusters) + 1 if groups else 0
        size = count * most * (factors.d_in + factors.d_out)
        if not groups or size > _GROUP_NUMBERS or rows[cluster] < _FILLED * most:
            groups.append(Group([], []))
            most = rows[cluster]
        groups[-1].clusters.append(cluster)
        groups[-1].members.append(members[cluster])
    return groups


def fit_group(
    factors: ModuleFactors,
    group: Group,
    rank: int,
    *,
    iterations: int,
    seed: int,
    start: Bases | None = None,
) -> Fitted:
    """`jd_full` of each cluster of a group.

    `start` has bases for each of them, in the group's order. If some are 0, it counts as none.
    """
    if start is not None and not all(bool(u.any()) for u, _ in start):
        start = None
    batch = _Batch.of(factors, group.members)
    left, right = _alternating(batch, rank, iterations, seed, start)
    kept = float((left.products.mT @ right.products).double().square().sum())
    found = zip(left.wanted.mT, right.wanted.mT, strict=True)
    d_in, d_out = factors.d_in, factors.d_out
    return Fitted([(_pad(u, rank, d_out), _pad(v, rank, d_in)) for u, v in found], kept)


def jd_full_clusters(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    clusters: int,
    rank: int,
    *,
    iterations: int,
    seed: int,
    start: Bases | None = None,
) -> Bases:
    """The bases of every cluster of one module (A.3, step 1), as `fit_clusters` of `jd_full`."""
    fit = partial(fit_group, rank=rank, iterations=iterations, seed=seed)
    starts = None if start is None else [start]
    return fit_modules([factors], assignment, clusters, rank, fit, map, starts)[0]


def fit_modules(
    modules: Sequence[ModuleFactors],
    assignment: torch.Tensor,
    clusters: int,
    rank: int,
    fit: Callable[..., Fitted],
    each: Callable[..., Iterable[Fitted]],
    start: Sequence[Bases] | None = None,
) -> list[Bases]:
    """The bases of every cluster in every module.

    Args:
        modules: the factors of each.
        assignment: int64 `[n]`, each adapter's cluster; −1: in none.
        clusters: how many there are.
        rank: of the bases.
        fit: `fit_group` of (factors, group, start=…).
        each: `map`, or what does the same side by side.
        start: bases to start from.
    """
    jobs = [(at, g) for at, own in enumerate(modules) for g in grouped(own, assignment, clusters)]

    def run(job: tuple[int, Group]) -> Fitted:
        at, group = job
        known = None if start is None else [start[at][cluster] for cluster in group.clusters]
        return fit(modules[at], group, start=known)

    found = [no_bases(factors, clusters, rank) for factors in modules]
    for (at, group), fitted in zip(jobs, each(run, jobs), strict=True):
        for cluster, bases in zip(group.clusters, fitted.bases, strict=True):
            found[at][cluster] = bases
    return found


@dataclass(frozen=True)
class _Batch:
    """The adapters of k clusters, padded to n adapters of r rows, and R rows in all.

    Args:
        a: `[k, R, d_in]`, rows of 0 where a cluster has fewer.
        b: `[k, R, d_out]`.
        rows: int64 `[k]`, how many rows each has.
        n: most adapters of a cluster.
        r: the largest rank.
        slots: int64 `[k, n · r]`, where each adapter's rows are, R where it has fewer; None if
            they come in this order and none is missing.
        places: int64 `[k, R]`, the inverse; anything for rows of 0.
    """

    a: torch.Tensor
    b: torch.Tensor
    rows: torch.Tensor
    n: int
    r: int
    slots: torch.Tensor | None
    places: torch.Tensor | None

    @classmethod
    def of(cls, factors: ModuleFactors, members: list[torch.Tensor]) -> "_Batch":
        """Of the adapters with these indices, each cluster's ascending."""
        device = factors.ranks.device
        ranks = [factors.ranks[own] for own in members]
        rows = torch.tensor([int(each.sum()) for each in ranks], device=device)
        k, most = len(members), int(rows.max())
        n, r = max(map(len, members)), max(int(each.max()) for each in ranks)
        starts = factors.ranks.cumsum(0) - factors.ranks
        index = torch.zeros(k, most, dtype=torch.int64, device=device)  # of the module's rows
        slots = torch.full((k, n * r), most, dtype=torch.int64, device=device)
        places = torch.zeros(k, most, dtype=torch.int64, device=device)
        for c, (own, rank) in enumerate(zip(members, ranks, strict=True)):
            owner = torch.repeat_interleave(torch.arange(len(own), device=device), rank)
            at = torch.arange(len(owner), device=device)
            position = at - (rank.cumsum(0) - rank)[owner]
            index[c, : len(at)] = starts[own][owner] + position
            slots[c, owner * r + position] = at
            places[c, : len(at)] = owner * r + position
        sides = []
        for side in (factors.a, factors.b):
            if k == 1 and most == len(side):
                sides.append(side[None])
                continue
            side = side.index_select(0, index.flatten()).view(k, most, -1)
            for own, count in zip(side, rows.tolist(), strict=True):
                own[count:] = 0
            sides.append(side)
        in_order = n * r == most and all(bool((each == r).all()) for each in ranks)
        return cls(*sides, rows, n, r, *((None, None) if in_order else (slots, places)))

    def per_adapter(self, seen: torch.Tensor) -> torch.Tensor:
        """`[k, R, q]` → `[k, n, r, q]`, 0 where an adapter has fewer rows."""
        if self.slots is not None:
            seen = torch.nn.functional.pad(seen, (0, 0, 0, 1))
            seen = seen.gather(1, self.slots[:, :, None].expand(-1, -1, seen.shape[2]))
        return seen.unflatten(1, (self.n, self.r))

    def per_row(self, padded: torch.Tensor) -> torch.Tensor:
        """`[k, n, r, q]` → `[k, R, q]`."""
        flat = padded.flatten(1, 2)
        if self.places is None:
            return flat
        return flat.gather(1, self.places[:, :, None].expand(-1, -1, flat.shape[2]))

    def grams(self) -> torch.Tensor:
        """B_iᵀB_i of every adapter: float32 `[k, n, r, r]`."""
        found = []
        for c, own in enumerate(self.b):
            if self.slots is not None:
                own = torch.nn.functional.pad(own, (0, 0, 0, 1))[self.slots[c]]
            each = own.view(self.n, self.r, -1)
            parts = each.split(max(1, _GRAM_NUMBERS // each[0].numel()))
            found.append(torch.cat([part.float() @ part.float().mT for part in parts]))
        return torch.stack(found)


class _Side:
    """One of the two bases of each cluster while they are sought, with a few more vectors than
    are wanted.

    Keeps `seen` = rows · basisᵀ, so that an update costs two products with the rows and no more.
    Those products are nearly all of the work, and memory-bound: while `rough`, they are taken in
    bfloat16, where the machine has it.
    """

    def __init__(
        self, batch: _Batch, rows: torch.Tensor, rank: int, start: torch.Tensor, rough: bool
    ):
        self.batch = batch
        self.rank = rank
        self._exact_rows = rows
        self._rows = rows.bfloat16() if rough else rows
        wanted = min(rank + _OVERSAMPLING, rows.shape[2])
        start = start[:, :wanted]
        extra = wanted - start.shape[1]
        if extra > 0:
            # Rows of the data are better company for the start than noise.
            spread = torch.linspace(0, 1, extra, device=rows.device, dtype=torch.float64)
            at = (spread * (batch.rows[:, None] - 1)).long()
            own = rows.gather(1, at[:, :, None].expand(-1, -1, rows.shape[2]))
            start = torch.cat([start, own.float()], dim=1)
        self._set(_orthonormal(start))

    def make_exact(self) -> None:
        """No longer `rough`."""
        self._rows = self._exact_rows

    def _set(self, basis: torch.Tensor) -> None:
        self.basis = basis
        self.seen = _product(self._rows, basis.to(self._rows.dtype).mT).float()

    @property
    def wanted(self) -> torch.Tensor:
        """The bases found so far, `[k, rank, d]`."""
        return self.basis[:, : self.rank]

    @property
    def products(self) -> torch.Tensor:
        """rows_i · basisᵀ of each adapter: `[k, n, r, rank]`."""
        return self.batch.per_adapter(self.seen[:, :, : self.rank])

    @property
    def weights(self) -> torch.Tensor:
        """What each adapter's rows of the other side weigh: `[k, n, r, r]`."""
        products = self.products
        return products @ products.mT

    def update(self, weights: torch.Tensor, steps: int = 1) -> None:
        """Towards the top eigenvectors of Σ_i rows_iᵀ · weights_i · rows_i.

        `weights` is `[k, n, r, r]`, symmetric and positive semidefinite. Power steps, then
        Rayleigh–Ritz: afterwards the basis' vectors are in descending order of eigenvalue.
        """
        for _ in range(steps):
            weighted = self._weighted(weights).to(self._rows.dtype).mT.contiguous()
            self._set(_orthonormal(_product(weighted, self._rows).float()))
        small = self.seen.mT @ self._weighted(weights)
        _, rotation = torch.linalg.eigh(small.double())
        rotation = rotation.flip(2).to(self.basis.dtype)
        self.basis = rotation.mT @ self.basis
        self.seen = self.seen @ rotation

    def _weighted(self, weights: torch.Tensor) -> torch.Tensor:
        return self.batch.per_row(weights @ self.batch.per_adapter(self.seen))


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x_j · y_j. One matrix by itself, since torch is slow at batches of one in bfloat16."""
    return (x[0] @ y[0])[None] if len(x) == 1 else x @ y


def _alternating(
    batch: _Batch, rank: int, iterations: int, seed: int, start: Bases | None
) -> tuple[_Side, _Side]:
    exact = batch.a.dtype == torch.float32
    rough = exact and iterations > 1 and in_bfloat16(batch.a, batch.b)
    left, right = _sides(batch, rank, seed, start, rough)
    for done in range(1, iterations + 1):
        if rough and done == iterations:
            rough = _leave_roughness(left, right)
        old_u, old_v = left.wanted, right.wanted
        left.update(right.weights)
        right.update(left.weights)
        change = max(_change(old_u, left.wanted), _change(old_v, right.wanted))
        if change < (_ROUGH_TOLERANCE if rough or not exact else TOLERANCE):
            if not rough:
                break
            rough = _leave_roughness(left, right)
    return left, right


def _leave_roughness(left: _Side, right: _Side) -> bool:
    left.make_exact()
    right.make_exact()
    return False


def in_bfloat16(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether to use bfloat16 in products with these factors, `[…, d_in]` and `[…, d_out]`."""
    return bfloat16_is_fast(a.device) and max(a.shape[-1], b.shape[-1]) <= _WIDEST_ROUGH


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether products of bfloat16 numbers are faster there than those of float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _sides(
    batch: _Batch, rank: int, seed: int, start: Bases | None, rough: bool
) -> tuple[_Side, _Side]:
    """The bases at the start: the given ones, or V from the top eigenvectors of
    Σ A_iᵀB_iᵀB_iA_i (JD with U free), then U given V."""
    if start is not None:
        u, v = (torch.stack(side).mT.float() for side in zip(*start, strict=True))
        return _Side(batch, batch.b, rank, u, rough), _Side(batch, batch.a, rank, v, rough)
    generator = torch.Generator().manual_seed(seed)
    sides = []
    weights = batch.grams()
    for rows in (batch.a, batch.b):
        k, _, d = rows.shape
        random = torch.randn(d, min(rank, d), generator=generator).to(rows.device).T
        side = _Side(batch, rows, rank, random.expand(k, -1, -1), rough)
        side.update(weights, _START_STEPS)
        weights = side.weights
        sides.append(side)
    right, left = sides
    return left, right


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal bases of the spans of x_j's rows: `[k, q, d]` → `[k, min(q, d), d]`."""
    return torch.linalg.qr(x.mT).Q.mT


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """‖U⁺ − U⁺UᵀU‖ / ‖U⁺‖ (eq. 19) of bases `[k, rank, d]`, the largest."""
    outside = torch.linalg.vector_norm(new - (new @ old.mT) @ old, dim=(1, 2))
    return float((outside / torch.linalg.vector_norm(new, dim=(1, 2)).clamp_min(1e-30)).max())


def _pad(basis: torch.Tensor, rank: int, d: int) -> torch.Tensor:
    if basis.shape[1] == rank:
        return basis
    return torch.cat([basis, basis.new_zeros(d, rank - basis.shape[1])], dim=1)


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: JdOptions,
    start: Bases | None,
    seed: int,
) -> Shared:
    bases = jd_full_clusters(
        factors,
        assignment,
        options.clusters,
        options.rank,
        iterations=options.iterations,
        seed=seed,
        start=start,
    )
    return shared_bases(bases, assignment, CORE_FULL)


JD_FULL = Method(
    "jd-full",
    "shared orthonormal bases and a full r × r core for each adapter",
    f"{REFERENCE}, §3.1, A.1 (case 1)",
    _fit,
    JdOptions,
    normalise=True,
    seeded=True,
    experts=True,
)
