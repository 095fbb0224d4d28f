"""Quantised stores on the Triton backend, in its interpreter: cores stay codes up to the kernels.

Triton decides at its own import whether it interprets: this file runs itself in a process of its
own for that.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from tests.plugin.worker.layer_pools import layer_pools
from tests.plugin.worker.test_layer import FakeLayer
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.kernels import Int8Rows, reference
from vllm_jd.plugin.worker.layer import Slice, Step

INTERPRETED = {"VLLM_JD_KERNEL": "triton", "TRITON_INTERPRET": "1"}
IS_INTERPRETED = all(os.environ.get(name) == value for name, value in INTERPRETED.items())
interpreted = pytest.mark.skipif(
    not IS_INTERPRETED, reason="runs in a process of its own: test_in_the_interpreter"
)
PREFIX = "model.layers.0.self_attn."
SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 40)}
DTYPE = torch.bfloat16
N, COUNT = 9, 4


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the process of its own")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | INTERPRETED,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert sorted(done.stdout.split()[0]) == [*"......", "s"], done.stdout


@pytest.fixture(scope="module", params=["int8", "int4"])
def store(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("quantised")
    shapes = {PREFIX + name: shape for name, shape in SHAPES.items()}
    write_adapters(folder / "adapters", N, kind="real", shapes=shapes)
    settings = Settings(rank=13, clusters=2, store_dtype=request.param)
    return compress(read_adapters([folder / "adapters"]), folder / "store", settings, own=1)


def layer_of(store, *, count=N, dtype=DTYPE):
    """(LayerPools of q, k, v, its Slots, the tokens' slots)."""
    columns = {m.name: m for m in store.manifest.modules}
    slices = [Slice(PREFIX + name, columns[PREFIX + name]) for name in SHAPES]
    layer = FakeLayer(64, tuple(d_out for _, d_out in SHAPES.values()))
    token_slots = torch.full((8,), -1, dtype=torch.int32)
    step = Step(token_slots, active=True)
    room = {"max_loras": 1, "max_rank": 4, "count": count, "dtype": dtype}
    return *layer_pools(store, layer, slices, step, **room), token_slots


def expected(store, adapter, x):
    """(What the store says that an adapter adds to one token `[d_in]`, its size), float64."""
    factors = store.factors(store.names[adapter])
    parts = [factors[PREFIX + name] for name in SHAPES]
    exact = [b.double() @ (a.double() @ x.double()) for b, a in parts]
    sizes = [b.double().abs() @ (a.double().abs() @ x.double().abs()) for b, a in parts]
    return torch.cat(exact), torch.cat(sizes)


@interpreted
@pytest.mark.parametrize("count", [N, 4], ids=["resident", "paged"])
def test_each_token_gets_its_adapter(store, count):
    layer, slots, token_slots = layer_of(store, count=count)
    kind = store.manifest.quantised
    assert slots.cores.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert layer.pools.core_bits == (8 if kind == "int8" else 4)
    assert isinstance(layer.pools.v_int8, Int8Rows)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    a, b = a.to(DTYPE), b.to(DTYPE)
    layer.set_adapter(0, [(a, b), None, None])
    for adapters in ([8, 0, 3, 1], [2, 7, 8, 3]):
        taken = slots.take(adapters)
        token_slots[:6] = torch.tensor([-1, *(taken[i] for i in adapters), count])
        x = torch.randn(6, 64, generator=generator).to(DTYPE)
        y = layer.add_lora_linear(torch.zeros(6, 136, dtype=DTYPE), x).double()
        other = torch.zeros(6, 136, dtype=DTYPE)
        reference.add_adapters(other, x, layer.pools, token_slots)
        assert not y[0].any()
        for t, adapter in enumerate(adapters, start=1):
            exact, size = expected(store, adapter, x[t])
            # y is rounded once; `factors` folds the core into B in float32.
            bound = 2**-8 * exact.abs() + 4e-5 * size
            assert ((y[t] - exact).abs() <= bound).all()
            assert ((other[t].double() - exact).abs() <= bound).all()
        upload = b.double() @ (a.double() @ x[5].double())
        torch.testing.assert_close(y[5, :64], upload, rtol=2**-7, atol=1e-3)
        assert not y[5, 64:].any()


@interpreted
def test_in_another_dtype_than_the_stores_they_are_decoded(store):
    layer, slots, token_slots = layer_of(store, dtype=torch.float32)
    assert slots.core_steps is None and slots.cores.dtype == torch.float32
    token_slots[:2] = torch.tensor([5, 2])
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    y = layer.add_lora_linear(torch.zeros(2, 136), x).double()
    for t, adapter in enumerate([5, 2]):
        exact, size = expected(store, adapter, x[t])
        assert ((y[t] - exact).abs() <= 1e-5 * size).all()
