"""Ask a running engine how its slots, its generations and its uploads are."""

from collections import Counter
from typing import Any, NamedTuple

CALL = "vllm_jd_measure"
"""The engine core's method, see `vllm_jd.plugin.install`."""


class Slots(NamedTuple):
    """Slots of one kind: held by requests, full but idle, and free."""

    held: int
    idle: int
    free: int


class Draining(NamedTuple):
    """A generation (of this number), or a version of an upload (None), that is served no more, and
    how many requests have it still."""

    generation: int | None
    requests: int


class Measures(NamedTuple):
    """What an engine says, see `vllm_jd.plugin.engine.adapters.EngineAdapters.measure`."""

    slots: dict[str, Slots]
    hits: dict[str, int]
    misses: dict[str, int]
    evictions: dict[str, int]
    bases: tuple[int, int]
    cores: tuple[int, int]
    whole: bool
    page_in_seconds: list[float]
    swaps: int
    draining: list[Draining]
    recent: list[str]
    waiting: int


async def ask_measures(engine_client: Any, names: int) -> Measures:
    """What the engine says, and up to `names` names that it was asked for last. Of several (data
    parallel), what there is of all of them together."""
    return _together(await engine_client.engine_core.call_utility_all_async(CALL, names))


def _together(told: list[dict[str, Any]]) -> Measures:
    def added(what: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for each in told:
            total.update(each[what])
        return dict(total)

    def pair(what: str) -> tuple[int, int]:
        return sum(each[what][0] for each in told), sum(each[what][1] for each in told)

    slots = {
        kind: Slots(*map(sum, zip(*(each["slots"][kind] for each in told), strict=True)))
        for kind in told[0]["slots"]
    }
    draining: Counter[int | None] = Counter()
    uploads = []
    for generation, requests in (pair for each in told for pair in each["draining"]):
        if generation is None:
            uploads.append(Draining(None, requests))
        else:
            draining[generation] += requests
    return Measures(
        slots=slots,
        hits=added("hits"),
        misses=added("misses"),
        evictions=added("evictions"),
        bases=pair("bases"),
        cores=pair("cores"),
        whole=all(each["whole"] for each in told),
        page_in_seconds=[seconds for each in told for seconds in each["page_in_seconds"]],
        swaps=max(each["swaps"] for each in told),
        draining=[*(Draining(*each) for each in sorted(draining.items())), *uploads],
        recent=list(dict.fromkeys(name for each in told for name in each["recent"])),
        waiting=sum(each["waiting"] for each in told),
    )
