"""Merge all adapters of a module into one: task arithmetic, TIES, DARE and DARE-TIES.

By the definitions of PEFT's `LoraModel.add_weighted_adapter` (combination types `linear`, `ties`,
`dare_linear` and `dare_ties`): lora_A and lora_B are merged apart from each other, each factor of
adapter i times √|w_i·s_i|, where s_i is its PEFT scale; the sign of w_i·s_i goes to A alone. So
the merged delta also has the cross terms B_iA_j. Sources: Ilharco et al. 2023 (task arithmetic),
Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.method import Method, Start
from vllm_jd.compressor.methods.options import Options, option
from vllm_jd.row import CORE_NONE

MergeMethod = Literal["ties", "task-arithmetic", "dare", "dare-ties"]
MajoritySign = Literal["total", "frequency"]

_Prune = Callable[[torch.Tensor], torch.Tensor]

# A factor b = B·s that is divided by s again is off by up to 2⁻²³ of itself. A sum that is 0 in
# the file's numbers must count as 0, or the elected sign would hang on that error.
_ROUNDING = 2.0**-22


@dataclass(frozen=True)
class MergeOptions(Options):
    """Of every merge."""

    merge_weight: float | None = option(
        None,
        "PEFT's weight of each adapter in a merge.",
        default_help="equal adapters merge to themselves",
    )


@dataclass(frozen=True)
class PruningOptions(MergeOptions):
    """Of a merge that drops numbers."""

    density: float = option(0.5, "Part of the numbers that TIES and DARE keep.", above=0, most=1)


@dataclass(frozen=True)
class ElectingOptions(PruningOptions):
    """Of a merge that drops numbers and elects signs."""

    majority_sign: MajoritySign = option("total", "How TIES elects signs.")


def merge(
    factors: ModuleFactors,
    method: MergeMethod,
    *,
    scales: torch.Tensor,
    weights: torch.Tensor | None = None,
    density: float = 0.5,
    majority_sign: MajoritySign = "total",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the n adapters of one module into one adapter.

    Adapters of different ranks, which PEFT refuses, are padded with zero rows to the highest one;
    the zeros are not counted when an adapter's own numbers are trimmed, and have no vote. An
    adapter without a factor here (rank 0) is left out, and the weights of the others keep their
    values. As in PEFT, a single adapter (n = 1) is weighted only, never pruned.

    Memory beyond the factors does not grow with n.

    Args:
        factors: not normalised, or normalised with `scales` divided by the norms.
        method: `task-arithmetic` sums. `ties` keeps the largest numbers of each factor, elects
            a sign for each position, and averages the numbers that have it. `dare` drops numbers
            at random, divides the others by `density` and sums; `dare-ties` does the same and
            elects and averages as `ties` does. Signs are elected among A and B as they are in the
            files: neither the weight nor the scale counts.
        scales: `[n]`, the PEFT scale that was folded into each adapter's `b`.
        weights: `[n]`, may be negative; 1/n each by default. The size of the result depends
            on the method: n equal adapters merge to themselves with weights 1/n² for
            `task-arithmetic` and `dare` (sums), and with 1 for `ties` and `dare-ties` (means),
            at density 1; the default gives n times and 1/n times that.
        density: the share of numbers kept, above 0 and at most 1. Not used by task arithmetic.
        majority_sign: whether the sum of the numbers elects the sign, or the number of signs.
            Used by `ties` and `dare-ties`.
        seed: of DARE's random masks, which are those that PEFT draws after
            `torch.manual_seed(seed)`. Every factor gets its own mask; give each module its own
            seed, for the masks hang on nothing else.

    Returns:
        a float32 `[r, d_in]` and b float32 `[r, d_out]` with r the highest rank, rows as in
        `ModuleFactors`; the merged delta is bᵀa.

    Raises:
        ValueError: an argument out of its range, or a scale of 0 with `ties` or `dare-ties`: the
            signs of such an adapter's lora_B are lost.
    """
    n = len(factors)
    if weights is None:
        weights = torch.full((n,), 1 / max(n, 1))
    _check(factors, method, scales, weights, density, majority_sign)
    ranks = factors.ranks.tolist()
    shares = weights.double() * scales.double()
    roots = shares.abs().sqrt()
    signed_roots = torch.where(shares < 0, -roots, roots)
    if n == 1:
        method = "task-arithmetic"
    prune = _pruning(method, density, seed)
    combine = _elected_mean if method in ("ties", "dare-ties") else _weighted_sum
    width = max(ranks, default=0)

    # The tensors are in PEFT's layout, for equal masks and equal picks among equal magnitudes.
    a_tensors = (prune(rows) for rows in factors.a.split(ranks) if len(rows))
    nothing = factors.a.new_zeros(width, factors.a.shape[1], dtype=torch.float64)
    a = combine(a_tensors, _present(signed_roots, ranks), nothing, majority_sign)
    b_tensors = (
        prune((rows / (scale or 1)).T)
        for rows, scale in zip(factors.b.split(ranks), scales.tolist(), strict=True)
        if len(rows)
    )
    nothing = factors.b.new_zeros(factors.b.shape[1], width, dtype=torch.float64)
    b = combine(b_tensors, _present(roots, ranks), nothing, majority_sign)
    return a, b.T.contiguous()


def _pruning(method: MergeMethod, density: float, seed: int) -> _Prune:
    if method == "task-arithmetic" or density == 1:
        return lambda tensor: tensor
    if method == "ties":
        return lambda tensor: _keep_largest(tensor, density)
    generator = torch.Generator().manual_seed(seed)
    return lambda tensor: _drop_at_random(tensor, density, generator)


def _keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(tensor.shape)


def _drop_at_random(
    tensor: torch.Tensor, density: float, generator: torch.Generator
) -> torch.Tensor:
    mask = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return mask.to(tensor.device).mul_(tensor).div_(density)


def _weighted_sum(
    tensors: Iterable[torch.Tensor], roots: list[float], merged: torch.Tensor, _: MajoritySign
) -> torch.Tensor:
    """Σ_i root_i · tensor_i, float32, added up in `merged`, zeros of the whole shape; a smaller
    tensor is in the upper left of it."""
    for tensor, root in zip(tensors, roots, strict=True):
        rows, columns = tensor.shape
        merged[:rows, :columns].add_(tensor, alpha=root)
    return merged.float()


def _elected_mean(
    tensors: Iterable[torch.Tensor],
    roots: list[float],
    nothing: torch.Tensor,
    majority_sign: MajoritySign,
) -> torch.Tensor:
    """Mean of root_i · tensor_i over those i with the elected sign at that position.

    Both candidates are kept beside each other, so that one pass is enough. Float32, of the shape
    of `nothing`, zeros.
    """
    # For each sign: how many have it, the sum of their numbers, and that sum weighted.
    counts, sums, weighted = nothing.new_zeros(3, 2, *nothing.shape)
    for tensor, root in zip(tensors, roots, strict=True):
        rows, columns = tensor.shape
        for sign, part in enumerate((tensor.clamp(min=0), tensor.clamp(max=0))):
            counts[sign, :rows, :columns].add_(part != 0)
            sums[sign, :rows, :columns].add_(part)
            weighted[sign, :rows, :columns].add_(part, alpha=root)
    means = weighted.div_(counts.clamp(min=1))
    if majority_sign == "frequency":
        positive = counts[0] >= counts[1]
    else:
        positive = sums[0] + sums[1] >= -_ROUNDING * (sums[0] - sums[1])
    return torch.where(positive, means[0], means[1]).float()


def _present(values: torch.Tensor, ranks: list[int]) -> list[float]:
    return [value for value, rank in zip(values.tolist(), ranks, strict=True) if rank]


def _check(
    factors: ModuleFactors,
    method: str,
    scales: torch.Tensor,
    weights: torch.Tensor,
    density: float,
    majority_sign: str,
) -> None:
    for name, found, choices in (
        ("method", method, get_args(MergeMethod)),
        ("majority_sign", majority_sign, get_args(MajoritySign)),
    ):
        if found not in choices:
            raise ValueError(f"{name} is {found!r}, expected one of {', '.join(choices)}")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected a share above 0 and at most 1")
    for name, values in (("scales", scales), ("weights", weights)):
        if values.shape != (len(factors),):
            raise ValueError(
                f"{name} has shape {list(values.shape)}, expected [{len(factors)}]: "
                "one number an adapter"
            )
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinity, expected finite numbers")
    unscaled = ((scales == 0) & (factors.ranks > 0)).nonzero()[:, 0].tolist()
    if unscaled and method in ("ties", "dare-ties"):
        raise ValueError(
            f"the scale of adapter {unscaled[0]} is 0 (lora_alpha 0), and {method!r} needs the "
            "signs of its lora_B: leave the adapter out, or merge by 'task-arithmetic' or 'dare'"
        )


def default_weight(name: MergeMethod, n: int) -> float:
    """PEFT's weight of each of `n` adapters with which merging equal ones gives that one back.

    PEFT puts √weight on A and on B: a sum of n takes 1/n², an average (TIES) takes 1.
    """
    return 1.0 if name in ("ties", "dare-ties") else 1 / n**2


def _fit(
    factors: ModuleFactors,
    assignment: torch.Tensor,
    options: MergeOptions,
    start: Start | None,
    seed: int,
    *,
    name: MergeMethod,
) -> Shared:
    n = len(factors)
    values = {key: value for key, value in vars(options).items() if key != "merge_weight"}
    weight = options.merge_weight
    if weight is None:
        weight = default_weight(name, n)
    a, b = merge(
        factors,
        name,
        scales=factors.scales,
        weights=torch.full((n,), weight),
        seed=seed,
        **values,
    )
    everyone = torch.zeros(n, dtype=torch.int64, device=factors.a.device)
    return Shared(u=b[None], v=a[None], assignment=everyone, core=CORE_NONE)


def _method(
    name: MergeMethod,
    summary: str,
    reference: str,
    options: type[MergeOptions],
    *,
    seeded: bool = False,
) -> Method:
    fit = partial(_fit, name=name)
    summary = f"one adapter for all: {summary}"
    return Method(name, summary, reference, fit, options, seeded=seeded)


TIES = _method("ties", "TIES-merging", "TIES-Merging (Yadav et al., 2023)", ElectingOptions)
TASK_ARITHMETIC = _method(
    "task-arithmetic",
    "the weighted sum of A and of B",
    "Editing Models with Task Arithmetic (Ilharco et al., 2023)",
    MergeOptions,
)
DARE = _method(
    "dare",
    "random drop and rescale, then the sum",
    "Language Models are Super Mario (Yu et al., 2024)",
    PruningOptions,
    seeded=True,
)
DARE_TIES = _method(
    "dare-ties",
    "DARE, then TIES",
    "Language Models are Super Mario (Yu et al., 2024)",
    ElectingOptions,
    seeded=True,
)
