"""A process for each engine of a benchmark: an engine leaves its settings behind."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def in_process(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """What `script --run JOB_JSON RESULT_JSON` writes for a job.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job))
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        subprocess.run(
            [sys.executable, script, "--run", *map(str, files)],
            env=environment,
            check=True,
            stdout=sys.stderr,
        )
        return json.loads(files[1].read_text())
