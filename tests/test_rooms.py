"""Imports run one way: a room imports only rooms that stand above it in this list."""

import ast
from pathlib import Path

import pytest

import vllm_jd

PACKAGE = Path(vllm_jd.__file__).parent
ROOMS = (
    "vllm_jd.row",
    "vllm_jd.store",
    "vllm_jd.kernels",
    "vllm_jd.compressor.errors",
    "vllm_jd.compressor.algebra",
    "vllm_jd.compressor.read",
    "vllm_jd.compressor.methods",
    "vllm_jd.compressor.settings",
    "vllm_jd.compressor.run",
    "vllm_jd.compressor.choose",
    "vllm_jd.compressor.change",
    "vllm_jd.compressor.report",
    "vllm_jd.compressor",  # what it gives out: from all of its rooms
    "vllm_jd.plugin",
    "vllm_jd.serve",
    "vllm_jd.evaluate",
    "vllm_jd.demo",
    "vllm_jd.cli",  # `vllm-jd demo` is one of its commands
)
MAY_IMPORT_VLLM = ("vllm_jd.plugin", "vllm_jd.evaluate.engine")


def module_name(file, root):
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package):
    """Every module of a package, by name: its parsed source."""
    return {
        module_name(file, package.parent): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(package.rglob("*.py"))
    }


def imports(name, tree, is_package):
    """(line, full name) of whatever a module imports, at its top or inside of a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                own = name.split(".")
                base = ".".join(own[: len(own) - up] + ([base] if base else []))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_in(name, room):
    return name == room or name.startswith(f"{room}.")


def room_of(name):
    """The room with the longest name that this is in; None: the package's own `__init__`."""
    return max((room for room in ROOMS if is_in(name, room)), key=len, default=None)


def upward(package):
    """Every import of a room from a room that stands before it."""
    found = []
    for name, tree in modules(package).items():
        is_package = (package.parent / Path(*name.split(".")) / "__init__.py").is_file()
        for line, target in imports(name, tree, is_package):
            if not is_in(target, "vllm_jd"):
                continue
            here, there = room_of(name), room_of(target)
            if there is None:
                continue  # the version
            if here is None or ROOMS.index(there) > ROOMS.index(here):
                found.append(f"{name}:{line} imports {target}")
    return found


def test_every_module_is_in_a_room():
    homeless = [name for name in modules(PACKAGE) if room_of(name) is None]
    assert homeless == ["vllm_jd"]
    for room in ROOMS:
        path = PACKAGE.parent / Path(*room.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), room


def test_imports_run_one_way():
    assert upward(PACKAGE) == []


def test_only_the_plugin_and_one_file_import_vllm():
    found = [
        f"{name}:{line} imports {target}"
        for name, tree in modules(PACKAGE).items()
        for line, target in imports(name, tree, is_package=False)
        if is_in(target, "vllm") and not any(is_in(name, room) for room in MAY_IMPORT_VLLM)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("where", "source", "caught"),
    [
        ("store/x.py", "from vllm_jd.kernels.pools import ModulePools", True),
        ("store/x.py", "import vllm_jd.kernels", True),
        ("store/x.py", "from vllm_jd import kernels", True),
        ("store/x.py", "def f():\n    from vllm_jd.cli import app", True),
        ("store/x.py", "from ..kernels import pools", True),
        ("store/__init__.py", "from ..kernels import pools", True),
        ("store/__init__.py", "from . import bases", False),
        ("kernels/x.py", "from vllm_jd.store import Store", False),
        ("compressor/methods/x.py", "from vllm_jd.compressor.run.module import Rounding", True),
        ("compressor/methods/x.py", "from vllm_jd.compressor import compress", True),
        ("compressor/run/x.py", "from vllm_jd.compressor.methods import registry", False),
        ("cli/x.py", "import torch, vllm_jd.store", False),
        ("cli/x.py", "from vllm_jd import __version__", False),
    ],
)
def test_an_import_against_the_order_is_found(tmp_path, where, source, caught):
    file = tmp_path / "vllm_jd" / where
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert bool(upward(tmp_path / "vllm_jd")) == caught
