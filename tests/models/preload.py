"""What `tests.forked` imports once for all engines."""

import gc
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def stand_in_for_torchvision() -> None:
    """Have this process, and those that it starts, find a torchvision where none is installed."""
    folder = str(Path(__file__).parent / "without_images")
    if folder not in sys.path and find_spec("torchvision") is None:
        sys.path.append(folder)
        # vLLM asks processes of its own what a model can do.
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])


stand_in_for_torchvision()

import vllm.entrypoints.llm  # noqa: E402
import vllm.entrypoints.openai.api_server  # noqa: E402
import vllm.v1.engine.llm_engine  # noqa: E402
import vllm.v1.executor.multiproc_executor  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import vllm_jd.plugin.worker.manager  # noqa: E402, F401

# An engine collects garbage several times as it starts, of which there is none in all this.
gc.collect()
gc.freeze()
