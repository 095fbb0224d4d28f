"""Prompts turned into tokens as a server would."""

from typing import Any

from vllm_jd.compressor.errors import ModelError

Message = dict[str, Any]
Prompt = str | list[Message]
"""Text as it stands, or chat messages for the model's chat template."""


def encode(prompts: list[Prompt], tokenizer: Any, max_tokens: int | None) -> list[list[int]]:
    """The first `max_tokens` token ids of each prompt; special tokens as a server adds them.

    Args:
        prompts: see `Prompt`.
        tokenizer: transformers' one of the model.
        max_tokens: of each prompt; None: all.

    Raises:
        ModelError: the model has no chat template for messages, or it refuses them.
    """
    from jinja2 import TemplateError  # what chat templates are written in; torch brings it along

    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            try:
                text = tokenizer.apply_chat_template(
                    prompt,
                    tokenize=False,
                    add_generation_prompt=prompt[-1]["role"] != "assistant",
                )
            except (ValueError, TypeError, KeyError, TemplateError) as error:
                why = str(error).strip() or type(error).__name__
                raise ModelError(
                    f"prompt {number}: the model's chat template cannot be applied to its "
                    f"messages: {why.splitlines()[0]}"
                ) from None
            # The template writes the special tokens itself.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        encoded.append(ids[:max_tokens])
    return encoded
