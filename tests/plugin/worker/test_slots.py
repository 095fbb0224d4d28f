"""Slots beyond which cores are paged, against a store that is resident as a whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.plugin.worker.layer_pools import SlotsOfOneLayer, layer_pools
from tests.plugin.worker.test_layer import FakeLayer, dense
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.worker.layer import Slice, Step, Target
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.store import Store
from vllm_jd.store.quantise import code_width, dequantise, quantise

N, COUNT = 12, 4

METHODS = {
    "full": Settings(rank=3, clusters=2, store_dtype="float32"),
    "diagonal": Settings(method="jd-diag", rank=3, store_dtype="float32"),
    "private": Settings(method="svd", rank=2, store_dtype="float32"),
    "own rows": Settings(rank=3, store_dtype="float32"),
    "int8": Settings(rank=3, clusters=2, store_dtype="int8"),
}
ROWS = {"own rows": {"own": 1}}


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("slots")
    write_adapters(folder / "adapters", N, kind="random")
    collection = read_adapters([folder / "adapters"])
    rows = ROWS.get(request.param, {})
    return compress(collection, folder / "store", METHODS[request.param], **rows)


def packed(store):
    """The modules of one layer's q and k."""
    return [m for m in store.manifest.modules if "layers.0." in m.name]


def made(store, count):
    modules = packed(store)
    layer = FakeLayer(modules[0].d_in, tuple(module.d_out for module in modules))
    slices = [Slice(module.name, module) for module in modules]
    step = Step(torch.full((8,), -1, dtype=torch.int32), active=True)
    pools, slots = layer_pools(store, layer, slices, step, max_loras=1, max_rank=2, count=count)
    return pools, slots, step


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=COUNT), max_size=12))
def test_every_step_adds_what_a_resident_store_adds(store, steps):
    whole, _, whole_step = made(store, N)
    paged, slots, step = made(store, COUNT)
    assert slots.paged and slots.count_of_store == COUNT
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


def test_one_too_many_waits_and_puts_nobody_out(store):
    _, slots, _ = made(store, COUNT)
    before = slots.take([0, 1])
    assert sorted(slots.take([0, 1, 2, 3, 4])) == [0, 1, 2, 3]
    assert slots.take([0, 1]) == before


def test_an_uncompressed_adapter_keeps_its_place_while_slots_change_hands(store):
    pools, slots, step = made(store, COUNT)
    modules = packed(store)
    pairs = [(torch.randn(2, m.d_in), torch.randn(m.d_out, 2)) for m in modules]
    pools.set_adapter(0, pairs)
    for adapter in range(N):
        slots.take([adapter])
    step.token_slots[0] = slots.count_of_store
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
        shard = next(s for s in opened.manifest.core_shards if 0 <= index - s.first < s.adapters)
        data = (opened.folder / shard.file).read_bytes()
        found = b"".join(data[offset : offset + size] for _, offset, size, _ in asked)
        with safe_open(opened.folder / shard.file, "pt") as file:
            order = sorted(file.keys(), key=lambda key: data.index(f'"{key}"'.encode()))
            rows = [file.get_tensor(key)[index - shard.first] for key in order]
        assert found == b"".join(
            row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows
        )


@pytest.mark.parametrize("order", [[1, 3, 2], [2, 0, 1, 3], [3, 2, 1], [0, 1, 2], [0]])
def test_adapters_go_to_the_slots_that_they_are_given_in_any_order(store, order):
    """First and last of some of these are as far apart as in a run, and they are none."""
    _, slots, _ = made(store, N)
    adapters = [5, 8, 0, 11][: len(order)]
    expected = {
        slot: slots._rows_of(slots.source, [adapter], [slot])[0]
        for slot, adapter in zip(order, adapters, strict=True)
    }
    before = slots.rows.clone()
    slots.fill_adapters(slots.source, adapters, order)
    for slot in range(N):
        wanted = torch.from_numpy(expected[slot]) if slot in expected else before[slot]
        assert torch.equal(slots.rows[slot], wanted)


def test_keys_put_those_of_one_basis_side_by_side(store):
    _, slots, _ = made(store, N)
    chosen = store.chosen[:, 0, 0].tolist()
    order = [chosen[slot] for slot in np.argsort(slots.keys[:N])]
    assert sum(a != b for a, b in zip([None, *order], order, strict=False)) == len(set(chosen))


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


# ---------------------------------------------------------------- cores that stay codes

BF16, CPU = torch.bfloat16, torch.device("cpu")
ODD = {f"model.layers.{i}.self_attn.{name}": (24, 24) for i in range(3) for name in "qkv"}


class SideBySide:
    """A store as the format allows it: cores of 25 entries without gaps, which share blocks of 32,
    in rows of an odd length."""

    def __init__(self, store):
        self._store = store
        modules = [
            module.model_copy(update={"core_offset": 25 * i, "core_size": 25})
            for i, module in enumerate(store.manifest.modules)
        ]
        self.manifest = store.manifest.model_copy(update={"modules": modules, "core_row": 225})
        self.chosen, self.dtype, self.path = store.chosen, store.dtype, store.path
        parts = [m.core_offset for m in store.manifest.modules]
        numbers = torch.cat([store.cores(0, N)[:, i : i + 25] for i in parts], dim=1)
        self._codes = quantise(numbers, store.manifest.quantised)

    def __len__(self):
        return N

    def rows(self, name):
        return self._store.rows(name)

    def core_codes(self, first, last):
        return tuple(each[first:last] for each in self._codes)

    def cores(self, first, last):
        return dequantise(*self.core_codes(first, last), 225).to(BF16)


@pytest.fixture(scope="module", params=["int8", "int4", "int8 side by side", "int4 side by side"])
def quantised(request, tmp_path_factory, write_adapters):
    kind, *packed = request.param.split(" ", 1)
    folder = tmp_path_factory.mktemp("quantised")
    write_adapters(folder / "adapters", N, kind="real", shapes=ODD)
    settings = Settings(rank=5, clusters=2, store_dtype=kind)
    store = compress(read_adapters([folder / "adapters"]), folder / "store", settings)
    return SideBySide(store) if packed else store


class CoresOnly:
    """A layer that has a place for rows, and no basis slots to speak of."""

    adapted = True
    experts = None

    def __init__(self, store, columns):
        self.slices = [Slice(str(column), store.manifest.modules[column]) for column in columns]
        address = np.zeros(N, dtype=np.int64)
        self.targets = [Target(s, address, address, address) for s in range(len(columns))]
        self.rows = len(columns)

    def attach(self, cores, rows, core_steps, long_rows):
        self.attached = cores, rows, core_steps, long_rows

    def put(self, store, side, s, module, spans):
        pass


def slots_of(store, columns, *, count=N, dtype=BF16):
    tables = Tables(store)
    config = PluginConfig(store="s", max_loras=1, core_slots=count)
    capacity = capacity_of(
        store, tables, config, max_num_seqs=1, max_lora_rank=4, in_codes=keeps_codes(store, dtype)
    )
    capacity = replace(capacity, cores=count, uploads={"v": SlotClass(4, 0, 0)})
    like = {"dtype": dtype, "device": CPU}
    layers = [CoresOnly(store, columns)]
    return SlotsOfOneLayer(store, tables, layers, capacity, uploads=0, **like)


def core_in(slots, slot, slice_, size=25):
    """The numbers that a slot's row of indices finds for one slice."""
    _, _, _, _, _, core_slot, offset = slots.rows[slot, slice_, 0].tolist()
    row = slice(core_slot, core_slot + 1)
    cores = slots.cores[row]
    if slots.core_steps is not None:
        width = cores.shape[1] * (2 if cores.dtype == torch.uint8 else 1)
        cores = dequantise(cores, slots.core_steps[row], width).to(BF16)
    return cores[0, offset : offset + size]


def test_the_stores_codes_are_kept(quantised):
    slots = slots_of(quantised, list(range(9)))
    codes, steps = quantised.core_codes(0, N)
    assert torch.equal(slots.cores, codes) and torch.equal(slots.core_steps, steps)
    row, kind = quantised.manifest.core_row, quantised.manifest.quantised
    assert codes.shape == (N, code_width(row, kind))
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    decoded = dequantise(codes, steps, row).to(BF16)
    assert torch.equal(decoded, quantised.cores(0, N))
    for adapter in (0, N - 1):
        for column, module in enumerate(quantised.manifest.modules):
            expected = decoded[adapter, module.core_offset : module.core_offset + 25]
            assert torch.equal(core_in(slots, adapter, column), expected)


@pytest.mark.parametrize("why", ["another dtype", "not quantised"])
def test_else_they_are_decoded(quantised, why, tmp_path, write_adapters):
    store = quantised
    if why == "not quantised":
        write_adapters(tmp_path / "adapters", N, shapes=ODD)
        store = compress(
            read_adapters([tmp_path / "adapters"]), tmp_path / "store", Settings(rank=5)
        )
    dtype = torch.float32 if why == "another dtype" else BF16
    assert not keeps_codes(store, dtype)
    slots = slots_of(store, list(range(9)), dtype=dtype)
    assert slots.core_steps is None
    assert torch.equal(slots.cores, store.cores(0, N).to(dtype))


@pytest.mark.parametrize("columns", [[0, 1, 2], [3, 4, 5], [7], [2, 3, 6, 8]], ids=str)
def test_a_stage_holds_the_blocks_of_its_own_layers(quantised, columns):
    slots = slots_of(quantised, columns)
    modules = [quantised.manifest.modules[column] for column in columns]
    blocks = {i // 32 for m in modules for i in range(m.core_offset, m.core_offset + 25)}
    assert slots.core_steps.shape == (N, len(blocks))
    assert len(blocks) < quantised.core_codes(0, 1)[1].shape[1]
    per_block = 32 if quantised.manifest.quantised == "int8" else 16
    assert slots.cores.shape[1] <= len(blocks) * per_block
    cores = quantised.cores(0, N)
    for adapter in range(N):
        for j, module in enumerate(modules):
            expected = cores[adapter, module.core_offset : module.core_offset + 25]
            assert torch.equal(core_in(slots, adapter, j), expected)


@pytest.mark.parametrize("columns", [list(range(9)), [4, 5]], ids=["whole", "a stage"])
def test_codes_are_paged(quantised, columns):
    slots = slots_of(quantised, columns, count=COUNT)
    cores = quantised.cores(0, N)
    for adapters in ([0, 5, 6, 11], [5, 6], [7, 8, 1], [0, 1, 2, 3]):
        for adapter, slot in slots.take(adapters).items():
            for j, column in enumerate(columns):
                offset = quantised.manifest.modules[column].core_offset
                assert torch.equal(core_in(slots, slot, j), cores[adapter, offset : offset + 25])
    assert slots.paged and slots.reads > 2 * COUNT


def test_only_a_quantised_store_has_codes(store):
    if store.manifest.quantised is None:
        with pytest.raises(ValueError, match=r"cores are float32, not quantised"):
            store.core_codes(0, 1)
        return
    codes, steps = store.core_codes(5, 5)
    row = store.manifest.core_row
    assert codes.shape == (0, row) and steps.shape == (0, row // 32)


def test_a_gibibyte_has_room_for_more_codes(quantised, monkeypatch):
    config = PluginConfig(store=str(quantised.path), max_loras=1)
    room = {"max_lora_rank": 4, "config": config}
    tables = Tables(quantised)
    rows = 9 * 7 * 4  # of what a slot takes, its rows in the pools

    def cores(most, **how):
        return capacity_of(quantised, tables, max_num_seqs=most, **room, **how).cores - 1

    numbers = quantised.cores(0, 1).nbytes + rows
    codes = sum(each.nbytes for each in quantised.core_codes(0, 1)) + rows
    monkeypatch.setattr("vllm_jd.plugin.engine.capacity._CORE_BYTES", 5 * codes)
    assert cores(1, in_codes=False) == 5 * codes // numbers < 5
    assert cores(1, in_codes=True) == 5
    assert cores(11, in_codes=True) == 11
