"""vLLM's own scheduler with the plugin's part in it, and workers that compute a tiny model: all of
an engine but its processes and its sampling."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import deque
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.plugin.conftest import HIDDEN, INNER, LAYERS, Runner, TinyModel
from vllm_jd.kernels import Int8Rows
from vllm_jd.plugin.config import KEY
from vllm_jd.plugin.engine.scheduler import ResidentAsyncScheduler, ResidentScheduler
from vllm_jd.plugin.placed import FAILED
from vllm_jd.store.generations import open_number

BLOCK, VOCABULARY = 4, 16
EMBEDDING = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))
"""What the model sees of each token."""


class FailingReads:
    """Stands in for `os.preadv`: the next `left` reads of files whose path has `of` in it fail."""

    def __init__(self):
        self.of, self.left, self.fired = "", 0, 0
        self._stock = os.preadv

    def __call__(self, descriptor, buffers, offset):
        if self.left and self.of in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            self.left -= 1
            self.fired += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._stock(descriptor, buffers, offset)

    @contextmanager
    def installed(self):
        os.preadv = self
        try:
            yield self
        finally:
            os.preadv = self._stock


class Worker:
    """One worker in this process."""

    def __init__(self, store, options):
        runner = self.runner = Runner(store, TinyModel())
        runner.vllm_config.additional_config = {KEY: {"store": str(store.path), **options}}
        device = torch.device("cpu")
        runner.model = runner.load_lora_model(runner.model, runner.vllm_config, device)

    def call(self, method, args):
        """As vLLM's executor calls a worker."""
        return method(SimpleNamespace(model_runner=self.runner), *args)

    def step(self, requests, tokens):
        """What the model makes of a step's tokens, some of each LoRARequest (or None)."""
        ids = [0 if request is None else request.lora_int_id for request in requests]
        counts = [len(each) for each in tokens]
        self.runner._set_active_loras(
            tuple(ids),
            tuple(np.repeat(ids, counts).tolist()),
            {request for request in requests if request is not None},
        )
        return self.runner.model(EMBEDDING[[token for each in tokens for token in each]])

    def warm_up(self):
        """A dummy run as vLLM makes it, between two steps too."""
        counts = np.array([2, 1], dtype=np.int32)
        with self.runner.maybe_dummy_run_with_lora(
            self.runner.lora_config, counts, counts, num_active_loras=2
        ):
            self.runner.model(EMBEDDING[:3])

    def state(self):
        """A digest of all that the kernels read."""
        slots = self.runner.lora_manager._slots
        digest = hashlib.sha256()
        for part in _tensors([slots.rows, slots.cores, slots.core_steps, slots.keys]):
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for layer in self.runner.lora_manager.layers.values():
            pools = layer.pools
            own = [pools.v, pools.u, pools.scales, pools.v_int8, pools.u_int8, pools.packed]
            for part in _tensors(own):
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _tensors(parts):
    for part in parts:
        if torch.is_tensor(part):
            yield part
        elif isinstance(part, np.ndarray):
            yield torch.from_numpy(part)
        elif isinstance(part, Int8Rows):
            yield from (part.codes, part.steps)
        elif part is not None:
            yield from _tensors(part)


class DistantWorker:
    """A worker in another process, whose sets go in another order."""

    def __init__(self, folder):
        seed = (int(os.environ.get("PYTHONHASHSEED", "0").replace("random", "0")) + 1) % 2**32
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.plugin.engine.lifecycle", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[3],
        )

    def _ask(self, *what):
        pickle.dump(what, self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def start(self, store, options):
        """Begin anew, on a store."""
        self._ask("start", str(store.path), store.generation, options)
        return self

    def call(self, method, args):
        """See `Worker`; so are the others."""
        return self._ask("call", method, args)

    def step(self, requests, tokens):
        return self._ask("step", requests, tokens)

    def warm_up(self):
        self._ask("warm_up")

    def state(self):
        return self._ask("state")

    def fail(self, of, count):
        """Have reads fail there."""
        self._ask("fail", of, count)

    def end(self):
        self._process.stdin.close()
        self._process.wait(60)


def _serve_as_worker(folder):
    """What the other process does."""
    from vllm_jd.plugin import register

    # What is printed must not get among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    register()
    torch.set_num_threads(1)
    worker, reads = None, FailingReads()
    with set_current_vllm_config(VllmConfig()), reads.installed():
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        while True:
            try:
                name, *args = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            answer = None
            try:
                if name == "start":
                    path, generation, options = args
                    reads.left = 0
                    store = open_number(Path(path), generation, verify=False)
                    worker = Worker(store, options)
                elif name == "fail":
                    reads.of, reads.left = args
                else:
                    answer = getattr(worker, name)(*args)
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers)
            answers.flush()


def engine_config(folder):
    """A VllmConfig for the tiny model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    made = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=32,
            max_model_len=64,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    made.lora_config = LoRAConfig(max_lora_rank=8, max_loras=64, max_cpu_loras=64)
    return made


class Step:
    """A step under way: `of` each request the positions that have been seen, see `Engine.step`."""

    def __init__(self, output, answer, seen):
        self.output, self.answer, self.seen = output, answer, seen


class Engine:
    """The scheduler, and workers that answer its orders.

    Args:
        vllm_config: see `engine_config`.
        workers: `Worker` or `DistantWorker`, one or more.
        config: of the plugin, as these have it.
        ahead: whether a step is scheduled before the one before it has ended.
        blocks: how many blocks of KV cache there are.
    """

    def __init__(self, vllm_config, workers, config, *, ahead=False, blocks=16):
        vllm_config.additional_config = {KEY: config.model_dump(exclude_none=True)}
        vllm_config.cache_config.num_gpu_blocks = blocks
        vllm_config.scheduler_config.async_scheduling = ahead
        self._workers, self._ahead = workers, ahead
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        scheduler = ResidentAsyncScheduler if ahead else ResidentScheduler
        self.scheduler = scheduler(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=SimpleNamespace(accept_tokens=lambda *_: True),
            block_size=BLOCK,
        )
        init_none_hash(sha256)
        self.model_executor = SimpleNamespace(collective_rpc=self._rpc)
        self.request_block_hasher = get_request_block_hasher(BLOCK, sha256)
        adapters = self.scheduler.connected_to(self)
        # As an EngineCore's calls about LoRAs, which the plugin replaces.
        self.add_lora, self.remove_lora = adapters.add_lora, adapters.remove_lora
        self.pin_lora, self.list_loras = adapters.pin_lora, adapters.list_loras
        self.adapters = self.scheduler.adapters
        self._cache = torch.full((blocks, BLOCK, HIDDEN), torch.nan)
        self._lora = {}
        self._under_way = deque()

    def _rpc(self, method, args=(), non_block=False):
        answers = [worker.call(method, args) for worker in self._workers]
        if not non_block:
            return answers
        future = Future()
        future.set_result(answers)
        return future

    def add(self, name, tokens, most, lora):
        """Begin a request that ends after `most` new tokens."""
        self.scheduler.add_request(
            Request(
                name,
                tokens,
                SamplingParams(max_tokens=most, ignore_eos=True),
                None,
                lora_request=lora,
                block_hasher=self.request_block_hasher,
            )
        )

    def abort(self, name):
        """End a request early."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Schedule a step and compute it; end it, or the one before it.

        Returns:
            What the step saw of each request, tokens and float32 `[tokens, d]`, what the model
            made of all of them since its beginning, in this step or in blocks of the cache; and
            what each request that has failed was told.
        """
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self._lora[new.req_id] = new.lora_request
        names = list(output.num_scheduled_tokens)
        seen = {}
        if names:
            tokens, places = [], []
            for name in names:
                request = self.scheduler.requests[name]
                last = self._computed(output, name)
                first = last - output.num_scheduled_tokens[name]
                (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
                all_tokens = [self._token(request, p) for p in range(last)]
                tokens.append(all_tokens[first:])
                places.append((blocks, first, last, all_tokens))
            requests = [self._lora[name] for name in names]
            made = [worker.step(requests, tokens) for worker in self._workers]
            assert all(torch.equal(made[0], other) for other in made), "the workers differ"
            at = 0
            for name, (blocks, first, last, all_tokens) in zip(names, places, strict=True):
                for p in range(first, last):
                    self._cache[blocks[p // BLOCK], p % BLOCK] = made[0][at]
                    at += 1
                index = [(blocks[p // BLOCK], p % BLOCK) for p in range(last)]
                rows = self._cache[[b for b, _ in index], [o for _, o in index]]
                seen[name] = all_tokens, rows
        states = {worker.state() for worker in self._workers} if len(self._workers) > 1 else ()
        assert len(states) <= 1, "the workers hold different numbers"
        self._under_way.append(Step(output, self._answer(output, names), seen))
        if self._ahead and len(self._under_way) < 2 and names:
            return {}, {}
        return self._end()

    def _computed(self, output, name):
        """How many tokens a request has when the step has been computed."""
        for new in output.scheduled_new_reqs:
            if new.req_id == name:
                return new.num_computed_tokens + output.num_scheduled_tokens[name]
        cached = output.scheduled_cached_reqs
        at = cached.req_ids.index(name)
        return cached.num_computed_tokens[at] + output.num_scheduled_tokens[name]

    @staticmethod
    def _token(request, place):
        """A request's token; those it has made are known beforehand, see `_answer`."""
        prompt = request.prompt_token_ids
        return prompt[place] if place < len(prompt) else place % VOCABULARY

    def _answer(self, output, names):
        sampled = []
        for name in names:
            request, last = self.scheduler.requests[name], self._computed(output, name)
            whole = last >= request.num_prompt_tokens and last >= len(request.all_token_ids)
            sampled.append([self._token(request, last)] if whole else [])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _end(self):
        step = self._under_way.popleft()
        outputs = self.scheduler.update_from_output(step.output, step.answer)
        failed = {}
        for its in outputs.values():
            for output in its.outputs:
                if output.finish_reason is not None and output.stop_reason is not None:
                    assert output.stop_reason.startswith(FAILED)
                    failed[output.request_id] = output.stop_reason.removeprefix(FAILED)
        return step.seen, failed

    def finish(self):
        """End the steps under way: what they saw, and whose requests failed, of each."""
        while self._under_way:
            yield self._end()


if __name__ == "__main__":
    _serve_as_worker(sys.argv[1])
