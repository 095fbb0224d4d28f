"""Which slot each token of a step gets, from vLLM's ids of requests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.requests import store_path
from vllm_jd.plugin.worker.manager import ResidentLoRAManager
from vllm_jd.plugin.worker.step import Step

PATH = store_path("/s", 1)


@pytest.fixture
def manager():
    """A manager of a store in which adapter a<i> has index i and slot i; `looked_up`: names."""
    made = ResidentLoRAManager.__new__(ResidentLoRAManager)
    made.device = torch.device("cpu")
    made._slots = SimpleNamespace(take=lambda adapters: {a: a for a in adapters}, count=100)
    made._step = Step.make(16, made.device)
    made._slot_of_id, made._known = np.full(1, -1, dtype=np.int32), {}
    made._eagerly, made._compiled, made._eager_places = False, [], set()
    made.looked_up = []

    def index(request):
        made.looked_up.append(request.lora_name)
        return int(request.lora_name[1:])

    made._check_store_request = index
    return made


def slots(manager, requests, ids):
    mapping = SimpleNamespace(index_mapping=tuple(ids))
    manager.set_active_adapters(set(requests), mapping)
    found = manager._step.token_slots.tolist()
    assert set(found[len(ids) :]) <= {-1}, "tokens of the step before are left"
    return found[: len(ids)]


def test_ids_become_slots_and_a_step_leaves_nothing_to_the_next(manager):
    one, two, far = (LoRARequest(f"a{i}", i + 1, PATH) for i in (4, 5, 90))
    assert slots(manager, [one, two], [5, 0, 6, 5]) == [4, -1, 5, 4]
    assert slots(manager, [two], [5, 6]) == [-1, 5]
    # Ids that nobody has: below, at the end of and beyond those that were ever looked up.
    assert slots(manager, [far], [91, 92, 10_000, 0, 5]) == [90, -1, -1, -1, -1]
    assert slots(manager, [], [91]) == [-1]


def test_an_id_that_comes_to_stand_for_another_adapter_is_looked_up(manager):
    first, again = LoRARequest("a4", 1, PATH), LoRARequest("a7", 1, PATH)
    assert slots(manager, [first], [1]) == slots(manager, [first], [1]) == [4]
    assert manager.looked_up == ["a4"]
    assert slots(manager, [again], [1]) == [7]
    assert manager.looked_up == ["a4", "a7"]
