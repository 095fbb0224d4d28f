"""What `benchmarks/soak.py` says of memory."""

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import soak


def test_a_slope_is_found_and_its_interval_is_as_wide_as_the_noise():
    moments = np.arange(0, 1800, 2.0)
    rng = np.random.default_rng(0)
    warm_up = 500 * np.exp(-moments / 20)  # over before the first fifth is
    inside = 0
    for noise in (0.1, 10):
        found = [
            soak.slope(
                moments.tolist(),
                (700 + 36 * moments / 3600 + warm_up + rng.normal(0, noise, len(moments))).tolist(),
            )
            for _ in range(40)
        ]
        widths = [each["high"] - each["low"] for each in found]
        inside += sum(each["low"] <= 36 <= each["high"] for each in found)
        # Four fifths of half an hour, the mean of `noise` over 720 samples.
        assert np.mean(widths) == pytest.approx(2 * 2.1 * noise / 720**0.5 / (0.4 / 12**0.5), 0.3)
    assert inside >= 70  # of 80; 76 are expected
    flat = soak.slope(moments.tolist(), [5.0] * len(moments))
    assert flat == {"slope": 0, "low": 0, "high": 0}


def test_memory_of_a_process_is_what_the_system_says():
    me = psutil.Process()
    block = np.ones(50 << 20, dtype=np.uint8)
    anonymous, resident = soak.memory(me)
    assert resident == pytest.approx(me.memory_info().rss / 1e6, rel=0.05)
    assert 52 < anonymous < resident
    del block
    assert anonymous - soak.memory(me)[0] > 40


def test_kinds_of_processes():
    class Process:
        def __init__(self, name, *line):
            self.name, self.cmdline = lambda: name, lambda: list(line)

    kinds = {
        "engine": Process("VLLM::EngineCore", "VLLM::EngineCore"),
        "worker": Process("VLLM::Worker"),
        "API server": Process("python", "python", "-m", "vllm.entrypoints.openai.api_server"),
        "recompression": Process("python", "python", "-m", "vllm_jd.cli.app", "recompress", "S"),
        "others": Process("python", "python", "-m", "vllm_jd.cli.app", "serve", "S"),
    }
    assert {kind: soak.kind_of(each) for kind, each in kinds.items()} == {k: k for k in kinds}
