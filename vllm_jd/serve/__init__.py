"""Serving a store: the server command, and the arguments for vLLM's offline engine."""

from vllm_jd.serve.engine import engine_args
from vllm_jd.serve.exposure import exposure
from vllm_jd.serve.process import ServerFailed, ServerProcess, run_server, running
from vllm_jd.serve.server import (
    ServeError,
    runtime_updating,
    server_command,
    server_environment,
)

__all__ = [
    "ServeError",
    "ServerFailed",
    "ServerProcess",
    "engine_args",
    "exposure",
    "run_server",
    "running",
    "runtime_updating",
    "server_command",
    "server_environment",
]
