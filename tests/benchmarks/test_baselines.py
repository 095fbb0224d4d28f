"""The compression benchmark: its baselines, against float64 formulas and the packages' own API,
its input, and what it counts."""

import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.compressor import Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods import jd_full as jd_full_module
from vllm_jd.compressor.methods.jd_full import cores, jd_full

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # new processes get it, too
import baselines
from synthetic import RandomCollection, Structure

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


# The input


@pytest.mark.parametrize(
    ("model", "layers", "d", "keys"), [("smollm2", 30, 576, 192), ("mistral-7b", 32, 4096, 1024)]
)
def test_shapes_of_models_without_a_folder(model, layers, d, keys):
    shapes = RandomCollection(model, 3).shapes
    assert len(shapes) == 3 * layers
    for layer in range(layers):
        for target, d_out in (("q_proj", d), ("k_proj", keys), ("v_proj", keys)):
            assert shapes[f"model.layers.{layer}.self_attn.{target}"] == (d, d_out)
    some = RandomCollection(model, 3, layers=2).shapes
    assert [name.split(".")[2] for name in some] == [str(i) for i in (layers // 4,) * 3] + [
        str(i) for i in (3 * layers // 4,) * 3
    ]
    assert some.items() <= shapes.items()
    with pytest.raises(ValueError, match=f"choose 1 to {layers}"):
        RandomCollection(model, 3, layers=layers + 1)


@pytest.mark.parametrize("structure", [None, Structure()])
def test_the_same_arguments_give_the_same_adapters(structure):
    one, two = (RandomCollection("smollm2", 3, rank=2, structure=structure) for _ in range(2))
    module = "model.layers.7.self_attn.k_proj"
    assert torch.equal(one.factors(module).a, two.factors(module).a)
    assert torch.equal(one.factors(module).b, two.factors(module).b)
    assert one.source_sha256 == two.source_sha256
    other = RandomCollection("smollm2", 3, rank=2, structure=Structure(noise=0.1))
    assert one.source_sha256 != other.source_sha256


@pytest.mark.parametrize("structure", [None, Structure()])
def test_a_deltas_entries_have_the_size_asked_for(structure):
    collection = RandomCollection("smollm2", 12, scale=3e-3, structure=structure)
    norms = collection.factors("model.layers.7.self_attn.q_proj").squared_norms()
    assert float((norms.mean() / 576**2).sqrt()) == pytest.approx(3e-3, rel=0.25)


def test_structured_adapters_are_like_trained_ones():
    collection = RandomCollection("smollm2", 50, structure=Structure())
    factors, _ = collection.factors("model.layers.7.self_attn.q_proj").normalised()
    deltas = factors.per_adapter(factors.b).mT @ factors.per_adapter(factors.a)
    kept = torch.linalg.svdvals(deltas[:10]).square().mean(0).cumsum(0)
    for rank, trained in ((1, 0.30), (2, 0.15), (4, 0.07)):
        assert 1 - float(kept[rank - 1]) == pytest.approx(trained, abs=0.04)
    for rank, trained in ((16, 0.61), (32, 0.38)):
        found = cores(factors, *jd_full(factors, rank)).double().square().sum() / 50
        assert 1 - float(found) == pytest.approx(trained, abs=0.06)


def test_an_adapter_has_the_same_family_in_all_modules():
    collection = RandomCollection("smollm2", 12, structure=Structure(3, shared=16, noise=0))
    relatives = []
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.v_proj"):
        factors = collection.factors(module)
        for rows in (factors.a, factors.b):
            rows = factors.per_adapter(rows)  # each spans all of its family's space
            both = torch.cat([rows[:1].expand(12, -1, -1), rows], dim=1)
            relatives.append(torch.linalg.matrix_rank(both, rtol=1e-5) == 16)
    assert all(torch.equal(found, relatives[0]) for found in relatives)
    assert 1 < int(relatives[0].sum()) < 12


# What is counted


@pytest.fixture
def compression():
    for package in ("matplotlib", "psutil"):
        pytest.importorskip(package)
    import compression

    return compression


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(("n", "rank", "iterations"), [(30, 6, 3), (12, 4, 10)])
def test_needed_work_is_that_of_the_products(
    compression, monkeypatch, bfloat16, n, rank, iterations
):
    monkeypatch.setattr(jd_full_module, "bfloat16_is_fast", lambda device: bfloat16)
    generator = torch.Generator().manual_seed(0)
    factors = ModuleFactors(
        torch.randn(n * 4, 160, generator=generator),
        torch.randn(n * 4, 120, generator=generator),
        torch.full((n,), 4),
    )
    needed = compression.needed_work(n, 4, 160, 120, rank, iterations, bfloat16=bfloat16)
    with compression.CountWork() as counted:
        unit, _ = factors.normalised()
        cores(unit, *jd_full(unit, rank, iterations=iterations))
    assert counted.flops[torch.bfloat16] == needed.rough
    assert bool(needed.rough) == bfloat16
    total = counted.flops.total()
    # The rest: products of small matrices, and the check of eq. 19.
    assert needed.rough + needed.exact <= total <= 1.4 * (needed.rough + needed.exact)


def test_an_early_end_shows_in_what_is_counted(compression):
    generator = torch.Generator().manual_seed(0)
    factors = ModuleFactors(
        torch.randn(4, 160, generator=generator),
        torch.randn(4, 120, generator=generator),
        torch.full((1,), 4),
    )
    needed = compression.needed_work(1, 4, 160, 120, 4, 50, bfloat16=False)
    with compression.CountWork() as counted:  # rank 4 holds all of it at once
        jd_full(factors.normalised()[0], 4, iterations=50)
    assert counted.flops.total() < 0.5 * needed.exact


def test_stages_and_counts_of_a_whole_run(compression):
    collection = compression.ClockedCollection("smollm2", 6, rank=16, layers=1)
    found = compression.compress_once(collection, Settings(rank=2, clusters=2, iterations=2))
    assert {"reading", "clustering", "modules", "writing"} <= found["stage_seconds"].keys()
    assert found["modules_judged_by"] == 3
    assert sum(found["stage_seconds"].values()) == pytest.approx(found["seconds"])
    assert found["synthesis_cpu_seconds"] > 0
    assert found["factor_bytes"] == 4 * 6 * 16 * sum(map(sum, collection.shapes.values()))
    assert found["peak_resident_bytes"] > found["factor_bytes"]
    assert 0.5 < found["error"] < 1
    assert found["issued"]["float32"] > 0
