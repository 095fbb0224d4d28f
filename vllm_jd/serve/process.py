"""Run the server as a child process: wait until it answers, pass signals on, leave nothing."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from vllm_jd.plugin.faults import FAULT_FILE, read_fault

_STOP_SECONDS = 30


class ServerFailed(Exception):
    """The server ended, or did not come up in time; the message says where its log is."""


class ServerProcess:
    """A server in a session of its own, so that Ctrl-C in the terminal reaches it through us only:
    vLLM's workers, which would get it too, then end in order instead of dying under the engine.

    Args:
        command: what to run.
        environment: of the child.
        log: file for its output; default: ours.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path | None = None):
        self.log = log
        self._file: IO[bytes] | None = log.open("wb") if log else None
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT if self._file else None,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )

    @property
    def pid(self) -> int:
        """Of the server's first process; also the id of the group of all its processes."""
        return self._process.pid

    def wait_ready(
        self, url: str, timeout: float, on_wait: Callable[[float], None] = lambda seconds: None
    ) -> float:
        """Wait until `url` answers; return the seconds that took.

        Raises:
            ServerFailed: the process ended, or `timeout` seconds passed.
        """
        start = time.monotonic()
        while (passed := time.monotonic() - start) < timeout:
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with code {self._process.returncode} before it was up"
                    + self._log_end()
                )
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return passed
            except (urllib.error.URLError, OSError):
                on_wait(passed)
                time.sleep(0.5)
        raise ServerFailed(f"the server did not answer within {timeout:.0f} s" + self._log_end())

    def wait(self) -> int:
        """Wait for its end, passing SIGINT and SIGTERM on; the second SIGINT kills.

        Returns the exit code; 0 after a stop that was asked for.
        """
        asked = 0

        def forward(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked += 1
            self._signal(signal.SIGINT if asked == 1 else signal.SIGKILL)

        previous = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
        try:
            code = self._process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.stop()
        return 0 if asked else code

    def stop(self) -> None:
        """End the server and every process it started."""
        if self._process.poll() is None:
            self._signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self._kill_group()
        self._process.wait()
        if self._file:
            self._file.close()

    def _signal(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            self._kill_group()
        elif self._process.poll() is None:
            self._process.send_signal(number)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _log_end(self) -> str:
        if self.log is None:
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return f"; the end of {self.log}:\n" + "\n".join(lines)


def end_with_parent() -> None:
    """In the child: SIGTERM if we are killed, so that no server outlives its command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_server(command: list[str], environment: dict[str, str]) -> tuple[int, str | None]:
    """Run a server in the foreground until it ends, see `ServerProcess.wait`.

    Returns its exit code, and, if it failed because the plugin refused to serve, why, on one line.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-jd-") as folder:
        file = Path(folder) / "fault"
        code = ServerProcess(command, environment | {FAULT_FILE: str(file)}).wait()
        return code, read_fault(file) if code else None


@contextmanager
def running(
    command: list[str], environment: dict[str, str], log: Path | None = None
) -> Iterator[ServerProcess]:
    """A server that has ended when the block has."""
    server = ServerProcess(command, environment, log)
    try:
        yield server
    finally:
        server.stop()
