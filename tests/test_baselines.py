"""The compression benchmark's baselines, against float64 formulas and the packages' own API."""

import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.compressor.factors import ModuleFactors
from vllm_jd.compressor.methods.jd_full import cores, jd_full

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # new processes get it, too
import baselines

MEGABYTE = 2**20


def pairs_of(adapters):
    """Adapters of `make_factors` as the baselines take them: module → [(A, B)]."""
    return {
        module: [(factors[module][1], factors[module][0]) for factors in adapters]
        for module in adapters[0]
    }


def dense_error(pairs, reconstruct):
    """Mean relative squared error from the d×d products, float64."""
    errors = []
    for i in range(len(next(iter(pairs.values())))):
        rebuilt = reconstruct(i)
        for module, of_module in pairs.items():
            a, b = (factor.double() for factor in of_module[i])
            new_a, new_b = (factor.double() for factor in rebuilt[module])
            delta = b @ a
            errors.append(((delta - new_b @ new_a).norm() / delta.norm()) ** 2)
    return float(sum(errors) / len(errors))


# plain_jd


@pytest.mark.parametrize(
    "module", ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"]
)
@pytest.mark.parametrize(("n", "ranks", "rank"), [(12, (4,), 6), (30, (2, 4, 1), 4), (2, (1,), 5)])
def test_plain_jd_is_as_good_as_jd_full(make_factors, module, n, ranks, rank):
    pairs = pairs_of(make_factors(n, kind="real", ranks=ranks))[module]
    (a, b), *_ = pairs
    factors, norms = ModuleFactors.stack(pairs, a.shape[1], b.shape[0]).normalised()
    pairs = [(a, b / norm) for (a, b), norm in zip(pairs, norms.float(), strict=True)]

    u, v, plain = baselines.plain_jd(pairs, rank, 10)

    eye = torch.eye(rank)
    torch.testing.assert_close(u.T @ u, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(v.T @ v, eye, atol=1e-5, rtol=0)
    for (a, b), core in zip(pairs, plain, strict=True):
        torch.testing.assert_close(core, u.T @ (b @ a) @ v, atol=1e-5, rtol=0)
    reached = float(torch.stack(plain).double().square().sum())
    ours = float(cores(factors, *jd_full(factors, rank)).double().square().sum())
    assert reached == pytest.approx(ours, rel=0.01)
    assert 0.3 * n < reached <= n * (1 + 1e-5)  # neither nothing nor more than was there


def test_every_iteration_of_plain_jd_raises_the_objective(make_factors):
    pairs = pairs_of(make_factors(20))["model.layers.2.mlp.down_proj"]
    objective = [
        float(torch.stack(baselines.plain_jd(pairs, 5, n)[2]).square().sum()) for n in (1, 2, 4, 8)
    ]
    assert all(after >= before * (1 - 1e-3) for before, after in pairwise(objective))
    assert objective[-1] > objective[0]


def test_plain_jd_leaves_the_global_generator_alone(make_factors):
    pairs = pairs_of(make_factors(3))["model.layers.0.self_attn.q_proj"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = baselines.plain_jd(pairs, 4, 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first[0], baselines.plain_jd(pairs, 4, 2)[0])


@pytest.mark.parametrize(
    ("n", "rank", "iterations", "message"),
    [(0, 2, 1, "no adapters"), (2, 9, 1, "1 to 8"), (2, 0, 1, "1 to 8"), (2, 2, 0, "iterations")],
)
def test_plain_jd_says_what_is_wrong(make_factors, n, rank, iterations, message):
    pairs = pairs_of(make_factors(2))["model.layers.0.self_attn.k_proj"][:n]
    with pytest.raises(ValueError, match=message):
        baselines.plain_jd(pairs, rank, iterations)


# The packages


@pytest.mark.parametrize(
    ("parameters", "k"),
    # One component: Σ d_in + d_out = 192; loadings: 4 modules × 2 sides × 6 adapters × rank 4.
    [(384 * 3, 3), (384 * 3 + 191, 3), (384 * 3 + 193, 4), (1, 1), (10**9, 8)],
)
def test_lorashare_stores_what_was_asked_for(make_factors, parameters, k):
    pytest.importorskip("lorashare")
    pairs = pairs_of(make_factors(6))
    compressed = baselines.lorashare(pairs, parameters)
    assert (compressed.components, compressed.parameters) == (k, 384 * k)
    assert compressed.stored_bytes == 4 * compressed.parameters


def test_lorashare_is_what_the_package_does_with_folders(make_factors, write_adapters, tmp_path):
    package = pytest.importorskip("lorashare")
    pairs = pairs_of(make_factors(6, kind="real"))
    compressed = baselines.lorashare(pairs, 384 * 5)

    folders = write_adapters(tmp_path, 6, kind="real")  # α/r is 2 in these files
    theirs = package.SHAREModel.from_adapters([str(f) for f in folders], num_components=5)

    assert compressed.parameters == theirs.config.compression_stats["compressed_total_params"]
    for i, folder in enumerate(folders):
        weights = theirs.reconstruct(folder.name)
        for module, (a, b) in compressed.reconstruct(i).items():
            torch.testing.assert_close(a, weights[f"base_model.model.{module}.lora_A.weight"])
            torch.testing.assert_close(b, weights[f"base_model.model.{module}.lora_B.weight"])


@pytest.mark.parametrize(
    # Means: rank 4 × 192 = 768. One component: 768 and 4 modules × 2 sides × 6 adapters = 48.
    ("parameters", "k"),
    [(768 + 816 * 3, 3), (768 + 816 * 3 + 407, 3), (768 + 816 * 3 + 409, 4), (1, 1), (10**9, 6)],
)
def test_vlora_stores_what_was_asked_for(make_factors, parameters, k):
    pytest.importorskip("vlora")
    pairs = pairs_of(make_factors(6))
    compressed = baselines.vlora(pairs, parameters)
    assert (compressed.components, compressed.parameters) == (k, 768 + 816 * k)
    assert compressed.stored_bytes == 4 * compressed.parameters


def test_vlora_is_what_the_package_does_with_folders(make_factors, write_adapters, tmp_path):
    package = pytest.importorskip("vlora")
    pairs = pairs_of(make_factors(6, kind="real"))
    compressed = baselines.vlora(pairs, 768 + 816 * 2)

    folders = write_adapters(tmp_path, 6, kind="real")
    adapters = [package.load_adapter(folder) for folder in folders]
    theirs = package.SharedSubspace.from_adapters(adapters, num_components=2)

    assert compressed.parameters == theirs.compression_stats()["total_params_compressed"]
    for i in range(6):
        weights = theirs.reconstruct(f"task_{i}")
        for module, (a, b) in compressed.reconstruct(i).items():
            torch.testing.assert_close(a, weights.lora_a[module])
            torch.testing.assert_close(b, weights.lora_b[module])


@pytest.mark.parametrize("name", ["lorashare", "vlora"])
def test_reported_error_is_that_of_the_products(make_factors, name):
    pytest.importorskip(name)
    pairs = pairs_of(make_factors(6, kind="real"))
    compress = getattr(baselines, name)
    errors = []
    for parameters in (1, 2500, 10**9):
        compressed = compress(pairs, parameters)
        report = baselines.report(compressed, pairs)
        assert report.error == pytest.approx(dense_error(pairs, compressed.reconstruct), rel=1e-6)
        assert report.parameters == compressed.parameters
        errors.append(report.error)
    assert errors[0] > errors[1] > errors[2]


def test_vlora_with_all_components_loses_nothing(make_factors):
    pytest.importorskip("vlora")
    pairs = pairs_of(make_factors(4))
    assert baselines.report(baselines.vlora(pairs, 10**9), pairs).error < 1e-9


@given(rank=st.integers(1, 5), new_rank=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_mean_error_is_that_of_the_products(rank, new_rank, seed):
    generator = torch.Generator().manual_seed(seed)

    def pair(r):
        return torch.randn(r, 9, generator=generator), torch.randn(7, r, generator=generator)

    pairs = {"x": [pair(rank), pair(rank)], "y": [pair(rank), pair(rank)]}
    rebuilt = [{"x": pair(new_rank), "y": pairs["y"][i]} for i in range(2)]
    error = baselines.mean_error(pairs, rebuilt.__getitem__)
    assert error == pytest.approx(dense_error(pairs, rebuilt.__getitem__), rel=1e-9)


def test_adapters_that_add_nothing_do_not_count_in_the_mean_error(make_factors):
    pairs = pairs_of(make_factors(2))
    pairs = {module: [one, (one[0], 0 * one[1])] for module, (one, _) in pairs.items()}
    halves = {module: (one[0], 0.5 * one[1]) for module, (one, _) in pairs.items()}
    assert baselines.mean_error(pairs, lambda adapter: halves) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["lorashare", "vlora"])
def test_without_the_package_the_error_says_what_to_install(make_factors, monkeypatch, name):
    for module in [name, "lorashare.compression"]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(baselines.MissingPackage, match="pip install vlora-dev lorashare"):
        getattr(baselines, name)(pairs_of(make_factors(2)), 1000)


@pytest.mark.parametrize("name", ["lorashare", "vlora"])
def test_adapters_that_a_package_cannot_take_are_refused(make_factors, name):
    compress = getattr(baselines, name)
    with pytest.raises(ValueError, match=r"one rank; found \[2, 4\]"):
        compress(pairs_of(make_factors(4, ranks=(2, 4))), 1000)
    with pytest.raises(ValueError, match="at least 2 adapters; found 1"):
        compress(pairs_of(make_factors(1)), 1000)
    with pytest.raises(ValueError, match="no modules"):
        compress({}, 1000)
    pairs = pairs_of(make_factors(3))
    pairs["model.layers.0.self_attn.q_proj"].pop()
    with pytest.raises(ValueError, match=r"every adapter in every module; found \[2, 3\]"):
        compress(pairs, 1000)


# measure


def load_ones(megabytes):
    """That many megabytes, made of four times as much for a moment."""
    return torch.cat([torch.ones(megabytes * MEGABYTE // 4) for _ in range(2)]).chunk(2)[0].clone()


def sum_of_ones(x, megabytes):
    return float(torch.ones(megabytes * MEGABYTE // 4).sum()) + float(x[0]), torch.get_num_threads()


def with_tensor(result, x):
    return *result, x[:3]


def test_measure_reports_the_memory_of_the_function_alone():
    # Neither the parent's peak nor that of making the input may show: 100 MB stay of 400.
    assert torch.ones(700 * MEGABYTE // 4).sum() > 0
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seconds, peak, (total, threads, tensor) = baselines.measure(
            partial(sum_of_ones, megabytes=200), load=partial(load_ones, 100), summarise=with_tensor
        )
    finally:
        torch.set_num_threads(before)
    assert 195 * MEGABYTE < peak < 225 * MEGABYTE
    assert seconds > 0
    assert (total, threads) == (200 * MEGABYTE / 4 + 1, 2)
    assert torch.equal(tensor, torch.ones(3))


def test_measure_raises_what_the_function_raises():
    with pytest.raises(baselines.MissingPackage, match="no_such_package cannot be imported"):
        baselines.measure(partial(baselines._import, "no_such_package.part"))


def test_measure_says_that_the_process_died():
    with pytest.raises(RuntimeError, match="out of memory"):
        baselines.measure(partial(os._exit, 1))
