"""What the quality study says of numbers, against dense float64 formulas."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import quality_errors

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_adapters):
    return write_adapters(tmp_path_factory.mktemp("adapters"), 5, kind="real", ranks=(4, 2))


def dense(factors):
    return {module: b.double() @ a.double() for module, (b, a) in factors.items()}


def test_against_dense_matrices(folders, peft_deltas, tmp_path):
    collection = read_adapters(folders)
    real = [peft_deltas(folder) for folder in folders]
    mean = {module: sum(each[module] for each in real) / len(real) for module in collection.shapes}
    with compress(collection, tmp_path / "store", Settings(rank=3)) as store:
        found = quality_errors.Judge(collection).errors(store)
        for folder, own in zip(folders, real, strict=True):
            kept = dense(store.factors(folder.name))
            lost = {module: own[module] - kept[module] for module in own}
            relative, beyond = [], []
            for module, delta in own.items():
                relative.append(lost[module].square().sum() / delta.square().sum())
                common = mean[module] / mean[module].norm()
                rest = delta - (delta * common).sum() * common
                beyond.append(lost[module].square().sum() / rest.square().sum())
            expected = {
                "error": sum(relative) / len(relative),
                "worst": max(relative),
                "energy": sum(d.square().sum() for d in lost.values())
                / sum(d.square().sum() for d in own.values()),
                "beyond": sum(beyond) / len(beyond),
            }
            assert set(found[folder.name]) == set(quality_errors.NAMES)
            for name, value in expected.items():
                assert found[folder.name][name] == pytest.approx(float(value), rel=1e-4), name
            assert found[folder.name]["error"] > 0.01


def test_one_that_only_has_the_mean_keeps_nothing_beyond_it(folders, tmp_path):
    collection = read_adapters(folders[::2])  # of one rank
    settings = Settings(method="none", store_dtype="float32")
    with compress(collection, tmp_path / "store", settings) as store:
        exact = quality_errors.Judge(collection).errors(store)
        assert all(each["error"] < 1e-9 and each["beyond"] < 1e-9 for each in exact.values())
        own = {name: store.factors(name) for name in store.names}
    modules = {module: None for each in own.values() for module in each}
    n = len(own)
    means = {
        module: (
            torch.cat([each[module][0] / n for each in own.values()], dim=1),
            torch.cat([each[module][1] for each in own.values()]),
        )
        for module in modules
    }

    class Mean:
        def factors(self, name):
            # As much of the mean as is nearest to the adapter.
            found = {}
            for module, (b, a) in means.items():
                mean = b.double() @ a.double()
                delta = own[name][module][0].double() @ own[name][module][1].double()
                found[module] = (b * float((delta * mean).sum() / mean.square().sum()), a)
            return found

    found = quality_errors.Judge(collection).errors(Mean())
    for each in found.values():
        assert each["beyond"] == pytest.approx(1, rel=1e-4) and 0.05 < each["error"] < 1
