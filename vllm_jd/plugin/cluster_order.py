"""Which waiting requests go first, so that a batch reads the bases of fewer clusters.

A step reads each basis once, however many of its tokens use it: a request whose cluster is in the
batch already is cheaper than one that brings a new cluster along. So the next place goes to the
first waiting request that costs nothing, or to the first of all if there is none.

The bound is hard and does not depend on the load: `window` 0 is first come, first served, and
otherwise no request is overtaken by more than `window` requests that arrived after it.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

import torch

Cluster = Hashable | None
"""What two requests share if they read the same bases; None: the request reads none."""

Request = TypeVar("Request", bound=Hashable)


def admission_order(
    waiting: Sequence[Cluster],
    overtaken: Sequence[int],
    running: Iterable[Cluster],
    room: int,
    window: int,
) -> list[int]:
    """In which order to offer waiting requests to the scheduler.

    Only the first `room + window` of them are looked at, which bounds the work of a step.

    Args:
        waiting: the cluster of each waiting request, in the order of arrival.
        overtaken: by how many later ones each of them was overtaken so far.
        running: the clusters in the batch.
        room: how many requests can be admitted at most.
        window: by how many later ones a request may be overtaken.

    Returns:
        A permutation of `range(len(waiting))`: positions in `waiting`. Before position i stand at
        most `max(0, window - overtaken[i])` that are greater than i, so the bound holds wherever
        the scheduler stops.
    """
    left = list(range(min(len(waiting), room + window)))
    slack = [window - count for count in overtaken[: len(left)]]
    present = {None, *running}
    order: list[int] = []
    while left and len(order) < room:
        choice = _choose(left, slack, waiting, present)
        for passed in left[:choice]:
            slack[passed] -= 1
        position = left.pop(choice)
        present.add(waiting[position])
        order.append(position)
    return order + left + list(range(len(left) + len(order), len(waiting)))


def _choose(
    left: list[int], slack: list[int], waiting: Sequence[Cluster], present: set[Cluster]
) -> int:
    """Index in `left` of the next to be admitted, none before it being out of slack."""
    for i, position in enumerate(left):
        if waiting[position] in present:
            return i
        if slack[position] <= 0:
            break
    return 0


class ClusterOrder(Generic[Request]):
    """Orders waiting requests step by step, and counts by how many each was overtaken.

    Args:
        window: by how many later ones a request may be overtaken.
        cluster_of: the cluster of a request.
    """

    def __init__(self, window: int, cluster_of: Callable[[Request], Cluster]) -> None:
        self.window = window
        self._cluster_of = cluster_of
        self._overtaken: dict[Request, int] = {}

    def arrange(
        self, waiting: Sequence[Request], running: Iterable[Request], room: int
    ) -> list[Request]:
        """The waiting requests (in the order of arrival), in the order to be admitted in."""
        head = waiting[: room + self.window]
        order = admission_order(
            [self._cluster_of(request) for request in head],
            [self._overtaken.get(request, 0) for request in head],
            [self._cluster_of(request) for request in running],
            room,
            self.window,
        )
        return [head[i] for i in order] + list(islice(waiting, len(head), None))

    def record(self, arrived: Sequence[Request], left: Collection[Request]) -> None:
        """Count who was overtaken in a step.

        Args:
            arrived: all who waited before it, in the order of arrival.
            left: those who still wait.
        """
        later = len(arrived) - sum(request in left for request in arrived)
        counts: dict[Request, int] = {}
        for request in arrived:
            if request not in left:
                later -= 1
            elif count := self._overtaken.get(request, 0) + later:
                counts[request] = count
        self._overtaken = counts


def adapter_clusters(cluster: torch.Tensor, shared: Sequence[int]) -> list[int]:
    """One number for each adapter of a store: equal where all shared bases are the same.

    With a cluster scope of `adapter` this is the cluster. With a scope of `module`, adapters count
    as one only where they agree in every module. An adapter without shared bases is alone, and one
    that lacks some of the modules does not count as one with those that have them.

    Args:
        cluster: int32 `[n, m, rows]`, `Store.chosen`.
        shared: for each of the m modules, how many lines of its cluster table are shared.
    """
    limits = torch.tensor(shared, dtype=cluster.dtype)[:, None]
    lines = torch.where(cluster < limits, cluster, -1).flatten(1).numpy()
    numbers: dict[Hashable, int] = {}
    return [
        numbers.setdefault(row.tobytes() if (row >= 0).any() else i, len(numbers))
        for i, row in enumerate(lines)
    ]
