"""What the door before the engine hears of a request, from vLLM's own processor of outputs."""

import asyncio
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_jd.plugin.api.callers import Caller, admit, caller


class Engine:
    """vLLM's processor of outputs, and as much of its client as asks it."""

    def __init__(self):
        self.output_processor = OutputProcessor(None, log_stats=False)

    async def generate(self, prompt, params, request_id):
        """As vLLM's: what comes until the end."""
        request = EngineCoreRequest(
            request_id=f"{request_id}-internal",
            external_req_id=request_id,
            prompt_token_ids=prompt["prompt_token_ids"],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=prompt["cache_salt"],
            data_parallel_rank=None,
        )
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        self.output_processor.add_request(request, None, queue=queue)
        while True:
            output = await queue.get()
            yield output
            if output.finished:
                return

    def shutdown(self, timeout=None):
        """As vLLM's."""

    def step(self, request_id, finish=None):
        """One token of a request, as the engine sends it."""
        output = EngineCoreOutput(f"{request_id}-internal", [7], finish_reason=finish)
        self.output_processor.process_outputs([output])


class Door:
    """Notes what it is asked and told."""

    def __init__(self):
        self.said = []

    @asynccontextmanager
    async def place(self, sequences, tokens):
        """Lets in at once."""
        self.said.append(("in", sequences, tokens))
        yield lambda: self.said.append("output")
        self.said.append("out")

    def charge(self):
        """Free."""
        return lambda tokens: None

    def open(self):
        """Nothing to do."""


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_the_door_hears_of_a_first_token_when_the_engine_has_it(kind):
    """A client that does not stream is told of nothing before the end."""

    async def run():
        engine, door = Engine(), Door()
        for _ in range(2):
            admit(engine, door)
        token = caller.set(Caller("acme", None, lambda name: True))
        params = SamplingParams(detokenize=False, output_kind=kind, max_tokens=3)
        prompt = {"prompt_token_ids": [1, 2, 3, 4, 5]}

        async def ask(name):
            return [output async for output in engine.generate(prompt, params, name)]

        tasks = [asyncio.create_task(ask(name)) for name in ("a", "b")]
        caller.reset(token)
        await asyncio.sleep(0.01)
        assert door.said == [("in", 1, 5)] * 2
        engine.step("a")
        assert door.said[2:] == ["output"]
        engine.step("a")
        engine.step("a", FinishReason.LENGTH)
        outputs = await tasks[0]
        assert outputs[-1].finished
        assert sum(len(each.outputs[0].token_ids) for each in outputs) >= 3
        assert door.said[2:] == ["output", "out"], "once"
        engine.step("b", FinishReason.LENGTH)
        await tasks[1]
        assert door.said[4:] == ["output", "out"]

    asyncio.run(run())


def test_requests_of_the_server_itself_are_not_asked():
    async def run():
        engine, door = Engine(), Door()
        admit(engine, door)
        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
        prompt = {"prompt_token_ids": [1], "cache_salt": None}
        task = asyncio.create_task(anext(engine.generate(prompt, params, "c")))
        await asyncio.sleep(0.01)
        engine.step("c")
        await task
        assert door.said == []

    asyncio.run(run())
