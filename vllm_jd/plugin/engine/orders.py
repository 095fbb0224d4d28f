"""What the engine has its workers do about adapters, and how they are asked."""

from collections.abc import Iterable, Mapping, Sequence
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


def carry_out(worker: Any, orders: list[Order]) -> dict[int, str]:
    """What vLLM's executor runs on each worker (`collective_rpc`).

    Returns:
        What was wrong with which order, by its place in the list. The others were carried out.
    """
    return worker.model_runner.lora_manager.carry_out(orders)


class Sent(NamedTuple):
    """Orders of one step, and what the workers say of them."""

    step: Any
    orders: list[Order]
    """Those that came before the fills, which no request waits for."""
    fills: list[Fill]
    answer: Future
    """Of what each worker says (see `carry_out`)."""

    def faults(self) -> dict[int, str]:
        """What was wrong, by the place in `fills`."""
        return own_faults(self.orders, self.answer.result())


def own_faults(before: Sequence[Order], answers: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """What workers say was wrong with orders, by their place behind others (`before`), whose faults
    are nobody's who asked for these: they are logged."""
    found: dict[int, str] = {}
    for faults in answers:
        for place, message in faults.items():
            if place >= len(before):
                found.setdefault(place - len(before), message)
            else:
                logger.error("vllm-jd: a worker did not carry out %s: %s", before[place], message)
    return found
