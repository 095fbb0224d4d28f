"""A basis that is paged in alone lies as it does where all are put at once, in every form."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from tests.plugin.worker.test_layer import FakeLayer
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.kernels import Int8Rows
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.residency import SlotClass
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.worker.bases import CodedRows, PackedInt8, PackedRows, PlainRows, Spans, take
from vllm_jd.plugin.worker.layer import LayerPools, Slice
from vllm_jd.plugin.worker.slots import Slots, keeps_codes
from vllm_jd.plugin.worker.step import Step
from vllm_jd.store.quantise import quantise

WIDTHS = {"v": 70, "u": 40, "scales": 40}  # no whole blocks: the ends are padded
RANKS = (3, 8, 16)
COUNT = 3  # of each rank


def memory(form):
    """All that a form holds, in bytes."""
    parts = [getattr(form, "packed", form.v), form.v, *form.u, *form.scales]
    for rows in (getattr(form, "v_int8", None), *getattr(form, "u_int8", ())):
        parts += [] if rows is None else [rows.codes, rows.steps]
    return [part.view(-1).view(torch.uint8) for part in parts]


def make(form, count=2):
    """Forms of a layer with two slices, and who has which slot: (slots, first rows, ranks)."""
    own = [SlotClass(rank, i * COUNT, COUNT) for i, rank in enumerate(RANKS)]
    classes = {"v": own, "u": own, "scales": [SlotClass(1, 0, COUNT)]}
    like = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    return [
        form(WIDTHS["v"], [WIDTHS["u"]] * 2, classes, [True, True], **like) for _ in range(count)
    ]


@pytest.mark.parametrize("side", ["v", "u", "scales"])
@pytest.mark.parametrize("form", [PlainRows, CodedRows, PackedRows, PackedInt8])
def test_one_by_one_is_all_at_once(form, side):
    ranks = np.ones(COUNT, dtype=int) if side == "scales" else np.repeat(RANKS, COUNT)
    spans = Spans(np.arange(len(ranks)), np.cumsum(ranks) - ranks, ranks)
    whole, alone, other = make(form, 3)
    numbers = [torch.randn(int(ranks.sum()), WIDTHS[side]) for _ in range(2)]
    if form.in_8_bits and side != "scales":
        vectors = [Int8Rows(*quantise(each, "int8")) for each in numbers]
    else:
        vectors = [each.bfloat16() for each in numbers]
    for s in range(2):
        whole.put(side, s, spans, vectors[s])
    assert any(part.any() for part in memory(whole))
    # Both slices' bases of one slot are prepared together, as those of many layers are.
    for slot in reversed(range(len(ranks))):
        rank = int(ranks[slot])
        index = spans.starts[slot] + np.arange(rank)
        both = [take(each, index) for each in vectors]
        if isinstance(both[0], Int8Rows):
            parts = ([each.codes for each in both], [each.steps for each in both])
            both = Int8Rows(*map(torch.cat, parts))
        else:
            both = torch.cat(both)
        for s, basis in enumerate(other.prepared(side, both, rank)):
            alone.place(side, s, slot, basis)
    for first, second in zip(memory(whole), memory(alone), strict=True):
        assert torch.equal(first, second)
    assert not any(part.any() for part in memory(other)), "who prepares need not be who gets it"


SHAPES = {
    f"model.layers.{i}.self_attn.{name}": shape
    for i in range(2)
    for name, shape in {"q_proj": (128, 128), "k_proj": (128, 64), "o_proj": (128, 160)}.items()
}
METHODS = {
    "clusters": Settings(rank=5, clusters=3),
    "own rows": Settings(rank=3, clusters=2),
    "ranks": Settings(method="svd", rank=3),
    "scales": Settings(method="hydraopt", matrices=2, steps=20),
}
ROWS = {"own rows": {"own": 1}}


@pytest.fixture(scope="module", params=METHODS)
def stores(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("one-basis")
    adapters = read_adapters(write_adapters(folder / "a", 7, shapes=SHAPES, ranks=(4, 2)))
    method, rows = METHODS[request.param], ROWS.get(request.param, {})
    return {
        dtype: compress(adapters, folder / dtype, replace(method, store_dtype=dtype), **rows)
        for dtype in ("bfloat16", "int8")
    }


def layers_of(store, rank, size, sharded):
    """q and k in one layer and o in another, twice; of one worker of several."""
    made = []
    for i in range(2):
        for names, cut in ((("q_proj", "k_proj"), "columns"), (("o_proj",), "rows")):
            modules = [
                store.manifest.modules[store.module_index(f"model.layers.{i}.self_attn.{name}")]
                for name in names
            ]
            widths = tuple(module.d_out for module in modules)
            layer = FakeLayer(128, widths, cut if size > 1 else None, rank, size)
            slices = [Slice(module.name, module) for module in modules]
            parallel = cut.removesuffix("s") if sharded else None
            made.append((f"{i}.{cut}", layer, slices, parallel))
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("rank", "size", "sharded"),
    [(0, 1, False), (0, 2, False), (1, 2, False), (0, 2, True), (1, 2, True), (3, 4, True)],
)
def test_the_bases_of_many_layers_are_filled_as_at_the_start(stores, dtype, rank, size, sharded):
    """On whichever worker: one by one, into slots that were emptied, last to first."""
    store = stores[dtype]
    tables, like = Tables(store), {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    capacity = capacity_of(
        store,
        tables,
        PluginConfig(store=str(store.path), max_loras=1),
        max_num_seqs=1,
        max_lora_rank=2,
        in_codes=keeps_codes(store, torch.bfloat16),
    )
    step = Step(torch.full((8,), -1, dtype=torch.int32))
    layers = [
        LayerPools(name, layer, slices, store, capacity, step=step, sharded=parallel, **like)
        for name, layer, slices, parallel in layers_of(store, rank, size, sharded)
    ]
    slots = Slots(store, tables, layers, capacity, **like)
    source = slots.begin()
    forms = [product.bases for layer in layers for product in layer._products]
    expected = [[part.clone() for part in memory(form)] for form in forms]
    assert any(part.any() for parts in expected for part in parts)
    for form in forms:
        for part in memory(form):
            part.zero_()
    for side, where in source.slots.items():
        for basis in reversed(range(len(where))):
            if where[basis] >= 0:
                slots.fill_basis(source, side, basis, int(where[basis]))
    for form, parts in zip(forms, expected, strict=True):
        for found, wanted in zip(memory(form), parts, strict=True):
            assert torch.equal(found, wanted)


def test_what_is_read_together_is_as_little_as_there_are_kinds(stores, monkeypatch):
    """Not once for each layer."""
    store = stores["bfloat16"]
    reads = []
    stock = type(store).vectors_of
    monkeypatch.setattr(
        type(store), "vectors_of", lambda *args: reads.append(args[1:3]) or stock(*args)
    )
    tables, like = Tables(store), {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    capacity = capacity_of(
        store,
        tables,
        PluginConfig(store=str(store.path), max_loras=1),
        max_num_seqs=1,
        max_lora_rank=2,
        in_codes=False,
    )
    step = Step(torch.full((8,), -1, dtype=torch.int32))
    layers = [
        LayerPools(name, layer, slices, store, capacity, step=step, **like)
        for name, layer, slices, _ in layers_of(store, 0, 1, False)
    ]
    slots = Slots(store, tables, layers, capacity, **like)
    source = slots.begin()
    for side in ("v", "u"):
        reads.clear()
        slots.fill_basis(source, side, 0, int(source.slots[side][0]))
        modules = [module for names, _ in reads for module in names]
        assert len(modules) == len(set(modules)) and len(modules) <= len(SHAPES)
        kinds = {SHAPES[m][0 if side == "v" else 1] for m in modules}
        ranks = {int(r) for r in tables.spans(side, source.modules, np.array([0]))[1] if r}
        assert len(reads) <= len(kinds) * len(ranks)
