"""Fully sharded layers: workers in threads, their collectives in memory, against dense float64."""

import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from tests.plugin.worker.layer_pools import layer_pools
from tests.plugin.worker.test_layer import FakeLayer
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.worker import sharded
from vllm_jd.plugin.worker.layer import Slice, Step

N, MAX_RANK = 7, 5
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (128, 64),
    "self_attn.v_proj": (128, 96),
    "self_attn.o_proj": (128, 150),
}
COLUMN, ROW = [*list(SHAPES)[:3]], ["self_attn.o_proj"]
METHODS = {
    "full": Settings(rank=13, clusters=2),
    "diagonal": Settings(method="jd-diag", rank=13),
    "no core": Settings(method="svd", rank=3),
    "own rows": Settings(rank=4, clusters=2),
    "several rows": Settings(rank=4),
    "output scales": Settings(method="hydraopt", matrices=2, steps=20),
}
ROWS = {"own rows": {"own": 1}, "several rows": {"own": 1, "mean": 2}}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("sharded")
    return read_adapters(write_adapters(folder / "adapters", N, shapes=SHAPES, ranks=(4, 3)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, adapters):
    made = {}

    def store(method, dtype):
        if (method, dtype) not in made:
            folder = tmp_path_factory.mktemp("store") / "s"
            settings = replace(METHODS[method], store_dtype=dtype)
            made[method, dtype] = compress(adapters, folder, settings, **ROWS.get(method, {}))
        return made[method, dtype]

    return store


class Workers:
    """Layers of one worker each, and what they say to each other."""

    def __init__(self, store, names, size, monkeypatch, dtype=torch.float32, count=None):
        self.size, self.names, self.calls = size, names, []
        self._rank, self._sent = threading.local(), [None] * size
        self._barrier = threading.Barrier(size, timeout=60)
        self._turn = threading.Lock()  # one computes at a time: Triton's interpreter wants it so
        monkeypatch.setattr(sharded, "tensor_model_parallel_all_gather", self.gather)
        monkeypatch.setattr(sharded, "tensor_model_parallel_all_reduce", self.reduce)
        widths = tuple(SHAPES[name][1] for name in names)
        self.parallel = "row" if names == ROW else "column"
        self.step = Step(torch.full((16,), -1, dtype=torch.int32), active=True)
        slices = [Slice(name, store.manifest.modules[store.module_index(name)]) for name in names]
        self.layers, self.slots = [], []
        for rank in range(size):
            layer = FakeLayer(128, widths, f"{self.parallel}s", rank, size)
            made, slots = layer_pools(
                store,
                layer,
                slices,
                self.step,
                max_loras=2,
                max_rank=MAX_RANK,
                dtype=dtype,
                sharded=self.parallel,
                count=count,
            )
            self.layers.append(made)
            self.slots.append(slots)

    def _all(self, z):
        self._sent[self._rank.value] = z
        self._turn.release()
        self._barrier.wait()
        found = list(self._sent)
        self._barrier.wait()
        self._turn.acquire()
        return found

    def gather(self, z):
        self.calls.append(("gather", z.shape))
        return torch.cat(self._all(z), dim=-1)

    def reduce(self, z):
        self.calls.append(("reduce", z.shape))
        return sum(self._all(z))

    def add(self, x, y):
        """y with what all workers add, each in a thread, put together as the layer does."""
        parts = [None] * self.size

        def work(rank):
            self._rank.value = rank
            layer, width = self.layers[rank], 128 // self.size
            if self.parallel == "row":
                mine = (y if rank == 0 else torch.zeros_like(y)).clone()
                part = x[:, rank * width : (rank + 1) * width].contiguous()
            else:
                pieces = y.split([SHAPES[name][1] for name in self.names], 1)
                mine = torch.cat([piece.chunk(self.size, 1)[rank] for piece in pieces], 1)
                part = x
            with self._turn:
                parts[rank] = layer.add_lora_linear(mine, part)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.parallel == "row":
            return sum(parts)
        widths = [SHAPES[name][1] // self.size for name in self.names]
        pieces = zip(*(part.split(widths, 1) for part in parts), strict=True)
        return torch.cat([piece for its in pieces for piece in its], dim=1)


def uploads(names, generator):
    """Two adapters of ranks 5 and 1; the second leaves the last slice out, where there are more."""
    made = []
    for rank in (MAX_RANK, 1):
        pairs = [
            (
                torch.randn(rank, SHAPES[n][0], generator=generator) / 11,
                torch.randn(SHAPES[n][1], rank, generator=generator),
            )
            for n in names
        ]
        made.append(pairs)
    if len(names) > 1:
        made[1][-1] = None
    return made


def deltas(store, names, uploaded):
    """Dense float64 deltas of all slots."""
    found = []
    for name in store.names:
        factors = store.factors(name)
        found.append(torch.cat([factors[n][0].double() @ factors[n][1].double() for n in names]))
    for pairs in uploaded:
        found.append(
            torch.cat(
                [
                    torch.zeros(SHAPES[n][1], SHAPES[n][0], dtype=torch.float64)
                    if pair is None
                    else pair[1].double() @ pair[0].double()
                    for n, pair in zip(names, pairs, strict=True)
                ]
            )
        )
    return torch.stack(found)


def check(store, names, size, monkeypatch, dtype, bound):
    generator = torch.Generator().manual_seed(size)
    workers = Workers(store, names, size, monkeypatch, dtype)
    uploaded = [
        [pair and tuple(each.to(dtype) for each in pair) for pair in pairs]
        for pairs in uploads(names, generator)
    ]
    for place, pairs in enumerate(uploaded):
        for layer in workers.layers:
            layer.set_adapter(place, pairs)
    slots = torch.tensor([*range(N + 2), -1, 3, 0, N], dtype=torch.int32)
    workers.step.token_slots[: len(slots)] = slots
    x = torch.randn(len(slots), 128, generator=generator).to(dtype)
    y = torch.randn(len(slots), sum(SHAPES[n][1] for n in names), generator=generator).to(dtype)
    found = workers.add(x, y.clone())
    expected, dense = y.double(), deltas(store, names, uploaded)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[t] += dense[slot] @ x[t].double()
    assert torch.equal(found[N + 2], y[N + 2]), "the base model's token changed"
    errors = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors[slots >= 0].max()) < bound
    return workers


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("names", [COLUMN, ["self_attn.q_proj"], ROW], ids=["q k v", "q", "o"])
@pytest.mark.parametrize("method", METHODS)
def test_the_workers_together_add_each_tokens_adapter(stores, method, names, size, monkeypatch):
    store = stores(method, "float32")
    workers = check(store, names, size, monkeypatch, torch.float32, 1e-5)
    kind = "reduce" if names == ROW else "gather"
    assert [call[0] for call in workers.calls] == [kind] * size
    assert len(set(workers.calls)) == 1, "all workers send as much"
    # Nothing of V or U is whole anywhere, and together they are the whole.
    modules = [store.manifest.modules[store.module_index(name)] for name in names]
    for worker in workers.layers:
        second = worker._products[1]
        assert all(
            u.shape[1] < module.d_out for u, module in zip(second.pools.u, modules, strict=True)
        )
    held = [worker._products[0].pools for worker in workers.layers]
    share = 1 if names == ROW else size
    room = 2 * -(-MAX_RANK // share) * len(names)
    if names == ROW:
        assert all(pools.v.shape[1] * size == 128 for pools in held)
    else:
        # Slots of a rank that the workers do not divide have room for one vector more on each.
        vectors = [pools.v.shape[0] - room for pools in held]
        whole = sum(module.v_vectors for module in modules)
        bases = sum(int(r > 0) for r in Tables(store).ranks["v"]) * len(names)
        assert whole <= sum(vectors) <= whole + bases * (size - 1)


@pytest.mark.parametrize("form", ["rows", "8 bits"])
@pytest.mark.parametrize("names", [COLUMN, ROW], ids=["q k v", "o"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_form_of_the_bases(stores, form, names, size, monkeypatch):
    store = stores("own rows", "int8" if form == "8 bits" else "bfloat16")
    if form == "rows":  # the same numbers in float32: what is left below is rounding
        check(store, names, size, monkeypatch, torch.float32, 1e-5)
    # z and the parts of y are rounded to bfloat16: ten times as much where what an adapter's rows
    # add cancels in z.
    workers = check(store, names, size, monkeypatch, torch.bfloat16, 0.05)
    kept = [layer.pools.u_int8 is not None for layer in workers.layers]
    # The second worker's columns of v and o are cut through a block.
    assert kept[:2] == [form == "8 bits", False]
    assert all(layer.pools.packed is None for layer in workers.layers)


def test_paged_slots_change_both_products(stores, monkeypatch):
    store = stores("several rows", "float32")
    workers = Workers(store, COLUMN, 2, monkeypatch, count=2)
    dense = deltas(store, COLUMN, [])
    for adapters in ([0, 1], [5, 1], [6, 2], [0, 5]):
        (taken, again) = [slots.take(adapters) for slots in workers.slots]
        assert taken == again
        workers.step.token_slots[:2] = torch.tensor([taken[adapter] for adapter in adapters])
        x = torch.randn(2, 128)
        found = workers.add(x, torch.zeros(2, dense.shape[1])).double()
        for t, adapter in enumerate(adapters):
            expected = dense[adapter] @ x[t].double()
            assert float((found[t] - expected).norm() / expected.norm()) < 1e-5


def test_a_layer_without_adapters_sends_where_its_step_is_recorded(stores, monkeypatch):
    """And adds nothing; else it does not even send."""
    store = stores("full", "float32")
    workers = Workers(store, ["self_attn.q_proj"], 2, monkeypatch)
    for layer in workers.layers:
        layer.adapted = layer.in_use = False
    x, y = torch.randn(3, 128), torch.randn(3, 128)
    assert torch.equal(workers.add(x, y.clone()), y) and not workers.calls
    workers.step.recorded = True
    assert torch.equal(workers.add(x, y.clone()), y) and len(workers.calls) == 2


def test_a_compiled_layer_sends_when_it_runs(stores, monkeypatch):
    store = stores("full", "float32")
    workers = Workers(store, ROW, 2, monkeypatch)
    workers.step.token_slots[:3] = torch.tensor([1, -1, 4])
    sent = []
    monkeypatch.setattr(
        sharded, "tensor_model_parallel_all_reduce", lambda z: sent.append(z.clone()) or 2 * z
    )
    layer = workers.layers[1]  # the one that the operator finds by its name
    x, y = torch.randn(3, 64), torch.randn(3, 150)
    expected = layer.add_lora_linear(y.clone(), x)
    run = torch.compile(
        lambda y, x: layer.add_lora_linear(y + 0, x) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(run(y, x), 2 * expected) and not torch.equal(expected, y)
    workers.step.active = False
    assert torch.equal(run(y, x), 2 * y)
    assert len(sent) == 2


def test_another_models_width_is_refused(stores, monkeypatch):
    store = stores("full", "float32")
    monkeypatch.setitem(SHAPES, ROW[0], (128, 300))
    with pytest.raises(ValueError, match=r"150 × 128.*another base model"):
        Workers(store, ROW, 2, monkeypatch)
