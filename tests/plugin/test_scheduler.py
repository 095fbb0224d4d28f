"""Requests wait for a place among the uncompressed adapters, and only those."""

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from vllm_jd.plugin.requests import store_path
from vllm_jd.plugin.scheduler import _UncompressedLimit

LIMIT = 2


@dataclass(eq=False)
class Request:
    number: int
    kind: int
    lora_request: LoRARequest | None


class Stock:
    """The stock scheduler's queues; a step starts as many waiting requests as there is room for."""

    def __init__(self, **kwargs):
        self.waiting = FCFSRequestQueue()
        self.kv_holding_waiting = FCFSRequestQueue()
        self.running = []
        self.room = 4

    def schedule(self, throttle_prefills=False):
        while self.waiting and len(self.running) < self.room:
            self.running.append(self.waiting.pop_request())
        return [request.number for request in self.running]


class Scheduler(_UncompressedLimit, Stock):
    pass


def make_scheduler():
    config = {"vllm_jd": {"store": "/s", "max_loras": LIMIT}}
    return Scheduler(vllm_config=SimpleNamespace(additional_config=config))


def request(number, kind):
    """kind 0: base model, positive: a compressed adapter, negative: an uncompressed one."""
    lora = None
    if kind:
        path = store_path("/s", 1) if kind > 0 else f"/peft/{kind}"
        lora = LoRARequest(f"adapter{kind}", abs(kind), path)
    return Request(number, kind, lora)


def uncompressed(requests):
    return {request.kind for request in requests if request.kind < 0}


def test_compressed_adapters_are_never_held_back():
    scheduler = make_scheduler()
    for number in range(4):
        scheduler.waiting.add_request(request(number, number + 1))
    assert scheduler.schedule() == [0, 1, 2, 3]


def test_the_third_uncompressed_adapter_waits_and_others_pass_it():
    scheduler = make_scheduler()
    for number, kind in enumerate([-1, -2, -3, 5, -1]):
        scheduler.waiting.add_request(request(number, kind))
    assert scheduler.schedule() == [0, 1, 3, 4]
    assert [r.number for r in scheduler.waiting] == [2]
    scheduler.running = [r for r in scheduler.running if r.kind != -2]
    assert 2 in scheduler.schedule(), "it goes as soon as a place is free"


@given(st.lists(st.integers(-5, 3), max_size=40), st.randoms(use_true_random=False))
def test_nobody_starves_is_lost_or_overcommitted(kinds, rng):
    scheduler = make_scheduler()
    arrivals = deque(request(number, kind) for number, kind in enumerate(kinds))
    done = set()
    for _ in range(4 * len(kinds) + 4):
        for _ in range(rng.randint(0, 3)):
            if arrivals:
                scheduler.waiting.add_request(arrivals.popleft())
        scheduler.schedule()
        assert len(uncompressed(scheduler.running)) <= LIMIT
        if scheduler.running:
            finished = scheduler.running.pop(rng.randrange(len(scheduler.running)))
            done.add(finished.number)
    while arrivals or scheduler.waiting or scheduler.running:
        if arrivals:
            scheduler.waiting.add_request(arrivals.popleft())
        scheduler.schedule()
        assert scheduler.running, "nothing runs although something waits"
        done.add(scheduler.running.pop(0).number)
    assert done == set(range(len(kinds)))
