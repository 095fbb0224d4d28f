"""Requests wait for a place among the uncompressed adapters, and only those.

With a window, requests whose cluster is in the batch go first.
"""

from collections import Counter, deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import RequestStatus

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request, store_path
from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.scheduler import _Admission
from vllm_jd.serve import ServeError, engine_args
from vllm_jd.serve.server import _check_policy
from vllm_jd.store import Store

LIMIT = 2


@dataclass(eq=False)
class Request:
    number: int
    kind: int
    lora_request: LoRARequest | None
    status: RequestStatus = RequestStatus.WAITING


class Stock:
    """The stock scheduler's queues; a step starts as many waiting requests as there is room for.

    Requests in `blocked` cannot start yet and are skipped; those in `preempt` lose their place.
    """

    def __init__(self, **kwargs):
        self.waiting = FCFSRequestQueue()
        self.kv_holding_waiting = FCFSRequestQueue()
        self.running = []
        self.max_num_running_reqs = 4
        self.blocked = set()
        self.preempt = []

    def add_request(self, request):
        self.waiting.add_request(request)

    def schedule(self, throttle_prefills=False):
        for request in self.preempt:
            self.running.remove(request)
            request.status = RequestStatus.PREEMPTED
            self.waiting.prepend_request(request)
        skipped = []
        while not self.preempt and self.waiting and len(self.running) < self.max_num_running_reqs:
            request = self.waiting.pop_request()
            if request.number in self.blocked:
                skipped.append(request)
                continue
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        self.waiting.prepend_requests(reversed(skipped))
        self.preempt = []
        return [request.number for request in self.running]


class Scheduler(_Admission, Stock):
    pass


STORE = {}


@pytest.fixture(scope="module", autouse=True)
def served(clustered):
    """What `make_scheduler` serves, where a test says nothing else."""
    STORE["store"] = str(clustered[0].path)


def make_scheduler(policy="fcfs", **options):
    config = {"vllm_jd": STORE | {"max_loras": LIMIT} | options}
    return Scheduler(
        vllm_config=SimpleNamespace(
            additional_config=config,
            scheduler_config=SimpleNamespace(policy=policy, max_num_seqs=4),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
        )
    )


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


def test_whoever_is_held_back_keeps_its_turn():
    scheduler = make_scheduler()
    for number, kind in enumerate([-1, -2, 1, 1]):
        scheduler.waiting.add_request(request(number, kind))
    scheduler.schedule()
    for number, kind in enumerate([7, -3, 8], start=4):
        scheduler.waiting.add_request(request(number, kind))
    scheduler.schedule()
    assert [r.number for r in scheduler.waiting] == [4, 5, 6], "nobody started, nobody is passed"


@pytest.fixture(scope="module")
def clustered(tmp_path_factory, write_adapters):
    """Six compressed adapters in three clusters. Returns the store and the cluster of each."""
    folder = tmp_path_factory.mktemp("clustered")
    write_adapters(folder / "adapters", 6, kind="real")
    collection = read_adapters([folder / "adapters"])
    store = compress(collection, folder / "store", Settings(rank=2, clusters=3))
    return store, {name: int(store.chosen[i, 0, 0]) for i, name in enumerate(store.names)}


def named(number, store, name):
    """A request for one of a store's adapters, or for another that lies in a folder, or none."""
    if name is None:
        return Request(number, 0, None)
    if name not in store:
        return Request(number, -1, LoRARequest(name, 99, "/peft/" + name))
    return Request(number, 1, adapter_request(store, name))


def test_with_a_window_the_cluster_in_the_batch_goes_first(clustered):
    store, cluster = clustered
    alike = [name for name in store.names if cluster[name] == cluster[store.names[0]]]
    other = next(name for name in store.names if name not in alike)
    for window, expected in ((0, [0, 1, 2, 3]), (2, [0, 3, 1, 2])):
        scheduler = make_scheduler(store=str(store.path), cluster_window=window)
        names = [alike[0], other, other, alike[-1], "folder"]
        scheduler.waiting.add_request(named(0, store, names[0]))
        scheduler.schedule()
        for number, name in enumerate(names[1:], start=1):
            scheduler.waiting.add_request(named(number, store, name))
        assert scheduler.schedule() == expected
        assert [r.number for r in scheduler.waiting] == [4]


def test_a_preempted_request_is_not_overtaken(clustered):
    store, cluster = clustered
    first = store.names[0]
    other = next(name for name in store.names if cluster[name] != cluster[first])
    scheduler = make_scheduler(store=str(store.path), cluster_window=8)
    for number, name in enumerate([first, first, first, other, first]):
        scheduler.waiting.add_request(named(number, store, name))
    scheduler.schedule()
    assert [r.number for r in scheduler.running] == [0, 1, 2, 4]
    scheduler.running.pop()
    scheduler.schedule()
    scheduler.preempt = [scheduler.running[3]]
    scheduler.waiting.add_request(named(5, store, first))
    assert scheduler.schedule() == [0, 1, 2]
    assert [r.number for r in scheduler.waiting] == [3, 5]
    assert scheduler.schedule() == [0, 1, 2, 3]


def test_a_window_and_the_priority_policy_are_refused_together(clustered):
    store, _ = clustered
    with pytest.raises(ValueError, match=r"cluster_window 8 cannot be used .* 'priority'"):
        make_scheduler("priority", store=str(store.path), cluster_window=8)
    make_scheduler("priority", store=str(store.path))


@pytest.mark.parametrize(
    "given", [["--scheduling-policy", "priority"], ["--scheduling_policy=priority"]]
)
def test_the_serve_command_refuses_them_before_anything_starts(given):
    with pytest.raises(ServeError, match=r"--cluster-window 8 cannot be used .* priority"):
        _check_policy(given, 8)
    _check_policy(given, 0)
    _check_policy(["--scheduling-policy", "fcfs", "--port", "1"], 8)


def test_the_window_reaches_the_scheduler_from_the_engine_arguments(clustered):
    store, _ = clustered
    args = engine_args(store.path, cluster_window=5)
    assert plugin_config(args["additional_config"]).cluster_window == 5
    assert plugin_config(engine_args(store.path)["additional_config"]).cluster_window == 0


@pytest.mark.parametrize("core_slots", [4, None])
def test_a_core_that_may_not_be_resident_is_fetched_at_arrival(clustered, monkeypatch, core_slots):
    store, _ = clustered
    fetched = []
    monkeypatch.setattr(Store, "prefetch", lambda self, index: fetched.append(self.names[index]))
    options = {} if core_slots is None else {"core_slots": core_slots}
    scheduler = make_scheduler(**options)
    for number, name in enumerate([*store.names, "upload", None, store.names[0]]):
        scheduler.add_request(named(number, store, name))
    assert len(scheduler.waiting) == len(store) + 3
    assert fetched == ([] if core_slots is None else [*store.names, store.names[0]])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kinds=st.lists(st.integers(-4, 6), max_size=40),
    window=st.integers(0, 6),
    rng=st.randoms(use_true_random=False),
)
def test_nobody_is_overtaken_by_more_than_the_window(clustered, kinds, window, rng):
    """Random loads with uploads beside the store; overtaking is counted from outside."""
    store, _ = clustered
    names = [f"folder{kind}" if kind < 0 else [None, *store.names][kind] for kind in kinds]
    scheduler = make_scheduler(store=str(store.path), cluster_window=window)
    arrivals = deque(named(number, store, name) for number, name in enumerate(names))
    overtaken, done, steps = Counter(), set(), 0
    while len(done) < len(kinds):
        for _ in range(rng.randint(0 if scheduler.waiting else 1, 6)):
            if arrivals:
                scheduler.waiting.add_request(arrivals.popleft())
        before = list(scheduler.waiting)
        held = set(scheduler._beyond_limit())
        scheduler.schedule()
        places = {r.lora_request.lora_name for r in scheduler.running if r.kind < 0}
        assert len(places) <= LIMIT
        assert [r for r in before if r not in scheduler.running] == list(scheduler.waiting)
        for request in before:
            # Who had to wait for a place of its own was not overtaken for the clusters' sake.
            if request not in scheduler.running and request not in held:
                overtaken[request.number] += sum(
                    other in scheduler.running and other.number > request.number for other in before
                )
        for _ in range(rng.randint(1, len(scheduler.running))):
            done.add(scheduler.running.pop(rng.randrange(len(scheduler.running))).number)
        steps += 1
        assert steps <= len(kinds), "somebody starves"
    assert max(overtaken.values(), default=0) <= window


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
