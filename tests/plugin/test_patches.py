"""The check of vLLM's attributes, and the replacements of a process."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import layer as fused_moe
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker import lora_model_runner_mixin

from vllm_jd.plugin import install, on_objects, patches, register
from vllm_jd.plugin.worker.compiled import CompiledModel

ENGINE_CALLS = ("preprocess_add_request", "add_lora", "remove_lora", "pin_lora", "list_loras")


def test_this_vllm_is_one_we_know():
    patches.check_vllm()


def test_so_is_one_in_which_ours_have_been_put(monkeypatch):
    """The check runs in a worker, after `install`."""
    for owner, name in (
        (lora_model_runner_mixin, "LRUCacheWorkerLoRAManager"),
        (CpuPlatform, "check_and_update_config"),
        (fused_moe, "FusedMoEConfig"),
        *((EngineCore, name) for name in ENGINE_CALLS),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    register()
    patches.check_vllm()


def test_every_missing_or_changed_attribute_is_named(monkeypatch):
    import vllm.lora.utils

    monkeypatch.delattr(vllm.lora.utils, "from_layer")
    monkeypatch.setattr(vllm.lora.utils, "is_in_target_modules", lambda name: True)
    with pytest.raises(patches.UnsupportedVllm) as caught:
        patches.check_vllm()
    message = str(caught.value)
    assert "vllm.lora.utils:from_layer: missing" in message
    assert "vllm.lora.utils:is_in_target_modules: found parameters ('name',)" in message
    assert "tried with vLLM 0.32.0 (run, on CPU) and 0.33.0" in message
    assert "vllm>=0.32,<0.34" in message
    assert "LRUCacheWorkerLoRAManager" not in message


def test_attributes_of_objects_are_looked_for_too(monkeypatch):
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    def init(self):
        self.gauge = None

    def load(self, lora_request):
        return self._adapter_manager.another(lora_request)

    monkeypatch.setattr(PrometheusStatLogger, "__init__", init)
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", load)
    with pytest.raises(patches.UnsupportedVllm) as caught:
        patches.check_vllm()
    faults = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(faults) == 2
    assert "__init__ sets no 'gauge_lora_info'" in faults[0]
    assert "reads self._adapter_manager.another, which ours lacks" in faults[1]


def test_what_vllm_reads_from_ours_is_there():
    from vllm_jd.plugin.worker.manager import ResidentLoRAManager, _LoaderView

    for (_, name), read in patches.READ_FROM_OURS.items():
        for attribute in read:
            if name == "self.lora_manager":
                assert hasattr(ResidentLoRAManager, attribute)
            if name == "self._adapter_manager" and attribute.startswith("_validate"):
                assert hasattr(_LoaderView, attribute)


def test_the_table_of_replacements_is_whole():
    """Each is checked at the start, and each is listed once; `test_metrics` has the other half."""
    where = [each.where for each in patches.REPLACEMENTS]
    assert len(set(where)) == len(where)
    for each in patches.REPLACEMENTS:
        module, _, attribute = each.where.rpartition(".")
        set_by_init = patches.SET_BY_INIT.get(module, ())
        if attribute != "do_not_compile":  # set where a model is compiled, read with a default
            assert each.where in patches.EXPECTED or attribute in set_by_init, each.where
        assert each.why and each.without_store


class Config:
    """A VllmConfig, as far as the replaced functions look at it."""

    def __init__(self, **additional):
        self.additional_config = additional
        self.lora_config = "lora"
        self.device_config = SimpleNamespace(device_type="cpu")


def test_without_a_store_vllms_own_is_done(monkeypatch):
    made, seen = [], []

    class Stock:
        def __init__(self, *args):
            made.append(args)

    def configure(cls, config):
        seen.append(config.lora_config)

    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", Stock)
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(configure))
    monkeypatch.setattr(fused_moe, "FusedMoEConfig", dict)
    for name in ENGINE_CALLS:
        monkeypatch.setattr(EngineCore, name, lambda self, *args, name=name: (name, *args))
    register()
    calls = [getattr(EngineCore, name) for name in ENGINE_CALLS]
    replaced = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    in_process = {each.where for each in patches.REPLACEMENTS if each.on == "process"}
    assert in_process == {
        "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        "vllm.model_executor.layers.fused_moe.layer:FusedMoEConfig",
        *(f"vllm.v1.engine.core:EngineCore.{name}" for name in ENGINE_CALLS),
    }
    register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is replaced, "twice is harmless"
    config = Config()
    assert isinstance(replaced(config, "cpu", {}), Stock)
    assert made == [(config, "cpu", {})]
    CpuPlatform.check_and_update_config(config)
    assert seen == ["lora"], "without a store the stock configuration sees LoRA"
    config = Config(vllm_jd={"store": "/s"})
    CpuPlatform.check_and_update_config(config)
    assert seen == ["lora", None], "with one it does not, and leaves torch.compile on"
    assert config.lora_config == "lora"
    assert calls == [getattr(EngineCore, name) for name in ENGINE_CALLS], "twice is harmless"
    core = EngineCore.__new__(EngineCore)
    core.scheduler = object()
    for name in ENGINE_CALLS:
        assert getattr(core, name)("it") == (name, "it")


def test_experts_are_those_without_lora_where_there_is_a_store(monkeypatch):
    monkeypatch.setattr(fused_moe, "FusedMoEConfig", dict)
    monkeypatch.setattr(fused_moe, "get_current_vllm_config", lambda: config)
    register()
    made = fused_moe.FusedMoEConfig
    register()
    assert fused_moe.FusedMoEConfig is made, "twice is harmless"
    config = Config()
    assert made(top_k=2, is_lora_enabled=True) == {"top_k": 2, "is_lora_enabled": True}
    config = Config(vllm_jd={"store": "/s"})
    monkeypatch.setattr(install, "adapts_experts", lambda config: config.store == "/experts")
    for store in ("/s", "/experts"):
        config = Config(vllm_jd={"store": store})
        for device in ("cpu", "cuda"):
            config.device_config = SimpleNamespace(device_type=device)
            asked = made(top_k=2, is_lora_enabled=True)
            lora = store == "/experts" and device == "cuda"
            assert asked == {"top_k": 2, "is_lora_enabled": lora}, (store, device)


def test_logits_are_told_before_and_after_they_are_computed():
    said = []

    class Processor:
        def _get_logits(self, hidden_states, lm_head, embedding_bias, skip_gather):
            said.append("computed")
            return None if lm_head == "elsewhere" else f"logits of {hidden_states}"

    class Model:
        def __init__(self):
            self.processor, self.head = Processor(), "here"

        def compute_logits(self, hidden_states):
            return self.processor._get_logits(f"{hidden_states} / 2", self.head)

    model = Model()
    on_objects.replace_logits(
        model,
        model.processor,
        lambda hidden_states: said.append(("before", hidden_states)),
        lambda logits, hidden_states: said.append((logits, hidden_states)),
    )
    assert model.compute_logits("x") == "logits of x / 2"
    assert said == [("before", "x"), "computed", ("logits of x / 2", "x / 2")]
    said.clear()
    model.head = "elsewhere"
    assert model.compute_logits("x") is None, "another worker has them"
    assert said == [("before", "x"), "computed"]
    said.clear()
    model.processor._get_logits("x", "here", None, True)
    assert said == ["computed"], "a part of the vocabulary"


def test_calls_about_adapters_go_to_a_scheduler_of_ours(monkeypatch):
    """Which is given the core at the first of them, whichever that is."""
    for name in ENGINE_CALLS:
        monkeypatch.setattr(EngineCore, name, lambda self, *args, name=name: ("stock", name, *args))
    register()
    adapters = SimpleNamespace(
        **{name: lambda *args, name=name: ("ours", name, *args) for name in ENGINE_CALLS[1:]}
    )
    given = []
    core = EngineCore.__new__(EngineCore)
    core.scheduler = SimpleNamespace(connected_to=lambda core: given.append(core) or adapters)
    assert core.preprocess_add_request("it") == ("stock", "preprocess_add_request", "it")
    for name in ENGINE_CALLS[1:]:
        assert getattr(core, name)("it") == ("ours", name, "it")
    assert given == [core] * len(ENGINE_CALLS)


def test_a_request_is_named_before_its_blocks_are_hashed():
    said = []
    core = SimpleNamespace(request_block_hasher=lambda request: said.append(("hashed", request)))
    on_objects.replace_block_hasher(core, lambda request: said.append(("named", request)))
    core.request_block_hasher("it")
    assert said == [("named", "it"), ("hashed", "it")]
    without = SimpleNamespace(request_block_hasher=None)
    on_objects.replace_block_hasher(without, said.append)
    assert without.request_block_hasher is None, "no prefix cache"


def test_what_is_compiled_is_left_out_only_while_a_step_asks_for_it():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.nn.ReLU())
    model[0].do_not_compile, model[1].do_not_compile = False, True
    compiled = CompiledModel(model)
    for eagerly in (True, True, False, False):
        compiled.run_eagerly(eagerly)
        assert (model[0].do_not_compile, model[1].do_not_compile) == (eagerly, True)


def test_an_unknown_vllm_is_left_alone(monkeypatch):
    monkeypatch.delattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
    register()
    assert not hasattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
