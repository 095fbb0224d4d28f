"""Estimates of size and error, and compressing to a target, against what really comes out."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.choose.plan import Candidate, candidate_settings, choose, plan, stored_size
from vllm_jd.compressor.choose.targets import compress_to_target
from vllm_jd.compressor.errors import TargetError
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store

plan_file = importlib.import_module("vllm_jd.compressor.choose.plan")
SHIPPED = Path(__file__).parents[3] / "vllm_jd" / "data" / "adapters"
FEW = [
    Settings(rank=8),
    Settings(rank=16),
    Settings(rank=8, clusters=3),
    Settings(method="jd-diag", rank=16),
    Settings(method="svd", rank=1),
    Settings(method="none"),
]


class Planted:
    """`n` adapters of rank 4 whose deltas are full cores between two common spaces."""

    base_model = "org/planted"

    def __init__(self, n=24, groups=1, width=6, d=48, modules=6, noise=0.05):
        self.names = [f"planted-{i:03d}" for i in range(n)]
        self.shapes = {
            f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj": (d, d) for i in range(modules)
        }
        self.source_sha256 = [f"{i:064x}" for i in range(n)]
        self.source_bytes = [2 * 4 * 2 * d * modules] * n
        self.factor_bytes = 4 * n * 4 * 2 * d * modules
        self._groups, self._width, self._d, self._noise = groups, width, d, noise

    def factors(self, module):
        generator = torch.Generator().manual_seed(list(self.shapes).index(module))

        def randn(*size):
            return torch.randn(*size, generator=generator)

        n, d = len(self.names), self._d
        left, right = (torch.linalg.qr(randn(self._groups, d, self._width)).Q for _ in "uv")
        pairs = []
        for i in range(n):
            u, v = left[i % self._groups], right[i % self._groups]
            b = u @ randn(self._width, 4) + self._noise * randn(d, 4)
            a = randn(4, self._width) @ v.T + self._noise * randn(4, d)
            pairs.append((a, b))
        return ModuleFactors.stack(pairs, d, d)


def mean_error(store):
    return float(store.error[store.present].double().mean())


# --- sizes ---


@pytest.mark.parametrize(
    "settings",
    [
        *FEW,
        Settings(method="hydraopt", rank=4, matrices=3, distance="frobenius", steps=3),
    ],
    ids=lambda s: f"{s.method}-{s.rank}-{s.clusters}",
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "float32"])
def test_the_size_is_known_before(tmp_path, settings, dtype):
    collection = Planted()
    settings = replace(settings, store_dtype=dtype)
    numbers, size = stored_size(collection, settings.adapted(rank=min(settings.rank, 48)))
    store = compress(collection, tmp_path, settings)
    assert numbers == pytest.approx(stored_numbers(store), rel=1e-9)
    # Headers of the small files of a test weigh more than they do in real ones.
    assert size == pytest.approx(store.stored_bytes, rel=0.02, abs=6000)


def stored_numbers(store):
    cores = {"jd-full": 2, "jd-diag": 1}.get(store.manifest.method)
    return sum(
        module.u_vectors * module.d_out
        + module.v_vectors * module.d_in
        + (len(store) * module.rank**cores if cores else 0)
        for module in store.manifest.modules
    )


# --- estimates ---


def test_estimates_agree_with_what_compressing_gives(tmp_path):
    collection = Planted(n=24, groups=3)
    candidates = plan(collection, base=Settings(), candidates=FEW)
    assert len(candidates) == len(FEW)
    for i, candidate in enumerate(candidates):
        store = compress(collection, tmp_path / str(i), candidate.settings)
        assert candidate.error == pytest.approx(mean_error(store), rel=0.1, abs=0.01)


def test_estimates_of_real_adapters_agree_with_what_compressing_gives(tmp_path):
    collection = read_adapters([SHIPPED])
    few = [Settings(rank=8), Settings(method="svd", rank=1)]
    for i, candidate in enumerate(plan(collection, base=Settings(), candidates=few)):
        store = compress(collection, tmp_path / str(i), candidate.settings)
        assert candidate.error == pytest.approx(mean_error(store), rel=0.3)


def test_of_several_types_each_is_what_it_is_by_itself(few_ranks, monkeypatch):
    """And fitted once: rounding is all that differs."""
    fits = []
    fit = plan_file.fit_module
    monkeypatch.setattr(
        plan_file, "fit_module", lambda *args, **named: fits.append(0) or fit(*args, **named)
    )
    collection = Planted(n=24, groups=3)
    together = plan(collection, base=Settings(), dtypes=("bfloat16", "int8", "int4"))
    once = len(fits)
    apart = [
        candidate
        for dtype in ("bfloat16", "int8", "int4")
        for candidate in plan(collection, base=Settings(store_dtype=dtype))
    ]
    assert once < 0.6 * (len(fits) - once)
    expected = {candidate.settings: candidate for candidate in apart}
    assert {candidate.settings for candidate in together} == set(expected)
    for candidate in together:
        other = expected[candidate.settings]
        assert (candidate.error, candidate.bytes) == (other.error, other.bytes)
        assert candidate.label.endswith(candidate.settings.quantised or "")


def test_a_large_collection_is_sampled(monkeypatch):
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._MOST_ADAPTERS", 24)
    whole = plan(Planted(n=24, groups=3), base=Settings(), candidates=FEW)
    sampled = plan(
        Planted(n=96, groups=3),
        base=Settings(),
        candidates=FEW,
    )
    by_settings = {candidate.settings: candidate for candidate in sampled}
    for candidate in whole:
        if candidate.settings.method in ("svd", "none"):
            other = by_settings[candidate.settings]
            assert other.error == pytest.approx(candidate.error, abs=0.05)
            assert other.bytes == pytest.approx(4 * candidate.bytes, rel=0.01)


def test_candidates_come_smallest_first_and_the_best_are_marked():
    candidates = plan(Planted(), base=Settings(), candidates=FEW)
    assert [c.bytes for c in candidates] == sorted(c.bytes for c in candidates)
    for i, candidate in enumerate(candidates):
        beaten = any(c.error <= candidate.error for c in candidates[:i])
        assert candidate.best == (not beaten)
    assert candidates[-1].settings.method == "none"
    assert candidates[-1].error < 1e-4
    # Uncompressed 16-bit adapters are as many slots as there are adapters.
    assert candidates[-1].slots == pytest.approx(24)


def test_the_papers_rank_is_looked_at_and_nothing_larger_than_the_adapters():
    collection = read_adapters([SHIPPED])
    found = candidate_settings(collection, Settings())
    assert len(collection.names) // 2 + 7 in {s.rank for s in found if s.method == "jd-full"}
    source = sum(collection.source_bytes)
    for settings in found:
        assert settings.method == "none" or stored_size(collection, settings)[1] < source


# --- choosing ---

some_candidates = st.lists(
    st.builds(
        Candidate,
        settings=st.just(Settings()),
        bytes=st.integers(1, 50),
        error=st.floats(0, 1),
        spread=st.just(0.0),
        slots=st.just(1.0),
    ),
    min_size=1,
)


@given(some_candidates, st.none() | st.floats(0, 1), st.none() | st.integers(1, 50))
def test_the_choice_meets_the_targets_and_nothing_better_does(candidates, error, size):
    order = choose(candidates, target_error=error, max_bytes=size)
    fits = [
        c
        for c in candidates
        if (error is None or c.error <= error) and (size is None or c.bytes <= size)
    ]
    assert len(order) == len(fits)
    if not fits:
        return
    if error is None:
        assert order[0].error == min(c.error for c in fits)
    else:
        assert order[0].bytes == min(c.bytes for c in fits)


# --- targets ---


@pytest.fixture
def few_ranks(monkeypatch):
    """Fewer settings to look at, for the tests' time."""
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._RANKS", (4, 8))
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._DIAGONAL_RANKS", (8, 16))


@pytest.mark.parametrize("target", [0.5, 0.1, 0.02])
def test_the_target_error_is_met(tmp_path, few_ranks, target):
    store, candidates = compress_to_target(
        Planted(groups=2), tmp_path, Settings(), target_error=target
    )
    assert mean_error(store) <= target
    assert any(c.settings.method == store.manifest.method for c in candidates)


def test_the_best_method_for_the_collection_is_found(tmp_path, few_ranks):
    # Few adapters with nothing in common, each nearly of rank 1: nothing beats SVD there.
    class Lonely(Planted):
        def factors(self, module):
            generator = torch.Generator().manual_seed(list(self.shapes).index(module))
            decay = torch.tensor([1.0, 0.2, 0.05, 0.01])[:, None]
            n, d = len(self.names), self._d
            a = torch.randn(n, 4, d, generator=generator)
            b = torch.randn(n, 4, d, generator=generator) * decay
            return ModuleFactors(a.flatten(0, 1), b.flatten(0, 1), torch.full((n,), 4))

    store, _ = compress_to_target(
        Lonely(n=10, modules=2), tmp_path / "a", Settings(), target_error=0.2
    )
    assert store.manifest.method == "svd"
    # And many adapters of one pair of spaces are what JD is for.
    store, _ = compress_to_target(
        Planted(n=64, modules=2), tmp_path / "b", Settings(), target_error=0.2
    )
    assert store.manifest.method in ("jd-full", "jd-diag")


def test_the_size_is_kept(tmp_path, few_ranks):
    store, candidates = compress_to_target(
        Planted(groups=2), tmp_path, Settings(store_dtype="int8"), max_bytes=40_000
    )
    assert store.stored_bytes <= 40_000
    assert store.manifest.quantised == "int8"
    smaller = [c for c in candidates if c.bytes < 35_000]
    assert mean_error(store) <= min(c.error for c in smaller) * 1.1 + 0.01


def test_an_estimate_that_was_too_good_is_not_published(tmp_path, monkeypatch):
    collection = Planted(groups=2)
    compress(collection, tmp_path, Settings(method="none"))
    real = plan(collection, base=Settings(), candidates=FEW)
    rosy = [replace(c, error=c.error / 3) for c in real]
    monkeypatch.setattr("vllm_jd.compressor.choose.targets.plan", lambda *args, **kwargs: rosy)
    tried = []
    store, _ = compress_to_target(
        collection, tmp_path, Settings(), target_error=0.3, on_choice=tried.append
    )
    assert len(tried) > 1
    assert mean_error(store) <= 0.3
    assert store.generation == 2


def test_targets_that_nothing_meets_are_an_error_that_says_what_comes_closest(tmp_path, few_ranks):
    with pytest.raises(TargetError, match=r"error of at most 0\.01 and at most 0\.0 MB"):
        compress_to_target(Planted(), tmp_path, Settings(), target_error=0.01, max_bytes=9_000)
    assert not (tmp_path / "CURRENT").exists()


def test_methods_can_be_restricted(tmp_path, few_ranks):
    store, _ = compress_to_target(
        Planted(), tmp_path, Settings(), target_error=0.3, methods=["jd-diag"]
    )
    assert store.manifest.method == "jd-diag"
    assert Store.open(tmp_path).manifest.method == "jd-diag"
