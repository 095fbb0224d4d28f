"""What the engine has its workers do about adapters, and how they are asked."""

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


def carry_out(worker: Any, orders: list[Order]) -> dict[int, str]:
    """What vLLM's executor runs on each worker (`collective_rpc`).

    Returns:
        What was wrong with which order, by its place in the list. The others were carried out.
    """
    return worker.model_runner.lora_manager.carry_out(orders)
