"""Changes a store in a process that kills itself at a given step on disk. Imports little: it is
loaded anew in each of many processes."""

import os
import signal
import sys
from pathlib import Path

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"}


def run(change, path, *arguments, stop_at=None, log=None, **options):
    """Run a change of the store at `path`; SIGKILL before its `stop_at`-th step on the store, or
    log their number."""
    import torch

    from vllm_jd.compressor import read_adapters
    from vllm_jd.compressor.change import incremental
    from vllm_jd.store import generations

    count = 0

    def hook(event, args):
        nonlocal count
        if event not in STEPS:
            return
        # Deletions by shutil.rmtree name a file relative to an open folder.
        if event not in {"os.remove", "os.rmdir"} and not str(args[0]).startswith(str(path)):
            return
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    if change == "add":
        arguments = (read_adapters(*arguments),)
    function = generations.prune if change == "prune" else getattr(incremental, change)
    sys.addaudithook(hook)
    function(Path(path), *arguments, **options)
    if log:
        Path(log).write_text(str(count))
