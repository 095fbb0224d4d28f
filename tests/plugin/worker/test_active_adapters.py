"""Which slot each token of a step gets, from the ids that the engine gave its requests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from vllm_jd.plugin.placed import known_by, placed, slot_of
from vllm_jd.plugin.worker.manager import ResidentLoRAManager
from vllm_jd.plugin.worker.step import Step


@pytest.fixture
def manager():
    """A manager of 100 slots; `eager`: how each step was to be run."""
    made = ResidentLoRAManager.__new__(ResidentLoRAManager)
    made.device = torch.device("cpu")
    made._slots = SimpleNamespace(eager=np.arange(100) >= 90, keys=np.arange(100))
    made._step = Step.make(16, made.device)
    made.eager = []
    made._compiled = SimpleNamespace(run_eagerly=made.eager.append)
    made._logit_rows = SimpleNamespace(begin=lambda *_: None)
    return made


def slots(manager, requests, ids):
    mapping = SimpleNamespace(index_mapping=tuple(ids), prompt_mapping=tuple(ids))
    manager.set_active_adapters(set(requests), mapping)
    found = manager._step.token_slots.tolist()
    assert set(found[len(ids) :]) <= {-1}, "tokens of the step before are left"
    return found[: len(ids)]


def test_ids_are_slots_and_a_step_leaves_nothing_to_the_next(manager):
    one, two = placed("a", 4), placed("b", 5)
    assert slots(manager, [one, two], [5, 0, 6, 5]) == [4, -1, 5, 4]
    assert slots(manager, [two], [0, 6]) == [-1, 5]
    assert slots(manager, [], [0, 0]) == [-1, -1]


def test_two_versions_of_one_name_are_two_in_one_step(manager):
    """vLLM takes requests of one name for one: the engine's names say which version is meant."""
    old, new = placed("digest-1", 2), placed("digest-2", 7)
    assert len({old, new}) == 2
    assert slots(manager, [old, new], [3, 8, 3]) == [2, 7, 2]


def test_warm_up_has_no_slots_but_its_kernels_run(manager):
    """What a user may write is never taken for it, nor it for what a user wrote."""
    stand_ins = [LoRARequest(f"warmup_{i}", i, "/not/a/real/path") for i in (1, 2)]
    assert slots(manager, stand_ins, [1, 2, 1]) == [-1, -1, -1]
    assert manager._step.active
    assert slot_of(known_by("a")) is None and slot_of(placed("a", 0)) == 0
    slots(manager, [], [0])
    assert not manager._step.active


def test_steps_with_uploads_elsewhere_are_run_eagerly(manager):
    slots(manager, [placed("a", 4)], [5])
    slots(manager, [placed("a", 4), placed("up", 95)], [5, 96])
    slots(manager, [placed("a", 4)], [5])
    assert manager.eager == [False, True, False]
