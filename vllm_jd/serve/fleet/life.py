"""What a server does by itself all day: follow the store's live generation, and recompress."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.logger import init_logger

from vllm_jd.serve.fleet.recompression import AlreadyRunning, Recompressions
from vllm_jd.serve.fleet.swap import Swaps
from vllm_jd.store import StoreError
from vllm_jd.store.fleet import Fleet
from vllm_jd.store.generations import generations_on_disk, revert

logger = init_logger("vllm.vllm_jd")

STATE = "vllm_jd_life"
"""Where the application's state has the server's `Life`."""

_FOLLOW_SECONDS = 0.25
_DUE_SECONDS = 5.0

router = APIRouter()


@dataclass
class Life:
    """The two of them, and what they go by.

    Attributes:
        swaps: see `Swaps`.
        recompressions: see `Recompressions`.
        fleet: the overlay of names as it is now.
        refusal: why this server may not change the store, None: it may.
    """

    swaps: Swaps
    recompressions: Recompressions
    fleet: Callable[[], Fleet]
    refusal: Callable[[], str | None]

    async def run(self) -> None:
        """Go on until cancelled; then a recompression that runs is ended."""
        loop = asyncio.get_running_loop()
        due = loop.time() + _DUE_SECONDS
        try:
            while True:
                try:
                    await self.swaps.follow()
                    if loop.time() >= due:
                        due = loop.time() + _DUE_SECONDS
                        await self._recompress_if_due()
                except Exception:  # this loop must not end before the server does
                    logger.exception("vllm-jd: following the store")
                await asyncio.sleep(_FOLLOW_SECONDS)
        finally:
            await self.recompressions.stop()

    async def _recompress_if_due(self) -> None:
        if self.refusal() is not None:
            return
        fleet, store = self.fleet(), self.swaps.store
        refit = await asyncio.to_thread(self.recompressions.due, fleet, store)
        if refit is not None:
            with suppress(AlreadyRunning):  # a client was faster
                await self.recompressions.start(refit=refit)

    async def roll_back(self, number: int | None) -> int:
        """Make what an older generation holds the live one again, and serve it. A recompression
        that runs is ended: it would bring another.

        Returns:
            The new generation's number.

        Raises:
            StoreError: that cannot be.
        """
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
        swaps = self.swaps
        with suppress(StoreError):
            return {
                "generation": swaps.store.generation,
                "generations": generations_on_disk(swaps.store.path),
                "swaps": swaps.count,
                "fault": swaps.fault,
                "recompression": self.recompressions.status(self.fleet(), swaps.store),
            }
        return {"generation": swaps.store.generation, "swaps": swaps.count, "fault": swaps.fault}


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
    life: Life = getattr(raw_request.app.state, STATE)
    if (why := life.refusal()) is not None:
        return _refused(why, HTTPStatus.CONFLICT)
    try:
        await life.recompressions.start(refit=body is not None and body.refit)
    except AlreadyRunning as error:
        return _refused(str(error), HTTPStatus.CONFLICT)
    return JSONResponse({"object": "recompression", "state": "running"}, HTTPStatus.ACCEPTED)


@router.post("/v1/store/rollback")
async def rollback(raw_request: Request, body: RollbackBody | None = None) -> JSONResponse:
    """Make what an older generation holds the live one again, and serve it."""
    life: Life = getattr(raw_request.app.state, STATE)
    if (why := life.refusal()) is not None:
        return _refused(why, HTTPStatus.CONFLICT)
    try:
        number = await life.roll_back(None if body is None else body.generation)
    except StoreError as error:
        return _refused(str(error), HTTPStatus.CONFLICT)
    return JSONResponse({"object": "store", "generation": number})


def _refused(message: str, code: HTTPStatus) -> JSONResponse:
    error = ErrorInfo(message=message, type="ConflictError", param=None, code=code)
    return JSONResponse(ErrorResponse(error=error).model_dump(), code)
