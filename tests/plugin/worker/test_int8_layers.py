"""LayerPools of quantised stores: bases stay in 8 bits, and are the numbers of the store."""

import json

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import save_file

from tests.plugin.worker.layer_pools import layer_pools
from tests.plugin.worker.test_layer import FakeLayer
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.kernels.cpu.packed import can_pack
from vllm_jd.plugin.worker import bases as layer_bases
from vllm_jd.plugin.worker.layer import Slice, Step

SHAPES = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 96), "o_proj": (128, 128)}
PREFIX = "model.layers.0.self_attn."
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """As where the CPU kernel does not take packed bases, and on other devices."""
    monkeypatch.setattr(layer_bases, "can_pack", lambda dtype: False)


@pytest.fixture
def adapters(tmp_path):
    generator = torch.Generator().manual_seed(5)
    for i in range(6):
        tensors = {}
        for name, (d_in, d_out) in SHAPES.items():
            key = f"base_model.model.{PREFIX}{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, d_in, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, 3, generator=generator)
        folder = tmp_path / "adapters" / f"a{i}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": 3, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapters([tmp_path / "adapters"])


@pytest.fixture(params=["int8", "int4"])
def store(request, adapters, tmp_path):
    settings = Settings(rank=8, clusters=2, store_dtype=request.param)
    return compress(adapters, tmp_path / "store", settings)


def build(store, names, cut=None, rank=0, size=1, dtype=DTYPE, n_tokens=8):
    """A layer with all adapters resident, the tokens' slots 0, 1, …, with one −1."""
    d_in = SHAPES[names[0]][0]
    layer = FakeLayer(d_in, tuple(SHAPES[name][1] for name in names), cut, rank, size)
    columns = {m.name: m for m in store.manifest.modules}
    slices = [Slice(PREFIX + name, columns[PREFIX + name]) for name in names]
    token_slots = torch.arange(n_tokens, dtype=torch.int32) - 1
    step = Step(token_slots, active=True)
    return layer_pools(store, layer, slices, step, max_loras=2, max_rank=4, dtype=dtype)[0]


def added(pools, x):
    y = torch.zeros(len(x), pools.pools.d_out, dtype=x.dtype)
    return pools.add_lora_linear(y, x)


def test_bases_stay_in_8_bits_and_are_the_stores_numbers(store):
    names = ["q_proj", "k_proj", "v_proj"]
    pools = build(store, names).pools
    bases = [store.bases(PREFIX + name) for name in names]
    assert pools.v.shape[0] == 3 * 2 * 4  # places for uploads only
    assert torch.equal(pools.v_int8.decode(DTYPE), torch.cat([b.v for b in bases]))
    for rows, floats, b in zip(pools.u_int8, pools.u, bases, strict=True):
        assert torch.equal(rows.decode(DTYPE), b.u)
        assert floats.shape[0] == 2 * 4


def test_each_token_gets_its_adapter_and_uploads_are_exact(store):
    names = ["q_proj", "k_proj", "v_proj"]
    layer = build(store, names)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 128, generator=generator).to(DTYPE)
    b = torch.randn(64, 4, generator=generator).to(DTYPE)
    layer.set_adapter(1, [None, (a, b), None])
    layer.step.token_slots[7] = len(store) + 1
    x = torch.randn(8, 128, generator=generator).to(DTYPE)
    y = added(layer, x).double()
    assert not y[0].any()
    for t in range(1, 7):
        factors = store.factors(store.names[t - 1])
        expected = torch.cat(
            [
                left.double() @ (right.double() @ x[t].double())
                for left, right in (factors[PREFIX + name] for name in names)
            ]
        )
        atol = 2**-8 * float(expected.abs().max())
        torch.testing.assert_close(y[t], expected, rtol=2**-7, atol=atol)
    expected = b.double() @ (a.double() @ x[7].double())
    torch.testing.assert_close(y[7, 128:192], expected, rtol=2**-8, atol=1e-5)
    assert not y[7, :128].any() and not y[7, 192:].any()


@pytest.mark.parametrize(
    ("cut", "names"), [("columns", ["q_proj", "k_proj"]), ("rows", ["o_proj"])]
)
def test_workers_parts_between_blocks_stay_in_8_bits(store, cut, names):
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    whole = added(build(store, names), x)
    workers = [build(store, names, cut, rank, 2) for rank in range(2)]
    assert all(worker.pools.v_int8 is not None for worker in workers)
    if cut == "rows":
        parts = [added(worker, x[:, 64 * r : 64 * r + 64]) for r, worker in enumerate(workers)]
        atol = 2**-7 * float(whole.abs().max())  # each part is rounded
        torch.testing.assert_close(sum(parts), whole, rtol=2**-7, atol=atol)
        return
    parts = [added(worker, x) for worker in workers]
    q = torch.cat([part[:, :64] for part in parts], dim=1)
    k = torch.cat([part[:, 64:] for part in parts], dim=1)
    assert torch.equal(torch.cat([q, k], dim=1), whole)


def test_a_cut_through_a_block_is_decoded(store):
    names = ["q_proj", "v_proj"]
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    workers = [build(store, names, "columns", rank, 2) for rank in range(2)]
    # v has 48 columns each: those of the second begin in the middle of a block.
    assert [worker.pools.v_int8 is None for worker in workers] == [False, True]
    parts = [added(worker, x) for worker in workers]
    q = torch.cat([part[:, :64] for part in parts], dim=1)
    v = torch.cat([part[:, 64:] for part in parts], dim=1)
    assert torch.equal(torch.cat([q, v], dim=1), added(build(store, names), x))


def test_another_dtype_than_the_stores_is_decoded(store):
    """Rounded twice, as its export is, and not once."""
    pools = build(store, ["o_proj"], dtype=torch.float32).pools
    assert pools.v_int8 is None
    bases = store.bases(PREFIX + "o_proj")
    assert torch.equal(pools.v[: len(bases.v)], bases.v.float())


@pytest.mark.skipif(not can_pack(DTYPE), reason="needs a processor with AVX512-BF16")
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16"])
def test_packed_for_the_cpu_it_adds_the_same(adapters, tmp_path, monkeypatch, kind):
    store = compress(adapters, tmp_path / "s", Settings(rank=8, clusters=2, store_dtype=kind))
    names = ["q_proj", "k_proj", "v_proj"]
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).to(DTYPE)
    a, b = torch.randn(3, 128).to(DTYPE), torch.randn(64, 3).to(DTYPE)
    results = []
    for packed in (False, True):
        monkeypatch.setattr(layer_bases, "can_pack", lambda dtype, packed=packed: packed)
        layer = build(store, names)
        assert (layer.pools.packed is not None) is packed
        layer.set_adapter(0, [None, (a, b), None])
        layer.step.token_slots[7] = len(store)
        results.append(added(layer, x))
    if kind == "bfloat16":
        assert torch.equal(results[0], results[1])
    else:  # not rounded to bfloat16 before it multiplies
        assert layer.pools.packed.dtype == torch.uint8
        atol = 2**-7 * float(results[0].abs().max())
        torch.testing.assert_close(results[0], results[1], rtol=2**-6, atol=atol)
        assert torch.equal(results[0][7], results[1][7])


def test_a_layer_that_the_store_leaves_alone_takes_uploads(store):
    layer = FakeLayer(128, (96,))
    step = Step(torch.full((2,), len(store), dtype=torch.int32), active=True)
    slices = [Slice(PREFIX + "other_proj", None)]
    pools, _ = layer_pools(store, layer, slices, step, max_loras=2, max_rank=4, dtype=DTYPE)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 128, generator=generator).to(DTYPE)
    b = torch.randn(96, 2, generator=generator).to(DTYPE)
    pools.set_adapter(0, [(a, b)])
    x = torch.randn(2, 128, generator=generator).to(DTYPE)
    expected = (b.double() @ (a.double() @ x.double().T)).T
    torch.testing.assert_close(added(pools, x).double(), expected, rtol=2**-8, atol=1e-5)
