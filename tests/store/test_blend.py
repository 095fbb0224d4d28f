"""What a blend may be, and what becomes of blends of blends."""

import math

import pytest
import torch

from vllm_jd.store.blend import Blend, BlendError, UnknownPart, flat, merge, of_mapping


def flattened(blend, **named):
    named = {name: of_mapping(its) if isinstance(its, dict) else its for name, its in named.items()}
    return flat(of_mapping(blend), named.get, {"a", "b", "c"}.__contains__)


def test_blends_of_blends_are_blends_of_adapters():
    assert flattened({"a": 0.5, "b": 0.5}).weights == {"a": 0.5, "b": 0.5}
    found = flattened({"ab": 2.0, "b": 1.0}, ab={"a": 0.7, "b": -0.3})
    assert found.weights == {"a": 1.4, "b": pytest.approx(0.4)}
    deep = flattened({"x": -1.0}, x={"y": 0.5, "c": 1.0}, y={"a": 4.0})
    assert deep.weights == {"a": -2.0, "c": -1.0}


def test_the_same_blend_twice_is_no_cycle():
    assert flattened({"x": 1.0, "y": 1.0}, x={"y": 1.0}, y={"a": 1.0}).weights == {"a": 2.0}


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"x": {"x": 1.0}}, "'x' → 'x'"),
        ({"x": {"y": 1.0}, "y": {"a": 1.0, "x": 0.5}}, "'x' → 'y' → 'x'"),
    ],
)
def test_a_cycle_is_told(named, match):
    with pytest.raises(BlendError, match=f"part of itself: {match}"):
        flattened({"x": 1.0}, **named)


def test_an_unknown_part_is_told_with_the_blend_that_has_it():
    with pytest.raises(UnknownPart, match="found the part 'd', which does not exist"):
        flattened({"a": 1.0, "d": 1.0})
    with pytest.raises(UnknownPart, match="the part 'd' of the blend 'x'"):
        flattened({"x": 1.0}, x={"d": 1.0})
    assert flattened({"a": 1.0, "d": 0.0}).weights == {"a": 1.0}, "of no weight"


def test_what_cancels_out_is_told():
    with pytest.raises(BlendError, match="no weight other than 0"):
        flattened({"x": 1.0, "a": -1.0}, x={"a": 1.0})


def test_only_linear_ones_are_parts():
    ties = of_mapping({"a": 1.0, "b": 1.0}, way="ties", density=0.5)
    with pytest.raises(BlendError, match="only linear blends"):
        flattened({"x": 1.0}, x=ties)
    with pytest.raises(BlendError, match="`ties`; only linear"):
        outer = of_mapping({"x": 1.0}, way="ties", density=0.5)
        flat(outer, {"x": of_mapping({"a": 1.0})}.get, {"a"}.__contains__)


def test_a_weight_that_grew_too_large():
    with pytest.raises(BlendError, match="at most 100"):
        flattened({"x": 60.0}, x={"a": 2.0})


@pytest.mark.parametrize("most", [0, 1])
def test_too_many_parts(most):
    blend = of_mapping({"a": 1.0, "b": 1.0, "c": 0.0})
    blend.check_size(2)
    with pytest.raises(BlendError, match="--max-blend"):
        blend.check_size(most)


def test_it_goes_through_json_and_back():
    blend = of_mapping({"a": 0.1, "b": -2.5e-7}, way="dare_ties", density=0.3, seed=7)
    assert Blend.model_validate_json(blend.model_dump_json()) == blend


@pytest.mark.parametrize("weight", [math.nan, -math.inf, 100.1, "1e999"])
def test_no_weights(weight):
    with pytest.raises(BlendError, match="weight"):
        of_mapping({"a": weight})


def test_weights_of_another_kind():
    with pytest.raises(BlendError):
        of_mapping({"a": None})
    with pytest.raises(BlendError, match="way"):
        of_mapping({"a": 1.0}, way="average")
    with pytest.raises(BlendError, match="seed"):
        of_mapping({"a": 1.0}, way="dare_linear", density=0.5, seed=-1)


def test_ties_keeps_the_largest_and_goes_by_the_majority():
    cores = torch.tensor([[3.0, -1.0, 0.1, 2.0], [-1.0, -2.0, 3.0, 0.1]])
    blend = of_mapping({"a": 1.0, "b": 1.0}, way="ties", density=0.5)
    found = merge(cores, [1.0, 1.0], blend, ["a", "b"], "m")
    assert found.tolist() == [3.0, -2.0, 3.0, 2.0]
    assert merge(cores, [0.5, 2.0], blend, ["a", "b"], "m").tolist() == [1.5, -4.0, 6.0, 1.0]


def test_ties_of_any_density_keeps_a_number_of_each():
    cores = torch.tensor([[3.0, -1.0, 0.1, 2.0], [-1.0, -2.0, 1.5, 0.1]])
    for density in (0.01, 0.25, 0.49):
        blend = of_mapping({"a": 1.0, "b": 1.0}, way="ties", density=density)
        assert merge(cores, [1.0, 1.0], blend, ["a", "b"], "m").tolist() == [3.0, -2.0, 0.0, 0.0]


def test_dare_keeps_the_sum_in_the_mean():
    cores = torch.ones(2, 20_000)
    blend = of_mapping({"a": 1.0, "b": 1.0}, way="dare_linear", density=0.25)
    found = merge(cores, [0.75, 0.25], blend, ["a", "b"], "m")
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert set(found.unique().tolist()) == {0.0, 1.0, 3.0, 4.0}
