"""Who goes first so that a batch has fewer clusters, and that nobody is overtaken too often."""

from collections import Counter

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_jd.plugin.cluster_order import ClusterOrder, adapter_clusters, admission_order

clusters = st.one_of(st.none(), st.integers(0, 4))


@st.composite
def queues(draw):
    waiting = draw(st.lists(clusters, max_size=30))
    overtaken = draw(st.lists(st.integers(0, 9), min_size=len(waiting), max_size=len(waiting)))
    return waiting, overtaken


def test_those_in_the_batch_go_first_then_the_oldest_and_its_like():
    # 7 runs: its two go first; then 9, the oldest, and the other 9; then 3, the next oldest.
    waiting = [9, 3, 7, 5, 3, 7, 9]
    assert admission_order(waiting, [0] * 7, [7], 6, 8) == [2, 5, 0, 6, 1, 4, 3]


def test_without_an_adapter_there_is_nothing_to_read():
    assert admission_order([4, None, 4], [0] * 3, [], 3, 4) == [1, 0, 2]


def test_the_one_that_was_overtaken_often_enough_goes_first():
    assert admission_order([9, 7, 7, 7], [2, 0, 0, 0], [7], 4, 4) == [1, 2, 0, 3]
    assert admission_order([9, 7, 7, 7], [4, 0, 0, 0], [7], 4, 4) == [0, 1, 2, 3]


def test_no_further_than_the_window_is_looked():
    waiting = [9] * 5 + [7]
    assert admission_order(waiting, [0] * 6, [7], 1, 4) == list(range(6))
    assert admission_order(waiting, [0] * 6, [7], 1, 5) == [5, 0, 1, 2, 3, 4]


@given(queues(), st.sets(clusters), st.integers(0, 12), st.integers(0, 12))
def test_an_order_is_a_permutation_that_keeps_the_bound(queue, running, room, window):
    waiting, overtaken = queue
    order = admission_order(waiting, overtaken, running, room, window)
    assert sorted(order) == list(range(len(waiting)))
    assert order == admission_order(waiting, overtaken, sorted(running, key=str), room, window)
    for place, i in enumerate(order):
        overtakers = sum(j > i for j in order[:place])
        assert overtakers <= max(0, window - overtaken[i])
    if window == 0:
        assert order == list(range(len(waiting)))


@given(queues(), st.integers(0, 12))
def test_a_step_brings_no_more_clusters_than_first_come_first_served(queue, room):
    """Where nobody's window is in the way and all that wait are looked at."""
    waiting, _ = queue
    order = admission_order(waiting, [0] * len(waiting), [0], room, 100)
    room = min(room, len(waiting))

    def clusters_of(positions):
        return len({waiting[i] for i in positions} - {None, 0})

    assert clusters_of(order[:room]) <= clusters_of(range(room))


class Served:
    """A scheduler loop over `ClusterOrder`; a request is (number, cluster)."""

    def __init__(self, window, room):
        self.order = ClusterOrder(window, lambda request: request[1])
        self.room = room
        self.waiting, self.running, self.admitted = [], [], []
        self.overtaken = Counter()  # counted here from scratch, not by the code under test

    def step(self, arrivals, stop=None):
        """Admit in the given order into the free places, but at most `stop`."""
        self.waiting += arrivals
        room = self.room - len(self.running)
        taken = self.order.arrange(self.waiting, self.running, room)[:room][:stop]
        for request in taken:
            self.waiting.remove(request)
            self.running.append(request)
            self.admitted.append(request)
            self.overtaken.update(other for other in self.waiting if other < request)
        self.order.record([*sorted([*self.waiting, *taken])], set(self.waiting))

    def finish(self, rng):
        for _ in range(rng.randint(1, len(self.running))):
            self.running.pop(rng.randrange(len(self.running)))


@given(
    st.lists(clusters, max_size=60),
    st.integers(0, 10),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_nobody_is_overtaken_by_more_than_the_window_or_starves(kinds, window, room, rng):
    served = Served(window, room)
    arrivals = list(enumerate(kinds))
    steps = 0
    while len(served.admitted) < len(kinds):
        count = rng.randint(0 if served.waiting else 1, 6)
        served.step(arrivals[:count], stop=rng.choice([None, 1, 2]))
        del arrivals[:count]
        served.finish(rng)
        steps += 1
        assert steps <= len(kinds), "somebody starves"
    assert max(served.overtaken.values(), default=0) <= window
    assert sorted(served.admitted) == list(enumerate(kinds)), "all run, each once"
    if window == 0:
        assert served.admitted == sorted(served.admitted)


@given(st.integers(1, 6), st.integers(1, 4))
@example(6, 1)
def test_a_stream_of_a_favoured_cluster_does_not_starve_the_others(window, room):
    """One request of cluster 1 among an endless stream of cluster 0, which always runs."""
    served = Served(window, room)
    served.step([(0, 0)])
    served.step([(1, 1)])
    for number in range(2, 40):
        served.running = served.running[1:]
        served.step([(number, 0)])
    assert (1, 1) in served.admitted
    place = [number for number, _ in served.admitted].index(1)
    assert place <= 1 + window


def test_an_aborted_requests_count_is_forgotten():
    order = ClusterOrder(4, lambda request: request)
    order.record(["a", "b"], {"a"})
    assert order._overtaken == {"a": 1}
    order.record(["c", "d"], {"d"})
    assert order._overtaken == {}


def test_adapters_of_one_cluster_have_one_number():
    # Two modules with 3 and 2 shared lines; beyond those, lines are an adapter's own.
    cluster = torch.tensor(
        [
            [[0, -1], [0, -1]],
            [[1, -1], [1, -1]],
            [[0, 3], [0, 2]],  # as the first, with a residual of its own
            [[1, -1], [0, -1]],  # another mixture (scope `module`)
            [[4, -1], [3, -1]],  # uncompressed: alone
            [[5, -1], [4, -1]],
        ],
        dtype=torch.int32,
    )
    numbers = adapter_clusters(cluster, [3, 2])
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 5
