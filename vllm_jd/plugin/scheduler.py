"""vLLM's scheduler, which limits the adapters of a step only where a limit is needed.

The stock scheduler admits at most `max_loras` distinct adapters a step. For compressed adapters
there are slots for any step, so vLLM is started with a `max_loras` that never binds; uncompressed
ones have `PluginConfig.max_loras` places, which this keeps a step from exceeding.

Where not all of a store's cores are resident, that of a request's adapter is fetched from the disk
as soon as the request is here, not when its step begins.

With `PluginConfig.cluster_window`, waiting requests whose bases are in the batch already go first
(see `vllm_jd.plugin.cluster_order`).
"""

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_jd.plugin.api.requests import is_store_request
from vllm_jd.plugin.cluster_order import Cluster, ClusterOrder, adapter_clusters
from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.store import Store


class _Admission:
    """Holds back waiting requests whose uncompressed adapter would find no place; orders the rest.

    Raises ValueError where `cluster_window` is on with vLLM's priority policy, StoreError where
    the store cannot be opened.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs["vllm_config"]
        config = plugin_config(vllm_config.additional_config)
        if config is None:
            raise ValueError("the vllm-jd scheduler needs additional_config['vllm_jd']")
        self._uncompressed_limit = config.max_loras
        store = config.open_store(verify=False)
        most = vllm_config.scheduler_config.max_num_seqs
        in_codes = keeps_codes(store, vllm_config.model_config.dtype)
        paged = config.slots(store, at_least=most, in_codes=in_codes) < len(store)
        self._prefetched = store if paged else None
        self._order: ClusterOrder[Request] | None = None
        if config.cluster_window:
            policy = vllm_config.scheduler_config.policy
            if policy != "fcfs":
                raise ValueError(
                    f"cluster_window {config.cluster_window} cannot be used with the scheduling "
                    f"policy {policy!r}, only with 'fcfs'; leave one of the two out"
                )
            self._order = ClusterOrder(config.cluster_window, _ClusterOf(store))

    def add_request(self, request: Request) -> None:
        """Queue a request, and begin to fetch its adapter's core."""
        super().add_request(request)
        store, lora = self._prefetched, request.lora_request
        if store and lora and is_store_request(lora) and lora.lora_name in store:
            store.prefetch(store.index(lora.lora_name))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the stock scheduler on those who may start, in the order that pays."""
        held = self._beyond_limit()
        room = self._room() if self._order else 0
        if not held and room <= 0:
            return super().schedule(*args, **kwargs)
        arrived = list(self.waiting)
        self.waiting.remove_requests(held)
        if room > 0:
            self._arrange(room)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            # Back into the order of arrival, behind those that this step preempted.
            left = {*held, *self.waiting}
            self.waiting.remove_requests(arrived)
            for request in arrived:
                if request in left:
                    self.waiting.add_request(request)
            if self._order:
                self._order.record(arrived, left)

    def _room(self) -> int:
        return self.max_num_running_reqs - len(self.running) if self.waiting else 0

    def _arrange(self, room: int) -> None:
        waiting = list(self.waiting)
        # Preempted requests stand in front, and stay there.
        first = list(takewhile(lambda r: r.status == RequestStatus.PREEMPTED, waiting))
        rest = self._order.arrange(
            waiting[len(first) :], [*self.running, *first], max(0, room - len(first))
        )
        self.waiting.remove_requests(waiting)
        for request in [*first, *rest]:
            self.waiting.add_request(request)

    def _beyond_limit(self) -> list[Request]:
        admitted: set[str] = set()
        for queue in (self.running, self.kv_holding_waiting):
            admitted |= {request.lora_request.lora_name for request in _uncompressed(queue)}
        held = []
        for request in _uncompressed(self.waiting):
            name = request.lora_request.lora_name
            if name in admitted:
                continue
            if len(admitted) < self._uncompressed_limit:
                admitted.add(name)
            else:
                held.append(request)
        return held


class ResidentScheduler(_Admission, Scheduler):
    """For engines that schedule one step at a time."""


class ResidentAsyncScheduler(_Admission, AsyncScheduler):
    """For engines that schedule ahead."""


def make_scheduler(**kwargs: Any) -> Scheduler:
    """What `--scheduler-cls` names: the variant that the engine's configuration asks for."""
    ahead = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (ResidentAsyncScheduler if ahead else ResidentScheduler)(**kwargs)


def _uncompressed(requests: Iterable[Request]) -> list[Request]:
    return [
        request
        for request in requests
        if request.lora_request is not None and not is_store_request(request.lora_request)
    ]


class _ClusterOf:
    """The cluster of a request: the store's, or its own where it is served uncompressed."""

    def __init__(self, store: Store) -> None:
        clusters = adapter_clusters(store.chosen, [m.shared for m in store.manifest.modules])
        self._clusters = dict(zip(store.names, clusters, strict=True))

    def __call__(self, request: Request) -> Cluster:
        lora = request.lora_request
        if lora is None:
            return None
        name = lora.lora_name
        return self._clusters.get(name, name) if is_store_request(lora) else name
