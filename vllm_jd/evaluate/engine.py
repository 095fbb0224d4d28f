"""vLLM's offline engine on a store: the one place outside of the plugin that imports vLLM, and of
it only what vLLM documents (`LLM`, `SamplingParams`, its engine's arguments).

As a program (`python -m vllm_jd.evaluate.engine`) it reads `EngineSettings` and then batches of
`Question` as lines of JSON, and writes the answers to each as a line; see `process.py`.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from vllm_jd.evaluate.questions import Answer, EngineSettings, Question


def answers(
    llm: Any, questions: Sequence[Question], requests: Sequence[Any], max_new_tokens: int
) -> list[Answer]:
    """What an engine makes of questions: greedy answers, and the completions' losses from the
    served model's own prompt log-probabilities.

    Args:
        llm: `vllm.LLM`, without a prefix cache, since a cached prompt has no log-probabilities.
        questions: what is asked.
        requests: the LoRARequest of each; None: the base model.
        max_new_tokens: of an answer.
    """
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    one = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    asked = [{"prompt_token_ids": question.asked} for question in questions]
    whole = [{"prompt_token_ids": each.prompt + each.completion} for each in questions]
    loras = list(requests)
    said = llm.generate(asked, greedy, lora_request=loras, use_tqdm=False)
    read = llm.generate(whole, one, lora_request=loras, use_tqdm=False)
    found = []
    for question, answer, told in zip(questions, said, read, strict=True):
        if reason := _failure(answer) or _failure(told):
            found.append(Answer("", 0.0, reason))
            continue
        places = zip(question.completion, told.prompt_logprobs[len(question.prompt) :], strict=True)
        loss = -sum(place[token].logprob for token, place in places) / len(question.completion)
        found.append(Answer(answer.outputs[0].text, loss))
    return found


def _failure(output: Any) -> str | None:
    """Why a request failed, if it did."""
    for each in output.outputs:
        if each.finish_reason == "error":
            from vllm_jd.plugin.placed import FAILED

            return str(each.stop_reason or "the engine says no more").removeprefix(FAILED)
    return None


class Requests:
    """The LoRARequest of a question's adapter, the same for all of an adapter's questions."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._uploads: dict[str, int] = {}

    def __call__(self, question: Question) -> Any:
        """The request; None for the base model."""
        from vllm_jd.plugin.api.requests import adapter_request, upload_request

        if question.adapter is None:
            return None
        if question.folder is None:
            return adapter_request(self._store, question.adapter)
        # vLLM's ids of the store's own come first.
        number = self._uploads.setdefault(
            question.folder, len(self._store) + 1 + len(self._uploads)
        )
        return upload_request(question.adapter, question.digest, question.folder, number)


def _start(settings: EngineSettings) -> Any:
    """The engine; a flag that vLLM does not know ends the process with code 2."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_jd.serve import engine_args

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-jd evaluate"))
    parser.set_defaults(
        model=settings.model,
        max_model_len=settings.max_model_len,
        max_lora_rank=settings.max_lora_rank,
        enforce_eager=True,  # it asks for minutes, compiling takes as long
        max_num_batched_tokens=2048,  # each has the log-probabilities of all words
        disable_log_stats=True,
    )
    args = parser.parse_args(settings.flags)
    ours = engine_args(
        settings.store,
        max_num_seqs=args.max_num_seqs,
        store_base_model=settings.store_base_model,
        max_blend=0,
    )
    ours["additional_config"] = dict(args.additional_config or {}) | ours["additional_config"]
    ours["enable_prefix_caching"] = False
    for name, value in ours.items():
        setattr(args, name, value)
    return LLM.from_engine_args(EngineArgs.from_cli_args(args))


def serve(lines: TextIO, out: TextIO) -> None:
    """Answer batches of questions until there are no more; the first line out says that the engine
    is up."""
    from vllm_jd.plugin.faults import faults_told
    from vllm_jd.store import Store, StoreError, read_current

    settings = EngineSettings(**json.loads(lines.readline()))
    llm = _start(settings)
    with Store.open(settings.store, verify=False) as store:
        with faults_told():
            if read_current(store.path)[1] != settings.manifest_sha256:
                raise StoreError(f"{store.path} has another generation now: start again")
        requests = Requests(store)
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in lines:
            batch = json.loads(line)
            questions = [Question(**each) for each in batch["questions"]]
            found = answers(llm, questions, [*map(requests, questions)], batch["max_new_tokens"])
            print(json.dumps([asdict(answer) for answer in found]), file=out, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)  # vLLM says much on its standard output
        serve(sys.stdin, pipe)
