"""The engine in a process of its own: what it prints goes to a log, and it ends with us."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_jd.evaluate.errors import EvaluateError, UsageError
from vllm_jd.evaluate.questions import Answer, EngineSettings, Question
from vllm_jd.plugin.faults import FAULT_FILE, read_fault
from vllm_jd.serve.process import end_with_parent

_LOG_LINES = 12
_WRONG_FLAG = 2  # what argparse ends with


class Engine:
    """Answers questions; see `running_engine`."""

    def __init__(self, process: subprocess.Popen[str], log: Path, fault: Path) -> None:
        self._process = process
        self._log = log
        self._fault = fault

    def ask(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """The answers, in the order of the questions.

        Raises:
            EvaluateError: the engine has ended; the message has the end of its log.
        """
        batch = {"questions": [asdict(q) for q in questions], "max_new_tokens": max_new_tokens}
        return [Answer(**each) for each in self.exchange(batch)]

    def exchange(self, message: Any) -> Any:
        """Write a line to the process, and read what it answers."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            self._tell_end()
        return json.loads(line)

    def _tell_end(self) -> None:
        code = self._process.wait()
        with self._log.open(encoding="utf-8", errors="replace") as lines:
            end = [line.rstrip() for line in deque(lines, _LOG_LINES)]
        if code == _WRONG_FLAG and end:
            raise UsageError(f"vLLM does not take these flags: {end[-1].partition('error: ')[2]}")
        reason = read_fault(self._fault)
        if reason:
            raise EvaluateError(f"the engine ended: {reason}")
        raise EvaluateError(
            f"the engine ended with code {code}; its last lines:\n" + "\n".join(end)
        )


@contextmanager
def running_engine(settings: EngineSettings, folder: Path, log: Path) -> Iterator[Engine]:
    """An engine that is up, and has ended when the block has.

    Args:
        settings: of it.
        folder: for what processes tell each other; it is there.
        log: file for what it prints.

    Raises:
        UsageError: vLLM does not know a flag.
        EvaluateError: it does not start; the message has the reason or the end of its log.
    """
    fault = folder / "fault"
    environment = os.environ | {FAULT_FILE: str(fault)}
    environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less to start
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "vllm_jd.evaluate.engine"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is ours
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
    try:
        engine = Engine(process, log, fault)
        engine.exchange(asdict(settings))
        yield engine
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it keeps nothing that could be lost
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()
