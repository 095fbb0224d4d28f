"""Spread the modules of one compression over the machines of a Ray cluster."""

import copyreg
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from vllm_jd import __version__
from vllm_jd.compressor.errors import AdapterError, CompressorError
from vllm_jd.compressor.run.compress import ModuleMap
from vllm_jd.store import Store

_AHEAD = 2  # modules handed out for each CPU


def _reopening(store: Store) -> tuple[type[Store], tuple]:
    """How to pickle a store: it is opened where it is needed, its mapped files are not sent."""
    return Store, (store.path.absolute(), store.generation, store.manifest)


copyreg.pickle(Store, _reopening)


class ClusterError(CompressorError):
    """Ray is not installed, its cluster not reachable, or not fit for the work."""


class _Refused(NamedTuple):
    """What a worker hands back in place of a result.

    Exceptions of ours would not do: Ray pickles them with their message as the only argument.
    """

    kind: type[Exception]
    faults: list[str]


def ray_map(address: str | None = None) -> ModuleMap:
    """A `module_map` for `compress` that runs every module as a task of an existing Ray cluster.

    A task takes one CPU and one thread. The adapters are read where the task runs: their folders
    must be there under the same paths with the same modification times, as on a file system that
    all machines share. So must the folder of a warm start. The store is written by this process
    alone. Each worker holds one module's factors at a time; two modules a CPU are handed out, and
    so many results at most wait in the cluster for those before them.

    The result has the same bytes as without Ray where all machines have the same kind of CPU and
    the same version of torch.

    Args:
        address: of the cluster's head (`host:6379`), or `auto`, also meant by None: what
            RAY_ADDRESS says, else the cluster that this machine belongs to. A process that is
            connected already stays with its cluster.

    Returns:
        `map` over modules: the results in order. It raises AdapterError as the function does, with
        the name of the machine, and ClusterError for what is wrong with the cluster. When it is
        left early (an error, Ctrl-C) and this call has made the connection, it is closed, and Ray
        ends the tasks under way. In a process that was connected before, those run to their end.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ClusterError(
            f"Ray cannot be imported ({error}); to spread work over a cluster: "
            "pip install 'vllm-jd[ray]'"
        ) from None
    connect = not ray.is_initialized()
    if connect:
        address = address or "auto"
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        # Ray has no common type for what goes wrong here.
        except (RayError, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {_first_line(error)}. Start one with "
                "`ray start --head`, or name its head as host:port"
            ) from None
    return partial(_map, disconnect=connect)


def _map(
    function: Callable[[str], Any], items: Iterable[str], *, disconnect: bool
) -> Iterator[Any]:
    import ray

    waiting = iter(items)
    # Once for all tasks: it holds where every tensor of every adapter lies.
    shared = ray.put(function)
    task = ray.remote(num_cpus=1)(_work)
    running: list[tuple[str, Any]] = []

    def hand_out() -> None:
        most = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 0)))
        for item in islice(waiting, max(0, most - len(running))):
            running.append((item, task.remote([shared], item, __version__)))

    try:
        hand_out()
        while running:
            item, result = running[0]
            yield _taken(item, result)
            running.pop(0)
            hand_out()
    finally:
        if running and disconnect:
            # Ray ends what a driver leaves behind. `ray.cancel` is no way to do that: it crashes
            # this process where a task ends at the same moment (Ray 2.60).
            ray.shutdown()


def _taken(item: str, result: Any) -> Any:
    """The result of a task, waited for."""
    import ray
    from ray import exceptions

    try:
        value = ray.get(result)
    except exceptions.RayTaskError as error:
        if not isinstance(error.cause, ImportError) and "failed to import" not in str(error):
            raise  # the function's own
        raise ClusterError(
            f"a machine of the Ray cluster lacks vllm-jd or what it needs: "
            f"{_first_line(error.cause)}; install vllm-jd {__version__} on every machine"
        ) from None
    except exceptions.RayError as error:
        raise ClusterError(
            f"{item}: a machine of the Ray cluster did not finish it: {_first_line(error)}. "
            "Where memory ran out, give Ray fewer CPUs there (`ray start --num-cpus`). What is "
            "done is kept: the same command goes on from there"
        ) from None
    if not isinstance(value, _Refused):
        return value
    raise AdapterError(value.faults) if value.kind is AdapterError else value.kind(*value.faults)


def _work(shared: list[Any], item: str, version: str) -> Any:
    """Run on a worker. `shared` is a list so that Ray leaves it to us when to fetch what is in it.

    What goes wrong with adapters or versions is returned as `_Refused`.
    """
    machine = socket.gethostname()
    if version != __version__:
        found = f"{machine} of the Ray cluster has vllm-jd {__version__}, this machine {version}"
        return _Refused(ClusterError, [f"{found}; install the same version on both"])
    torch.set_num_threads(1)
    try:
        return _function(shared[0])(item)
    except AdapterError as error:
        hint = ""
        if isinstance(error.__context__, FileNotFoundError):
            hint = (
                ": with --ray the adapters are read on the cluster's machines; put them on a file "
                "system that all of them share, under the same path"
            )
        return _Refused(AdapterError, [f"{fault} (on {machine}{hint})" for fault in error.faults])


@lru_cache(maxsize=1)
def _function(shared: Any) -> Callable[[str], Any]:
    """What `_map` was called with, taken apart once a worker process and not once a task."""
    import ray

    return ray.get(shared)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
