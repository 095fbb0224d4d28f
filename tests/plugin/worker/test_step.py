"""The order of a step's tokens, and what is left of the step before."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.kernels import tiles
from vllm_jd.plugin.worker import step as step_module
from vllm_jd.plugin.worker.step import Step

MOST, SLOTS = 24, 9


def made(monkeypatch):
    monkeypatch.setattr(step_module, "backend_name", lambda device: "triton")
    return Step.make(MOST, torch.device("cpu"))


def test_before_the_first_step_no_token_has_an_adapter(monkeypatch):
    step = made(monkeypatch)
    assert (step.token_slots == -1).all() and not step.active
    assert (step.order == -1).all()
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
def test_every_order_gives_each_cluster_tiles_of_its_own(steps, clusters, padding):
    with pytest.MonkeyPatch.context() as monkeypatch:
        step = made(monkeypatch)
    address = step.token_slots.data_ptr(), step.order.data_ptr()
    keys = tiles.keys_of(np.array(clusters), np.arange(SLOTS))
    for now in steps:
        slots = np.array(now, dtype=np.int32)
        step.begin(slots, keys[slots], active=True)
        assert (step.token_slots.data_ptr(), step.order.data_ptr()) == address
        assert step.token_slots.tolist() == now + [-1] * (MOST - len(now))
        # Graphs are padded: a call of more tokens than the step has finds them all, too.
        n = max(len(now), padding)
        order = step.order[: tiles.places(n)]
        assert sorted(order[order >= 0].tolist()) == [t for t, slot in enumerate(now) if slot >= 0]
        for tile in order.view(-1, tiles.tile_of(n)).tolist():
            used = [now[t] for t in tile if t >= 0]
            assert len({clusters[slot] for slot in used}) <= 1
            runs = sum(a != b for a, b in zip([None, *used], used, strict=False))
            assert runs == len({*used}), "a slot stands in two places"
