"""Layers of experts: each pair of a token and one of its experts gets what its adapter says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.lora_weights import LoRALayerWeights
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from tests.compressor.run.test_experts import made, served
from tests.plugin.worker.layer_pools import SlotsOfOneLayer
from tests.several_rows import compress
from vllm_jd.compressor import Settings
from vllm_jd.kernels import tiles
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.worker import step as step_module
from vllm_jd.plugin.worker.expert_names import ExpertNames, expert_module
from vllm_jd.plugin.worker.experts import ExpertLayer, Projection, check_experts, fit_halves
from vllm_jd.plugin.worker.experts_context import adapt_in_context, context_of
from vllm_jd.plugin.worker.experts_cpu import adapt_on_cpu
from vllm_jd.plugin.worker.layer import LayerPools, Slice
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.plugin.worker.step import Step

LAYER = "model.layers.0.mlp.experts"
N, E, D_IN, INNER, K = 6, 4, 22, 18, 2  # as `made` has them
GATE, UP = f"{LAYER}.gate_proj", f"{LAYER}.up_proj"

KINDS = {
    "joint": {"rank": 5, "clusters": 2, "experts": "joint"},
    "separate": {"rank": 3, "clusters": 2, "experts": "separate"},
    "a diagonal": {"method": "jd-diag", "rank": 6},
    "own rows": {"rank": 3, "own": 1, "experts": "joint"},
    "guarded": {"rank": 4, "max_adapter_error": 0.8, "experts": "joint"},
    "int8": {"rank": 4, "store_dtype": "int8"},
    "as they are": {"method": "none"},
}


def stored(folder, own=0, **settings):
    collection = made(N, modules=(GATE, UP, "model.layers.0.self_attn.q_proj"))
    settings = Settings(**{"store_dtype": "float32"} | settings)
    return compress(collection, folder, settings, own=own)


@pytest.fixture(scope="module", params=KINDS)
def store(request, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("experts") / "s", **KINDS[request.param])


def pools_of(store, step, *, rank=0, size=1, count=None, inner=INNER):
    """(the pools of gate and up, their slots) of one worker of so many."""
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    tables = Tables(store)
    config = PluginConfig(store="s", max_loras=2, core_slots=count or len(store))
    capacity = capacity_of(
        store,
        tables,
        config,
        max_num_seqs=1,
        max_lora_rank=4,
        in_codes=keeps_codes(store, torch.float32),
    )
    modules = {m.name: m for m in store.manifest.modules}
    slices = [Slice(name, modules.get(name)) for name in (GATE, UP)]
    layer = Projection(D_IN, [inner, inner], rank, size, by_output=True)
    pools = LayerPools(
        f"{LAYER}.{rank}", layer, slices, store, capacity, step=step, experts=E, **like
    )
    return pools, SlotsOfOneLayer(store, tables, [pools], capacity, uploads=2, **like)


def put_upload(slots, place, pairs):
    """Put an upload, name of an expert's layer → (A, B), into a place behind the store's."""
    loras = {name: SimpleNamespace(lora_a=a, lora_b=b) for name, (a, b) in pairs.items()}
    upload = SimpleNamespace(get_lora=loras.get)
    for side in ("v", "u"):
        slots.fill_upload_basis(upload, side, place)
    slots.fill_upload(upload, slots.count_of_store + place, {"v": place, "u": place})


def expected(store, adapters, pairs, x):
    """What each pair (token, expert) is to get: float64 `[pairs, 2 · inner]`."""
    whole = [
        None if a is None else torch.cat([served(store, store.names[a], m) for m in (GATE, UP)], 1)
        for a in adapters
    ]
    out = torch.zeros(len(pairs), 2 * INNER, dtype=torch.float64)
    for i, (token, expert) in enumerate(pairs):
        if whole[token] is not None:
            out[i] = whole[token][expert] @ x[token].double()
    return out


def routed(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])


def all_pairs(ids):
    return [(t, int(e)) for t, row in enumerate(ids) for e in row]


def test_a_tokens_pairs_lie_side_by_side_in_the_order_of_the_tiles(monkeypatch):
    monkeypatch.setattr(step_module, "backend_name", lambda device: "triton")
    step = Step.make(8, torch.device("cpu"))
    slots = np.array([3, -1, 0, 3, 5], dtype=np.int32)
    step.begin(slots, tiles.keys_of(slots % 2, slots), active=True)
    layer = ExpertLayer(LAYER, E, SimpleNamespace(step=step), None)
    pairs, order = layer.pairs(routed(len(slots)))
    assert len(order) == tiles.places(len(slots)) * K
    places = order.view(-1, K)
    assert torch.equal(places < 0, (places[:, :1] < 0).expand_as(places))
    assert places[places[:, 0] >= 0].tolist() == [[2 * t, 2 * t + 1] for t in (2, 0, 3, 4)]
    assert sorted(order[order >= 0].tolist()) == torch.nonzero(pairs >= 0).flatten().tolist()


def test_each_pair_gets_its_adapters_expert(store):
    adapters = [0, None, 3, 5, 1, 4, 2]
    slots = torch.tensor([-1 if a is None else a for a in adapters], dtype=torch.int32)
    step = Step(slots, active=True)
    pools, _ = pools_of(store, step)
    ids = routed(len(adapters))
    layer = ExpertLayer(LAYER, E, pools, pools)
    pairs, order = layer.pairs(ids)
    assert order is None and pairs.shape == (len(adapters) * K,)
    x = torch.randn(len(adapters), D_IN, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(len(pairs), 2 * INNER)
    pools.add_pairs(y, x, pairs, None)
    wanted = expected(store, adapters, all_pairs(ids), x)
    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)
    ids[0, 1] = -1
    pairs, _ = layer.pairs(ids)
    assert pairs[1] == -1 and pairs[0] >= 0, "a pair without an expert"
    pools.add_pairs(y[:0], x[:0], pairs[:0], None)  # a step without tokens


def test_workers_parts_make_up_the_whole(store):
    adapters = [0, 2, 4, None]
    step = Step(torch.tensor([0, 2, 4, -1], dtype=torch.int32), active=True)
    ids, x = routed(4), torch.randn(4, D_IN, generator=torch.Generator().manual_seed(2))
    parts = []
    for rank in range(2):
        pools, _ = pools_of(store, step, rank=rank, size=2)
        pairs, _ = ExpertLayer(LAYER, E, pools, pools).pairs(ids)
        y = torch.zeros(len(pairs), INNER)
        pools.add_pairs(y, x, pairs, None)
        parts.append(y.chunk(2, dim=1))
    whole = torch.cat([torch.cat([parts[0][s], parts[1][s]], 1) for s in range(2)], 1)
    wanted = expected(store, adapters, all_pairs(ids), x)
    torch.testing.assert_close(whole.double(), wanted, rtol=1e-4, atol=1e-3)


def test_down_and_halves_in_one_are_cut_as_the_layer_is():
    a, b = torch.randn(3, 8), torch.randn(12, 3)
    down = [Projection(8, [12], r, 2, by_output=False) for r in range(2)]
    assert torch.equal(torch.cat([d.slice_lora_a(a) for d in down], 1), a)
    assert torch.equal(down[1].slice_lora_b(b), b) and down[0].input_size == 4
    halves = [Projection(8, [12], r, 2, by_output=True, halves=True) for r in range(2)]
    first, second = (h.slice_lora_b(b) for h in halves)
    assert torch.equal(torch.cat([first[:3], second[:3], first[3:], second[3:]]), b)
    alternate = [Projection(8, [12], r, 2, by_output=True) for r in range(2)]
    assert torch.equal(torch.cat([h.slice_lora_b(b) for h in alternate]), b)


def test_paged_slots_add_what_resident_ones_do(store):
    ids = routed(2)
    x = torch.randn(2, D_IN, generator=torch.Generator().manual_seed(3))
    step = Step(torch.full((2,), -1, dtype=torch.int32), active=True)
    pools, slots = pools_of(store, step, count=2)
    layer = ExpertLayer(LAYER, E, pools, pools)
    for adapters in ([0, 1], [2, 3], [5, 0], [4, 2]):
        taken = slots.take(adapters)
        step.token_slots[:] = torch.tensor([taken[a] for a in adapters])
        pairs, _ = layer.pairs(ids)
        y = torch.zeros(len(pairs), 2 * INNER)
        pools.add_pairs(y, x, pairs, None)
        wanted = expected(store, adapters, all_pairs(ids), x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)


def test_uploads_may_lack_experts_and_go_again(store):
    step = Step(torch.tensor([N, N + 1, 0], dtype=torch.int32), active=True)
    pools, slots = pools_of(store, step)
    layer = ExpertLayer(LAYER, E, pools, pools)
    generator = torch.Generator().manual_seed(4)

    def factors(rank):
        a = torch.randn(rank, D_IN, generator=generator)
        return a, torch.randn(INNER, rank, generator=generator)

    upload = {expert_module(UP, 1): factors(2), expert_module(GATE, 3): factors(4)}
    other = {expert_module(GATE, e): factors(3) for e in range(E)}
    put_upload(slots, 0, upload)
    put_upload(slots, 1, other)
    ids = torch.tensor([[1, 3], [2, 0], [3, 1]])
    x = torch.randn(3, D_IN, generator=generator)
    pairs, _ = layer.pairs(ids)
    y = torch.zeros(6, 2 * INNER)
    pools.add_pairs(y, x, pairs, None)
    wanted = expected(store, [None, None, 0], all_pairs(ids), x)
    for token, own in enumerate((upload, other)):
        for k, expert in enumerate(ids[token].tolist()):
            for half, name in enumerate((GATE, UP)):
                if expert_module(name, expert) in own:
                    a, b = own[expert_module(name, expert)]
                    place = slice(half * INNER, (half + 1) * INNER)
                    wanted[token * K + k, place] = b.double() @ (a.double() @ x[token].double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)
    put_upload(slots, 0, {})
    y.zero_()
    pools.add_pairs(y, x, pairs, None)
    assert not y[:2].any() and y[2:].any()


def test_bases_that_experts_share_are_there_once(tmp_path):
    rows = {}
    for way in ("joint", "separate"):
        store = stored(tmp_path / way, rank=3, clusters=2, experts=way)
        pools, _ = pools_of(store, Step(torch.zeros(1, dtype=torch.int32)))
        uploads = 2 * 4 * E * 2
        rows[way] = len(pools.pools.v) - uploads
        wide = {c.wide for c in capacity_classes(store)}
        assert wide == {way == "separate"}
    assert rows == {"joint": 2 * 2 * 3, "separate": 2 * 2 * 3 * E}


def capacity_classes(store):
    config = PluginConfig(store="s")
    found = capacity_of(
        store, Tables(store), config, max_num_seqs=1, max_lora_rank=4, in_codes=False
    )
    return [c for side in ("v", "u") for c in found.bases[side]]


def test_vllms_own_experts_find_them_in_their_context(tmp_path):
    """`LoRAExpertsMixin` as vLLM's Triton experts call it, on CPU tensors."""
    store = stored(tmp_path / "s", rank=4, clusters=2)
    adapters = [1, None, 4]
    step = Step(torch.tensor([1, -1, 4], dtype=torch.int32), active=True)
    pools, _ = pools_of(store, step)
    mixin = LoRAExpertsMixin()
    mixin.moe_config = SimpleNamespace(activation=MoEActivation.SILU)
    context = context_of(ExpertLayer(LAYER, E, pools, Down()), K)
    mixin.set_lora_context(context)
    ids = routed(3)
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(5))
    weights = torch.rand(3, K)
    start = torch.randn(3, K, 2 * INNER)
    nothing = torch.empty(0)
    for add in (True, False):
        y = start.clone()
        rest = mixin.apply_w13_lora(
            context,
            y=y,
            x=x,
            topk_ids=ids,
            topk_weights=weights,
            expert_map=None,
            w1=nothing,
            w2=nothing,
            num_tokens=3,
            top_k_num=K,
            add_inputs=add,
        )
        found = y.double() - (start if add else torch.zeros_like(start)).double()
        wanted = expected(store, adapters, all_pairs(ids), x).view(3, K, -1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    y = torch.zeros(3, K, D_IN)
    inner = torch.randn(3 * K, INNER)
    mixin.apply_w2_lora(
        context,
        y=y,
        x=inner,
        topk_weights=weights,
        sorted_token_ids_lora=rest[0],
        expert_ids_lora=rest[1],
        num_tokens_post_padded_lora=rest[2],
        token_lora_mapping=rest[3],
        num_tokens=3,
        w1=nothing,
        w2=nothing,
        top_k_num=K,
    )
    assert torch.equal(context.punica_wrapper._adapters.down.slots, context.punica_wrapper._pairs)
    torch.testing.assert_close(y.view(-1, D_IN)[:, 0], (inner * weights.view(-1, 1)).sum(1))


class Down:
    """Pools that add the sum of each input, and tell for whom."""

    slices = ()

    def add_pairs(self, y, x, slots, order):
        self.slots = slots
        y += x.sum(1, keepdim=True)


class OnCpu:
    """A layer of vLLM's experts on CPU, and what is to come out of it."""

    def __init__(self, name, activation, hidden=32, inner=48, bias=False, dtype=torch.float32):
        self.runner = FusedMoEFactory(
            num_experts=E,
            top_k=K,
            hidden_size=hidden,
            intermediate_size=inner,
            params_dtype=dtype,
            renormalize=True,
            prefix=name,
            activation=activation,
            has_bias=bias,
        )
        weights = self.runner.routed_experts
        generator = torch.Generator().manual_seed(0)
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            if hasattr(weights, name):
                own = getattr(weights, name).data
                own.copy_(torch.randn(own.shape, generator=generator) / 4)
        self.w13, self.w2 = weights.w13_weight.data.double(), weights.w2_weight.data.double()
        weights.quant_method.process_weights_after_loading(weights)
        self.kernel = weights.quant_method.moe_kernel

    def run(self, x, ids, topk):
        layer = self.runner.routed_experts
        return self.kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk,
            topk_ids=ids,
            activation=layer.activation,
            global_num_experts=E,
            expert_map=None,
            apply_router_weight_on_input=False,
        )


@pytest.mark.parametrize(
    ("activation", "inner", "bias", "dtype"),
    [
        ("silu", 64, False, torch.float32),
        ("silu", 48, False, torch.float32),  # which vLLM fills up with zeros
        ("gelu", 48, True, torch.float32),
        ("gelu_tanh", 64, False, torch.float32),
        ("swigluoai", 64, True, torch.float32),
        ("silu", 64, False, torch.bfloat16),
    ],
)
def test_without_adapters_they_compute_what_vllms_do(one_worker, activation, inner, bias, dtype):
    layer = OnCpu(f"{activation}.{inner}.{dtype}", activation, 32, inner, bias, dtype)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    ids, weights = routed(5).int(), torch.rand(5, K, generator=generator)
    expected = layer.run(x, ids, weights)
    step = Step(torch.full((5,), -1, dtype=torch.int32))
    nothing = SimpleNamespace(step=step, add_pairs=lambda *_: None)
    adapt_on_cpu(layer.runner, ExpertLayer(layer.runner.layer_name, E, nothing, nothing))
    bound = (1e-4 if dtype == torch.float32 else 0.03) * float(expected.abs().max())
    torch.testing.assert_close(layer.run(x, ids, weights), expected, rtol=0, atol=bound)


def test_names_of_experts():
    names = ExpertNames(["model.layers.0.block_sparse_moe.experts", "model.layers.11.mlp.experts"])
    first = "model.layers.0.block_sparse_moe.experts"
    assert names.find("model.layers.0.mlp.experts.gate_up_proj") == (first, None, "gate_up_proj")
    assert names.find("model.layers.0.block_sparse_moe.experts.5.w3") == (first, 5, "up_proj")
    assert names.find("model.layers.11.mlp.experts.down_proj")[2] == "down_proj"
    for other in (
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.shared_experts.down_proj",
        "model.layers.0.mlp.experts.5.router",
        "lm_head",
    ):
        assert names.find(other) is None
    both = ExpertNames(["model.layers.0.a.experts", "model.layers.0.b.experts"])
    assert both.find("model.layers.0.a.experts.down_proj") is None


def test_an_upload_gets_the_halves_that_the_layer_has():
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    pair = {part: (torch.randn(3, 6), torch.randn(4, 3)) for part in ("gate_proj", "up_proj")}

    def upload(modules):
        own = {
            expert_module(f"{LAYER}.{part}", 1): LoRALayerWeights(
                "", len(a), len(a), a, b, scaling=1
            )
            for part, (a, b) in modules.items()
        }
        return SimpleNamespace(loras=own)

    def layer(parts, width):
        slices = [Slice(f"{LAYER}.{part}", None) for part in parts]
        return SimpleNamespace(experts=2, slices=slices, shapes=[(width, 6)] * len(parts))

    apart = upload({"gate_up_proj": (a, b)})
    fit_halves(apart, layer(("gate_proj", "up_proj"), 4))
    found = {name.rpartition(".")[2]: lora for name, lora in apart.loras.items()}
    assert torch.equal(found["gate_proj"].lora_b, b[:4]) and found.keys() == {
        "gate_proj",
        "up_proj",
    }
    assert torch.equal(found["up_proj"].lora_b, b[4:]) and found["up_proj"].lora_a is a
    whole = upload(pair)
    fit_halves(whole, layer(("gate_up_proj",), 8))
    ((name, made_one),) = whole.loras.items()
    assert name == f"{LAYER}.1.gate_up_proj" and made_one.rank == 6
    wanted = torch.cat([b @ a for a, b in pair.values()])
    torch.testing.assert_close(made_one.lora_b @ made_one.lora_a, wanted)
    half = upload({"up_proj": pair["up_proj"]})
    fit_halves(half, layer(("gate_up_proj",), 8))
    (made_one,) = half.loras.values()
    delta = made_one.lora_b @ made_one.lora_a
    assert not delta[:4].any() and torch.allclose(delta[4:], wanted[4:])


NO_GATE = MoEActivation.SILU_NO_MUL


@pytest.mark.parametrize(
    ("place", "value", "found", "todo"),
    [
        ("moe_config.moe_parallel_config.use_ep", True, "--enable-expert-parallel", "without it"),
        ("moe_config.moe_parallel_config.dp_size", 2, "data parallel", "size of 1"),
        ("moe_config.num_experts", E + 2, "experts that are there several", "--enable-eplb"),
        ("moe_config.activation", NO_GATE, "experts without a gate", "leave experts alone"),
        (
            *("routed_experts.apply_router_weight_on_input", True),
            *("experts whose inputs are weighted", "leave experts alone"),
        ),
        (
            "moe_config.hidden_dim",
            48,
            "experts with inputs of another width",
            "leave experts alone",
        ),
    ],
)
def test_layers_for_which_they_would_be_wrong_are_refused(
    one_worker, monkeypatch, place, value, found, todo
):
    runner = OnCpu(f"refused.{place}", "silu").runner
    check_experts(runner)
    *parents, last = place.split(".")
    owner = runner
    for parent in parents:
        owner = getattr(owner, parent)
    monkeypatch.setattr(owner, last, value)
    with pytest.raises(ValueError) as refused:
        check_experts(runner)
    message = str(refused.value)
    assert f"found {found}" in message and todo in message.rpartition(". ")[2]
    assert "\n" not in message and f" in refused.{place}" in message


def test_experts_that_take_no_adapters_are_refused(one_worker):
    runner = OnCpu("quantised", "silu").runner
    runner._quant_method.moe_kernel = None
    with pytest.raises(ValueError, match=r"computed by NoneType, expected CPUUnq.* not quantised"):
        adapt_on_cpu(runner, None)
    with pytest.raises(ValueError, match=r"quantised computed by NoneType.*--moe-backend triton"):
        adapt_in_context(runner, None)
