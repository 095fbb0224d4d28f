"""What share of their work compressed adapters are expected to keep, by the error of a setting.

Measured on one small model (`vllm_jd/data/quality.json`, which benchmarks/quality_curve.py makes of
the study that docs/quality.md reports): the error ranks settings, not adapters, and larger models
may bear more of it.
"""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from vllm_jd.compressor.errors import SettingsError

AUTO_QUALITY = 0.99
"""What `--auto` asks for: the share that the paper's claim is about."""


@dataclass(frozen=True)
class Share:
    """A share that is kept: expected, and the 95 % interval of that expectation."""

    expected: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.expected:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Quality:
    """What a setting is expected to keep.

    Args:
        rouge_l: of the uncompressed adapters' mean Rouge-L.
        unchanged: of their answers, word for word.
    """

    rouge_l: Share
    unchanged: Share


def expected_quality(error: float) -> Quality | None:
    """What is expected of settings of that mean relative squared error; None where none of so
    large an error was measured."""
    points = measured()["points"]
    errors = [point["error"] for point in points]
    if not 0 <= error <= errors[-1]:
        return None

    def share(name: str) -> Share:
        columns = np.array([point[name] for point in points]).T
        return Share(*(float(np.interp(error, errors, column)) for column in columns))

    return Quality(share("rouge_l"), share("unchanged"))


def error_for(quality: float) -> float:
    """The largest error at which at least that share of LoRA's mean Rouge-L is kept: the lower end
    of the interval, since a setting is asked for by what it must not lose.

    Raises:
        SettingsError: it is not a share, or so little that no such setting was measured.
    """
    points = measured()["points"]
    errors = np.array([point["error"] for point in points])
    shares = np.array([point["rouge_l"][1] for point in points])  # falls, as the file has it
    if not 0 < quality <= 1:
        raise SettingsError(
            f"a quality of {quality:g} was asked for; expected a share of LoRA's, above 0 and at "
            "most 1, such as 0.99"
        )
    if quality < shares[-1]:
        raise SettingsError(
            f"a quality of {quality:g} was asked for; what keeps less than {shares[-1]:.2f} was "
            f"not measured: ask for an error of more than {errors[-1]:g} (--target-error)"
        )
    last = int(np.flatnonzero(shares >= quality)[-1])
    if last == len(errors) - 1:
        return float(errors[-1])
    fraction = (shares[last] - quality) / (shares[last] - shares[last + 1])
    return float(errors[last] + fraction * (errors[last + 1] - errors[last]))


@functools.cache
def measured() -> dict[str, Any]:
    """The file: model, numbers of adapters, and by error [expected, low, high] of each share."""
    file = files("vllm_jd") / "data" / "quality.json"
    return json.loads(file.read_text(encoding="utf-8"))
