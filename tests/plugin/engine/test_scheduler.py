"""Requests wait for slots of their adapters, and fail alone where these cannot be had."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
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
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.engine import scheduler as scheduler_module
from vllm_jd.plugin.engine.orders import Carried, LoadUpload
from vllm_jd.plugin.engine.residency import Adapter, Fill
from vllm_jd.plugin.engine.scheduler import _Admission
from vllm_jd.plugin.placed import slot_of
from vllm_jd.store import Store

LIMIT = 2


@dataclass(eq=False)
class Request:
    number: int
    kind: int
    lora_request: LoRARequest | None
    status: RequestStatus = RequestStatus.WAITING
    client_index: int = 0
    trace_headers: None = None
    block_hashes: list = field(default_factory=list)

    @property
    def request_id(self):
        return f"request {self.number}"

    def update_block_hashes(self):
        self.block_hashes.append(self.lora_request.lora_name)

    def get_finished_reason(self):
        return RequestStatus.get_finished_reason(self.status)

    def take_events(self):
        return None


class Stock:
    """The stock scheduler's queues; a step starts as many waiting requests as there is room for.

    Requests in `blocked` cannot start yet and are skipped; those in `preempt` lose their place.
    """

    needs_kv_cache_zeroing = True

    def __init__(self, **kwargs):
        self.waiting = FCFSRequestQueue()
        self.kv_holding_waiting = FCFSRequestQueue()
        self.running = []
        self.requests = {}
        self.max_num_running_reqs = 4
        self.blocked = set()
        self.preempt = []

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.waiting.add_request(request)

    def _handle_blocked_waiting_request(self, request):
        return request.number not in self.blocked

    def schedule(self, throttle_prefills=False):
        for request in self.preempt:
            self.running.remove(request)
            request.status = RequestStatus.PREEMPTED
            self.waiting.prepend_request(request)
        skipped = []
        while not self.preempt and self.waiting and len(self.running) < self.max_num_running_reqs:
            request = self.waiting.peek_request()
            ready = self._handle_blocked_waiting_request(request)
            self.waiting.pop_request()
            if not ready:
                skipped.append(request)
                continue
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        self.waiting.prepend_requests(reversed(skipped))
        self.preempt = []
        return [request.number for request in self.running]

    def finish_requests(self, names, status):
        found = [self.requests[name] for name in names if name in self.requests]
        for request in found:
            if request in self.running:
                self.running.remove(request)
            else:
                self.waiting.remove_requests([request])
            request.status = status
            self._free_request(request)
        return found

    def _free_request(self, request):
        del self.requests[request.request_id]

    def update_from_output(self, scheduler_output):
        return {}


class Scheduler(_Admission, Stock):
    """Ours, with workers that do what they are told, but for what is in `faults`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.orders, self.faults = [], {}
        executor = SimpleNamespace(collective_rpc=self.rpc)
        self.connected_to(SimpleNamespace(model_executor=executor, request_block_hasher=None))

    def rpc(self, method, args=(), non_block=False):
        (orders,) = args
        self.orders += orders
        faults = {
            place: self.faults[order.what]
            for place, order in enumerate(orders)
            if isinstance(order, Fill) and order.what in self.faults
        }
        if not non_block:
            return [Carried({}, 0.0)]
        future = Future()
        future.set_result([Carried({}, 0.25), Carried(faults, 0.5)])  # of two workers
        return future

    def arrive(self, *requests):
        for request in requests:
            self.add_request(request)

    def finish(self, *numbers):
        """The requests of these numbers end, wherever they are."""
        names = [f"request {number}" for number in numbers]
        return self.finish_requests(names, RequestStatus.FINISHED_STOPPED)


STORE = {}


@pytest.fixture(scope="module", autouse=True)
def served(clustered, tmp_path_factory):
    """What `make_scheduler` serves where a test says nothing else, and folders of uploads."""
    folder = tmp_path_factory.mktemp("peft")
    for name in [
        *map(str, range(-5, 0)),
        "folder",
        "upload",
        *(f"folder{i}" for i in range(-5, 0)),
    ]:
        (folder / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name / file).write_text(name)
    STORE.update(store=clustered, folder=folder)


def make_scheduler(**options):
    config = {"vllm_jd": {"store": str(STORE["store"].path), "max_loras": LIMIT} | options}
    return Scheduler(
        vllm_config=SimpleNamespace(
            additional_config=config,
            scheduler_config=SimpleNamespace(policy="fcfs", max_num_seqs=4),
            model_config=SimpleNamespace(dtype=torch.bfloat16),
            lora_config=SimpleNamespace(max_lora_rank=8, fully_sharded_loras=False),
            device_config=SimpleNamespace(device_type="cpu"),
        )
    )


def request(number, kind):
    """kind 0: base model, positive: a compressed adapter, negative: an uncompressed one."""
    lora = None
    if kind > 0:
        names = STORE["store"].names
        lora = adapter_request(STORE["store"], names[(kind - 1) % len(names)])
    elif kind:
        lora = LoRARequest(f"adapter{kind}", abs(kind), f"{STORE['folder']}/{kind}")
    return Request(number, kind, lora)


def uncompressed(requests):
    return {request.kind for request in requests if request.kind < 0}


def test_compressed_adapters_are_never_held_back():
    scheduler = make_scheduler()
    for number in range(4):
        scheduler.add_request(request(number, number + 1))
    assert scheduler.schedule() == [0, 1, 2, 3]


def test_the_third_uncompressed_adapter_waits_and_others_pass_it():
    scheduler = make_scheduler()
    for number, kind in enumerate([-1, -2, -3, 5, -1]):
        scheduler.add_request(request(number, kind))
    assert scheduler.schedule() == [0, 1, 3, 4]
    assert [r.number for r in scheduler.waiting] == [2]
    assert scheduler.measure(0)["waiting"] == 1
    scheduler.finish(1)
    assert 2 in scheduler.schedule(), "it goes as soon as a place is free"
    assert scheduler.measure(0)["waiting"] == 0


def test_whoever_is_held_back_keeps_its_turn():
    scheduler = make_scheduler()
    for number, kind in enumerate([-1, -2, 1, 1]):
        scheduler.add_request(request(number, kind))
    scheduler.schedule()
    for number, kind in enumerate([7, -3, 8], start=4):
        scheduler.add_request(request(number, kind))
    scheduler.schedule()
    assert [r.number for r in scheduler.waiting] == [4, 5, 6], "nobody started, nobody is passed"


@pytest.fixture(scope="module")
def clustered(tmp_path_factory, write_adapters):
    """A store of six compressed adapters in three clusters."""
    folder = tmp_path_factory.mktemp("clustered")
    write_adapters(folder / "adapters", 6, kind="real")
    collection = read_adapters([folder / "adapters"])
    return compress(collection, folder / "store", Settings(rank=2, clusters=3))


def named(number, store, name):
    """A request for one of a store's adapters, or for another that lies in a folder, or none."""
    if name is None:
        return Request(number, 0, None)
    if name not in store:
        return Request(number, -1, LoRARequest(name, 99, f"{STORE['folder']}/{name}"))
    return Request(number, 1, adapter_request(store, name))


@pytest.mark.parametrize("core_slots", [4, None])
def test_a_core_that_may_not_be_resident_is_fetched_at_arrival(clustered, monkeypatch, core_slots):
    store = clustered
    fetched = []
    monkeypatch.setattr(Store, "prefetch", lambda self, index: fetched.append(self.names[index]))
    options = {} if core_slots is None else {"core_slots": core_slots}
    scheduler = make_scheduler(**options)
    for number, name in enumerate([*store.names, "upload", None, store.names[0]]):
        scheduler.add_request(named(number, store, name))
    assert len(scheduler.waiting) == len(store) + 3
    assert fetched == ([] if core_slots is None else [*store.names, store.names[0]])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(kinds=st.lists(st.integers(-4, 6), max_size=40), rng=st.randoms(use_true_random=False))
def test_first_come_first_served_but_for_those_who_wait_for_slots(clustered, kinds, rng):
    """Random loads with uploads beside the store; overtaking is counted from outside."""
    store = clustered
    names = [f"folder{kind}" if kind < 0 else [None, *store.names][kind] for kind in kinds]
    scheduler = make_scheduler(store=str(store.path))
    arrivals = deque(named(number, store, name) for number, name in enumerate(names))
    done, finished, steps = set(), set(), 0
    while len(done) < len(kinds):
        for _ in range(rng.randint(0 if scheduler.waiting else 1, 6)):
            if arrivals:
                scheduler.add_request(arrivals.popleft())
        before = list(scheduler.waiting)
        scheduler.schedule()
        held = {r for r in before if r.request_id in scheduler._waiting_for_slots}
        places = {r.lora_request.lora_name for r in scheduler.running if r.kind < 0}
        assert len(places) <= LIMIT
        assert [r for r in before if r not in scheduler.running] == list(scheduler.waiting)
        for request in set(before) - set(scheduler.running) - held:
            assert not any(
                other in scheduler.running and other.number > request.number for other in before
            )
        for _ in range(rng.randint(1, len(scheduler.running))):
            done.add(rng.choice(scheduler.running).number)
            scheduler.finish(*(done - finished))
            finished |= done
        steps += 1
        assert steps <= len(kinds), "somebody starves"


@given(st.lists(st.integers(-5, 3), max_size=40), st.randoms(use_true_random=False))
def test_nobody_starves_is_lost_or_overcommitted(kinds, rng):
    scheduler = make_scheduler()
    arrivals = deque(request(number, kind) for number, kind in enumerate(kinds))
    done = set()
    for _ in range(4 * len(kinds) + 4):
        for _ in range(rng.randint(0, 3)):
            if arrivals:
                scheduler.add_request(arrivals.popleft())
        scheduler.schedule()
        assert len(uncompressed(scheduler.running)) <= LIMIT
        if scheduler.running:
            finished = rng.choice(scheduler.running)
            scheduler.finish(finished.number)
            done.add(finished.number)
    while arrivals or scheduler.waiting or scheduler.running:
        if arrivals:
            scheduler.add_request(arrivals.popleft())
        scheduler.schedule()
        assert scheduler.running, "nothing runs although something waits"
        done.add(scheduler.running[0].number)
        scheduler.finish(scheduler.running[0].number)
    assert done == set(range(len(kinds)))
    assert not scheduler._slots and not scheduler._references and not scheduler._overtaken


def test_no_two_adapters_of_a_step_have_one_slot_and_it_is_the_requests_id():
    scheduler = make_scheduler()
    scheduler.arrive(*(request(i, kind) for i, kind in enumerate([1, 2, -1, 1])))
    scheduler.schedule()
    slots = {r.kind: slot_of(r.lora_request) for r in scheduler.running}
    assert len(set(slots.values())) == 3
    assert all(r.lora_request.lora_int_id == slots[r.kind] + 1 for r in scheduler.running)
    fills = [order for order in scheduler.orders if isinstance(order, Fill)]
    assert [order.slot for order in fills if isinstance(order.what, Adapter)] == [slots[-1]]
    assert sum(isinstance(order, LoadUpload) for order in scheduler.orders) == 1


def test_a_preempted_request_keeps_its_slot_and_one_that_ended_does_not():
    scheduler = make_scheduler()
    scheduler.arrive(request(0, -1), request(1, -2))
    scheduler.schedule()
    slot = slot_of(scheduler.running[1].lora_request)
    scheduler.preempt = [scheduler.running[1]]
    scheduler.arrive(request(2, -3))
    assert scheduler.schedule() == [0]
    assert scheduler.schedule() == [0, 1], "request 2 has no slot while 1 is out"
    assert slot_of(scheduler.running[1].lora_request) == slot
    scheduler.finish(1)
    assert scheduler.schedule() == [0, 2]


def test_no_more_than_the_bound_pass_one_that_waits_for_slots(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_MOST_OVERTAKEN", 3)
    scheduler = make_scheduler()
    scheduler.arrive(*(request(i, kind) for i, kind in enumerate([-1, -2, -3])))
    passed, number = 0, 3
    for _ in range(8):
        scheduler.arrive(request(number, 1))
        if number in scheduler.schedule():
            passed += 1
            scheduler.finish(number)
        number += 1
    assert passed == 3
    scheduler.finish(0)
    assert 2 in scheduler.schedule() and len(scheduler.running) == 4, "and then all go on"


def test_an_adapter_that_is_not_there_fails_its_request_alone():
    scheduler = make_scheduler()
    bad = Request(0, 0, LoRARequest("x", 3, "/not/a/real/path"))
    scheduler.arrive(bad, request(1, 1))
    step = scheduler.schedule()
    assert step == [1]
    (output,) = scheduler.update_from_output(step)[0].outputs
    assert output.request_id == bad.request_id
    assert output.stop_reason.startswith("vllm-jd: adapter 'x' cannot be read from /not/a/real")
    assert str(output.finish_reason) == "error"
    assert not scheduler.waiting and [r.number for r in scheduler.running] == [1]


def test_what_the_workers_could_not_fill_fails_who_needs_it_and_nobody_finds_its_blocks():
    scheduler = make_scheduler()
    upload, other = request(0, -1), request(1, 1)
    scheduler.arrive(upload, other)
    scheduler.max_num_running_reqs = 2
    late = request(2, -1)
    late.block_hashes = ["of the prompt"]
    scheduler.arrive(late)
    scheduler.faults = {Adapter(2, 0): "Input/output error"}
    step = scheduler.schedule()
    (output,) = scheduler.update_from_output(step)[0].outputs
    assert (output.request_id, output.stop_reason) == ("request 0", "vllm-jd: Input/output error")
    assert scheduler.running == [other]
    assert late.lora_request.lora_name != upload.lora_request.lora_name
    assert late.block_hashes == [late.lora_request.lora_name], "hashed anew"
    scheduler.faults, before = {}, len(scheduler.orders)
    step = scheduler.schedule()
    assert step == [1, 2]
    fills = [order.what for order in scheduler.orders[before:]]
    assert Adapter(2, 0) in fills, "read again"
    assert scheduler.update_from_output(step) == {}
    assert late.lora_request.lora_name != upload.lora_request.lora_name


def test_an_upload_that_is_unloaded_is_served_to_who_has_asked():
    scheduler = make_scheduler()
    scheduler.adapters.add_lora(request(0, -1).lora_request)
    scheduler.blocked = {0}
    scheduler.arrive(request(0, -1))
    scheduler.schedule()
    scheduler.adapters.remove_lora(1)
    scheduler.blocked = set()
    assert scheduler.schedule() == [0]
    scheduler.finish(0)
    assert list(scheduler.adapters._sources) == [1], "and goes with the last of them"


def pinned(scheduler, *kinds):
    for kind in kinds:
        scheduler.adapters.add_lora(request(0, kind).lora_request)
        scheduler.adapters.pin_lora(abs(kind))


def test_who_finds_all_slots_pinned_fails_and_does_not_wait():
    scheduler = make_scheduler()
    pinned(scheduler, -1, -2)
    scheduler.arrive(request(0, -3), request(1, 1), request(2, -2))
    step = scheduler.schedule()
    assert step == [1, 2], "who is pinned, and who needs no such slot, are served"
    (output,) = scheduler.update_from_output(step)[0].outputs
    assert output.request_id == "request 0" and str(output.finish_reason) == "error"
    assert output.stop_reason.endswith(
        f"with the pinned adapters (of ids 1, 2) found 3 uploads, expected {LIMIT} at most: so "
        "many have room at once; give them more with --max-loras; or unload one of those"
    )
    assert not scheduler.waiting and not scheduler._failures
    scheduler.adapters.remove_lora(1)
    scheduler.arrive(request(3, -3))
    assert 3 in scheduler.schedule(), "and is served when one of them is unloaded"


def test_who_finds_slots_in_use_beside_a_pinned_one_waits():
    scheduler = make_scheduler()
    pinned(scheduler, -1)
    scheduler.arrive(request(0, -2), request(1, -3))
    step = scheduler.schedule()
    assert step == [0] and scheduler.update_from_output(step) == {}
    scheduler.finish(0)
    assert scheduler.schedule() == [1]


def test_who_waits_fails_once_the_last_slot_is_pinned():
    scheduler = make_scheduler()
    pinned(scheduler, -1)
    scheduler.arrive(request(0, -2), request(1, -3))
    step = scheduler.schedule()
    assert scheduler.update_from_output(step) == {}
    pinned(scheduler, -2)
    step = scheduler.schedule()
    (output,) = scheduler.update_from_output(step)[0].outputs
    assert output.request_id == "request 1" and "(of ids 1, 2)" in output.stop_reason
    assert [each.number for each in scheduler.running] == [0]
