"""Who goes first where bases are paged: those whose bases are in slots, within the window."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_jd.plugin.cluster_order import ClusterOrder
from vllm_jd.plugin.scheduler import _ClusterOf


class Adapters:
    """As much of EngineAdapters as the order asks: a reference is its cluster."""

    def __init__(self, clusters, *, whole=False):
        names = [f"of-{c}" for c in clusters]
        modules = [SimpleNamespace(shared=max(clusters) + 1)]
        store = SimpleNamespace(
            chosen=torch.tensor(clusters)[:, None, None],
            names=names,
            manifest=SimpleNamespace(modules=modules),
        )
        self.first = SimpleNamespace(store=store)
        self.capacity = SimpleNamespace(whole=whole)
        self.in_slots = set()
        self.asked = 0

    def has_bases(self, reference):
        self.asked += 1
        return reference in self.in_slots


def order_of(adapters, window):
    references = {}
    order = ClusterOrder(window, _ClusterOf(adapters, references))

    def request(name, cluster):
        lora = None if cluster is None else SimpleNamespace(lora_name=f"of-{cluster}")
        found = SimpleNamespace(request_id=name, lora_request=lora)
        if cluster is not None:
            references[name] = cluster
        return _Hashable(found)

    return order, request


class _Hashable:
    def __init__(self, fields):
        self.__dict__.update(vars(fields))


def names(requests):
    return [request.request_id for request in requests]


def test_those_whose_bases_are_in_slots_go_first_then_the_oldest_and_its_like():
    adapters = Adapters([0, 1, 2, 3])
    order, request = order_of(adapters, window=8)
    adapters.in_slots = {2, 3}
    waiting = [request(n, c) for n, c in zip("abcdefg", [0, 1, 2, 1, 3, 0, None], strict=True)]
    assert names(order.arrange(waiting, [], 7)) == ["c", "e", "g", "a", "f", "b", "d"]


def test_nobody_is_overtaken_by_more_than_the_window():
    adapters = Adapters([0, 1])
    order, request = order_of(adapters, window=2)
    adapters.in_slots = {1}
    old = request("old", 0)
    passed = 0
    for i in range(6):
        waiting = [old, request(f"new-{i}", 1)]
        first = order.arrange(waiting, [], 1)[0]
        order.record(waiting, {each for each in waiting if each is not first})
        if first is old:
            break
        passed += 1
    assert passed == 2


def test_where_all_is_resident_nobody_asks_for_slots():
    adapters = Adapters([0, 1], whole=True)
    order, request = order_of(adapters, window=8)
    waiting = [request("a", 0), request("b", 1), request("c", 1)]
    assert names(order.arrange(waiting, [request("r", 1)], 3)) == ["b", "c", "a"]
    assert adapters.asked == 0


def test_an_upload_that_is_not_in_slots_is_a_cluster_of_its_own():
    adapters = Adapters([0, 1])
    order, request = order_of(adapters, window=8)
    adapters.in_slots = {1}
    upload = request("u", 7)
    assert names(order.arrange([upload, request("b", 1)], [], 2)) == ["b", "u"]
