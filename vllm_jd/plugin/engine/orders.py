"""What the engine has its workers do about adapters, and how they are asked."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.logger import init_logger

from vllm_jd.plugin.engine.blends import Term
from vllm_jd.plugin.engine.residency import Fill
from vllm_jd.store.blend import Blend

logger = init_logger("vllm.vllm_jd")


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


@dataclass(frozen=True)
class MakeBlend:
    """An order to the workers: from now on source `source` is a blend of these parts, whose names
    (`whose`) say what DARE drops of each."""

    source: int
    terms: tuple[Term, ...]
    blend: Blend = field(repr=False)
    whose: tuple[str, ...] = field(repr=False, default=())


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


class Sent(NamedTuple):
    """Orders of one step, and what the workers say of them."""

    step: Any
    orders: list[Order]
    """Those that came before the fills, which no request waits for."""
    fills: list[Fill]
    answer: Future
    """Of what each worker says (see `carry_out`)."""


def own_faults(before: Sequence[Order], answers: Iterable[Carried]) -> dict[int, str]:
    """What workers say was wrong with orders, by their place behind others (`before`), whose faults
    are nobody's who asked for these: they are logged."""
    found: dict[int, str] = {}
    for carried in answers:
        for place, message in carried.faults.items():
            if place >= len(before):
                found.setdefault(place - len(before), message)
            else:
                logger.error("vllm-jd: a worker did not carry out %s: %s", before[place], message)
    return found
