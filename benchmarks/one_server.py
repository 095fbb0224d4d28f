"""The server that studies of a fleet's life measure: eager, on CPU, without cached prefixes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_jd.demo.demo import free_port
from vllm_jd.serve import running
from vllm_jd.serve.process import ServerProcess

_START_SECONDS = 600


@contextmanager
def one_server(
    store: Path,
    model: Path,
    log: Path,
    *flags: str,
    max_num_seqs: int,
    max_model_len: int,
    engine_cores: str | None = None,
) -> Iterator[tuple[ServerProcess, str]]:
    """A server that answers, until the block ends: its process, and its URL without a path.

    Args:
        store: to serve.
        model: folder of its base model.
        log: file for its output.
        flags: more of `vllm-jd serve`.
        max_num_seqs: as in vLLM.
        max_model_len: as in vLLM.
        engine_cores: VLLM_CPU_OMP_THREADS_BIND.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm_jd.cli.app", "serve", str(store)]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-num-seqs", str(max_num_seqs), "--max-model-len", str(max_model_len)]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if engine_cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = engine_cores
    url = f"http://127.0.0.1:{port}"
    with running([*command, *flags], environment, log) as process:
        process.wait_ready(f"{url}/health", _START_SECONDS)
        yield process, url
