"""Why a process of the server refused to start, for the command that started it.

vLLM buries the reason under the log of each process in between; the command says it again as its
last line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FAULT_FILE = "VLLM_JD_FAULT_FILE"
"""The environment variable that names the file for the reason. The first process writes it."""


@contextmanager
def faults_told() -> Iterator[None]:
    """Note down the error that ends the block, on one line, if the command asked for it."""
    try:
        yield
    except Exception as error:
        if file := os.environ.get(FAULT_FILE):
            line = " ".join(str(error).split()) or type(error).__name__
            with suppress(OSError), Path(file).open("x", encoding="utf-8") as out:
                out.write(line)
        raise


def read_fault(file: Path) -> str | None:
    """The line that a process wrote, or None."""
    try:
        return file.read_text(encoding="utf-8") or None
    except OSError:
        return None
