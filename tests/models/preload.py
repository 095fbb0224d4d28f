"""What `tests.forked` imports once for all engines."""

import gc
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def stand_in_for_torchvision() -> None:
    """Have this process, and those that it starts, find a torchvision where none is installed."""
    folder = str(Path(__file__).parent / "without_images")
    found = find_spec("torchvision")
    # The stand-in itself is found where it was imported before: the path, and the environment of
    # other processes, may have been taken from somewhere else since.
    if found is not None and not str(found.origin).startswith(folder):
        return
    if folder not in sys.path:
        sys.path.append(folder)
    # vLLM asks processes of its own what a model can do.
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in others:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *others])


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
