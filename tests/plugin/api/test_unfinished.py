"""Requests that an engine has not answered when it is stopped, in vLLM's own queues."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_jd.plugin.api.unfinished import end_unfinished, raise_unfinished


class Engine:
    def __init__(self):
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.stopped = []

    def shutdown(self, timeout=None):
        self.stopped.append(timeout)

    def asked(self, name):
        queue = RequestOutputCollector(RequestOutputKind.DELTA, name)
        self.output_processor.request_states[name] = SimpleNamespace(queue=queue)
        return queue


@pytest.mark.parametrize("thread", [True, False])
def test_they_end_with_an_error_that_says_why(thread):
    engine = Engine()

    async def scenario():
        for _ in range(2):
            end_unfinished(engine)
        first, second = engine.asked("a"), engine.asked("b")
        waiting = asyncio.ensure_future(first.get())
        await asyncio.sleep(0)
        if thread:  # as vLLM stops it at a signal
            await asyncio.to_thread(engine.shutdown, timeout=3)
        else:
            engine.shutdown(timeout=3)
            assert not waiting.done()
        for queue in (waiting, second.get()):
            with pytest.raises(GracefulHTTPError, match="--shutdown-timeout") as caught:
                await asyncio.wait_for(queue, 5)
            assert caught.value.http_status == 503

    asyncio.run(scenario())
    assert engine.stopped == [3]
    engine.shutdown()  # again, as its server's loop has ended
    assert engine.stopped == [3, None]


def test_one_that_came_too_late_is_no_empty_answer():
    """The engine that stops gives it up: 200 and no tokens, if nobody looks."""
    engine = Engine()
    given_up = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="abort")])
    whole = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="length")])

    async def scenario():
        end_unfinished(engine)
        raise_unfinished(engine, given_up)  # as its client wished
        engine.shutdown()
        raise_unfinished(engine, whole)
        with pytest.raises(GracefulHTTPError, match="send it again") as caught:
            raise_unfinished(engine, given_up)
        assert caught.value.http_status == 503

    asyncio.run(scenario())


def test_an_engine_without_queues_is_left_alone():
    engine = SimpleNamespace(shutdown=print)
    end_unfinished(engine)
    assert engine.shutdown is print
