"""The order of a step's tokens, and what is left of the step before."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.plugin.worker import step as step_module
from vllm_jd.plugin.worker.step import Step

MOST, SLOTS = 24, 9


def made(monkeypatch):
    monkeypatch.setattr(step_module, "backend_name", lambda device: "triton")
    return Step.make(MOST, torch.device("cpu"))


def test_before_the_first_step_no_token_has_an_adapter(monkeypatch):
    step = made(monkeypatch)
    assert (step.token_slots == -1).all() and not step.active
    assert step.order.tolist() == list(range(MOST))
    assert Step.make(MOST, torch.device("cpu")).token_slots.tolist() == [-1] * MOST


def test_a_backend_without_an_order_gets_none():
    step = Step.make(MOST, torch.device("cpu"))
    step.begin(np.array([3, -1], dtype=np.int32), active=True)
    assert step.order is None
    assert step.token_slots.tolist() == [3, -1] + [-1] * (MOST - 2)


@settings(deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(-1, SLOTS - 1), max_size=MOST), min_size=1, max_size=4),
    clusters=st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS),
    padding=st.integers(0, MOST),
)
def test_every_order_groups_the_tokens_of_its_step(steps, clusters, padding):
    with pytest.MonkeyPatch.context() as monkeypatch:
        step = made(monkeypatch)
    address = step.token_slots.data_ptr(), step.order.data_ptr()
    keys = np.array(clusters, dtype=np.int64) * SLOTS + np.arange(SLOTS)
    for now in steps:
        slots = np.array(now, dtype=np.int32)
        step.begin(slots, keys[slots], active=True)
        assert (step.token_slots.data_ptr(), step.order.data_ptr()) == address
        assert step.token_slots.tolist() == now + [-1] * (MOST - len(now))
        # Graphs are padded: any number of tokens from the step's on is ordered within itself.
        n = max(len(now), padding)
        order = step.order[:n].tolist()
        assert sorted(order) == list(range(n))
        arranged = [(now + [-1] * MOST)[t] for t in order]
        used = [slot for slot in arranged if slot >= 0]
        assert arranged == used + [-1] * (n - len(used))
        for values in (used, [clusters[slot] for slot in used]):
            runs = sum(a != b for a, b in zip([None, *values], values, strict=False))
            assert runs == len(set(values)), "a slot, or a cluster, stands in two places"
