"""The worker's manager on vLLM's own layers: what it wraps and refuses, what the layers see."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm import envs
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.lora.utils import from_layer
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import PPMissingLayer

from tests.plugin.conftest import HIDDEN, LAYERS, SHAPES, TinyModel
from tests.plugin.worker.layer_pools import layer_pools
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.worker import manager as worker_manager
from vllm_jd.plugin.worker import wrap
from vllm_jd.plugin.worker.layer import Slice
from vllm_jd.plugin.worker.sharded import parallel_of
from vllm_jd.plugin.worker.step import Step

N = 4


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    return write_adapters(tmp_path_factory.mktemp("adapters"), N, shapes=SHAPES)


@pytest.fixture(scope="module")
def store(tmp_path_factory, adapters):
    settings = Settings(rank=3, clusters=2, store_dtype="float32")
    return compress(read_adapters(adapters), tmp_path_factory.mktemp("store") / "s", settings)


def deltas_of(store, name):
    return {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}


def begin(runner, requests):
    """Start a step of one token for each request, or None."""
    runner.begin(requests)


def close(found, wanted, bound=1e-4):
    distance = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(distance.max()) < bound


class TestPipelineStages:
    def stage(self, first, last):
        """A model of which this worker has layers `first … last-1`."""
        model = TinyModel()
        for i in range(LAYERS):
            if not first <= i < last:
                model.model.layers[i] = PPMissingLayer()
        return model

    def test_a_stage_serves_its_layers_of_the_store_and_of_uploads(
        self, store, adapters, make_runner
    ):
        """Two stages one after the other say what the whole model says."""
        requests = [
            adapter_request(store, store.names[1]),
            LoRARequest("upload", 50, str(adapters[2])),
            None,
        ]
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
        whole = make_runner(store, TinyModel()).load()
        begin(whole, requests)
        expected = whole.model(x)
        assert not close(expected, TinyModel()(x).double()), "the adapters do nothing"
        for i in range(LAYERS):
            runner = make_runner(store, self.stage(i, i + 1)).load()
            begin(runner, requests)
            x = runner.model(x)
            held = runner.lora_manager._slots.cores.shape[1]
            assert held * LAYERS == store.manifest.core_row > 0, "the other stages' cores"
        assert close(x, expected.double(), 1e-5)

    def test_a_module_that_no_stage_has_is_refused_by_all(
        self, tmp_path, write_adapters, make_runner
    ):
        shapes = SHAPES | {f"model.layers.{LAYERS}.self_attn.q_proj": (HIDDEN, HIDDEN)}
        folders = write_adapters(tmp_path / "adapters", 2, shapes=shapes)
        store = compress(read_adapters(folders), tmp_path / "store", Settings(rank=2))
        for i in range(LAYERS):
            with pytest.raises(ValueError, match=rf"1 modules.*layers\.{LAYERS}\."):
                make_runner(store, self.stage(i, i + 1)).load()

    def test_so_is_an_uploads_and_one_that_the_stage_should_have(
        self, store, tmp_path, write_adapters, make_runner
    ):
        shapes = SHAPES | {f"model.layers.{LAYERS}.mlp.up_proj": (HIDDEN, HIDDEN)}
        (folder,) = write_adapters(tmp_path / "wide", 1, shapes=shapes)
        runner = make_runner(store, self.stage(0, 1)).load()
        with pytest.raises(ValueError, match=rf"1 modules.*layers\.{LAYERS}\."):
            runner.add_lora(LoRARequest("wide", 1, str(folder)))
        model = self.stage(0, 1)
        del model.model.layers[0].mlp.down_proj
        with pytest.raises(ValueError, match=r"1 modules.*layers\.0\.mlp\.down_proj"):
            make_runner(store, model).load()


class TestWhatIsWrapped:
    def test_a_layer_in_two_places_is_adapted_in_both(self, store, make_runner):
        model = TinyModel()
        model.again = torch.nn.Module()
        model.again.name = model.model.layers[0].self_attn.o_proj
        make_runner(store, model).load()
        assert model.again.name is model.model.layers[0].self_attn.o_proj
        assert model.again.name.punica_wrapper.adapted

    def test_of_a_multimodal_model_only_the_language_model_is(
        self, store, make_runner, monkeypatch
    ):
        """A tower's forward pass has tokens of its own, which have no adapter."""
        monkeypatch.setattr(wrap, "supports_multimodal", lambda model: True)
        model = TinyModel()
        model.visual = copy.deepcopy(model.model)
        model.get_mm_mapping = lambda: SimpleNamespace(language_model=["model"])
        make_runner(store, model).load()
        wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
        assert len(wrapped) == 4 * LAYERS
        assert all(name.startswith("model.") for name in wrapped)


class TestSettings:
    def test_one_that_cannot_be_right_is_refused(self, store, make_runner):
        runner = make_runner(store, TinyModel())
        runner.vllm_config.parallel_config.use_ubatching = True
        with pytest.raises(ValueError, match=r"--enable-dbo.*Leave it out"):
            runner.load()

    def test_fully_sharded_on_one_worker_changes_nothing(self, store, adapters, make_runner):
        requests = [
            adapter_request(store, store.names[1]),
            LoRARequest("upload", 50, str(adapters[2])),
            None,
        ]
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
        found = []
        for fully_sharded in (False, True):
            runner = make_runner(store, TinyModel())
            runner.lora_config.fully_sharded_loras = fully_sharded
            begin(runner.load(), requests)
            found.append(runner.model(x))
        assert torch.equal(*found)
        assert runner.lora_config.fully_sharded_loras, "vLLM's own configuration stays"

    @pytest.mark.parametrize(
        ("name", "parallel"),
        [
            ("self_attn.qkv_proj", "column"),
            ("mlp.gate_up_proj", "column"),
            ("self_attn.o_proj", "row"),
            ("mlp.down_proj", "row"),
        ],
    )
    def test_fully_sharded_layers_of_two_workers(self, name, parallel, one_worker):
        """vLLM's layers, as they stand when a model is wrapped."""
        layer = TinyModel().model.layers[0].get_submodule(name)
        parts = TinyModel.packed_modules_mapping.get(name.split(".")[1], [])
        config = LoRAConfig(max_lora_rank=8, max_loras=1)
        config.lora_dtype = torch.float32
        wrapped = from_layer(layer, 0, config, parts, None)
        assert parallel_of(wrapped) is None
        wrapped.tp_size = 2
        assert parallel_of(wrapped) == parallel
        replicated = ReplicatedLinear(8, 8, bias=False, params_dtype=torch.float32)
        wrapped = from_layer(replicated, 0, config, [], None)
        wrapped.tp_size = 2
        assert parallel_of(wrapped) is None

    def test_needless_graphs_are_warned_of(self, store, make_runner, monkeypatch):
        said = []
        monkeypatch.setattr(worker_manager.logger, "warning", said.append)
        runner = make_runner(store, TinyModel())
        runner.lora_config.specialize_active_lora = True
        runner.load()
        assert len(said) == 1 and "--specialize-active-lora" in said[0]


class OneLayer(torch.nn.Module, SupportsLoRA):
    """A model of one linear layer, for the store's o_proj of layer 0."""

    def __init__(self, layer):
        super().__init__()
        self.packed_modules_mapping, self.embedding_modules = {}, {}
        self.config = SimpleNamespace()
        self.model = torch.nn.Module()
        block = torch.nn.Module()
        block.self_attn = torch.nn.Module()
        block.self_attn.o_proj = layer
        self.model.layers = torch.nn.ModuleList([block])

    def forward(self, x):
        result = self.model.layers[0].self_attn.o_proj(x)
        return result[0] if isinstance(result, tuple) else result


WIDE = 64


@pytest.fixture(scope="module")
def o_proj_store(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("o_proj")
    shapes = {"model.layers.0.self_attn.o_proj": (WIDE, WIDE)}
    folders = write_adapters(folder / "adapters", N, shapes=shapes)
    settings = Settings(rank=3, store_dtype="float32")
    return compress(read_adapters(folders), folder / "store", settings)


def fill(layer, weight):
    layer.weight.data.copy_(weight)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def adapters_part(store, x):
    """What the adapter of each token adds: those of the store, in turn, and none."""
    requests = [adapter_request(store, name) for name in store.names] + [None]
    deltas = [deltas_of(store, name) for name in store.names] + [{}]
    rows = [
        delta.get("model.layers.0.self_attn.o_proj", torch.zeros(WIDE, WIDE, dtype=torch.float64))
        @ token.double()
        for delta, token in zip(deltas, x, strict=True)
    ]
    return requests, torch.stack(rows)


def test_the_adapters_of_a_quantised_layer_get_the_activation_as_it_was(o_proj_store, make_runner):
    """A layer of int8 weights that rounds its input to int8 as well, by vLLM's own kernel."""
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    quantised = get_quantization_config("compressed-tensors").from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": [],
            "config_groups": {"group_0": group},
        }
    )
    layer = RowParallelLinear(
        WIDE,
        WIDE,
        bias=False,
        params_dtype=torch.float32,
        quant_config=quantised,
        prefix="model.layers.0.self_attn.o_proj",
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDE, WIDE, generator=generator)
    # In 7 of the 8 bits: processors without VNNI add two products in 16 bits, which would saturate.
    steps = weight.abs().amax(1, keepdim=True) / 63
    layer.weight_scale.data.copy_(steps)
    fill(layer, (weight / steps).round().to(torch.int8))
    x = torch.randn(N + 1, WIDE, generator=generator)
    try:
        base = layer(x)[0].double()
    except RuntimeError as error:
        if "expect A to be bfloat16 or half" not in str(error):
            raise
        pytest.skip("vLLM's int8 kernel for processors with AMX takes no float32 inputs")
    assert 1e-4 < float((base - x.double() @ weight.double().T).norm() / base.norm()) < 0.05
    runner = make_runner(o_proj_store, OneLayer(layer)).load()
    requests, added = adapters_part(o_proj_store, x)
    begin(runner, requests)
    found = runner.model(x).double()
    assert torch.equal(found[-1], base[-1]), "the base model's token changed"
    assert close((found - base)[:-1], added[:-1], 1e-5)
    rounding = x.abs().amax(1, keepdim=True) / 127
    _, of_rounded = adapters_part(o_proj_store, (x / rounding).round() * rounding)
    assert not close(of_rounded[:-1], added[:-1], 1e-4), "the test could not tell them apart"


def test_an_output_of_another_type_than_the_input(o_proj_store, make_runner):
    """As a router in float64 would have; it goes through the layer's own forward pass."""

    class Precise(ReplicatedLinear):
        def forward(self, x):
            return (x.double() @ self.weight.double().T, None)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDE, WIDE, generator=generator)
    layer = Precise(WIDE, WIDE, bias=False, params_dtype=torch.float32)
    layer.weight.data.copy_(weight)
    runner = make_runner(o_proj_store, OneLayer(layer)).load()
    x = torch.randn(N + 1, WIDE, generator=generator)
    requests, added = adapters_part(o_proj_store, x)
    begin(runner, requests)
    found = runner.model(x)
    assert found.dtype == torch.float64
    assert close(found, x.double() @ weight.double().T + added, 1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_two_streams_add_up_to_what_one_gives(dims, o_proj_store, make_runner, monkeypatch):
    """vLLM's own code for its second stream, in which the adapters' part comes alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDE, WIDE, generator=generator)
    layer = RowParallelLinear(WIDE, WIDE, bias=False, params_dtype=torch.float32)
    runner = make_runner(o_proj_store, OneLayer(fill(layer, weight))).load()
    wrapped = runner.model.model.layers[0].self_attn.o_proj
    x = torch.randn(N + 1, WIDE, generator=generator)
    requests, added = adapters_part(o_proj_store, x)
    begin(runner, requests)
    monkeypatch.setattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", True, raising=False)
    wrapped._events, wrapped._lora_stream = [None, None], None
    found = wrapped._apply_async_impl(x if dims == 2 else x[None])
    assert found.dim() == dims
    assert close(found.reshape(N + 1, WIDE), x.double() @ weight.double().T + added, 1e-5)


def test_a_head_that_two_workers_share_is_adapted_on_both(
    tmp_path, write_adapters, one_worker, monkeypatch
):
    """4 heads and one for keys and values on 2 workers: each has that one, and 2 of the others."""
    widths = {"q_proj": 24, "k_proj": 6, "v_proj": 6}
    shapes = {f"model.layers.0.self_attn.{name}": (HIDDEN, w) for name, w in widths.items()}
    folders = write_adapters(tmp_path / "adapters", N, shapes=shapes)
    settings = Settings(rank=3, store_dtype="float32")
    store = compress(read_adapters(folders), tmp_path / "store", settings)
    slices = [Slice(name, store.manifest.modules[store.module_index(name)]) for name in shapes]
    x = torch.randn(N, HIDDEN, generator=torch.Generator().manual_seed(0))
    whole = [
        torch.stack([deltas_of(store, name)[module] @ token.double() for name, token in pairs])
        for pairs in [list(zip(store.names, x, strict=True))]
        for module in shapes
    ]
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(linear, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        layer = linear.QKVParallelLinear(
            HIDDEN, 6, 4, 1, bias=False, params_dtype=torch.float32, prefix=f"of worker {rank}"
        )
        assert layer.num_kv_head_replicas == 2
        config = LoRAConfig(max_lora_rank=8, max_loras=1)
        config.lora_dtype = torch.float32
        wrapped = from_layer(layer, 0, config, list(widths))
        step = Step(torch.arange(N, dtype=torch.int32), active=True)
        pools, _ = layer_pools(store, wrapped, slices, step, max_loras=1, max_rank=8)
        y = torch.zeros(N, 24)
        pools.add_lora_linear(y, x)
        wanted = torch.cat([whole[0][:, 12 * rank : 12 * rank + 12], *whole[1:]], dim=1)
        assert close(y, wanted, 1e-5)
