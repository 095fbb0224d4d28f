"""vLLM's scheduler, which sees to it that every adapter is there when its tokens are computed.

A waiting request is admitted once its adapter has its slots, which it then holds until it ends;
where others hold all of them it waits, and others go first, but no more than `_MOST_OVERTAKEN`;
where those are pinned it fails, since it would wait for ever. The
stock scheduler's own limit (`max_loras` distinct adapters a step) is set so that it never binds.
What the workers have to do for a step is sent to them before it; what they could not do fails the
requests that needed it, with a message, and nobody else's.

Where not all of a store is resident, the core and the bases of a request's adapter are fetched from
the disk as soon as the request is here, not when its step begins.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_jd.plugin.config import plugin_config
from vllm_jd.plugin.engine.adapters import AdapterUnavailable, EngineAdapters, Reference
from vllm_jd.plugin.engine.tainted import TaintedBlocks
from vllm_jd.plugin.placed import FAILED, known_by, placed

_MOST_OVERTAKEN = 256  # requests that may pass one which waits for slots


class _Admission:
    """Admits requests with their adapters.

    Raises ValueError where there is too little room, StoreError where the store cannot be opened.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs["vllm_config"]
        config = plugin_config(vllm_config.additional_config)
        if config is None:
            raise ValueError("the vllm-jd scheduler needs additional_config['vllm_jd']")
        self.adapters = EngineAdapters(vllm_config, config)
        self._references: dict[str, Reference] = {}
        self._slots: dict[str, int] = {}  # of requests that hold one
        self._failures: dict[str, str] = {}  # why requests are about to fail
        self._overtaken: dict[str, int] = {}
        self._waiting_for_slots: list[str] = []  # in this step
        on_cpu = vllm_config.device_config.device_type == "cpu"
        self._tainted = None
        if on_cpu and not self.needs_kv_cache_zeroing:
            self._tainted = TaintedBlocks(self.kv_cache_manager)

    def connected_to(self, core: Any) -> EngineAdapters:
        """The adapters of this scheduler, given the EngineCore that it belongs to (see
        `patches`)."""
        self.adapters.connect(core)
        return self.adapters

    def measure(self, names: int) -> dict[str, Any]:
        """See `EngineAdapters.measure`; and how many requests are `waiting` for slots that others
        hold."""
        waiting = sum(name in self._references for name in self._waiting_for_slots)
        return self.adapters.measure(names) | {"waiting": waiting}

    def add_request(self, request: Request) -> None:
        """Queue a request, and find out which adapter it means; begin to fetch its core."""
        asked = getattr(request, "vllm_jd_asked", request.lora_request)
        if asked is not None and request.request_id not in self.requests:
            request.vllm_jd_asked = asked  # without a prefix cache nobody has said so yet
            try:
                reference = self.adapters.resolve(asked)
            except AdapterUnavailable as error:
                self._failures[request.request_id] = str(error)
                request.lora_request = known_by(f"failed:{request.request_id}")
            else:
                self.adapters.keep(reference, asked.lora_name)
                self.adapters.prefetch(reference)
                self._know(request, reference)
        super().add_request(request)

    def _know(self, request: Request, reference: Reference) -> None:
        """Have a request without a slot known to the prefix cache by its reference."""
        self._references[request.request_id] = reference
        before, request.lora_request = request.lora_request, known_by(reference.identity)
        if request.block_hashes and before != request.lora_request:
            request.block_hashes.clear()
            request.update_block_hashes()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the stock scheduler on those who may start."""
        self._waiting_for_slots.clear()
        step = super().schedule(*args, **kwargs)
        self.adapters.flush(step)
        return step

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether the stock scheduler may start a waiting request now."""
        return super()._handle_blocked_waiting_request(request) and self._admit(request)

    def _admit(self, request: Request) -> bool:
        name = request.request_id
        if name in self._failures:
            return False
        reference = self._references.get(name)
        if reference is None or name in self._slots:
            return True
        if any(self._overtaken[other] >= _MOST_OVERTAKEN for other in self._waiting_for_slots):
            return False
        slot = self.adapters.acquire(reference)
        if slot is None:
            reason = self.adapters.shut_out(reference)
            if reason is not None:
                self._failures[name] = reason
                return False
            self._overtaken.setdefault(name, 0)
            self._waiting_for_slots.append(name)
            return False
        for other in self._waiting_for_slots:
            self._overtaken[other] += 1
        self._overtaken.pop(name, None)
        self._slots[name] = slot
        request.lora_request = placed(reference.identity, slot)
        return True

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Give up what a request held that has ended."""
        self._taint(request)
        freed = super()._free_request(request, *args, **kwargs)
        name = request.request_id
        self._overtaken.pop(name, None)
        reference = self._references.pop(name, None)
        if self._slots.pop(name, None) is not None:
            self.adapters.release(reference)
        if reference is not None:
            self.adapters.let_go(reference)
        return freed

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Preempt a request, which keeps its slot."""
        self._taint(request)
        return super()._preempt_request(request, *args, **kwargs)

    def _taint(self, request: Request) -> None:
        reference = self._references.get(request.request_id)
        if self._tainted and reference is not None and self.adapters.may_overflow(reference):
            self._tainted.freed(request.request_id)

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        """Blocks that the workers have to empty before this step."""
        if self._tainted is None:
            return super()._get_new_block_ids_to_zero()
        return self._tainted.to_empty()

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """What a step gave, without the requests whose adapters could not be had for it."""
        broken = self.adapters.failed(scheduler_output)
        for name, reference in list(self._references.items()) if broken else ():
            if reference.adapter in broken and name in self._slots:
                self._failures[name] = broken[reference.adapter]
            elif reference.adapter in broken:
                self._know(self.requests[name], self.adapters.renewed(reference))
        reasons, self._failures = self._failures, {}
        failed = self.finish_requests(reasons, RequestStatus.FINISHED_ERROR) if reasons else []
        self.adapters.give_up_lost()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        for request in failed:
            its = outputs.setdefault(request.client_index, EngineCoreOutputs())
            its.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=FAILED + reasons[request.request_id],
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs


class ResidentScheduler(_Admission, Scheduler):
    """For engines that schedule one step at a time."""


class ResidentAsyncScheduler(_Admission, AsyncScheduler):
    """For engines that schedule ahead."""


def make_scheduler(**kwargs: Any) -> Scheduler:
    """What `--scheduler-cls` names: the variant that the engine's configuration asks for."""
    ahead = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (ResidentAsyncScheduler if ahead else ResidentScheduler)(**kwargs)
