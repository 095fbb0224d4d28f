"""Runs `vllm-jd` in a process that kills itself at a given step on disk. Imports little: it is
loaded anew in each of many processes."""

import os
import signal
import sys
from pathlib import Path

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def run(arguments, stop_at=None, log=None):
    """Run the command; SIGKILL before its `stop_at`-th step on the store, or log their number."""
    import torch

    from vllm_jd.cli.app import app

    out = arguments[arguments.index("--out") + 1]
    count = 0

    def hook(event, args):
        nonlocal count
        if event not in STEPS:
            return
        # Deletions by shutil.rmtree name a file relative to an open folder.
        if event not in {"os.remove", "os.rmdir"} and not str(args[0]).startswith(out):
            return
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        app(arguments)
    finally:
        if log:
            Path(log).write_text(str(count))
