"""Settings: what the method has counts, anything else is refused, and stores keep their record."""

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from typing import Literal

import pytest

from vllm_jd.compressor import Settings
from vllm_jd.compressor.errors import CompressorError, SettingsError
from vllm_jd.compressor.methods.method import Method
from vllm_jd.compressor.methods.options import Options, option, options_of
from vllm_jd.compressor.methods.registry import METHODS

JD = {
    "rank": 16,
    "clusters": 1,
    "iterations": 10,
    "seed": 0,
}
HYDRAOPT = {
    "rank": 16,
    "matrices": 1,
    "temperature": 0.1,
    "distance": "mae",
    "steps": 200,
    "seed": 0,
}
# What the manifest of a store has of default settings: written down from stores that are out.
RECORDED = {
    "jd-full": JD,
    "jd-diag": JD,
    "svd": {"rank": 16},
    "hydraopt": HYDRAOPT,
    "ties": {"density": 0.5, "majority_sign": "total"},
    "task-arithmetic": {},
    "dare": {"density": 0.5, "seed": 0},
    "dare-ties": {"density": 0.5, "majority_sign": "total", "seed": 0},
    "none": {},
}


def test_every_method_is_written_down_here():
    assert RECORDED.keys() == METHODS.keys()


@pytest.mark.parametrize("method", RECORDED)
def test_what_a_manifest_records_of_a_method(method):
    recorded = Settings(method=method).recorded()
    assert recorded == RECORDED[method] | {"store_dtype": "bfloat16"}
    settings = Settings(method=method, store_dtype="int4", max_adapter_error=0.5)
    assert settings.recorded() == RECORDED[method] | {
        "store_dtype": "int4",
        "max_adapter_error": 0.5,
    }
    assert Settings.from_recorded(method, settings.recorded()) == settings


@pytest.mark.parametrize("way", ["joint", "separate"])
def test_what_becomes_of_experts_is_recorded_where_there_are_some(way):
    settings = Settings(experts=way)
    assert settings.recorded(experts=True) == settings.recorded() | {"experts": way}
    assert Settings.from_recorded("jd-full", settings.recorded(experts=True)) == settings
    assert Settings("svd").recorded(experts=True) == Settings("svd").recorded()


@pytest.mark.parametrize("method", RECORDED)
def test_settings_of_a_manifest_that_has_less_or_more(method):
    assert Settings.from_recorded(method, {}) == Settings(method=method)
    more = {"peft_type": "VERA", "of_a_later_version": 1}
    more |= {"rank_allocation": "uniform", "residual_rank": 0, "mean_rank": 0}
    assert Settings.from_recorded(method, more) == Settings(method=method)


def test_a_store_made_with_an_option_that_is_gone_is_refused():
    recorded = {"rank": 3, "rank_allocation": "spectrum"}
    with pytest.raises(SettingsError, match=r"made with rank_allocation spectrum, .*`vllm-jd comp"):
        Settings.from_recorded("svd", recorded)
    recorded |= {"residual_rank": 2, "mean_rank": 1}
    with pytest.raises(SettingsError, match="spectrum, residual_rank 2, mean_rank 1, which"):
        Settings.from_recorded("jd-full", recorded)


def test_merge_weight_is_recorded_where_it_was_given():
    assert Settings("ties", merge_weight=0.25).recorded()["merge_weight"] == 0.25


def test_options_are_read_and_replaced_like_fields():
    settings = Settings("jd-diag", rank=3, clusters=2, seed=7, store_dtype="int8")
    assert (settings.rank, settings.clusters, settings.iterations) == (3, 2, 10)
    assert (settings.quantised, settings.float_dtype) == ("int8", "bfloat16")
    other = replace(settings, rank=4, seed=8)
    assert (other.rank, other.clusters, other.seed, other.method) == (4, 2, 8, "jd-diag")
    assert (settings.rank, settings.seed) == (3, 7)
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
    assert settings.as_dict() == JD | {
        "method": "jd-diag",
        "rank": 3,
        "clusters": 2,
        "seed": 7,
        "experts": "separate",
        "store_dtype": "int8",
        "max_adapter_error": None,
    }
    assert Settings(**settings.as_dict()) == settings


def test_equal_settings_are_one_key_and_survive_copies():
    settings = Settings(rank=3)
    assert {settings: 1}[Settings(rank=3)] == 1
    assert settings != Settings(rank=4) and settings != Settings("jd-diag", rank=3)
    assert Settings("ties") != Settings("dare-ties")
    assert pickle.loads(pickle.dumps(settings)) == copy.deepcopy(settings) == settings
    assert asdict(settings)["options"]["rank"] == 3


def test_another_method_takes_over_what_both_have():
    settings = Settings(rank=3, iterations=2, clusters=2, store_dtype="int8")
    other = replace(settings, method="svd")
    assert other == Settings("svd", rank=3, store_dtype="int8")
    assert replace(settings, method="svd", rank=5).rank == 5
    assert replace(settings, method="none") == Settings("none", store_dtype="int8")
    assert replace(other, method="jd-diag") == Settings("jd-diag", rank=3, store_dtype="int8")


def test_what_a_missing_option_means():
    for method in ("ties", "none"):
        settings = Settings(method)
        assert (settings.rank, settings.clusters) == (0, 1)
        assert not settings.has("rank")
        with pytest.raises(AttributeError):
            _ = settings.density_of_another
    with pytest.raises(AttributeError):
        _ = Settings("jd-full").density


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "jd"}, "no method 'jd'; there are jd-full, jd-diag, svd, hydraopt, ties"),
        ({"density": 0.3}, "method jd-full has no option density; it has rank, clusters"),
        ({"density": 0.3, "steps": 2}, "has no option density, steps; it has rank"),
        ({"method": "svd", "clusters": 1}, "method svd has no option clusters; it has rank"),
        ({"method": "none", "rank": 16}, "method none has no option rank; it has none"),
        ({"nonsense": 1}, "method jd-full has no option nonsense"),
        ({"rank": 0}, "rank is 0; expected a whole number, at least 1"),
        ({"rank": 2.5}, "rank is 2.5; expected a whole number"),
        ({"rank": True}, "rank is True; expected a whole number"),
        ({"rank": "many"}, "rank is 'many'; expected a whole number"),
        ({"rank": None}, "rank is None; expected a whole number"),
        ({"experts": "few"}, "experts is 'few'; expected one of separate, joint"),
        ({"method": "dare", "density": 0}, "density is 0; expected a number, above 0 and at most"),
        ({"method": "dare", "density": 1.5}, "density is 1.5; expected a number, above 0 and at"),
        ({"method": "hydraopt", "temperature": float("nan")}, "temperature is nan; expected a num"),
        ({"method": "ties", "merge_weight": float("inf")}, "merge_weight is inf; expected a num"),
        ({"seed": -1}, "seed is -1; expected a whole number, at least 0"),
        ({"store_dtype": "int2"}, "store_dtype is 'int2'; expected one of bfloat16, float16"),
        ({"max_adapter_error": -0.1}, "max_adapter_error is -0.1; expected a number, at least 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError) as caught:
        Settings(**given)
    assert isinstance(caught.value, SettingsError) and isinstance(caught.value, CompressorError)
    assert message in str(caught.value)


def test_every_method_states_where_it_is_from_and_what_its_options_mean():
    kinds = {}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary and method.reference
        for stated in method.stated.values():
            assert stated.help.endswith("."), stated.name
            stated.check(stated.default)
            # The command line has one option of a name.
            assert kinds.setdefault(stated.name, stated.kind) is stated.kind


def test_options_are_typed_by_their_annotations():
    @dataclass(frozen=True)
    class Some(Options):
        count: int = option(3, "How many.", least=1, most=5)
        share: float | None = option(None, "How much.", above=0, default_help="all")
        way: Literal["this", "that"] = option("this", "Which.")

    stated = options_of(Some)
    assert [(o.name, o.kind, o.default) for o in stated.values()] == [
        ("count", int, 3),
        ("share", float, None),
        ("way", str, "this"),
    ]
    assert stated["way"].choices == ("this", "that")
    assert stated["share"].default_help == "all"
    method = Method("some", "", "", lambda *_: None, Some)
    assert not method.clustered
    with pytest.raises(SettingsError, match="count is 6; expected a whole number, at least 1 and"):
        Some(count=6)

    @dataclass(frozen=True)
    class Wrong(Options):
        names: list = option((), "No kind of option.")

    with pytest.raises(TypeError, match=r"Wrong\.names"):
        options_of(Wrong)
