"""LayerPools on stores of VeRA adapters: what a layer adds is PEFT's delta."""

import pytest
import torch

pytest.importorskip("vllm")

from peft import VeraConfig, get_peft_model

from tests.plugin.worker.layer_pools import layer_pools
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.worker.layer import Slice, Step

D_IN, WIDTHS, RANK, N = 24, {"q_proj": 24, "k_proj": 8}, 6, 4
NAMES = [f"self_attn.{name}" for name in WIDTHS]


class FakeLayer:
    """A packed column-parallel layer: what LayerPools asks of it."""

    def __init__(self, rank=0, size=1):
        self.tp_rank, self.tp_size, self.input_size = rank, size, D_IN
        self.output_slices = tuple(width // size for width in WIDTHS.values())

    def slice_lora_a(self, a):
        return a

    def slice_lora_b(self, b):
        return [
            None if part is None else part[self.tp_rank * width : (self.tp_rank + 1) * width]
            for part, width in zip(b, self.output_slices, strict=True)
        ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of adapters, module → float64 deltas `[n, d_out, d_in]`), from PEFT itself."""
    folder = tmp_path_factory.mktemp("vera")
    deltas = {name: [] for name in NAMES}
    for i in range(N):
        torch.manual_seed(i)
        linears = {name: torch.nn.Linear(D_IN, width) for name, width in WIDTHS.items()}
        base = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict(linears)})
        config = VeraConfig(r=RANK, target_modules=list(WIDTHS), init_weights=False)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / f"a{i}")
        for name in NAMES:
            layer = model.double().get_submodule(f"base_model.model.{name}")
            deltas[name].append(layer.get_delta_weight("default").detach())
    return folder, {name: torch.stack(parts) for name, parts in deltas.items()}


def outputs(store, x, slots, rank=0, size=1):
    """What the layer adds to zeros, one tensor a module."""
    layer = FakeLayer(rank, size)
    slices = [Slice(name, store.manifest.modules[store.module_index(name)]) for name in NAMES]
    pools, _ = layer_pools(store, layer, slices, Step(slots, active=True), max_loras=1, max_rank=4)
    pools.set_adapter(0, [(torch.ones(2, D_IN), torch.ones(w, 2)) for w in WIDTHS.values()])
    y = torch.zeros(len(x), sum(layer.output_slices))
    pools.add_lora_linear(y, x)
    return y.split(layer.output_slices, dim=1)


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_layer_adds_is_the_delta_of_peft(tmp_path, made, size):
    folder, deltas = made
    settings = Settings(method="none", store_dtype="float32")
    store = compress(read_adapters([folder]), tmp_path / "store", settings)
    slots = torch.tensor([2, 0, -1, 3, 1, 0, N], dtype=torch.int32)
    x = torch.randn(len(slots), D_IN, generator=torch.Generator().manual_seed(5))
    parts = [outputs(store, x, slots, rank, size) for rank in range(size)]
    for s, name in enumerate(NAMES):
        found = torch.cat([part[s] for part in parts], dim=1)
        for t, slot in enumerate(slots.tolist()):
            expected = torch.zeros(len(found[t]), dtype=torch.float64)
            if slot == N:  # the uncompressed one beside them, which has no scale
                expected += 2 * x[t].double().sum()
            elif slot >= 0:
                expected = deltas[name][slot] @ x[t].double()
            torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-4)


def test_hydraopts_scales_are_picked_by_their_adapters(tmp_path, made):
    folder, _ = made
    settings = Settings(method="hydraopt", matrices=2, steps=20, store_dtype="float32")
    store = compress(read_adapters([folder]), tmp_path / "store", settings)
    slots = torch.arange(N, dtype=torch.int32)
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(5))
    for s, name in enumerate(NAMES):
        found = outputs(store, x, slots)[s]
        kinds = set()
        for t in range(N):
            b, a = store.factors(store.names[t])[name]
            kinds.add(int(store.chosen[t, store.module_index(name), 0]))
            expected = b.double() @ (a.double() @ x[t].double())
            torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-4)
        assert kinds == {0, 1}
