"""Step `engine`: vLLM itself, from its Python files alone, with this repository's plugin.

A tiny Llama with random weights, a lossy store of random adapters on all of its linear layers, and
one adapter that is served as it is, all of them from the bundle. Does the plugin start on vLLM's
CUDA platform, and are the tokens those of PEFT on the store's exports? vLLM's compiled operators
are not there: attention is Triton's, the rest torch's (`compiled_ops`). Each engine is a process,
told what to do in JSON, and says how far it has come line by line. That one does not start is a
finding, not a fault of the step; a wrong token is.

Without a GPU (`--small`) it is vLLM's CUDA platform all the same, on `fake_gpu`.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_steps import bare, carried, step
from gpu_steps.served import MODEL, SERVED, UPLOAD
from gpu_steps.step import Step

SECONDS_OF_AN_ENGINE = 25.0  # about; with less it is not begun
TIE = {"float32": 1e-3, "bfloat16": 0.15}
"""By how much, in standard deviations of a token's logits, the reference may prefer another one."""

RUNS: tuple[dict[str, Any], ...] = (
    {"name": "float32, eager", "dtype": "float32", "graphs": False},
    {"name": "bfloat16, CUDA graphs", "dtype": "bfloat16", "graphs": True},
    {"name": "bfloat16, eager", "dtype": "bfloat16", "graphs": False},
)
PROMPTS = [[5, 17, 200, 31], [250, 2, 2, 9, 41, 77, 8], [11]]


def run(step: Step) -> None:
    """Make what is served, then serve it with one engine after the other."""
    if step.bundle is None or not (step.bundle / carried.ARCHIVE).is_file():
        step.skip("all of it", "no bundle with vLLM's Python files (make gpu-first-bundle)")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = folder / "site"
        step.doing("unpacking vLLM and the wheels")
        step.put("wheels", carried.unpack(step.bundle, site))
        served = find(step.bundle / SERVED)
        for one in RUNS:
            if one["dtype"] != "float32" and not step.on_gpu:
                step.skip(one["name"], "vLLM's attention in bfloat16 is wrong in the interpreter")
            elif step.enough(0 if step.small else SECONDS_OF_AN_ENGINE, one["name"]):
                serve(step, one, served, site, folder)


def find(folder: Path) -> dict[str, Any]:
    """What `served.make` wrote: the model, the store, and where each adapter lies as PEFT's."""
    exports = sorted((folder / "exports").iterdir())
    return {
        "model": str(folder / MODEL),
        "store": str(folder / "store"),
        "folders": {each.name: str(each) for each in exports}
        | {UPLOAD: str(folder / UPLOAD), "": None},
        "upload": str(folder / UPLOAD),
    }


def reference(
    served: dict[str, Any], answers: Sequence[dict[str, Any]]
) -> list[tuple[float, list[int]]]:
    """For each answer: how much the reference prefers another token at most, and its own ones.

    PEFT's and transformers' forward pass in float32 on CPU, given the answer's tokens up to each.
    Preference is the largest logit less that of the answer's token, in standard deviations.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = []
    for answer in answers:
        model = AutoModelForCausalLM.from_pretrained(served["model"], dtype=torch.float32)
        folder = served["folders"][answer["adapter"]]
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        tokens, prompt = answer["tokens"], answer["prompt"]
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *tokens[:-1]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        of_answer = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        preferred = (logits.max(dim=1).values - of_answer) / logits.std(dim=1)
        found.append((float(preferred.max()), logits.argmax(dim=1).tolist()))
    return found


# --- one engine ---


def serve(
    step: Step, one: dict[str, Any], served: dict[str, Any], site: Path, folder: Path
) -> None:
    """Run it with vLLM's second model runner, and with its first if that comes to no answers."""
    for runner in (2, 1):
        found = {**one, "runner": runner} | _process(step, one, runner, served, site, folder)
        answers = found.pop("answers", None)
        if answers:
            found |= judge(served, answers, TIE[one["dtype"]])
            if found["wrong"]:
                step.fault(one["name"], f"{found['wrong']} of {found['asked']} answers are wrong")
        step.add("engines", found)
        if answers or step.left < SECONDS_OF_AN_ENGINE:
            return


def judge(served: dict[str, Any], answers: Sequence[dict[str, Any]], tie: float) -> dict[str, Any]:
    """What became of the answers: how many are wrong, and whether adapters show at all."""
    said = reference(served, answers)
    by_prompt: dict[str, set[tuple[int, ...]]] = {}
    for answer in answers:
        by_prompt.setdefault(str(answer["prompt"]), set()).add(tuple(answer["tokens"]))
    return {
        "asked": len(answers),
        "same": sum(
            own == answer["tokens"] for (_, own), answer in zip(said, answers, strict=True)
        ),
        "wrong": sum(preferred > tie for preferred, _ in said),
        "most_preferred": round(max(preferred for preferred, _ in said), 5),
        "tie": tie,
        "different_answers": [len(each) for each in by_prompt.values()],
    }


def _process(
    step: Step,
    one: dict[str, Any],
    runner: int,
    served: dict[str, Any],
    site: Path,
    folder: Path,
) -> dict[str, Any]:
    """Start an engine, read what it says, and end it when the step's time is up."""
    job = {**one, **served, "small": step.small, "prompts": PROMPTS[: 2 if step.small else None]}
    name = f"{one['dtype']}-{one['graphs']}-{runner}"
    job_file, lines = folder / f"{name}.json", folder / f"{name}.jsonl"
    job_file.write_text(json.dumps(job))
    changed = bare.environment(site, folder, runner)
    command = [sys.executable, "-m", "gpu_steps.engine", "--engine", str(job_file), str(lines)]
    start = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | changed)
    try:
        while process.poll() is None and step.left > 0:
            time.sleep(0.2)
            came = _said(lines)
            if came.get("came_to") and step.content["doing"] != (now := _where(one, runner, came)):
                step.doing(now)
    finally:
        process.kill()
        process.wait()
    found = _said(lines)
    found["seconds"] = round(time.monotonic() - start, 1)
    if process.returncode and "error" not in found:
        found["error"] = "no time left" if step.left <= 0 else f"exit code {process.returncode}"
    return found


def _where(one: dict[str, Any], runner: int, said: dict[str, Any]) -> str:
    return f"{one['name']}, runner {runner}: {said['came_to']}"


def _said(lines: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        text = lines.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            found |= json.loads(line)
    return found


# --- inside of its process ---


def engine(job: dict[str, Any], lines: Path) -> None:
    """Serve the job's prompts with every adapter."""

    def say(**what: Any) -> None:
        with lines.open("a") as file:
            file.write(json.dumps(what) + "\n")

    try:
        _engine(job, say)
    except BaseException as error:
        say(error=f"{type(error).__name__}: {error}"[:2000])
        raise


def _engine(job: dict[str, Any], say: Any) -> None:
    say(came_to="importing vLLM")
    say(came_to="its platform", **bare.put_up())
    say(came_to="importing its engine")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_jd.plugin.api.requests import adapter_request
    from vllm_jd.serve.engine import engine_args
    from vllm_jd.store import Store

    store = Store.open(job["store"], verify=False)
    say(came_to="starting the engine")
    start = time.monotonic()
    made = LLMEngine.from_engine_args(
        EngineArgs(
            model=job["model"],
            dtype=job["dtype"],
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_batched_tokens=64 if job["small"] else 512,
            block_size=16,
            kv_cache_memory_bytes=(4 if job["small"] else 64) << 20,
            enable_prefix_caching=False,
            **bare.options((1, 8, 16) if job["graphs"] else ()),
            **engine_args(job["store"], max_num_seqs=16),
        )
    )
    say(came_to="answering", start_seconds=round(time.monotonic() - start, 1), **_plugin(made))
    upload = LoRARequest(UPLOAD, 1000, job["upload"])
    asked = [(name, prompt) for prompt in job["prompts"] for name in job["folders"]]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3 if job["small"] else 12)
    for i, (name, prompt) in enumerate(asked):
        lora = None if not name else upload if name == UPLOAD else adapter_request(store, name)
        made.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=lora)
    answers: dict[int, list[int]] = {}
    while made.has_unfinished_requests():
        for output in made.step():
            if output.finished:
                answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
    say(
        came_to="the end",
        answers=[
            {"adapter": name, "prompt": prompt, "tokens": answers[i]}
            for i, (name, prompt) in enumerate(asked)
        ],
    )


def _plugin(made: Any) -> dict[str, Any]:
    """What of ours is in the engine: the manager, its kernels, the layers that it wrapped."""
    from vllm_jd.kernels import backend_name

    worker = made.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    manager = runner.lora_manager
    return {
        "manager": type(manager).__name__,
        "model_runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "kernels": backend_name(manager.device),
        "layers": len(manager.layers),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        engine(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
    else:
        step.main("engine", run)
