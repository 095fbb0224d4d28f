"""Which request a log line is about: vLLM's JSON log, as a server writes it."""

import json
import logging
import threading
import time

import httpx
import pytest

pytest.importorskip("vllm")

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.logging_utils import create_uvicorn_log_config

from vllm_jd.plugin.api.request_ids import RequestIds, tell_adapter


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def server(log):
    """The address of a server that logs as vLLM does with `--logging-config.formatter json`."""
    factory = logging.getLogRecordFactory()
    app = FastAPI()

    @app.get("/ask/{adapter}")
    async def ask(raw_request: Request, adapter: str):
        tell_adapter(adapter)
        logging.getLogger("uvicorn.error").info("asked for %s", adapter)
        return {"seen": raw_request.headers.get("X-Request-Id")}

    @app.get("/stream/{adapter}")
    async def stream(adapter: str):
        tell_adapter(adapter)
        return StreamingResponse(iter(["a", "b"]))

    @app.get("/plain")
    async def plain():
        tell_adapter(None)
        return {}

    app.add_middleware(XRequestIdMiddleware)  # --enable-request-id-headers
    app.add_middleware(RequestIds)
    written = create_uvicorn_log_config(formatter="json")
    for handler in written["handlers"].values():
        del handler["stream"]
        handler |= {"class": "logging.FileHandler", "filename": str(log)}
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=written)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    logging.setLogRecordFactory(factory)
    tell_adapter("nobody's")  # harmless where no request is handled


def lines_of(log, requests):
    """Its lines, once the access log has that many."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if sum(line["name"] == "uvicorn.access" for line in lines) == requests:
            return lines
        time.sleep(0.02)
    raise AssertionError(lines)


def test_each_line_has_the_id_and_the_adapter_of_its_request(log, server):
    reply = httpx.get(f"{server}/ask/first", headers={"X-Request-Id": "mine"})
    assert reply.json() == {"seen": "mine"} and reply.headers["X-Request-Id"] == "mine"
    given = httpx.get(f"{server}/stream/second").headers["X-Request-Id"]
    other = httpx.get(f"{server}/plain").headers["X-Request-Id"]
    assert len({given, other, "mine"}) == 3 and len(given) == 32
    lines = lines_of(log, 3)
    (said,) = [line for line in lines if line["message"] == "asked for first"]
    assert (said["request_id"], said["adapter"]) == ("mine", "first")
    access = [line for line in lines if line["name"] == "uvicorn.access"]
    asked = [(line["request_id"], line.get("adapter")) for line in access]
    assert asked == [("mine", "first"), (given, "second"), (other, None)]
    assert not any("request_id" in line for line in lines if "started server" in line["message"])


def test_an_id_does_not_make_a_line_endless(log, server):
    httpx.get(f"{server}/plain", headers={"X-Request-Id": "x" * 5000})
    (line,) = [line for line in lines_of(log, 1) if line["name"] == "uvicorn.access"]
    assert line["request_id"] == "x" * 200
