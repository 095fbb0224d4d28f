"""Small Llamas with random weights, which engines of the tests serve, and a tokenizer of words."""


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


def tiniest_llama():
    """A model in memory: two layers, hidden size 24, 32 tokens; what it says is far from even."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write_word_tokenizer(folder, words):
    """A tokenizer of these words, parted by spaces; `</s>` is 1. Returns how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(vocabulary)
