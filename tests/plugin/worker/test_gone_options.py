"""A store that was made with options of an earlier version is served as it is."""

import pytest
import torch

pytest.importorskip("vllm")

from tests.compressor.change.gone_options import old_store
from tests.plugin.conftest import HIDDEN, TinyModel
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.store import Store


def test_every_adapter_and_a_blend_get_all_their_rows(tmp_path, make_runner):
    store = Store.open(old_store(tmp_path / "store"))
    runner = make_runner(store, TinyModel(), max_blend=4).load()
    deltas = {
        name: {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}
        for name in store.names
    }
    first, second, third = store.names[:3]  # the second is kept as it was
    weights = {first: 0.7, second: -0.5, third: 0.3}
    blend = {m: sum(w * deltas[name][m] for name, w in weights.items()) for m in deltas[first]}
    requests = [adapter_request(store, name) for name in (*store.names, weights)]
    wanted = [*deltas.values(), blend, {}]
    x = torch.randn(len(wanted), HIDDEN, generator=torch.Generator().manual_seed(0))
    runner.begin([*requests, None])
    found = runner.model(x).double()
    for i, own in enumerate(wanted):
        expected = TinyModel().expected(x[i], own)
        assert float((found[i] - expected).norm() / expected.norm()) < 1e-4, i
