"""A blend: adapters with weights, which are served as one.

Σ_i w_i Δ_i of the parts' deltas is what the way `linear` adds to a layer's output. Within a
cluster that is one core, Σ_i w_i Σ_i, on the cluster's bases, without loss; parts of other
clusters, and uploads, are rows of their own. The other ways (TIES-Merging, Yadav et al., 2023;
DARE, Yu et al., 2024) are those of PEFT's `add_weighted_adapter`, on the cores of one cluster:
what Core Space merging (2509.17786) does, where PEFT's work on the factors A and B apart.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_jd.store.errors import told

Way = Literal["linear", "ties", "dare_linear", "dare_ties"]
"""How parts are put together, as PEFT calls it."""
Sign = Literal["total", "frequency"]
"""Whether the sign with the larger sum is elected, or the one that more parts have."""

MOST_WEIGHT = 100.0
"""In size. Who asks for more has made a mistake: trained adapters blow up long before."""


class BlendError(ValueError):
    """A blend that cannot be; the message says what was found and expected."""


class UnknownPart(BlendError):
    """A part of a blend that there is not."""


class Blend(BaseModel):
    """What a blend is made of.

    Args:
        weights: name of each part → its weight, of either sign, at most `MOST_WEIGHT` in size.
        way: how they are put together.
        density: the share of a core's numbers that stays, more than 0 and at most 1; of `linear`,
            which drops nothing, None.
        sign: how the ways with `ties` elect a sign, as PEFT's `majority_sign_method`.
        seed: of what DARE drops, from 0 to 2³² − 1.

    Raises:
        ValueError: there are no parts, a weight is no number or too large, or the density does not
            fit the way.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weights: dict[str, float]
    way: Way = "linear"
    density: float | None = None
    sign: Sign = "total"
    seed: int = Field(default=0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _check(self) -> "Blend":
        if not self.weights:
            raise ValueError("found no parts, expected one at least")
        for name, weight in self.weights.items():
            if not math.isfinite(weight) or abs(weight) > MOST_WEIGHT:
                raise ValueError(
                    f"found the weight {weight} of {name!r}, expected a number of at most "
                    f"{MOST_WEIGHT:g} in size"
                )
        if not any(self.weights.values()):
            raise ValueError("found no weight other than 0, expected one; for the base model, ask")
        if self.way == "linear" and self.density is not None:
            raise ValueError("found a density, expected none: the way `linear` drops nothing")
        if self.way != "linear" and not 0 < (self.density or 0) <= 1:
            raise ValueError(
                f"found the density {self.density}, expected more than 0 and at most 1 (the way "
                f"`{self.way}` keeps that share of a core's numbers)"
            )
        return self

    @property
    def parts(self) -> dict[str, float]:
        """The parts that count: those whose weight is not 0."""
        return {name: weight for name, weight in self.weights.items() if weight}

    def check_size(self, most: int) -> None:
        """Raises BlendError where it has more than `most` parts."""
        if not most:
            raise BlendError("found a blend, but this server makes none (--max-blend 0)")
        if len(self.parts) > most:
            raise BlendError(
                f"found {len(self.parts)} parts, expected {most} at most (--max-blend)"
            )


def flat(blend: Blend, named: Callable[[str], Blend | None], known: Callable[[str], bool]) -> Blend:
    """The same blend of adapters, none of which is a blend itself.

    Args:
        blend: whose parts may be named blends.
        named: the blend of a name, or None.
        known: whether there is an adapter of a name.

    Raises:
        UnknownPart: there is no such part.
        BlendError: a blend is part of itself, or one that is not linear is part of another.
    """
    weights: dict[str, float] = {}

    def add(its: Blend, factor: float, within: tuple[str, ...]) -> None:
        for name, weight in its.parts.items():
            inner = named(name)
            if inner is None:
                if not known(name):
                    of = f" of the blend {within[-1]!r}" if within else ""
                    raise UnknownPart(f"found the part {name!r}{of}, which does not exist")
                weights[name] = weights.get(name, 0.0) + factor * weight
            elif name in within:
                path = " → ".join(map(repr, (*within[within.index(name) :], name)))
                raise BlendError(f"found a blend that is part of itself: {path}")
            elif its.way != "linear" or inner.way != "linear":
                way = its.way if its.way != "linear" else inner.way
                raise BlendError(
                    f"found the blend {name!r} as a part, and the way `{way}`; only linear blends "
                    "can be parts, and of linear blends only"
                )
            else:
                add(inner, factor * weight, (*within, name))

    add(blend, 1.0, ())
    try:
        return Blend(**blend.model_dump() | {"weights": weights})
    except ValueError as error:
        raise BlendError(told(error)) from None


def merge(
    cores: torch.Tensor, weights: Sequence[float], blend: Blend, whose: Sequence[str], module: str
) -> torch.Tensor:
    """The core of a blend of one cluster in one module, by its way.

    Args:
        cores: float32 `[parts, numbers]`, 1 number at least.
        weights: of the parts, in the order of the cores.
        blend: gives way, density, sign and seed.
        whose: what each part is known as, which with the seed says what DARE drops of it.
        module: its name, likewise.

    Returns:
        float32 `[numbers]`.
    """
    w = torch.tensor(list(weights), dtype=torch.float32)
    if blend.way == "linear":
        return w @ cores
    density = float(blend.density)
    if blend.way == "ties":
        cores = torch.stack([_largest(core, density) for core in cores])
    else:
        kept = torch.stack([_drawn(len(cores[0]), density, blend.seed, n, module) for n in whose])
        cores = torch.where(kept, cores / density, 0.0)
    if blend.way == "dare_linear":
        return w @ cores
    signs = cores.sign()
    elected = torch.where((cores if blend.sign == "total" else signs).sum(0) >= 0, 1.0, -1.0)
    agree = signs == elected
    return (w[:, None] * cores * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(core: torch.Tensor, density: float) -> torch.Tensor:
    """The largest numbers of a core, one at least, 0 elsewhere."""
    kept = core.abs().topk(max(1, int(density * len(core)))).indices
    return torch.zeros_like(core).index_copy(0, kept, core[kept])


def _drawn(n: int, density: float, seed: int, name: str, module: str) -> torch.Tensor:
    """Which of `n` numbers stay: the same for the same seed, part and module everywhere."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(n, generator=generator) < density


def weighted(
    cores: torch.Tensor, coefficients: torch.Tensor, column_of: torch.Tensor
) -> torch.Tensor:
    """Sums of cores, module by module.

    Args:
        cores: float32 `[parts, core_row]`, each an adapter's cores of all modules.
        coefficients: float32 `[parts, modules]`.
        column_of: int64 `[core_row]`, whose module each number is; `modules` where it is nobody's.

    Returns:
        float32 `[core_row]`.
    """
    padded = torch.nn.functional.pad(coefficients, (0, 1))
    return (padded[:, column_of] * cores).sum(0)


def of_mapping(weights: Mapping[str, float], /, **how: object) -> Blend:
    """A blend of plain numbers.

    Args:
        weights: name of each part → its weight, or what `float` takes for one.
        how: the other fields of `Blend`.

    Raises:
        BlendError: it cannot be.
    """
    try:
        return Blend(weights={name: float(weight) for name, weight in weights.items()}, **how)
    except (TypeError, ValueError) as error:
        raise BlendError(told(error) if isinstance(error, ValueError) else str(error)) from None
