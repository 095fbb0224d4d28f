"""What an evaluation says: its figures, which adapters suffered, and what to do."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np

from vllm_jd.compressor.errors import few
from vllm_jd.compressor.report.summary import store_summary
from vllm_jd.evaluate.bootstrap import Interval, shown
from vllm_jd.evaluate.compared import METRICS, RELATIVE, Compared, with_agreement
from vllm_jd.evaluate.metrics import SCORES, Score
from vllm_jd.evaluate.run import WAYS, Evaluated, Options
from vllm_jd.store import Store

_GOOD = 0.99  # of LoRA's Rouge-L: what the paper's claim is about, and what `--auto` asks for
_FELT = 0.05  # nats a token: by so much the loss of an adapter rises that suffers
_RISE = 0.015  # the same of all: up to an error of 0.1 it stayed below (docs/quality.md)
_MUCH_MORE = 3.0  # times the median's rise
_ROUNDING = 1e-3  # a smaller error is that of the numbers that are stored
_WIDE = 0.1  # an interval that says little


class Results:
    """Figures of an evaluation.

    Args:
        store: that was evaluated.
        model: the base model's folder or name.
        evaluated: what was answered.
        options: how it was asked.

    `facts` is the store's summary.
    """

    def __init__(self, store: Store, model: str, evaluated: Evaluated, options: Options) -> None:
        self.store = store
        self.model = model
        self.evaluated = evaluated
        self.options = options
        self.facts = store_summary(store)
        self.names = [each.name for each in evaluated.adapters]
        series = {way: [_series(each) for each in evaluated.scores[way]] for way in WAYS}
        lora = with_agreement(series["lora"], series["lora"])
        self.compared = {
            way: Compared(self.names, with_agreement(series[way], series["lora"]), lora)
            for way in WAYS
        }

    @cached_property
    def errors(self) -> np.ndarray:
        """Of each adapter its mean relative squared error, float64 `[adapters]`."""
        entries = {each["name"]: each["error"] for each in self.facts["adapters"]}
        return np.array([entries[name] for name in self.names])

    @cached_property
    def kept(self) -> dict[str, dict[str, Interval]]:
        """Way → metric → the share of LoRA's."""
        return {way: {m: self.compared[way].kept(m) for m in RELATIVE} for way in WAYS}

    @cached_property
    def means(self) -> dict[str, dict[str, Interval]]:
        """Way → metric → its mean over adapters."""
        return {way: {m: self.compared[way].mean(m) for m in METRICS} for way in WAYS}

    @cached_property
    def added(self) -> dict[str, Interval]:
        """Way → how much its loss is above LoRA's, nats a token."""
        return {way: self.compared[way].added("loss") for way in WAYS}

    @property
    def items(self) -> int:
        """How many were asked."""
        return sum(len(each.items) for each in self.evaluated.adapters)

    def worst(self, most: int) -> list[int]:
        """Places of the adapters that suffered most: whose loss rose most, the largest rise first;
        of those that say the same as before none."""
        rises = self.compared["store"].rises()
        changed = self.compared["store"].each("agreement") < 1
        order = np.argsort(-rises, kind="stable")
        return [int(i) for i in order if rises[i] > 1e-3 or changed[i]][:most]

    def suffering(self) -> list[int]:
        """Places of the adapters whose loss rose by much, and by much more than the others'."""
        rises = self.compared["store"].rises()
        limit = max(_FELT, _MUCH_MORE * float(np.median(rises)))
        return [i for i in self.worst(len(rises)) if rises[i] > limit]

    def headline(self) -> str:
        """What came of it, in a sentence."""
        agreement = self.means["store"]["agreement"]
        kept = self.kept["store"]["rouge_l"]
        first = f"The store keeps {shown(kept, 2)} of the adapters' Rouge-L"
        if np.isnan(kept.value):
            first = "The adapters themselves score no Rouge-L here"
        return (
            f"{first}; {100 * agreement.value:.0f} % [{100 * agreement.low:.0f}, "
            f"{100 * agreement.high:.0f}] of the answers stay word for word, and the loss of what "
            f"is expected rises by {shown(self.added['store'], 3)} nats a token "
            f"({len(self.names):,} adapters, {self.items:,} items)."
        )

    def advice(self) -> list[str]:
        """Sentences about what to do, and about what the figures do not say."""
        suffering = self.suffering()
        found = self._doubts()
        if suffering:
            found += self._about(suffering)
        error = self.facts["error"]
        if error > _ROUNDING and self._loses(suffering):
            found.append(
                f"All in all: compress again with less loss: --target-quality {_GOOD:g}, or "
                f"--target-error {error / 2:.2g} (this store's error is {error:.2g}); `vllm-jd "
                "plan` shows what that costs."
            )
        elif not suffering:
            found.append("No adapter that was asked here suffers.")
        return found

    def _loses(self, suffering: Sequence[int]) -> bool:
        """Whether the adapters lose, those that suffer most aside."""
        rest = np.delete(self.compared["store"].rises(), suffering)
        kept = self.kept["store"]["rouge_l"]
        return (len(rest) > 0 and float(rest.mean()) > _RISE) or kept.high < _GOOD

    def _about(self, suffering: Sequence[int]) -> list[str]:
        """What to do about adapters that suffer more than the others."""
        rises = self.compared["store"].rises()
        listed = few([f"{self.names[i]} ({rises[i]:+.3f})" for i in suffering])
        others = np.delete(self.errors, suffering)
        least = min(self.errors[i] for i in suffering)
        way = (
            "serve them uncompressed beside the store (`vllm-jd remove STORE NAME`, then `serve "
            "--lora-modules NAME=FOLDER`)"
        )
        if len(others) and least > others.max():
            limit = (least + float(others.max())) / 2
            guard = f"--max-adapter-error {limit:.2g}"
            way = f"compress with {guard}, which keeps them as they are, or {way}"
        return [f"Suffer most (rise of the loss): {listed}; {way}."]

    def _doubts(self) -> list[str]:
        found = []
        base, lora = self.means["base"], self.means["lora"]
        if lora["loss"].value >= base["loss"].value:
            found.append(
                "The adapters themselves do no better on this data than the base model (loss "
                f"{lora['loss'].value:.2f} against {base['loss'].value:.2f}): are the prompts in "
                "the form that they were trained on?"
            )
        kept = self.kept["store"]["rouge_l"]
        if kept.high - kept.low > _WIDE:
            found.append(
                f"The interval is wide ({kept.low:.2f} to {kept.high:.2f}): more --items, or more "
                "adapters with data, would say more."
            )
        return found

    def as_dict(self, *, items: bool) -> dict[str, Any]:
        """All of it as JSON; with `items`, every item with its answers, too."""
        facts = self.facts
        store = self.compared["store"]
        result = {
            "date": date.today().isoformat(),
            "versions": self.evaluated.versions,
            "store": {
                "path": str(self.store.path),
                "generation": self.store.generation,
                "manifest_sha256": self.evaluated.manifest_sha256,
                "method": facts["method"],
                "settings": facts["settings"],
                "error": facts["error"],
                "bytes": facts["sizes"]["store_bytes"],
                "adapter_bytes": facts["sizes"]["adapter_bytes"],
                "adapters": len(self.store),
            },
            "base_model": self.model,
            "options": asdict(self.options),
            "headline": self.headline(),
            "advice": self.advice(),
            "items": self.items,
            "too_long": sum(each.too_long for each in self.evaluated.adapters),
            "failed": self.evaluated.failed,
            "ways": {
                way: {
                    "mean": {m: _interval(v) for m, v in self.means[way].items()},
                    "of_lora": {m: _interval(v) for m, v in self.kept[way].items()},
                    "loss_added": _interval(self.added[way]),
                }
                for way in WAYS
            },
            "adapters": [
                {
                    "name": name,
                    "items": len(self.evaluated.adapters[i].items),
                    "error": float(self.errors[i]),
                    "rouge_l_kept": _number(store.shares("rouge_l")[i]),
                    "loss_added": float(store.rises()[i]),
                    **{
                        way: {m: float(self.compared[way].each(m)[i]) for m in METRICS}
                        for way in WAYS
                    },
                }
                for i, name in enumerate(self.names)
            ],
            "worst": [self.names[i] for i in self.worst(10)],
        }
        if items:
            result["answers"] = self._answers()
        return result

    def _answers(self) -> list[dict[str, Any]]:
        return [
            {
                "adapter": adapter.name,
                "prompt": item.text,
                "expected": item.expected,
                **{way: asdict(self.evaluated.scores[way][i][k]) for way in WAYS},
            }
            for i, adapter in enumerate(self.evaluated.adapters)
            for k, item in enumerate(adapter.items)
        ]


def _series(scores: Sequence[Score]) -> dict[str, list[Any]]:
    return {name: [getattr(score, name) for score in scores] for name in (*SCORES, "said")}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(value: Interval) -> list[float] | None:
    """[value, low, high]; None where there is no figure."""
    return None if np.isnan(value.value) else [value.value, value.low, value.high]
