"""The families of models that are tried: for each a tiny random model with the real head layout."""

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

_SIZES = {
    "vocab_size": 49152,  # SmolLM2's
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: what people call it.
        model: its class in transformers.
        config: what its configuration has besides, or otherwise than, the common sizes.
        attention: the last part of the names of layers that adapters of attention adapt.
        mlp: of those that others adapt.
        heads: what one adapter and the upload adapt besides: output layer and embedding.
        experts: weights of all experts in one, as transformers has them, that those adapt which
            others' adapters adapt the MLP with.
        text: of a vision-language wrapper the class of its language model's configuration; `config`
            is that of the language model then.
        wrapper: the rest of a wrapper's configuration.
        dtype: of the engine, where vLLM has no float32 for the family on CPU.
        workers: how many engines of so many workers it is served by, too.
        cannot: words of the message with which vLLM itself refuses to serve adapters of the family
            on CPU.
    """

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = GATED
    heads: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    text: str = ""
    wrapper: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    workers: tuple[int, ...] = (1,)
    cannot: str = ""

    @property
    def sizes(self) -> dict[str, Any]:
        """The configuration of the language model."""
        return _SIZES | self.config


FAMILIES = (
    Family(
        "Llama 3",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        heads=("lm_head", "embed_tokens"),
        workers=(1, 2),
    ),
    Family("Mistral", "MistralForCausalLM", {"sliding_window": 16}),
    Family(
        "Ministral 3",
        "Ministral3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    Family("Qwen 2.5", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, workers=(1, 2)),
    Family(
        "Qwen 3",
        "Qwen3ForCausalLM",
        {"head_dim": 64, "tie_word_embeddings": True},
        heads=("lm_head", "embed_tokens"),
    ),
    Family(
        "Qwen 3.5",
        "Qwen3_5ForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        attention=(
            *ATTENTION,
            *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        ),
        dtype="bfloat16",
    ),
    Family(
        "Qwen 3 MoE",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        mlp=(),
        heads=("embed_tokens",),
        experts=EXPERTS,
        workers=(1, 2),
    ),
    Family("Mixtral", "MixtralForCausalLM", {"num_local_experts": 4}, mlp=(), experts=EXPERTS),
    Family(
        "OLMoE",
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2},
        mlp=(),
        experts=EXPERTS,
    ),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        mlp=(),
        experts=EXPERTS,
    ),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "sliding_window": 16,
        },
        heads=("lm_head", "embed_tokens"),
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        heads=("embed_tokens",),
    ),
    Family(
        "Phi 3, Phi 4",
        "Phi3ForCausalLM",
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        workers=(1, 2),
    ),
    Family("OLMo 2", "Olmo2ForCausalLM"),
    Family(
        "Granite 3",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.25,
            "tie_word_embeddings": True,
        },
        heads=("lm_head",),
    ),
    Family(
        "Falcon 3",
        "LlamaForCausalLM",
        {
            "hidden_size": 192,
            "num_attention_heads": 6,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0},
        },
    ),
    Family(
        "GLM 4",
        "Glm4ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        mlp=("gate_up_proj", "down_proj"),
    ),
    Family("StableLM", "StableLmForCausalLM", {"use_qkv_bias": True}, cannot="LoRA"),
    Family("StarCoder 2", "Starcoder2ForCausalLM", mlp=("c_fc", "c_proj")),
    Family(
        "Qwen 2.5 VL",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        text="Qwen2_5_VLTextConfig",
        wrapper={
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 1,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
    ),
    Family(
        "Gemma 3 with images",
        "Gemma3ForConditionalGeneration",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        text="Gemma3TextConfig",
        wrapper={
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "boi_token_index": 3,
            "eoi_token_index": 4,
            "image_token_index": 5,
        },
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        heads=("embed_tokens",),
        text="LlamaConfig",
        wrapper={
            "vision_config": _VISION
            | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32},
            "image_token_index": 3,
            "image_seq_length": 4,
        },
    ),
)
