"""Tasks as `train_adapters.py` reads them, and how well an engine does one.

An item is answered greedily; its answer is compared with the target by Rouge-L and Rouge-1
(F-measures, as the paper's tables have them) and exactly, and the loss is the mean of the target's
tokens, the end-of-sequence token among them, from the served model's own log-probabilities.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_jd.evaluate.engine import answers
from vllm_jd.evaluate.metrics import Score, Scorer
from vllm_jd.evaluate.questions import Question

MAX_NEW = 48
MOST_TOKENS = 400  # of prompt and target; longer items are left out


@dataclass(frozen=True)
class Item:
    """One instance of a task, as text and as token ids. `target` ends with end-of-sequence."""

    answer: str
    prompt: list[int]
    target: list[int]


def read_items(file: Path, split: str, most: int, tokenizer: Any, seed: int = 0) -> list[Item]:
    """Up to `most` items of a split, chosen by the seed; of inputs that are asked twice the first.

    Raises:
        ValueError: there is none.
    """
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    seen: dict[str, dict[str, str]] = {}
    for line in lines:
        if line["split"] == split:
            seen.setdefault(line["input"], line)
    chosen = list(seen.values())
    random.Random(seed).shuffle(chosen)
    found = []
    for line in chosen:
        prompt = tokenizer(f"Input: {line['input']}\nOutput:").input_ids
        target = [*tokenizer(f" {line['output']}").input_ids, tokenizer.eos_token_id]
        if len(prompt) + len(target) <= MOST_TOKENS:
            found.append(Item(line["output"], prompt, target))
    if not found:
        raise ValueError(f"{file}: found no items of the split {split!r}")
    return found[:most]


def engine(model: str, store: str, *, dtype: str = "float32", **options: Any) -> Any:
    """vLLM's offline engine on a store, for `scores`; `options` are `vllm.LLM`'s."""
    from vllm import LLM

    from vllm_jd.serve import engine_args

    return LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=MOST_TOKENS + MAX_NEW,
        enable_prefix_caching=False,  # a cached prompt has no log-probabilities
        **engine_args(store, max_num_seqs=64, max_blend=8),
        **options,
    )


def scores(llm: Any, items: Sequence[Item], requests: Sequence[Any]) -> list[Score]:
    """What an engine makes of items, each asked with its LoRARequest (None: the base model)."""
    scorer = Scorer()
    asked = [Question(item.prompt, item.prompt, item.target) for item in items]
    found = []
    for item, answer in zip(items, answers(llm, asked, requests, MAX_NEW), strict=True):
        if answer.failed:
            raise RuntimeError(answer.failed)
        found.append(scorer.score(item.answer, answer.said, answer.loss))
    return found


def mean(values: Sequence[Score]) -> dict[str, float]:
    """The mean of each figure."""
    return {
        name: round(sum(getattr(value, name) for value in values) / len(values), 4)
        for name in ("rouge_l", "exact", "loss")
    }
