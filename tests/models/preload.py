"""What `tests.models.engine` imports once for all engines."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("torchvision") is None:
    stand_in = str(Path(__file__).parent / "without_images")
    sys.path.append(stand_in)
    # vLLM asks processes of its own what a model can do.
    os.environ["PYTHONPATH"] = os.pathsep.join([stand_in, os.environ.get("PYTHONPATH", "")])

import vllm.entrypoints.llm
import vllm.v1.engine.llm_engine
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401

import vllm_jd.plugin.worker.manager  # noqa: F401
