"""vLLM's scheduler, which limits the adapters of a step only where a limit is needed.

The stock scheduler admits at most `max_loras` distinct adapters a step. Compressed adapters are
all resident, so vLLM is started with a `max_loras` that never binds; uncompressed ones have
`PluginConfig.max_loras` places, which this keeps a step from exceeding.
"""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.requests import is_store_request


class _UncompressedLimit:
    """Holds back waiting requests whose uncompressed adapter would find no place."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = plugin_config(kwargs["vllm_config"].additional_config)
        if config is None:
            raise ValueError("the vllm-jd scheduler needs additional_config['vllm_jd']")
        self._uncompressed_limit = config.max_loras

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the stock scheduler, without the requests that must wait for a place."""
        held = self._beyond_limit()
        if not held:
            return super().schedule(*args, **kwargs)
        self.waiting.remove_requests(held)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            # In front: they were here before what is left, and go as soon as a place is free.
            self.waiting.prepend_requests(reversed(held))

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


class ResidentScheduler(_UncompressedLimit, Scheduler):
    """For engines that schedule one step at a time."""


class ResidentAsyncScheduler(_UncompressedLimit, AsyncScheduler):
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
