"""The output layer: which adapter each row of logits has, and what it adds."""

import pytest

pytest.importorskip("vllm")

import numpy as np
import torch

from tests.plugin.worker.layer_pools import layer_pools
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.worker.layer import Slice
from vllm_jd.plugin.worker.output import LogitRows, OutputLayer, WholeLayer
from vllm_jd.plugin.worker.step import Step

D, VOCABULARY, N = 16, 40, 3
TOKENS = np.array([0, 0, 0, -1, 1, 1, 2], dtype=np.int32)
SAMPLES = np.array([0, -1, 1, 2], dtype=np.int32)


def slots_of(rows, n):
    return rows.step.token_slots[:n].tolist()


@pytest.fixture
def rows():
    rows = LogitRows(Step.make(32, torch.device("cpu")))
    rows.begin(TOKENS, SAMPLES, np.zeros(8, dtype=np.int64))
    return rows


def test_rows_that_are_gathered_are_sampled_after(rows):
    hidden_states = torch.randn(9, D)  # two more than there are tokens
    rows.find(hidden_states[torch.tensor([2, 3, 5, 6])])
    assert slots_of(rows, 6) == [0, -1, 1, 2, -1, -1]


@pytest.mark.parametrize(("first", "last"), [(0, 2), (0, 4), (3, 4), (2, 6), (4, 5), (0, 7)])
def test_rows_of_the_models_output_are_the_tokens_that_lie_there(rows, first, last):
    rows.find(torch.randn(7, D)[first:last])
    assert slots_of(rows, last - first) == TOKENS[first:last].tolist()


def test_of_one_request_alone_all_rows_are_its_own():
    rows = LogitRows(Step.make(32, torch.device("cpu")))
    rows.begin(np.full(5, 1, dtype=np.int32), np.full(1, 1, dtype=np.int32), np.zeros(8))
    rows.find(torch.randn(5, D))
    assert slots_of(rows, 6) == [1, 1, 1, 1, 1, -1]


def test_more_rows_than_a_step_has_are_nobodys(rows):
    """A warm-up run of the sampler, before or after a step."""
    rows.find(torch.randn(12, D))
    assert slots_of(rows, 12) == [*TOKENS.tolist(), *[-1] * 5]


def test_each_row_gets_its_adapter(rows, tmp_path, write_adapters):
    """Where the logits are a part of a wider tensor, as those of a padded vocabulary are."""
    folders = write_adapters(tmp_path / "in", N, shapes={"lm_head": (D, VOCABULARY)})
    settings = Settings(rank=12, store_dtype="float32")
    store = compress(read_adapters(folders), tmp_path / "store", settings)
    slices = [Slice("lm_head", store.manifest.modules[0])]
    layer = WholeLayer(D, (VOCABULARY,))
    pools, _ = layer_pools(store, layer, slices, rows.step, max_loras=1, max_rank=4)
    output = OutputLayer(pools, rows)
    hidden_states = torch.randn(7, D)
    padded = torch.randn(7, VOCABULARY + 24)
    before = padded.clone()
    output.before(hidden_states[1:])
    output.add(padded[1:, :VOCABULARY], hidden_states[1:])
    expected = before.double()
    for token, slot in enumerate(TOKENS.tolist()):
        if token > 0 and slot >= 0:
            b, a = store.factors(store.names[slot])["lm_head"]
            expected[token, :VOCABULARY] += b.double() @ a.double() @ hidden_states[token].double()
    torch.testing.assert_close(padded.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(padded[1:4], before[1:4])
