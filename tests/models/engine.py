"""vLLM engines, each in a process that is forked off one that has imported vLLM already.

Importing takes several times as long as starting a tiny engine does.
"""

import json
import multiprocessing
import os
import traceback

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.models.preload"])

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # of helpers, which a tiny engine waits longer for
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}
_SECONDS = 600


class EngineFailed(Exception):
    """An engine did not start, or ended; the message is its traceback."""


def serve(model, batch, tokens, *, store=None, uploads=None, **options):
    """What an engine of a tiny model answers.

    Args:
        model: the model's folder.
        batch: (adapter name or None, token ids) for each request, all at once.
        tokens: how many tokens each answer has.
        store: the store's folder, or None: vLLM as it is.
        uploads: name → folder of adapters that are served uncompressed.
        options: of `vllm.LLM`.

    Returns:
        For each request its tokens, and the log-probabilities of the prompt's tokens after the
        first and of these.

    Raises:
        EngineFailed: there is no answer.
    """
    job = {
        "model": str(model),
        "batch": batch,
        "tokens": tokens,
        "store": store and str(store),
        "uploads": {name: str(folder) for name, folder in (uploads or {}).items()},
        "options": options,
    }
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(json.dumps(job), sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            raise EngineFailed(f"no answer in {_SECONDS} s")
        done, found = receiver.recv()
    except EOFError:
        raise EngineFailed("the process ended without an answer") from None
    finally:
        process.join(20)
        process.kill()
    if not done:
        raise EngineFailed(found)
    return found


def _run(job, sender):
    from tests.models.preload import stand_in_for_torchvision

    os.environ |= ENVIRONMENT
    stand_in_for_torchvision()  # a forked process has the path of who asked for it
    try:
        sender.send((True, _answers(**json.loads(job))))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()


def _answers(model, batch, tokens, store, uploads, options):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    known = {
        name: LoRARequest(name, 1000 + i, folder)
        for i, (name, folder) in enumerate(uploads.items())
    }
    opened = None
    if store is not None:
        opened = Store.open(store)
        options |= engine_args(store, max_num_seqs=32)
    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=512,
        block_size=32,
        num_gpu_blocks_override=64,
        **options,
    )
    requests = [
        known.get(name) or (adapter_request(opened, name) if name else None) for name, _ in batch
    ]
    params = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=tokens, logprobs=0, prompt_logprobs=0
    )
    prompts = [{"prompt_token_ids": ids} for _, ids in batch]
    outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
    answers = []
    for output in outputs:
        said = output.outputs[0]
        ids = [*output.prompt_token_ids[1:], *said.token_ids]
        steps = [*output.prompt_logprobs[1:], *said.logprobs]
        logprobs = [step[token].logprob for step, token in zip(steps, ids, strict=True)]
        answers.append({"tokens": list(said.token_ids), "logprobs": logprobs})
    return answers
