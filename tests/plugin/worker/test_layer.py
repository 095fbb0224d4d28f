"""LayerPools against dense float64 deltas, whole and cut for tensor parallelism."""

import pytest
import torch

pytest.importorskip("vllm")

from tests.plugin.worker.layer_pools import layer_pools
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.worker.layer import Slice, Step

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


class FakeLayer:
    """What LayerPools asks of a vLLM LoRA layer: sizes, and how factors are cut."""

    def __init__(self, d_in, output_slices, cut=None, rank=0, size=1):
        self.tp_size, self.tp_rank = size, rank
        columns, rows = cut == "columns", cut == "rows"
        self.input_size = d_in // size if rows else d_in
        self.output_slices = tuple(d // size for d in output_slices) if columns else output_slices
        self._cut, self._packed = cut, len(output_slices) > 1

    def slice_lora_a(self, a):
        if self._cut != "rows":
            return a
        return a[:, self.tp_rank * self.input_size : (self.tp_rank + 1) * self.input_size]

    def slice_lora_b(self, b):
        if self._cut != "columns":
            return b
        if not self._packed:
            return self._part(b, self.output_slices[0])
        return [
            None if piece is None else self._part(piece, width)
            for piece, width in zip(b, self.output_slices, strict=True)
        ]

    def _part(self, b, width):
        return b[self.tp_rank * width : (self.tp_rank + 1) * width]


@pytest.fixture
def store(tmp_path, random_adapter_folder):
    folder = random_adapter_folder
    collection = read_adapters([folder])
    settings = Settings(rank=6, clusters=2, store_dtype="float32")
    return compress(collection, tmp_path / "store", settings)


@pytest.fixture
def random_adapter_folder(tmp_path):
    """Five adapters of ranks 2 and 3 on two layers' q, k, v, o; one lacks k, one lacks layer 1."""
    import json

    from safetensors.torch import save_file

    shapes = {"q_proj": (24, 24), "k_proj": (24, 8), "v_proj": (24, 8), "o_proj": (24, 24)}
    generator = torch.Generator().manual_seed(3)
    for i in range(5):
        tensors = {}
        rank = 2 + i % 2
        for layer in range(2):
            for name, (d_in, d_out) in shapes.items():
                if (i == 1 and name == "k_proj") or (i == 2 and layer == 1):
                    continue
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
        folder = tmp_path / "adapters" / f"a{i}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": rank, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapters"


def pools_for(store, layer, names, step, max_loras=2, max_rank=4):
    columns = {m.name: m for m in store.manifest.modules}
    slices = [Slice(name, columns.get(name)) for name in names]
    return layer_pools(store, layer, slices, step, max_loras=max_loras, max_rank=max_rank)[0]


def dense(store, slot, name):
    """Delta of a store adapter's module in float64, or 0."""
    factors = store.factors(store.names[slot])
    if name not in factors:
        module = store.manifest.modules[store.module_index(name)]
        return torch.zeros(module.d_out, module.d_in, dtype=torch.float64)
    b, a = factors[name]
    return b.double() @ a.double()


def test_a_packed_layer_adds_each_tokens_adapter(store):
    names = [f"model.layers.0.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj")]
    slots = torch.tensor([0, 1, -1, 4, 5, 2, 6, 1], dtype=torch.int32)
    layer = pools_for(store, FakeLayer(24, (24, 8, 8)), names, Step(slots, active=True))
    generator = torch.Generator().manual_seed(0)
    private = [(torch.randn(3, 24, generator=generator), torch.randn(8, 3, generator=generator))]
    layer.set_adapter(0, [None, private[0], None])
    x = torch.randn(8, 24, generator=generator)
    y = torch.randn(8, 40, generator=generator)
    expected = y.double().clone()
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < 5:
            delta = torch.cat([dense(store, slot, name) for name in names])
            expected[t] += delta @ x[t].double()
        elif slot == 5:
            a, b = private[0]
            expected[t, 24:32] += b.double() @ (a.double() @ x[t].double())
    assert layer.add_lora_linear(y, x) is y
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_place_can_be_taken_again(store):
    names = ["model.layers.0.self_attn.o_proj"]
    step = Step(torch.tensor([5, 6], dtype=torch.int32), active=True)
    layer = pools_for(store, FakeLayer(24, (24,)), names, step)
    x = torch.randn(2, 24)
    first, second = ((torch.randn(r, 24), torch.randn(24, r)) for r in (4, 2))
    layer.set_adapter(0, [first])
    layer.set_adapter(0, [second])
    y = torch.zeros(2, 24)
    layer.add_lora_linear(y, x)
    torch.testing.assert_close(y[0], second[1] @ (second[0] @ x[0]), rtol=1e-4, atol=1e-5)
    assert not y[1].any(), "an empty place adds nothing"
    layer.clear_adapter(0)
    y = torch.zeros(2, 24)
    layer.add_lora_linear(y, x)
    assert not y.any()


def test_a_layer_the_store_does_not_know_costs_nothing_and_takes_uploads(store):
    names = ["model.layers.0.mlp.down_proj"]
    step = Step(torch.tensor([0, 5], dtype=torch.int32), active=True)
    layer = pools_for(store, FakeLayer(12, (7,)), names, step)
    y = torch.zeros(2, 7)
    layer.add_lora_linear(y, torch.randn(2, 12))
    assert not y.any()
    a, b = torch.randn(2, 12), torch.randn(7, 2)
    layer.set_adapter(0, [(a, b)])
    x = torch.randn(2, 12)
    layer.add_lora_linear(y, x)
    torch.testing.assert_close(y[1], b @ (a @ x[1]), rtol=1e-4, atol=1e-5)
    assert not y[0].any()


@pytest.mark.parametrize("cut", ["columns", "rows"])
def test_workers_parts_make_up_the_whole(store, cut):
    """Two workers: outputs side by side for column-parallel layers, summed for row-parallel."""
    if cut == "columns":
        names = [f"model.layers.1.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj")]
        widths = (24, 8, 8)
    else:
        names, widths = ["model.layers.1.self_attn.o_proj"], (24,)
    slots = torch.tensor([0, 2, 3, 4, 5, 1], dtype=torch.int32)
    x = torch.randn(6, 24)
    upload = [(torch.randn(2, 24), torch.randn(width, 2)) for width in widths]

    def run(rank, size):
        layer = FakeLayer(24, widths, cut, rank, size)
        pools = pools_for(store, layer, names, Step(slots, active=True))
        pools.set_adapter(0, upload)
        part = x if cut == "columns" else x[:, rank * 12 : (rank + 1) * 12].contiguous()
        y = torch.zeros(6, sum(layer.output_slices))
        pools.add_lora_linear(y, part if size > 1 else x)
        return y, layer.output_slices

    whole, _ = run(0, 1)
    (first, parts), (second, _) = run(0, 2), run(1, 2)
    if cut == "columns":
        pieces = zip(first.split(parts, 1), second.split(parts, 1), strict=True)
        joined = torch.cat([piece for pair in pieces for piece in pair], dim=1)
    else:
        joined = first + second
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-4)


def test_another_models_shapes_are_refused(store):
    with pytest.raises(ValueError, match=r"24 × 24.*another base model"):
        pools_for(
            store,
            FakeLayer(32, (32,)),
            ["model.layers.0.self_attn.o_proj"],
            Step(torch.empty(0, dtype=torch.int32)),
        )
