"""A small Llama that is asked and answers in words, adapters of it that are heard, and what
transformers and PEFT say of both."""

import json

import numpy as np

from tests.serving.conftest import write_wide_adapter
from tests.tiny_llama import write_tiny_llama, write_word_tokenizer


def write_word_llama(folder, words, **config):
    """Two layers with random weights, and a tokenizer of these words; answers end with `</s>`."""
    size = write_word_tokenizer(folder, words)
    write_tiny_llama(
        folder,
        layers=2,
        positions=512,
        vocab_size=size,
        bos_token_id=1,
        eos_token_id=1,
        **config,
    )


def write_loud_adapter(folder, model, seed):
    """A random adapter that says something else than the base model, in bfloat16 too."""
    write_wide_adapter(folder, model, seed=seed)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["lora_alpha"] *= 8
    settings["alpha_pattern"] = {k: 8 * a for k, a in settings["alpha_pattern"].items()}
    config.write_text(json.dumps(settings))


def losses(model, folder, items):
    """Of each (prompt, completion), token ids, the completion's loss by transformers and PEFT in
    float32; without a folder the base model's."""
    import torch

    tuned = _tuned(model, folder)
    found = []
    for prompt, completion in items:
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([prompt + completion])).logits[0]
        told = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(-float(told[range(len(completion)), completion].mean()))
    return np.array(found)


def likely_words(model, folder, prompts, count):
    """Of each prompt, token ids, the likeliest `count` next ones that are words."""
    import torch

    tuned = _tuned(model, folder)
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                logits = tuned(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(2 + int(logits[2:].argmax()))  # after <unk> and </s>
        found.append(ids[len(prompt) :])
    return found


def _tuned(model, folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return base if folder is None else PeftModel.from_pretrained(base, folder)
