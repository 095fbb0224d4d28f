"""What a server shows of itself: every two seconds it asks the engine, and brings `/metrics`, what
routers read, and what `GET /v1/store` says up to date."""

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from vllm_jd.compressor.change.progress import Recompression, read_recompression
from vllm_jd.compressor.report.summary import cluster_sizes, uncompressed_adapters
from vllm_jd.plugin.api.measures import Measures, ask_measures
from vllm_jd.plugin.api.metrics import publish_measures
from vllm_jd.plugin.api.names import Names
from vllm_jd.plugin.api.routing import LISTED, Residency
from vllm_jd.plugin.api.series import series
from vllm_jd.serve.fleet.life import Life
from vllm_jd.store import Store
from vllm_jd.store.fleet import Blended, Compressed, Fleet

logger = logging.getLogger("vllm.vllm_jd")

_EVERY = 2.0  # seconds

STATES = ("compressed", "uncompressed", "uploaded", "blend", "broken")
"""Of adapters, see `vllm_jd.serve.fleet.listing.described`."""


class Observed:
    """What one server shows.

    Args:
        life: of its fleet.
        names: the server's.
        residency: what routers are told.
    """

    def __init__(self, life: Life, names: Names, residency: Residency):
        self.measures: Measures | None = None
        """What the engine said last; None: nothing yet."""
        self._life, self._names, self._residency = life, names, residency
        self._model = names.engine.model_config.served_model_name
        self._states: dict[str, int] = {}
        self._clusters: list[int] | None = None
        self._key: Any = None
        self._ended: float | None = None  # when the recompression that was counted last had begun
        self._told = ""

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await self.look()
                self._told = ""
            except Exception as error:
                if str(error) != self._told:  # until it is another
                    self._told = str(error)
                    logger.exception("vllm-jd: metrics could not be brought up to date")
            await asyncio.sleep(_EVERY)

    async def look(self) -> None:
        """Bring everything up to date, once."""
        engine, live = self._names.engine, self._life.live
        measures = await ask_measures(engine, LISTED)
        publish_measures(measures, engine)
        self.measures = measures
        pinned = [name for name, entry in live.fleet.entries.items() if entry.pinned]
        await self._residency.look(self._names, measures, pinned)
        await asyncio.to_thread(self._publish_fleet, live.fleet, live.store)

    def _publish_fleet(self, fleet: Fleet, store: Store) -> None:
        life, model = self._life, self._model
        key = fleet.counter, store.generation
        if key != self._key:
            self._states, self._clusters = count_states(fleet, store), cluster_sizes(store)
            self._key = key
        broken = len(life.live.blends.faults)
        for state in STATES:
            count = {"broken": broken, "blend": self._states.get("blend", 0) - broken}
            found = count.get(state, self._states.get(state, 0))
            series("adapters").labels(model, state).set(found)
        series("generation_unserved").labels(model).set(life.swaps.fault is not None)
        waiting, oldest = life.recompressions.waiting(fleet, store)
        series("uploads_waiting").labels(model).set(waiting)
        age = time.time() - oldest if waiting else 0.0
        series("oldest_waiting_seconds").labels(model).set(max(0.0, age))
        self._publish_recompression(read_recompression(life.live.path))

    def _publish_recompression(self, last: Recompression | None) -> None:
        model, running = self._model, last is not None and last.state == "running"
        series("recompression_running").labels(model).set(running)
        progress = last.done / last.total if running and last.total else 0.0
        series("recompression_progress").labels(model).set(progress)
        failed = last is not None and last.state == "failed"
        series("recompression_failed").labels(model).set(failed)
        begun = last.started_at if last is not None and not running else None
        if self._ended is None:  # what ended before this server began is not counted
            self._ended = begun or 0.0
        elif begun is not None and begun != self._ended:
            self._ended = begun
            if self._life.live.keeps_house:  # one process of one server counts them
                series("recompressions").labels(model, last.state).inc()

    def status(self) -> dict[str, Any]:
        """What GET /v1/store shows of adapters by state, of the sizes of clusters, and of the
        engine."""
        found: dict[str, Any] = {"states": self._states, "clusters": self._clusters}
        measures = self.measures
        if measures is None:
            return found | {"engine": None}
        engine = {
            "slots": {kind: slots._asdict() for kind, slots in measures.slots.items()},
            "bases": {"resident": measures.bases[0], "all": measures.bases[1]},
            "cores": {"resident": measures.cores[0], "all": measures.cores[1]},
            "whole": measures.whole,
            "draining": [each._asdict() for each in measures.draining],
            "waiting": measures.waiting,
        }
        return found | {"engine": engine}


def count_states(fleet: Fleet, store: Store) -> dict[str, int]:
    """How many names stand for adapters of each state; what cannot be served counts as what it
    would be."""
    kept = uncompressed_adapters(store).tolist()
    found: Counter[str] = Counter()
    for _, meaning in fleet.meanings(store):
        if isinstance(meaning, Compressed):
            found["uncompressed" if kept[meaning.index] else "compressed"] += 1
        else:
            found["blend" if isinstance(meaning, Blended) else "uploaded"] += 1
    return dict(found)
