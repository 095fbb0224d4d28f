"""What a compression method is: a function of one module's factors, and the options it states.

What methods have in common (rounding, cores, errors, the store) is done around them, in
`vllm_jd.compressor.run.module`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_jd.compressor.algebra.approximation import Shared
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.errors import SettingsError
from vllm_jd.compressor.methods.options import Option, Options, options_of

Start = list[tuple[torch.Tensor, torch.Tensor]]
"""Bases to start from: (U `[d_out, r]`, V `[d_in, r]`) of each cluster."""

Fit = Callable[[ModuleFactors, torch.Tensor, Any, Start | None, int], Shared | ModuleFactors]
"""(factors, assignment int64 `[n]`, the method's options, start, seed) → what stands for the
adapters: bases that they share, or factors of their own."""


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Args:
        name: of `--method`.
        summary: one line for people.
        reference: where it is described.
        fit: see `Fit`.
        options: the class of its options.
        normalise: whether it is given every adapter at norm 1 (Compress then Serve, §6.1).
        seeded: whether it makes random choices.
        experts: whether it does those of a mixture of experts, each as an adapter of its own.
    """

    name: str
    summary: str
    reference: str
    fit: Fit
    options: type[Options] = Options
    normalise: bool = False
    seeded: bool = False
    experts: bool = False

    @property
    def stated(self) -> dict[str, Option]:
        """Its options by name, as its class states them."""
        return options_of(self.options)

    @property
    def clustered(self) -> bool:
        """Whether adapters are grouped into clusters first."""
        return "clusters" in self.stated

    def refuse_unknown(self, names: Iterable[str], spell: Callable[[str], str] = str) -> None:
        """Refuse what is no option of this method.

        Args:
            names: of options that were given.
            spell: how to write a name in the message.

        Raises:
            SettingsError: it says which these are, and which options there are.
        """
        unknown = [spell(name) for name in names if name not in self.stated]
        if unknown:
            known = ", ".join(map(spell, self.stated))
            it_has = f"it has {known}" if known else "it has none"
            raise SettingsError(f"method {self.name} has no option {', '.join(unknown)}; {it_has}")
