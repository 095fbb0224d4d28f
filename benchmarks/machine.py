"""What a benchmark says of the machine that it ran on."""

import os
import platform
from pathlib import Path

import psutil


def describe() -> str:
    """Processor, cores, memory and Python, in one line."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{names[0]}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )
