"""What a server does by itself all day: follow what others change of the store, and recompress."""

import asyncio
import logging
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_jd.plugin.api.errors import Route
from vllm_jd.plugin.api.generations import open_generation_async, serve_generation_async
from vllm_jd.plugin.api.metrics import publish_store
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.serve.fleet.recompression import AlreadyRunning, Recompressions
from vllm_jd.serve.fleet.swap import Swaps
from vllm_jd.store import Store, StoreError, read_current
from vllm_jd.store.generations import generations_on_disk, revert

logger = logging.getLogger("vllm.vllm_jd")

_FOLLOW_SECONDS = 0.25
_DUE_SECONDS = 5.0

router = APIRouter(route_class=Route)


class _Server:
    """A running server, as `Swaps` wants it."""

    def __init__(self, live: LiveFleet):
        self._live = live

    @property
    def store(self) -> Store:
        return self._live.store

    async def open_generation(self, store: Path, generation: int) -> None:
        await open_generation_async(self._live.engine, store, generation)

    async def point(self, store: Store) -> None:
        async with self._live.changing:
            await self._live.serve(store, self._live.fleet)
        publish_store(store, self._live.engine)

    async def serve_generation(self, store: Path, generation: int) -> None:
        await serve_generation_async(self._live.engine, store, generation)


class Life:
    """The swaps and recompressions of one server.

    Args:
        live: its fleet.
    """

    def __init__(self, live: LiveFleet):
        self.live = live
        self.swaps = Swaps(_Server(live))
        self.recompressions = Recompressions(live.path, live.config.recompress)

    async def run(self) -> None:
        """Go on until cancelled; then a recompression that runs is ended."""
        loop = asyncio.get_running_loop()
        due = loop.time() + _DUE_SECONDS
        try:
            while True:
                try:
                    await self.live.follow()
                    if self.live.config.follow_generations:
                        await self.swaps.follow()
                    if loop.time() >= due:
                        due = loop.time() + _DUE_SECONDS
                        await self._recompress_if_due()
                except Exception:  # this loop must not end before the server does
                    logger.exception("vllm-jd: the store could not be followed; it is tried again")
                    await asyncio.sleep(_DUE_SECONDS)
                await asyncio.sleep(_FOLLOW_SECONDS)
        finally:
            await self.recompressions.stop()

    async def _recompress_if_due(self) -> None:
        if not self.live.keeps_house or not await asyncio.to_thread(self._serves_live):
            return
        due = self.recompressions.due
        refit = await asyncio.to_thread(due, self.live.fleet, self.live.store)
        if refit is not None:
            with suppress(AlreadyRunning):  # a client was faster
                await self.recompressions.start(refit=refit)

    def _serves_live(self) -> bool:
        """Whether the live generation is served; without that it is not known what waits."""
        with suppress(StoreError):
            return read_current(self.live.path)[0] == self.live.store.generation
        return False

    async def reload(self) -> int:
        """Serve the live generation, if it is not served yet.

        Returns:
            Its number.

        Raises:
            StoreError: it cannot be served.
        """
        await self.swaps.follow(at_once=True)
        if self.swaps.fault is not None:
            raise StoreError(
                f"{self.swaps.fault}; generation {self.swaps.store.generation} is served on"
            )
        return self.swaps.store.generation

    async def roll_back(self, number: int | None) -> int:
        """Make what an older generation holds the live one again, and serve it. A recompression
        that runs is ended: it would bring another.

        Returns:
            The new generation's number.

        Raises:
            StoreError: that cannot be.
        """
        async with self.recompressions.starting:
            await self.recompressions.stop()
            store = await asyncio.to_thread(revert, self.swaps.store.path, number)
        store.close()
        await self.swaps.follow()
        if self.swaps.store.generation < store.generation:
            raise StoreError(
                f"generation {store.generation} is the live one now, but is not served: "
                f"{self.swaps.fault}"
            )
        return store.generation

    def status(self) -> dict[str, Any]:
        """What GET /v1/store shows of it."""
        live, swaps = self.live, self.swaps
        found: dict[str, Any] = {"swaps": swaps.count, "fault": swaps.fault}
        found["follows_generations"] = live.config.follow_generations
        with suppress(StoreError):
            found["generations"] = generations_on_disk(live.path)
        return found | {"recompression": self.recompressions.status(live.fleet, live.store)}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecompressBody(_Body):
    """What POST /v1/recompress may say: whether to fit new bases."""

    refit: bool = False


class RollbackBody(_Body):
    """What POST /v1/store/rollback may say: which generation; default: the one before."""

    generation: int | None = Field(default=None, ge=1)


@router.post("/v1/recompress")
async def recompress(raw_request: Request, body: RecompressBody | None = None) -> JSONResponse:
    """Start a recompression; GET /v1/store tells how it goes."""
    life: Life = raw_request.app.state.vllm_jd_life
    await life.live.may_change()
    try:
        await life.recompressions.start(refit=body is not None and body.refit)
    except AlreadyRunning as error:
        raise FleetFault(str(error), HTTPStatus.CONFLICT) from None
    return JSONResponse({"object": "recompression", "state": "running"}, HTTPStatus.ACCEPTED)


@router.post("/v1/store/reload")
async def reload(raw_request: Request) -> JSONResponse:
    """Serve the store's live generation: for a server that follows on request only."""
    life: Life = raw_request.app.state.vllm_jd_life
    try:
        number = await life.reload()
    except StoreError as error:
        raise FleetFault(str(error), HTTPStatus.CONFLICT) from None
    return JSONResponse({"object": "store", "generation": number})


@router.post("/v1/store/rollback")
async def rollback(raw_request: Request, body: RollbackBody | None = None) -> JSONResponse:
    """Make what an older generation holds the live one again, and serve it."""
    life: Life = raw_request.app.state.vllm_jd_life
    await life.live.may_change()
    try:
        number = await life.roll_back(None if body is None else body.generation)
    except StoreError as error:
        raise FleetFault(str(error), HTTPStatus.CONFLICT) from None
    return JSONResponse({"object": "store", "generation": number})
