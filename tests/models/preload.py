"""What `tests.models.engine` imports once for all engines."""

import sys

from tests.models.engine import WITHOUT_IMAGES

sys.path.append(WITHOUT_IMAGES)

import vllm.entrypoints.llm
import vllm.v1.engine.llm_engine
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401

import vllm_jd.plugin.worker.manager  # noqa: F401
