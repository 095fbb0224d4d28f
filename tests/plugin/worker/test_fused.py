"""Layers that vLLM has in other parts than the store or an upload: one for several outputs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.models.interfaces import SupportsLoRA

from tests.plugin.worker.layer_pools import layer_pools
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.worker.layer import Slice
from vllm_jd.plugin.worker.step import Step

D_IN, OUTPUTS, N = 16, (8, 8, 16, 24), 3
WHOLE, PARTS, SINGLE = "layer.in_qkvz", ("layer.in_qkv", "layer.in_z"), "layer.out"
PACKED = {"in_qkvz": ["in_qkv", "in_z"]}
SHAPES = {
    "whole": {WHOLE: (D_IN, 56), SINGLE: (D_IN, 8)},
    "parts": {PARTS[0]: (D_IN, 32), PARTS[1]: (D_IN, 24), SINGLE: (D_IN, 8)},
    "neither": {SINGLE: (D_IN, 8)},
}


class Model(torch.nn.Module, SupportsLoRA):
    """A layer of four outputs, of which vLLM packs the first three as one module, and another."""

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping, self.embedding_modules = PACKED, {}
        self.config = SimpleNamespace()
        self.layer = torch.nn.Module()
        like = {"bias": False, "params_dtype": torch.float32}
        self.layer.in_qkvz = MergedColumnParallelLinear(D_IN, list(OUTPUTS), **like)
        self.layer.out = linear.ReplicatedLinear(D_IN, 8, **like)
        for part in (self.layer.in_qkvz, self.layer.out):
            part.weight.data.zero_()
            part.quant_method.process_weights_after_loading(part)

    def forward(self, x):
        return torch.cat([self.layer.in_qkvz(x)[0], self.layer.out(x)[0]], 1)


@pytest.fixture
def made(tmp_path, write_adapters):
    """(kind) → folders of adapters; (kind) → a store of them."""

    def adapters(kind):
        folder = tmp_path / kind
        if not folder.exists():
            write_adapters(folder, N, shapes=SHAPES[kind], seed=list(SHAPES).index(kind))
        return sorted(folder.iterdir())

    def store(kind):
        settings = Settings(rank=12, store_dtype="float32")
        return compress(read_adapters(adapters(kind)), tmp_path / f"{kind}-store", settings)

    return SimpleNamespace(adapters=adapters, store=store)


def added(deltas, x):
    """What an adapter's deltas add to the outputs for a token, in float64."""
    order = [(WHOLE, *PARTS), (SINGLE,)]
    widths = {WHOLE: 56, PARTS[0]: 32, PARTS[1]: 24, SINGLE: 8}
    zeros = {name: torch.zeros(widths[name], D_IN, dtype=torch.float64) for name in widths}
    parts = []
    for names in order:
        there = [name for name in names if name in deltas] or [names[0]]
        parts += [deltas.get(name, zeros[name]) for name in there]
    return torch.cat(parts) @ x.double()


@pytest.mark.parametrize("upload", ["whole", "parts", "neither"])
@pytest.mark.parametrize("kind", ["whole", "parts", "neither"])
def test_a_layer_is_adapted_as_a_whole_and_by_its_parts(
    kind, upload, made, make_runner, peft_deltas
):
    store, (folder, *_) = made.store(kind), made.adapters(upload)
    runner = make_runner(store, Model()).load()
    request = LoRARequest("upload", 50, str(folder))
    if (kind, upload) == ("whole", "parts"):
        with pytest.raises(ValueError, match=r"2 modules that cannot be served.*layer\.in_qkv"):
            runner.add_lora(request)
        return
    x = torch.randn(N + 2, D_IN, generator=torch.Generator().manual_seed(0))
    runner.begin([*(adapter_request(store, name) for name in store.names), request, None])
    found = runner.model(x).double()
    deltas = [
        {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}
        for name in store.names
    ]
    deltas += [peft_deltas(folder), {}]
    expected = torch.stack([added(each, token) for each, token in zip(deltas, x, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float(found[N].norm()) > 1 and not found[-1].any()


def test_a_store_of_both_is_refused(tmp_path, write_adapters, make_runner):
    shapes = SHAPES["whole"] | SHAPES["parts"]
    folders = write_adapters(tmp_path / "in", N, shapes=shapes)
    store = compress(read_adapters(folders), tmp_path / "store", Settings(rank=3))
    with pytest.raises(ValueError, match=rf"modules {WHOLE} and {PARTS[0]}, which is a part"):
        make_runner(store, Model()).load()


@pytest.mark.parametrize("first", [24, 40])
def test_parts_of_other_widths_are_refused(first, tmp_path, write_adapters, make_runner):
    shapes = {PARTS[0]: (D_IN, first), PARTS[1]: (D_IN, 56 - first)}
    folders = write_adapters(tmp_path / "in", N, shapes=shapes)
    store = compress(read_adapters(folders), tmp_path / "store", Settings(rank=3))
    with pytest.raises(ValueError, match=rf"{PARTS[0]} is {first} × {D_IN}"):
        make_runner(store, Model()).load()


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_each_worker_has_its_part_of_each_output(kind, made, one_worker, monkeypatch):
    store = made.store(kind)
    names = [WHOLE] if kind == "whole" else list(PARTS)
    counts = [4] if kind == "whole" else [3, 1]
    slices = [
        Slice(name, store.manifest.modules[store.module_index(name)], count)
        for name, count in zip(names, counts, strict=True)
    ]
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, token in zip(store.names, x, strict=True):
        factors = store.factors(name)
        delta = torch.cat([factors[part][0].double() @ factors[part][1].double() for part in names])
        rows.append((delta @ token.double()).split(OUTPUTS))
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        layer = MergedColumnParallelLinear(
            D_IN, list(OUTPUTS), bias=False, params_dtype=torch.float32, prefix=f"{kind} {rank}"
        )
        config = LoRAConfig(max_lora_rank=8, max_loras=1)
        config.lora_dtype = torch.float32
        wrapped = from_layer(layer, 0, config, PACKED["in_qkvz"], None)
        step = Step(torch.arange(N, dtype=torch.int32), active=True)
        pools, _ = layer_pools(store, wrapped, slices, step, max_loras=1, max_rank=8)
        assert [d_out for d_out, _ in pools.shapes] == ([56] if kind == "whole" else [32, 24])
        y = torch.zeros(N, 28)
        pools.add_lora_linear(y, x)
        expected = torch.stack(
            [
                torch.cat([part[len(part) // 2 * rank :][: len(part) // 2] for part in row])
                for row in rows
            ]
        )
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
