"""Slots beyond which cores are paged, against a store that is resident as a whole."""

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.plugin.layer_pools import layer_pools
from tests.plugin.test_layers import FakeLayer, dense
from vllm_jd.compressor import Settings, compress, read_adapters
from vllm_jd.plugin.layers import Slice, Step
from vllm_jd.store import Store

N, COUNT = 12, 4

METHODS = {
    "full": Settings(rank=3, clusters=2, store_dtype="float32"),
    "diagonal": Settings(method="jd-diag", rank=3, store_dtype="float32"),
    "private": Settings(method="svd", rank=2, store_dtype="float32"),
    "residual": Settings(rank=3, residual_rank=1, store_dtype="float32"),
    "int8": Settings(rank=3, clusters=2, store_dtype="int8"),
}


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("slots")
    write_adapters(folder / "adapters", N, kind="random")
    collection = read_adapters([folder / "adapters"])
    return compress(collection, folder / "store", METHODS[request.param])


def packed(store):
    """The modules of one layer's q and k."""
    return [m for m in store.manifest.modules if "layers.0." in m.name]


def made(store, count):
    modules = packed(store)
    layer = FakeLayer(modules[0].d_in, tuple(module.d_out for module in modules))
    slices = [Slice(module.name, store.module_index(module.name)) for module in modules]
    step = Step(torch.full((8,), -1, dtype=torch.int32), active=True)
    pools, slots = layer_pools(store, layer, slices, step, max_loras=1, max_rank=2, count=count)
    return pools, slots, step


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=COUNT), max_size=12))
def test_every_step_adds_what_a_resident_store_adds(store, steps):
    whole, _, whole_step = made(store, N)
    paged, slots, step = made(store, COUNT)
    assert slots.paged and slots.count == COUNT
    generator = torch.Generator().manual_seed(0)
    last_used = {}
    for now, adapters in enumerate(steps):
        taken = slots.take(adapters)
        assert sorted(taken) == sorted(set(adapters))
        assert len(set(taken.values())) == len(taken), "each its own slot"
        for adapter in adapters:
            last_used[adapter] = now
        recent = sorted(last_used, key=last_used.get, reverse=True)[: len(set(adapters))]
        assert all(slots.resident(adapter) for adapter in recent)
        assert sum(slots.resident(adapter) for adapter in range(N)) <= COUNT
        x = torch.randn(len(adapters), whole.pools.d_in, generator=generator)
        step.token_slots[: len(adapters)] = torch.tensor([taken[a] for a in adapters])
        whole_step.token_slots[: len(adapters)] = torch.tensor(adapters)
        y, expected = (torch.zeros(len(adapters), whole.pools.d_out) for _ in range(2))
        paged.add(y, x)
        whole.add(expected, x)
        assert torch.equal(y, expected)


def test_the_least_recently_used_slot_is_taken_and_only_then_is_a_core_read(store):
    _, slots, _ = made(store, COUNT)
    assert slots.reads == 0
    for adapters in ([0, 1], [2, 3], [0], [4]):
        slots.take(adapters)
    assert [slots.resident(i) for i in range(5)] == [True, False, True, True, True]
    assert slots.reads == 5
    slots.take([0, 2, 3, 4])
    assert slots.reads == 5


def test_a_step_with_too_many_adapters_is_refused_whole(store):
    _, slots, _ = made(store, COUNT)
    before = slots.take([0, 1])
    with pytest.raises(ValueError, match=r"5 distinct adapters.*4 slots.*--core-slots"):
        slots.take(range(5))
    assert slots.take([0, 1]) == before


def test_an_uncompressed_adapter_keeps_its_place_while_slots_change_hands(store):
    pools, slots, step = made(store, COUNT)
    modules = packed(store)
    pairs = [(torch.randn(2, m.d_in), torch.randn(m.d_out, 2)) for m in modules]
    pools.set_adapter(0, pairs)
    for adapter in range(N):
        slots.take([adapter])
    step.token_slots[0] = slots.count
    x, y = torch.randn(1, pools.pools.d_in), torch.zeros(1, pools.pools.d_out)
    pools.add(y, x)
    expected = torch.cat([b @ (a @ x[0]) for a, b in pairs])
    torch.testing.assert_close(y[0], expected, rtol=1e-4, atol=1e-4)


def test_prefetch_names_the_bytes_of_the_core_and_no_others(store, monkeypatch):
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda *args: asked.append(args))
    opened = Store.open(store.path)
    for index in (0, N - 1):
        asked.clear()
        opened.prefetch(index)
        if not opened.manifest.core_row:
            assert not asked
            continue
        shard = next(s for s in opened.manifest.core_shards if 0 <= index - s.first < s.rows)
        data = (opened.folder / shard.file).read_bytes()
        found = b"".join(data[offset : offset + size] for _, offset, size, _ in asked)
        with safe_open(opened.folder / shard.file, "pt") as file:
            order = sorted(file.keys(), key=lambda key: data.index(f'"{key}"'.encode()))
            rows = [file.get_tensor(key)[index - shard.first] for key in order]
        assert found == b"".join(
            row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows
        )


def test_a_dense_reference_agrees(store):
    pools, slots, step = made(store, COUNT)
    adapters = [7, 2, 11]
    taken = slots.take(adapters)
    step.token_slots[:3] = torch.tensor([taken[a] for a in adapters])
    x, y = torch.randn(3, pools.pools.d_in), torch.zeros(3, pools.pools.d_out)
    pools.add(y, x)
    for t, adapter in enumerate(adapters):
        delta = torch.cat([dense(store, adapter, m.name) for m in packed(store)])
        torch.testing.assert_close(y[t].double(), delta @ x[t].double(), rtol=1e-4, atol=1e-4)
