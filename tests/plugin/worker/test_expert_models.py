"""A model with a layer of experts under the worker's manager: adapters of a store, uploads, blends
and the base model in one step, against float64."""

import itertools
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.model_executor.models.interfaces import SupportsLoRA

from tests.compressor.read.moe_folders import write
from tests.plugin.worker.test_experts import OnCpu
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.engine.adapters import AdapterUnavailable

E, K, HIDDEN, INNER = 4, 2, 32, 48
LAYER = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
NUMBERS = itertools.count()


class TinyMoe(torch.nn.Module, SupportsLoRA):
    """One layer of experts, whose router is told what to choose."""

    packed_modules_mapping: ClassVar = {}
    embedding_modules: ClassVar = {}
    is_3d_moe_weight = True
    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self._layer = OnCpu(f"moe.{next(NUMBERS)}", "silu", HIDDEN, INNER)
        self.model = torch.nn.Module()
        block = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([block])
        block.mlp = torch.nn.Module()
        block.mlp.experts = self._layer.runner

    def forward(self, x, ids, weights):
        return self._layer.run(x, ids, weights)

    def expected(self, x, ids, weights, deltas):
        """Of one token, float64; `deltas`: an expert's layer → `[d_out, d_in]`."""
        x, out = x.double(), 0
        for expert, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            own = {name: deltas.get(f"{LAYER}.{expert}.{name}", 0) for name in SHAPES}
            gate, up = self._layer.w13[expert].chunk(2)
            inner = torch.nn.functional.silu((gate + own["gate_proj"]) @ x)
            inner = inner * ((up + own["up_proj"]) @ x)
            out = out + weight * (self._layer.w2[expert] + own["down_proj"]) @ inner
        return out


def folder_of(path, seed, *, rank=2, stacked=False, experts=range(E)):
    """An adapter of experts: a layer for each, or as PEFT stacks them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        (expert, name): (
            torch.randn(rank, d_in, generator=generator) / 4,
            torch.randn(d_out, rank, generator=generator) / 4,
        )
        for expert in experts
        for name, (d_in, d_out) in SHAPES.items()
    }
    deltas = {f"{LAYER}.{e}.{n}": b.double() @ a.double() for (e, n), (a, b) in pairs.items()}
    prefix = f"base_model.model.{LAYER}"
    if not stacked:
        tensors = {}
        for (expert, name), (a, b) in pairs.items():
            tensors |= _pair(f"{prefix}.{expert}.{name}", a, b)
        return write(path, tensors, rank, rank, target_modules=[*SHAPES]), deltas
    # gate and up have one A: that of gate.
    a = torch.cat([pairs[e, "gate_proj"][0] for e in experts])
    halves = [torch.cat([pairs[e, n][1] for n in ("gate_proj", "up_proj")]) for e in experts]
    tensors = _pair(f"{prefix}.base_layer", a, torch.stack(halves, 2).flatten(1))
    down_a = torch.cat([pairs[e, "down_proj"][0] for e in experts])
    down_b = torch.stack([pairs[e, "down_proj"][1] for e in experts], 2).flatten(1)
    tensors |= _pair(prefix, down_a, down_b)
    for e in experts:
        b, a = pairs[e, "up_proj"][1], pairs[e, "gate_proj"][0]
        deltas[f"{LAYER}.{e}.up_proj"] = b.double() @ a.double()
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return write(path, tensors, rank, rank, target_parameters=parameters), deltas


def _pair(module, a, b):
    return {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}


METHODS = {
    "joint": Settings(rank=4, clusters=2, experts="joint", store_dtype="float32"),
    "separate": Settings(rank=2, clusters=2, experts="separate", store_dtype="float32"),
    "as they are": Settings(method="none", store_dtype="float32"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [folder_of(folder / f"a{i}", i)[0] for i in range(4)]


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, folders):
    path = tmp_path_factory.mktemp("store") / "s"
    return compress(read_adapters(folders), path, METHODS[request.param])


def deltas_of(store, name):
    return {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}


def check(runner, requests, wanted):
    n = len(requests)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(n)]).int()
    weights = torch.rand(n, K, generator=generator)
    runner.begin(requests)
    found = runner.model(x, ids, weights)
    for i, deltas in enumerate(wanted):
        expected = runner.model.expected(x[i], ids[i], weights[i], deltas)
        error = float((found[i].double() - expected).norm() / expected.norm())
        assert error < 1e-4, f"request {i} is off by {error:.3g}"


def added(*weighted):
    total = {}
    for deltas, weight in weighted:
        for module, delta in deltas.items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def test_a_batch_of_all_kinds(store, tmp_path, make_runner):
    runner = make_runner(store, TinyMoe(), max_blend=4).load()
    own, of_own = folder_of(tmp_path / "own", 7, rank=3)
    stacked, of_stacked = folder_of(tmp_path / "stacked", 8, stacked=True)
    few, of_few = folder_of(tmp_path / "few", 9, experts=[1, 2])
    names = store.names
    known = [deltas_of(store, name) for name in names]
    blend = {names[0]: 0.5, names[2]: -1.0, names[1]: 0.25}
    both = {names[3]: 1.5, own: 0.5}
    requests = [
        adapter_request(store, names[0]),
        None,
        LoRARequest("own", 50, str(own)),
        LoRARequest("stacked", 51, str(stacked)),
        LoRARequest("few", 52, str(few)),
        adapter_request(store, names[3]),
        adapter_request(store, blend),
    ]
    wanted = [known[0], {}, of_own, of_stacked, of_few, known[3]]
    wanted.append(added((known[0], 0.5), (known[2], -1.0), (known[1], 0.25)))
    assert len(of_few) == 2 * len(SHAPES) and max(d.abs().max() for d in known[0].values()) > 0.1
    check(runner, requests, wanted)
    check(runner, requests[::-1], wanted[::-1])
    request = adapter_request(store, both)
    check(runner, [request, None], [added((known[3], 1.5), (of_own, 0.5)), {}])


def test_uploads_that_do_not_fit_are_refused(tmp_path, make_runner, folders):
    bad, _ = folder_of(tmp_path / "bad", 3, experts=[E])
    store = compress(read_adapters(folders), tmp_path / "s", METHODS["separate"])
    runner = make_runner(store, TinyMoe()).load()
    with pytest.raises((ValueError, AdapterUnavailable), match=rf"experts\.{E}\.\w+\);") as found:
        runner.add_lora(LoRARequest("bad", 50, str(bad)))
    assert "beside a store" not in str(found.value)
    wide, _ = folder_of(tmp_path / "wide", 3, rank=9)
    with pytest.raises((ValueError, AdapterUnavailable), match=r"LoRA rank 9 is greater than"):
        runner.add_lora(LoRARequest("wide", 51, str(wide)))
