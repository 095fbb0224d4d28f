"""vLLM engines of tiny models."""

import multiprocessing
import os
from functools import partial
from pathlib import Path

from tests.forked import run

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def serve(model, batch, tokens, *, generations=(), uploads=None, compiled=False, **options):
    """What an engine of a tiny model answers.

    Args:
        model: the model's folder.
        batch: (adapter name or None, token ids) for each request, all at once.
        tokens: how many tokens each answer has.
        generations: of a store: the one that it starts with (see `engine_args`) and those that
            follow it; none: vLLM as it is.
        uploads: name → folder of adapters that are served uncompressed.
        compiled: whether vLLM compiles the model.
        options: of `vllm.LLM`.

    Returns:
        For each generation what is said to each request: its tokens, and the log-probabilities of
        the prompt's tokens after the first and of these.

    Raises:
        tests.forked.EngineFailed: there is no answer.
    """
    job = {
        "model": str(model),
        "batch": batch,
        "tokens": tokens,
        "generations": [(str(store.path), store.generation) for store in generations],
        "uploads": {name: str(folder) for name, folder in (uploads or {}).items()},
        "compiled": compiled,
        "options": options,
    }
    return run(_answers, job, os.environ | ENVIRONMENT)


_ENGINES = []
"""Until the process ends."""


def _answers(job):
    import torch
    import vllm.v1.executor.multiproc_executor as executor
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.plugin.api.generations import serve_generation
    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.store.generations import open_number

    known = {
        name: LoRARequest(name, 1000 + i, folder)
        for i, (name, folder) in enumerate(job["uploads"].items())
    }
    if not job["compiled"]:
        torch.compiler.set_stance("force_eager")  # helpers, which a tiny engine waits longer for
    # vLLM starts the workers of a CPU with `spawn`: each imports all of it again.
    executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    llm = LLM(
        job["model"],
        enforce_eager=not job["compiled"],
        max_model_len=64,
        max_num_batched_tokens=512,
        block_size=32,
        num_gpu_blocks_override=64,
        skip_tokenizer_init=True,
        **job["options"],
    )
    _ENGINES.append(llm)
    params = SamplingParams(
        temperature=0,
        ignore_eos=True,
        max_tokens=job["tokens"],
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for _, ids in job["batch"]]
    answers = []
    for i, (path, number) in enumerate(job["generations"] or [(None, 0)]):
        store = path and open_number(Path(path), number)
        if i:
            serve_generation(llm.llm_engine, path, number)
        requests = [
            known.get(name) or (adapter_request(store, name) if name else None)
            for name, _ in job["batch"]
        ]
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        answers.append([_said(output) for output in outputs])
    return answers


def _said(output):
    said = output.outputs[0]
    ids = [*output.prompt_token_ids[1:], *said.token_ids]
    steps = [*output.prompt_logprobs[1:], *said.logprobs]
    logprobs = [step[token].logprob for step, token in zip(steps, ids, strict=True)]
    return {"tokens": list(said.token_ids), "logprobs": logprobs}
