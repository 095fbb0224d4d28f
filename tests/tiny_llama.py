"""A small Llama with random weights, which engines of the tests serve."""


def write_tiny_llama(folder, *, layers, positions=256, **config):
    """4 heads, 2 for keys and values, hidden size 128, 320 tokens; `config` overrides fields."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": positions,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields | config)).save_pretrained(folder)
