"""The check of vLLM's attributes, and the one replacement."""

import pytest

pytest.importorskip("vllm")

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker import lora_model_runner_mixin

from vllm_jd.plugin import patches, register


def test_this_vllm_is_one_we_know():
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
    assert "0.32" in message
    assert "LRUCacheWorkerLoRAManager" not in message


class Config:
    """A VllmConfig, as far as the replaced functions look at it."""

    def __init__(self, **additional):
        self.additional_config = additional
        self.lora_config = "lora"


def test_without_a_store_vllms_own_is_done(monkeypatch):
    made, seen = [], []

    class Stock:
        def __init__(self, *args):
            made.append(args)

    def configure(cls, config):
        seen.append(config.lora_config)

    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", Stock)
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(configure))
    register()
    replaced = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
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


def test_an_unknown_vllm_is_left_alone(monkeypatch):
    monkeypatch.delattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
    register()
    assert not hasattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager")
