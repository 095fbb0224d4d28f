"""Which layer of vLLM's model a store's module is, with vLLM's own tables."""

import pytest

pytest.importorskip("vllm")

from vllm.model_executor.models.paligemma import PaliGemmaForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper

from vllm_jd.plugin.worker.wrap_names import layer_columns

Q = "layers.0.self_attn.q_proj"
PALIGEMMA = PaliGemmaForConditionalGeneration.hf_to_vllm_mapper
QWEN = WeightsMapper(
    orig_to_new_prefix={
        "model.language_model.": "language_model.model.",
        "model.": "language_model.model.",
    }
)


def test_modules_get_vllms_names_and_keep_their_places():
    modules = [f"model.{Q}", "model.layers.1.mlp.down_proj"]
    assert layer_columns(modules, None) == {modules[0]: 0, modules[1]: 1}
    assert layer_columns([f"model.language_model.{Q}"], PALIGEMMA) == {
        f"language_model.model.{Q}": 0
    }


@pytest.mark.parametrize(
    ("mapper", "one", "other"),
    [
        (None, f"model.{Q}", f"base_model.model.model.{Q}"),
        (PALIGEMMA, f"model.language_model.{Q}", f"language_model.model.{Q}"),
        (QWEN, f"model.language_model.{Q}", f"model.{Q}"),
    ],
)
def test_two_modules_of_one_layer_are_refused_with_both(mapper, one, other):
    for pair in ([one, other], [other, one]):
        with pytest.raises(ValueError, match="one layer of the served model") as caught:
            layer_columns([*pair, "model.layers.9.x"], mapper)
        assert f"{pair[0]} and {pair[1]}, which" in str(caught.value)
