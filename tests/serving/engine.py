"""vLLM's offline engine, behind which a store is."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.gpu_steps.interpreter import hasten
from tests.forked import run
from tests.serving.conftest import MAX_MODEL_LEN, NEW_TOKENS
from vllm_jd.compressor import export_adapter

ROOT = Path(__file__).parents[2]


def run_engine(store, model, batches, *, one_process=False, fresh=False, **options):
    """Run batches of (adapter name or None, token ids) through one engine, beside this process.

    The engine's core and its worker are processes of their own, as a server's are; with
    `one_process` they are not. With `fresh` it imports vLLM itself, under this environment.

    Returns each batch's outputs, and the most requests that one step of each batch answered.
    """
    job = {
        "store": str(store.path),
        "model": str(model),
        "batches": batches,
        "dtype": "float32",
        "max_tokens": NEW_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "prompt_logprobs": None,
        "eager": True,
        "core_slots": None,
        "adapter_memory": None,
        "uploads": {},
        "args": {},
    } | options
    environment = os.environ | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_process else {})
    if not fresh:
        return run(answers, job, environment)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job))
        command = [sys.executable, "-m", "tests.serving.engine", *map(str, files)]
        subprocess.run(command, check=True, timeout=600, env=environment, cwd=ROOT)
        return json.loads(files[1].read_text())


def answers(job):
    """What `run_engine` returns, in the process that it starts."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.serve import engine_args
    from vllm_jd.store import Store

    fork_workers()
    store = Store.open(job["store"])
    settings = engine_args(
        job["store"],
        max_num_seqs=job["max_num_seqs"],
        core_slots=job["core_slots"],
        adapter_memory=job["adapter_memory"],
    )
    llm = LLM(
        job["model"],
        enforce_eager=job["eager"],
        max_model_len=job["max_model_len"],
        dtype=job["dtype"],
        block_size=32,
        max_num_batched_tokens=4096,
        **job["args"],
        **settings,
    )
    uploads = {
        name: LoRARequest(name, len(store) + 1 + i, folder)
        for i, (name, folder) in enumerate(job["uploads"].items())
    }

    def request_of(name):
        if isinstance(name, dict):  # a blend; paths are those of folders
            name = {Path(part) if part.startswith("/") else part: w for part, w in name.items()}
        elif name in uploads:
            return uploads[name]
        return adapter_request(store, name) if name else None

    results, at_once = [], []
    for batch in job["batches"]:
        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            max_tokens=job["max_tokens"],
            prompt_logprobs=job["prompt_logprobs"],
        )
        # Step by step rather than llm.generate, to see how many requests a step had.
        for i, (name, ids) in enumerate(batch):
            llm.llm_engine.add_request(
                str(i), {"prompt_token_ids": ids}, params, lora_request=request_of(name)
            )
        finished, most = {}, 0
        while llm.llm_engine.has_unfinished_requests():
            step = llm.llm_engine.step()
            most = max(most, len(step))
            finished |= {int(o.request_id.split("-")[0]): o for o in step if o.finished}
        at_once.append(most)
        results.append([_said(finished[i], job) for i in range(len(batch))])
    return results, at_once


def fork_workers():
    """Have vLLM fork the processes of an engine off this one: for CPUs it starts them with `spawn`,
    and each imports all of it again."""
    import vllm.v1.engine.utils as engine
    import vllm.v1.executor.multiproc_executor as executor

    engine.get_mp_context = executor.get_mp_context = partial(multiprocessing.get_context, "fork")


def run_stock(model, requests, folders):
    """What vLLM's own LoRA says to (adapter name, token ids), the adapters being in `folders`."""
    job = str(model), requests, {name: str(folder) for name, folder in folders.items()}
    return run(_stock_answers, job, os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def _stock_answers(job):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, requests, folders = job
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        enable_lora=True,
        max_loras=8,
        max_lora_rank=8,
    )
    loras = {
        name: LoRARequest(name, i + 1, folder) for i, (name, folder) in enumerate(folders.items())
    }
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in requests],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
        lora_request=[loras[name] for name, _ in requests],
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _said(output, job):
    logprobs = None
    if job["prompt_logprobs"] is not None:
        steps = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        logprobs = [step[token].logprob for step, token in steps]
    return {"tokens": list(output.outputs[0].token_ids), "logprobs": logprobs}


def exported(store, names, folder):
    """Adapter name → folder of what a store has of it."""
    return {name: export_adapter(store, name, folder / name) for name in names}


if __name__ == "__main__":
    hasten()
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
