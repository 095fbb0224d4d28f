"""vLLM engines in processes of their own, forked off one that has imported vLLM already.

Importing takes several times as long as starting a small engine does. What vLLM, torch or Triton
look at while they are imported (`TRITON_INTERPRET`, say) cannot be set for such a process.
"""

import multiprocessing
import os
import traceback

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.models.preload"])
_SECONDS = 600


class EngineFailed(Exception):
    """An engine did not start, or ended; the message is its traceback."""


def run(function, job, environment):
    """What `function(job)` returns in such a process.

    Args:
        function: of a module; imports of vLLM belong inside.
        job: what can be pickled; so must be what it returns.
        environment: all of its environment.

    Raises:
        EngineFailed: it has raised something, or the process has ended.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(function, job, dict(environment), sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_SECONDS):
            raise EngineFailed(f"no answer in {_SECONDS} s")
        done, found = receiver.recv()
    except EOFError:
        raise EngineFailed("the process ended without an answer") from None
    finally:
        process.join(20)
        process.kill()
    if not done:
        raise EngineFailed(found)
    return found


def start(function, job, environment):
    """Have `function(job)` run in such a process, the first of a group of its own, which the caller
    ends (`os.killpg`). Arguments are as those of `run`."""
    process = _CONTEXT.Process(target=_run_alone, args=(function, job, dict(environment)))
    process.start()
    return process


def _run_alone(function, job, environment):
    os.setsid()
    _prepare(environment)
    function(job)


def _prepare(environment):
    import torch

    from tests.models.preload import stand_in_for_torchvision

    os.environ.clear()
    os.environ.update(environment)
    # Read by OpenMP when it was loaded, before this process was.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    stand_in_for_torchvision()  # a forked process has the path of who asked for it


def _run(function, job, environment, sender):
    _prepare(environment)
    try:
        sender.send((True, function(job)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    # At once: an engine that is still there waits seconds for its workers to end.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)
