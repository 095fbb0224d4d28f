"""What the engine has its workers do about adapters, and how they are asked."""

import time
from typing import Any, NamedTuple

from vllm_jd.plugin.engine.blends import MakeBlend
from vllm_jd.plugin.engine.residency import Fill


class OpenStore(NamedTuple):
    """Open a generation of a store as source `source`."""

    source: int
    path: str
    generation: int


class LoadUpload(NamedTuple):
    """Read and check an uploaded folder, whose files have this digest, as source `source`."""

    source: int
    name: str
    digest: str
    path: str


class AlsoAt(NamedTuple):
    """Remember another folder with the files of upload `source`."""

    source: int
    path: str


class CloseSource(NamedTuple):
    """Forget a source, of which nothing is held."""

    source: int


Order = OpenStore | LoadUpload | AlsoAt | MakeBlend | CloseSource | Fill


class Carried(NamedTuple):
    """What a worker says of orders: what was wrong with which, by its place in the list (the others
    were carried out), and how many seconds they took it. On a GPU copies may go on behind these."""

    faults: dict[int, str]
    seconds: float


def carry_out(worker: Any, orders: list[Order]) -> Carried:
    """What vLLM's executor runs on each worker (`collective_rpc`)."""
    begun = time.perf_counter()
    faults = worker.model_runner.lora_manager.carry_out(orders)
    return Carried(faults, time.perf_counter() - begun)
