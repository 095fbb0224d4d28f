"""What is expected to be kept at an error, and the error that a wanted share stands for."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_jd.compressor.choose.quality import error_for, expected_quality, measured
from vllm_jd.compressor.errors import SettingsError

ROOT = Path(__file__).parents[3]


def test_the_file_is_what_the_study_says(monkeypatch):
    """Expectations to the last digit; intervals as far as fewer draws go."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import quality_curve
    from quality_predict import candidates
    from quality_results import load

    cells = candidates(load(ROOT / "benchmarks" / "results" / "quality"))
    made = quality_curve.curves(cells, 200, 1)
    assert {k: v for k, v in made.items() if k != "points"} == {
        k: v for k, v in measured().items() if k != "points"
    }
    for mine, theirs in zip(made["points"], measured()["points"], strict=True):
        assert mine["error"] == theirs["error"]
        for name in ("rouge_l", "unchanged"):
            assert mine[name][0] == theirs[name][0]
            np.testing.assert_allclose(mine[name][1:], theirs[name][1:], atol=0.03)


def test_curves_fall_from_everything():
    points = measured()["points"]
    first = expected_quality(0)
    assert first.rouge_l.expected == first.unchanged.expected == 1
    for name in ("rouge_l", "unchanged"):
        shares = np.array([point[name] for point in points])
        assert (np.diff(shares, axis=0) <= 0).all()
        assert (shares[:, 1] <= shares[:, 0]).all() and (shares[:, 0] <= shares[:, 2]).all()


def test_what_the_docs_say():
    found = expected_quality(0.1)
    assert f"{found.rouge_l.expected:.3f}" == "0.997"
    assert 0.75 <= found.unchanged.expected <= 0.83
    assert error_for(0.99) == pytest.approx(0.075, abs=5e-4)


@given(st.floats(0, measured()["points"][-1]["error"]))
def test_a_wanted_share_is_the_largest_error_that_surely_keeps_it(error):
    share = expected_quality(error).rouge_l.low
    found = error_for(share)
    assert found >= error - 1e-9
    assert expected_quality(found).rouge_l.low == pytest.approx(share)
    if found < measured()["points"][-1]["error"] - 1e-6:
        assert expected_quality(found + 1e-6).rouge_l.low < share


@pytest.mark.parametrize("error", [-0.1, 0.6501, 1, float("nan")])
def test_of_what_was_not_measured_nothing_is_said(error):
    assert expected_quality(error) is None


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        (0, "expected a share"),
        (1.01, "expected a share"),
        (99, "expected a share"),
        (float("nan"), "expected a share"),
        (0.5, r"less than 0.75 was not measured: ask for an error of more than 0.65"),
    ],
)
def test_shares_that_are_none(quality, message):
    with pytest.raises(SettingsError, match=message):
        error_for(quality)
