"""The quality study (`quality.py`) on a bare GPU: no network, no vLLM installed.

    make gpu-first-bundle                                  # where vLLM is: build/gpu-first
    python3 benchmarks/gpu_quality.py run --data DATA …    # on the GPU, as quality.py run

vLLM's Python files come from the bundle (`gpu_steps/carried.py`) and are unpacked into the folder
`VLLM_JD_SITE`, by default a new one; its compiled operators have stand-ins, as in the step `engine`
of `make gpu-first`. All else is `quality.py` as it is: vLLM's engine on its CUDA platform, this
repository's plugin and Triton kernels, decoding steps as captured graphs. Without a GPU it is a
rehearsal in Triton's interpreter. Beside what `make gpu-first` needs it takes rouge-score, and the
base model in the cache (`VLLM_JD_CACHE`).
"""

import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent
BUNDLE = BENCHMARKS.parent / "build" / "gpu-first"
INSIDE = "VLLM_JD_BARE_GPU"  # set where vLLM's files are on the path already
CAPTURED = (1, 2, 4, 8, 16, *range(32, 257, 32))
PROMPT_TOKENS = 8192  # a step


def main(words: list[str]) -> int:
    """Unpack vLLM and run quality.py in this Python again, with it on the path."""
    if os.environ.get(INSIDE):
        return inside(words)
    site = Path(os.environ.get("VLLM_JD_SITE") or tempfile.mkdtemp(prefix="gpu-quality-"))
    packages = site / "packages"  # not the repository: its link `kernels` would hide another
    sys.path[:0] = [str(BENCHMARKS.parent)]
    from gpu_steps import bare, carried

    if not (BUNDLE / carried.ARCHIVE).is_file():
        print(
            f"error: found no {carried.ARCHIVE} in {BUNDLE}, expected vLLM's Python files; fill it "
            "with `make gpu-first-bundle` where vLLM is installed, and bring it here",
            file=sys.stderr,
        )
        return 1
    if not packages.exists():
        packages.mkdir(parents=True)
        (packages / "vllm_jd").symlink_to(BENCHMARKS.parent / "vllm_jd")
        carried.unpack(BUNDLE, site / "vllm")
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(packages), str(BENCHMARKS), known])
    os.environ |= bare.environment(site / "vllm", site)
    os.environ |= {INSIDE: "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.execv(sys.executable, [sys.executable, __file__, *words])


def inside(words: list[str]) -> int:
    """quality.py, its engine in this process."""
    import torch

    on_gpu = torch.cuda.is_available()  # before there may be one that is none
    from gpu_steps import bare

    bare.put_up()
    import quality
    import tasks

    tasks.engine = functools.partial(engine, on_gpu)
    if not on_gpu:
        tasks.MAX_NEW = 2  # the interpreter is slow
    quality.in_process = lambda script, job: quality.answers(job)
    quality.app(words)
    return 0


def engine(on_gpu: bool, model: str, store: str, *, dtype: str = "float32", **options: Any) -> Any:
    """As `tasks.engine`, for a GPU without vLLM's compiled operators."""
    import tasks
    from gpu_steps import bare
    from vllm import LLM

    from vllm_jd.serve import engine_args

    return LLM(
        model,
        dtype=dtype,
        max_model_len=tasks.MOST_TOKENS + tasks.MAX_NEW,
        max_num_batched_tokens=PROMPT_TOKENS if on_gpu else 512,
        gpu_memory_utilization=0.05,  # several may share it
        kv_cache_memory_bytes=(4 << 30) if on_gpu else (64 << 20),
        enable_prefix_caching=False,
        **bare.options(CAPTURED if on_gpu else ()),
        **engine_args(store, max_num_seqs=256 if on_gpu else 16, max_blend=8),
        **options,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
