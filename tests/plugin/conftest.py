"""One worker of vLLM's, without an engine: its linear layers in a small model, and our manager."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_jd.plugin.config import KEY, PluginConfig
from vllm_jd.plugin.engine.adapters import EngineAdapters
from vllm_jd.plugin.placed import placed

HIDDEN, HEADS, HEAD, INNER, LAYERS = 24, 3, 8, 16, 2


@pytest.fixture(scope="session")
def one_worker(tmp_path_factory):
    """What vLLM's layers ask for when they are made: a configuration and a group of one worker."""
    folder = tmp_path_factory.mktemp("worker")
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


class Block(torch.nn.Module):
    """The linear layers of a Llama block."""

    def __init__(self, prefix):
        super().__init__()
        like = {"bias": False, "params_dtype": torch.float32}
        self.self_attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, 1, prefix=f"{prefix}.self_attn.qkv_proj", **like
        )
        self.self_attn.o_proj = RowParallelLinear(
            HIDDEN, HIDDEN, prefix=f"{prefix}.self_attn.o_proj", **like
        )
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], prefix=f"{prefix}.mlp.gate_up_proj", **like
        )
        self.mlp.down_proj = RowParallelLinear(
            INNER, HIDDEN, prefix=f"{prefix}.mlp.down_proj", **like
        )

    def forward(self, x):
        q, k, v = self.self_attn.qkv_proj(x)[0].split([HIDDEN, HEAD, HEAD], 1)
        x = x + self.self_attn.o_proj(q * torch.cat([k, v, k], 1).tanh())[0]
        gate, up = self.mlp.gate_up_proj(x)[0].chunk(2, 1)
        return x + self.mlp.down_proj(gate.tanh() * up)[0]


class TinyModel(torch.nn.Module, SupportsLoRA):
    """Blocks without attention: each token goes its own way."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules: ClassVar = {}
    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(Block(f"model.layers.{i}") for i in range(LAYERS))
        generator = torch.Generator().manual_seed(0)
        self.weights = {}
        for name, module in self.named_modules():
            if hasattr(module, "quant_method"):
                weight = torch.randn(module.weight.shape, generator=generator) / 5
                module.weight.data.copy_(weight)
                module.quant_method.process_weights_after_loading(module)
                self.weights[name] = weight.double()

    def forward(self, x):
        for block in self.model.layers:
            x = block(x)
        return x

    def expected(self, token, deltas):
        """What the model makes of one token `[d]` with its weights changed, in float64.

        `deltas`: module, as PEFT names it → `[d_out, d_in]`.
        """
        x = token.double()
        for i in range(LAYERS):

            def linear(name, parts, x, i=i):
                parent = f"model.layers.{i}.{name.rpartition('.')[0]}"
                weight = self.weights[f"model.layers.{i}.{name}"]
                pieces = weight.split([d_out for _, d_out in parts])
                return torch.cat(
                    [
                        (piece + deltas.get(f"{parent}.{part}", 0)) @ x
                        for piece, (part, _) in zip(pieces, parts, strict=True)
                    ]
                )

            qkv = [("q_proj", HIDDEN), ("k_proj", HEAD), ("v_proj", HEAD)]
            q, k, v = linear("self_attn.qkv_proj", qkv, x).split([HIDDEN, HEAD, HEAD])
            mixed = q * torch.cat([k, v, k]).tanh()
            x = x + linear("self_attn.o_proj", [("o_proj", HIDDEN)], mixed)
            both = [("gate_proj", INNER), ("up_proj", INNER)]
            gate, up = linear("mlp.gate_up_proj", both, x).chunk(2)
            x = x + linear("mlp.down_proj", [("down_proj", HIDDEN)], gate.tanh() * up)
        return x


SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HEAD),
        "self_attn.v_proj": (HIDDEN, HEAD),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (HIDDEN, INNER),
        "mlp.up_proj": (HIDDEN, INNER),
        "mlp.down_proj": (INNER, HIDDEN),
    }.items()
}
"""Module → (d_in, d_out) of all of TinyModel's."""


class Runner(LoRAModelRunnerMixin):
    """As much of a model runner as both of vLLM's have in common about LoRA."""

    def __init__(
        self, store, model, *, max_loras=4, uploads=8, graphs=CUDAGraphMode.NONE, **plugin
    ):
        self.lora_config = LoRAConfig(max_lora_rank=8, max_loras=max_loras, max_cpu_loras=64)
        self.lora_config.lora_dtype = torch.float32
        config = self._config = PluginConfig(store=str(store.path), max_loras=uploads, **plugin)
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=32),
            model_config=SimpleNamespace(
                get_vocab_size=lambda: 16,
                hf_config=SimpleNamespace(
                    get_text_config=lambda: SimpleNamespace(max_position_embeddings=64),
                    to_dict=dict,
                ),
                is_encoder_decoder=False,
                enable_prompt_embeds=False,
                model=store.manifest.base_model.name,
                dtype=torch.float32,
            ),
            lora_config=self.lora_config,
            compilation_config=SimpleNamespace(
                cudagraph_mode=graphs, max_cudagraph_capture_size=8, cudagraph_specialize_lora=True
            ),
            parallel_config=SimpleNamespace(use_ubatching=False),
            speculative_config=None,
            additional_config={KEY: config.model_dump(exclude_none=True)},
        )
        self.model = model

    def load(self):
        self.model = self.load_lora_model(self.model, self.vllm_config, torch.device("cpu"))
        self.adapters = EngineAdapters(self.vllm_config, self._config)
        self.model_executor = SimpleNamespace(collective_rpc=self._rpc)
        self.request_block_hasher = None
        self.adapters.connect(self)
        self._held = []
        return self

    def _rpc(self, method, args=(), non_block=False):
        """As vLLM's executor of one worker: what the workers answer, or a future of that."""
        answers = [method(SimpleNamespace(model_runner=self), *args)]
        if not non_block:
            return answers
        future = Future()
        future.set_result(answers)
        return future

    def add_lora(self, request):
        """As an EngineCore's calls about LoRAs, which the plugin replaces."""
        return self.adapters.add_lora(request)

    def remove_lora(self, lora_id):
        return self.adapters.remove_lora(lora_id)

    def pin_lora(self, lora_id):
        return self.adapters.pin_lora(lora_id)

    def list_loras(self):
        return self.adapters.list_loras()

    def hold(self, requests):
        """The LoRARequests of a step, each with its slot, as the scheduler makes them of what users
        ask for; who ran in the step before has ended."""
        for reference in self._held:
            self.adapters.release(reference)
        self._held, found = [], []
        for request in requests:
            if request is None:
                found.append(None)
                continue
            reference = self.adapters.resolve(request)
            slot = self.adapters.acquire(reference)
            assert slot is not None, "no room"
            self._held.append(reference)
            found.append(placed(reference.identity, slot))
        step = object()
        self.adapters.flush(step)
        assert not self.adapters.failed(step)
        return found

    def begin(self, requests, tokens=None):
        """Start a step of one token (or `tokens`) for each LoRARequest, or None."""
        found = self.hold(requests)
        ids = np.array([0 if request is None else request.lora_int_id for request in found])
        self._set_active_loras(
            tuple(ids.tolist()),
            tuple(ids.repeat(tokens or 1).tolist()),
            {request for request in found if request is not None},
        )

    def get_model(self):
        return self.model


@pytest.fixture
def make_runner(one_worker, monkeypatch):
    """(store, model, …) → a Runner with our manager, which its vLLM finds as the plugin says."""
    from vllm.model_executor.layers.fused_moe import layer as fused_moe
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker import lora_model_runner_mixin

    from vllm_jd.plugin import register

    monkeypatch.setattr(fused_moe, "FusedMoEConfig", fused_moe.FusedMoEConfig)

    monkeypatch.setattr(
        lora_model_runner_mixin,
        "LRUCacheWorkerLoRAManager",
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager,
    )
    monkeypatch.setattr(
        CpuPlatform,
        "check_and_update_config",
        classmethod(CpuPlatform.check_and_update_config.__func__),
    )
    register()
    return Runner
