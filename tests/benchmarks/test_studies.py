"""The smaller studies: what they compare is what they say it is."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import born_in_store
import privacy
import studies

from vllm_jd.compressor import read_adapters
from vllm_jd.compressor.choose.model import beside


@pytest.fixture
def folders(tmp_path, write_adapters):
    return write_adapters(tmp_path / "in", 6, kind="real", ranks=(2, 4))


def values(factors, i):
    own = factors.subset(torch.tensor([i]))
    return torch.linalg.svdvals(own.b.T.double() @ own.a.double())


def test_turned_adapters_have_their_singular_values_and_no_direction_in_common(folders):
    collection = read_adapters(folders)
    module = next(iter(collection.shapes))
    trained = collection.factors(module)
    turned = studies.turned(trained, torch.Generator().manual_seed(0))
    assert turned.ranks.tolist() == trained.ranks.tolist()
    for i in range(6):
        torch.testing.assert_close(values(turned, i), values(trained, i), rtol=1e-4, atol=1e-5)
    kept = {
        kind: studies.lost(f, *studies.jd_full(f, 4)).mean()
        for kind, f in (("turned", turned.normalised()[0]), ("own", trained.normalised()[0]))
    }
    assert kept["own"] < kept["turned"] - 0.05


def test_every_study_is_made_once(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(studies, "RANKS", (2, 4))
    monkeypatch.setattr(studies, "SCOPES", ((2, 2), (99, 2)))
    monkeypatch.setattr(studies, "MOST_ITERATIONS", (1, 8))
    monkeypatch.setattr(studies, "STEPS", 3)
    studies.main(folders, out, seed=0, base_model="org/tiny-llama")
    found = json.loads(out.read_text())
    for row in found["random"]:
        assert 0 < row["trained"] < row["spectra"] <= row["random"] + 0.02 < 1.03
    assert [row["adapters"] for row in found["random"]] == [4, 4, 6, 6]
    for few, many in zip(found["convergence"][::2], found["convergence"][1::2], strict=True):
        assert 0 < many["error"] <= few["error"] + 1e-4
    (scope,) = found["scope"]
    assert abs(scope["adapter"] - scope["module"]) < 0.2
    assert [row["matrices"] for row in found["dial"]] == [1, 2, 3, 4, 6]
    assert found["dial"][0]["bytes"] < found["dial"][-1]["bytes"]
    assert "convergence" in capsys.readouterr().out
    monkeypatch.setattr(studies, "STUDIES", dict.fromkeys(studies.STUDIES))
    studies.main(folders, out, seed=0, base_model="org/tiny-llama")
    assert json.loads(out.read_text()) == found


def test_deltas_beside_a_layer_are_added_to_what_it_says():
    layer = torch.nn.Linear(5, 3)
    b, a, x = torch.randn(3, 2), torch.randn(2, 5), torch.randn(4, 5)
    with beside(born_in_store.deltas({"m": layer}, {"m": (b, a)})):
        torch.testing.assert_close(layer(x), x @ (layer.weight + b @ a).T + layer.bias)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_of_a_shuffled_adapter_the_values_stay_and_the_others_are_as_they_were(folders):
    collection = read_adapters(folders)
    shuffled = privacy.Shuffled(collection, 2, seed=0)
    for module in collection.shapes:
        own, other = (each.factors(module) for each in (collection, shuffled))
        for i in range(6):
            torch.testing.assert_close(values(other, i), values(own, i), rtol=1e-4, atol=1e-5)
            deltas = [f.per_adapter(f.b)[i].mT @ f.per_adapter(f.a)[i] for f in (own, other)]
            assert torch.equal(*deltas) == (i != 2)


def test_what_together_differs_by_is_told_by_task():
    rows = [
        {"of": of, "together": together, "shuffled": 2.0, "plain": 3.0}
        for of, together in (("a", 1.0), ("a", 1.5), ("b", 2.5))
    ]
    mean, low, high, fewer = privacy.difference(rows, "shuffled", 0)
    assert mean == pytest.approx((-0.75 + 0.5) / 2) and fewer == 2
    assert (low, high) == pytest.approx((-0.75, 0.5))
