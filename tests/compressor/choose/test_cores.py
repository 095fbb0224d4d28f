"""Batches of examples, and their loss, against one example at a time."""

import random
from itertools import chain

import pytest
import torch

from tests.tiny_llama import tiniest_llama
from vllm_jd.compressor.choose.cores import batches, length, mean_loss, summed_loss
from vllm_jd.compressor.choose.examples import Example


def test_batches_hold_everything_once_within_their_bound():
    examples = [Example([0] * (1 + n % 17), [1]) for n in range(100)]
    examples.append(Example([0] * 80, [1]))
    found = batches(examples, 40, random.Random(0))
    assert sorted(map(id, chain(*found))) == sorted(map(id, examples))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(map(length, batch)) <= 40
    padded = sum(len(batch) * max(map(length, batch)) for batch in found)
    assert padded < 1.2 * sum(map(length, examples))
    assert batches(examples, 40, random.Random(0)) == found
    assert batches(examples, 40, random.Random(1)) != found


def test_the_loss_of_a_padded_batch_is_that_of_its_examples():
    model = tiniest_llama()
    rng = random.Random(0)
    examples = [
        Example(*([rng.randrange(32) for _ in range(rng.randint(1, 9))] for _ in range(2)))
        for _ in range(7)
    ]
    expected = []
    for each in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([each.prompt + each.completion])).logits[0]
        told = logits[len(each.prompt) - 1 : -1].double().log_softmax(-1)
        expected.append(-float(told[range(len(each.completion)), each.completion].sum()))
    with torch.no_grad():
        assert float(summed_loss(model, examples)) == pytest.approx(sum(expected), rel=1e-5)
    tokens = sum(len(each.completion) for each in examples)
    for at_once in (1, 20, 1000):
        assert mean_loss(model, examples, at_once) == pytest.approx(
            sum(expected) / tokens, rel=1e-5
        )
