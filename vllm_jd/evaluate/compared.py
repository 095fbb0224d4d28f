"""A way to serve adapters beside the adapters as they are: series of items, and what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_jd.evaluate import bootstrap
from vllm_jd.evaluate.bootstrap import Interval
from vllm_jd.evaluate.metrics import SCORES

METRICS = (*SCORES, "agreement")
RELATIVE = ("rouge_l", "rouge_1", "exact")
"""Of these the share of LoRA's says most; of the loss the difference, agreement is relative."""

Series = list[list[float]]
"""Of each adapter its items' values."""


@dataclass(frozen=True)
class Compared:
    """What adapters do when they are served in one way, beside what they do as they are.

    Args:
        names: the adapters that were asked.
        values: metric → of each of these, its items' values.
        lora: the same of the adapters as they are.
    """

    names: list[str]
    values: dict[str, Series]
    lora: dict[str, Series]

    def mean(self, metric: str) -> Interval:
        """The mean over tasks."""
        return bootstrap.interval([self.values[metric]], bootstrap.mean)

    def kept(self, metric: str) -> Interval:
        """The mean over tasks as a share of LoRA's."""
        return bootstrap.interval([self.values[metric], self.lora[metric]], bootstrap.ratio)

    def added(self, metric: str) -> Interval:
        """The mean over tasks minus LoRA's."""
        return bootstrap.interval([self.values[metric], self.lora[metric]], bootstrap.difference)

    def each(self, metric: str) -> np.ndarray:
        """Of each adapter the mean, float64 `[adapters]`."""
        return np.array([np.mean(items) for items in self.values[metric]])

    def each_lora(self, metric: str) -> np.ndarray:
        """The same of the adapters as they are."""
        return np.array([np.mean(items) for items in self.lora[metric]])

    def shares(self, metric: str) -> np.ndarray:
        """Of each adapter the share of its own LoRA's that it keeps, float64 `[adapters]`; NaN of
        those that score nothing themselves."""
        theirs = self.each_lora(metric)
        return self.each(metric) / np.where(theirs > 0, theirs, np.nan)

    def rises(self) -> np.ndarray:
        """Of each adapter the rise of its loss, nats a token, float64 `[adapters]`."""
        return self.each("loss") - self.each_lora("loss")

    def worst_kept(self, metric: str) -> tuple[float, str]:
        """The smallest share of LoRA's that an adapter keeps, and its name. Adapters that score
        nothing themselves are left out."""
        shares = np.nan_to_num(self.shares(metric), nan=np.inf)
        worst = int(shares.argmin())
        return float(shares[worst]), self.names[worst]

    def worst_added(self) -> tuple[float, str]:
        """The most that an adapter's loss rises, in nats a token, and its name."""
        added = self.rises()
        worst = int(added.argmax())
        return float(added[worst]), self.names[worst]


def with_agreement(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Series]:
    """Metric → series; `agreement` is 1 where an item's answer is LoRA's word for word.

    Args:
        ours: of each adapter, metric → its items' values, and `said`: what tells its answers apart.
        theirs: the same of the adapters as they are.
    """
    found = {metric: [each[metric] for each in ours] for metric in METRICS if metric in ours[0]}
    found["agreement"] = [
        [float(a == b) for a, b in zip(one["said"], other["said"], strict=True)]
        for one, other in zip(ours, theirs, strict=True)
    ]
    return found
