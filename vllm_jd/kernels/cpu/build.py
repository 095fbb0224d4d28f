"""The C++ kernel, compiled for this machine at first use, cached, and loaded.

It is the files in `cpp/`, of which `kernel.cpp` includes the others, and one that is made here:
`constants.h`, the numbers that Python and C++ have in common.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_jd import row
from vllm_jd.kernels.cpu import layout
from vllm_jd.kernels.pools import PACKED

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-std=c++17")
_CORE_KINDS = ("CORE_NONE", "CORE_FULL", "CORE_DIAGONAL")


class BuildError(Exception):
    """The kernel cannot be built or loaded; says why and what to do."""


@functools.cache
def loaded_library() -> ctypes.CDLL | None:
    """The kernel's library, built if need be. None, after one warning in the log, where it can
    neither be built nor loaded."""
    try:
        return load(build())
    except BuildError as error:
        logger.warning(
            "The CPU kernel is not available, the much slower torch path is used: %s", error
        )
        return None


def build(flags: tuple[str, ...] = FLAGS, sources: Path = SOURCES) -> Path:
    """Path of the compiled kernel in the user's cache folder, compiled unless it is there.

    Any number of processes may build at once: each compiles to a file of its own and renames it.

    Args:
        flags: of the compiler.
        sources: a folder of files of which `kernel.cpp` includes the others.

    Raises:
        BuildError: no compiler, a compiler error, or a cache folder that cannot be written.
    """
    compiler = _compiler()
    header = constants()
    files = sorted(file for file in sources.iterdir() if file.suffix in (".h", ".cpp"))
    texts = [text for file in files for text in (file.name, file.read_text())]
    key = [*texts, header, *compiler, _run([*compiler, "--version"]), *flags, cpu_features()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()
    target = _cache_folder() / f"cpu_kernel-{digest[:32]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            (Path(folder) / "constants.h").write_text(header)
            _run([*compiler, *flags, f"-I{folder}", str(sources / "kernel.cpp"), "-o", str(built)])
            built.replace(target)
    except OSError as error:
        raise BuildError(
            f"{target.parent} cannot be written ({error}); set VLLM_JD_CACHE to a folder that can"
        ) from error
    return target


def constants() -> str:
    """The text of `constants.h`: a row's fields and core kinds, and numbers of `row.py`,
    `pools.py` and `layout.py`."""
    fields = [f"{_name(field)} = {i}" for i, field in enumerate(row.ROW_FIELDS)]
    kinds = [f"{_name(kind)} = {getattr(row, kind)}" for kind in _CORE_KINDS]
    numbers = {"step_block": row.BLOCK, "packed": PACKED}
    names = ("UNIT", "GROUP", "V_COLUMNS", "SIDE", "LANES", "MAX_INT8_RANK")
    numbers |= {name: getattr(layout, name) for name in names}
    return "\n".join(
        (
            "// Made by build.py.",
            "#pragma once",
            f"enum Field {{ {', '.join(fields)}, kFields = {len(fields)} }};",
            f"enum CoreKind {{ {', '.join(kinds)} }};",
            *(f"constexpr int {_name(name)} = {number};" for name, number in numbers.items()),
            "",
        )
    )


def _name(name: str) -> str:
    """`kMaxInt8Rank` of `MAX_INT8_RANK`."""
    return "k" + name.lower().title().replace("_", "")


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, with the types of what `backend.py` calls.

    Raises:
        BuildError: it cannot be loaded.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} could not be loaded: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.jd_add_adapters.argtypes = [
        *(pointer, pointer, integer, pointer, integer, pointer, integer, integer),
        ctypes.c_int,
    ]
    library.jd_add_adapters.restype = ctypes.c_int
    library.jd_error.restype = library.jd_isa.restype = ctypes.c_char_p
    return library


def _compiler() -> list[str]:
    """The C++ compiler's command: `$CXX` (which may carry options), else g++ or clang++."""
    if chosen := os.environ.get("CXX", "").split():
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX={chosen[0]} was not found")
        return chosen
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError(
        "no C++ compiler was found; install g++ (Debian, Ubuntu: apt-get install g++) or set CXX"
    )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()[:2000]}")
    return done.stdout


def _cache_folder() -> Path:
    if chosen := os.environ.get("VLLM_JD_CACHE"):
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "vllm-jd" / "kernels"


def cpu_features() -> str:
    """What -march=native depends on: a home may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])
