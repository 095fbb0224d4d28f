"""Say which of the attributes that the plugin uses a release of vLLM lacks or has changed.

    python scripts/check_vllm.py 0.33.0                  a release: its wheel, as pip finds it
    python scripts/check_vllm.py vllm-0.33.0-….whl       a wheel
    python scripts/check_vllm.py …/site-packages/vllm    a folder with its sources

Nothing is installed and nothing of vLLM is imported or run: its sources are read (ast). Of a
release only the files that are looked at are fetched where the server of the wheel can send parts
of it, else the whole wheel (some 340 MB); both are kept in a cache folder. Looked at are the
tables of `vllm_jd/plugin/patches.py` (parameters of what we call and are called by, and what vLLM
reads from objects of ours), and whether all that `vllm_jd/plugin` imports from vLLM is there (no
other folder imports any of it).

Exit code: 0 all is there; 1 something is not; 2 the sources could not be had.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from vllm_jd.plugin.patches import (
    EXPECTED,
    READ_FROM_OURS,
    SET_BY_INIT,
    changed,
    not_set,
    reads_more,
)

PACKAGE = Path(__file__).parents[1] / "vllm_jd"
_BLOCK = 1 << 20
_PLATFORM = "manylinux_2_28_x86_64"
_PYTHON = "3.12"


class SourcesError(Exception):
    """vLLM's sources could not be had; the message says why."""


# ---------------------------------------------------------------- where the sources are


@dataclass(frozen=True)
class Sources:
    """Source files of a vLLM: their names (`vllm/lora/utils.py`), and how to read one."""

    label: str
    files: frozenset[str]
    read: Callable[[str], str]


def open_sources(what: str, cache: Path) -> Sources:
    """The sources of a release ("0.33.0"), a wheel or a folder.

    Raises:
        SourcesError: there is no such thing, or it cannot be fetched.
    """
    if re.fullmatch(r"\d+(\.\w+)+", what):
        return _release(what, cache / f"vllm-{what}")
    path = Path(what)
    if path.is_file():
        try:
            return _wheel(path.name, path.open("rb"))
        except BadZipFile:
            raise SourcesError(f"{path}: no wheel (found no zip file)") from None
    for folder in (path, path.parent):
        if path.is_dir() and (folder / "vllm" / "__init__.py").exists():
            return _folder(what, folder)
    raise SourcesError(
        f"{what}: expected a release such as 0.33.0, a wheel, or a folder with vllm/__init__.py"
    )


def _folder(label: str, folder: Path) -> Sources:
    files = frozenset(str(f.relative_to(folder)) for f in (folder / "vllm").rglob("*.py"))
    return Sources(label, files, lambda name: (folder / name).read_text(encoding="utf-8"))


def _wheel(label: str, file: io.IOBase) -> Sources:
    wheel = ZipFile(file)
    files = frozenset(name for name in wheel.namelist() if re.match(r"vllm/.*\.py$", name))
    return Sources(label, files, lambda name: wheel.read(name).decode())


def _release(version: str, cache: Path) -> Sources:
    """A release, by what the cache has of it; the rest is fetched when it is asked for."""
    listing = cache / "files.json"
    fetched: list[Sources] = []

    def remote() -> Sources:
        if not fetched:
            fetched.append(_fetch(version, cache))
        return fetched[0]

    if not listing.exists():
        _write(listing, json.dumps(sorted(remote().files)))
    files = frozenset(json.loads(listing.read_text()))

    def read(name: str) -> str:
        kept = cache / name
        if not kept.exists():
            _write(kept, remote().read(name))
        return kept.read_text(encoding="utf-8")

    return Sources(f"vllm {version}", files, read)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)


def _fetch(version: str, cache: Path) -> Sources:
    """The release's wheel, read in parts over HTTP where that is possible, else downloaded."""
    wanted = ["--no-deps", "--only-binary", ":all:", f"vllm=={version}"]
    wanted += ["--platform", _PLATFORM, "--python-version", _PYTHON]
    with tempfile.TemporaryDirectory() as nowhere:
        report = _pip(
            *("install", "--dry-run", "--quiet", "--ignore-installed", "--target", nowhere),
            *("--report", "-", *wanted),
        )
    (found,) = json.loads(report)["install"]
    try:
        return _wheel(
            version, io.BufferedReader(_RemoteFile(found["download_info"]["url"]), _BLOCK)
        )
    except (OSError, ValueError, BadZipFile):
        print("downloading the whole wheel …", file=sys.stderr)
    _pip("download", "--quiet", "--dest", str(cache), *wanted)
    (wheel,) = cache.glob("*.whl")
    return _wheel(version, wheel.open("rb"))


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SourcesError(f"pip could not get it: {reason}")
    return done.stdout


class _RemoteFile(io.RawIOBase):
    """A file behind an address, of which parts can be read.

    Raises OSError where the server cannot be reached or sends no parts, ValueError where the
    address is none.
    """

    def __init__(self, url: str):
        self._url = url
        self._place = 0
        self._length = 0
        _, self._length = self._part(0, 1)

    def _part(self, first: int, count: int) -> tuple[bytes, int]:
        headers = {"Range": f"bytes={first}-{first + count - 1}"}
        request = urllib.request.Request(self._url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            found = re.fullmatch(r"bytes \d+-\d+/(\d+)", reply.headers.get("Content-Range", ""))
            if reply.status != 206 or found is None:
                raise OSError("the server sends no parts of files")
            return reply.read(), int(found[1])

    def readinto(self, buffer: memoryview) -> int:
        count = min(len(buffer), self._length - self._place)
        if count <= 0:
            return 0
        data, _ = self._part(self._place, count)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence, self._length)
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


# ---------------------------------------------------------------- what is in them


class Missing(Exception):
    """A name that is not in the sources; the message says where it was looked for."""


_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.stmt | ast.Module


@dataclass(frozen=True)
class Found:
    """A definition (of another package's: the import), its module, and its class if it has one."""

    node: _Definition
    module: str
    owner: ast.ClassDef | None = None


class Reader:
    """Looks names up in sources as Python's import system and classes would."""

    def __init__(self, sources: Sources):
        self._sources = sources
        self._trees: dict[str, ast.Module | None] = {}

    def look_up(self, where: str) -> Found:
        """The definition of `module:path`, of a module alone if `path` is empty.

        Raises:
            Missing: there is none.
        """
        module, _, path = where.partition(":")
        tree = self._tree(module)
        if tree is None:
            raise Missing(f"no module {module}")
        found = Found(tree, module)
        for part in path.split(".") if path else ():
            inner = self._member(found, part)
            if inner is None:
                raise Missing(f"{_describe(found)} has no {part!r}")
            found = inner
        return found

    def parameters(self, found: Found) -> tuple[str, ...] | None:
        """Names of the parameters, as `inspect.signature` gives them; None: not to be told."""
        node = found.node
        if isinstance(node, _Function):
            names = _argument_names(node.args)
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            bound = found.owner is not None and "classmethod" in decorators
            return names[1:] if bound else names
        if not isinstance(node, ast.ClassDef):
            return None
        fields: dict[str, None] = {}
        for at in self._classes(found):
            init = _last(at.node.body, "__init__")
            if isinstance(init, _Function):
                return _argument_names(init.args)[1:]
            fields = dict.fromkeys(_field_names(at.node)) | fields
        return tuple(fields)

    def sets(self, found: Found, name: str) -> bool:
        """Whether `__init__` of a class, or of a class above it, sets `self.name`."""
        return isinstance(found.node, ast.ClassDef) and any(
            isinstance(target, ast.Attribute)
            and isinstance(target.ctx, ast.Store)
            and ast.unparse(target) == f"self.{name}"
            for at in self._classes(found)
            if (init := _last(at.node.body, "__init__"))
            for target in ast.walk(init)
        )

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            base = module.replace(".", "/")
            names = [n for n in (f"{base}/__init__.py", f"{base}.py") if n in self._sources.files]
            self._trees[module] = ast.parse(self._sources.read(names[0])) if names else None
        return self._trees[module]

    def _member(self, found: Found, name: str) -> Found | None:
        if isinstance(found.node, ast.Module):
            return self._global(found.module, name)
        if isinstance(found.node, ast.ClassDef):
            for at in self._classes(found):
                if (node := _last(at.node.body, name)) is not None:
                    return Found(node, at.module, at.node)
        return None

    def _global(
        self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Found | None:
        """A module's name, through its imports, or a module in a package."""
        tree = self._tree(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        node = _last(tree.body, name, lazy=_last(tree.body, "__getattr__") is not None)
        if isinstance(node, ast.ImportFrom):
            source = self._source(module, node)
            if not source.startswith("vllm"):
                return Found(node, module)
            real = next(a.name for a in node.names if (a.asname or a.name) == name)
            # `from . import name` in a package means one of its own modules.
            return self._global(source, real, seen) or self._module(f"{source}.{real}")
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name):
            return self._global(module, node.value.id, seen) or Found(node, module)
        if node is not None:
            return Found(node, module)
        if (submodule := self._module(f"{module}.{name}")) is not None:
            return submodule
        for star in _statements(tree.body):
            if isinstance(star, ast.ImportFrom) and star.names[0].name == "*":
                inner = self._global(self._source(module, star), name, seen)
                if inner is not None:
                    return inner
        return None

    def _module(self, name: str) -> Found | None:
        tree = self._tree(name)
        return None if tree is None else Found(tree, name)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = f"{module.replace('.', '/')}/__init__.py" in self._sources.files
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def _classes(self, found: Found) -> Iterator[Found]:
        """A class and those above it that stand in vLLM, in the order in which they are asked."""
        yield found
        for base in found.node.bases:
            path = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            at: Found | None = Found(self._tree(found.module), found.module)
            for part in path.split("."):
                at = self._member(at, part) if at else None
            if at and isinstance(at.node, ast.ClassDef) and at.node is not found.node:
                yield from self._classes(at)


def _statements(body: Iterable[ast.stmt], *, lazy: bool = False) -> Iterator[ast.stmt]:
    """Statements that run when a module or class is made; of `try`, those without an error.

    What only a type checker sees is left out, but for `lazy` modules, which repeat there what
    their `__getattr__` gives.
    """
    for statement in body:
        if isinstance(statement, ast.If):
            if lazy or "TYPE_CHECKING" not in ast.unparse(statement.test):
                yield from _statements(statement.body, lazy=lazy)
            yield from _statements(statement.orelse, lazy=lazy)
        elif isinstance(statement, ast.Try):
            for part in (statement.body, statement.orelse, statement.finalbody):
                yield from _statements(part, lazy=lazy)
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body, lazy=lazy)
        else:
            yield statement


def _last(body: Iterable[ast.stmt], name: str, *, lazy: bool = False) -> ast.stmt | None:
    """The statement that defines or imports `name`; a definition goes before an assignment."""
    found: ast.stmt | None = None
    for statement in _statements(body, lazy=lazy):
        if isinstance(statement, _Function | ast.ClassDef):
            if statement.name == name:
                found = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in statement.names):
                found = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and found is None:
            targets = getattr(statement, "targets", None) or [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found = statement
    return found


def _argument_names(arguments: ast.arguments) -> tuple[str, ...]:
    several = [arguments.vararg] if arguments.vararg else []
    rest = [arguments.kwarg] if arguments.kwarg else []
    every = [*arguments.posonlyargs, *arguments.args, *several, *arguments.kwonlyargs, *rest]
    return tuple(argument.arg for argument in every)


def _field_names(node: ast.ClassDef) -> list[str]:
    """Of a dataclass, a struct or a pydantic model."""
    return [
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    ]


def _describe(found: Found) -> str:
    kind = "module" if isinstance(found.node, ast.Module) else "class"
    name = found.module if kind == "module" else getattr(found.node, "name", "?")
    return f"{kind} {name}"


# ---------------------------------------------------------------- what is used of them


def imported(package: Path = PACKAGE) -> dict[str, list[str]]:
    """`module:name` → files, of all that `plugin` imports from vLLM."""
    found: dict[str, list[str]] = {}
    for file in sorted((package / "plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [f"{alias.name}:" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}:{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if re.match(r"vllm[.:]", name):
                    found.setdefault(name, []).append(str(file.relative_to(package.parent)))
    return found


def used() -> dict[str, list[str]]:
    """`module:name` → files, of all that is looked at."""
    tables = [*EXPECTED, *SET_BY_INIT, *(where for where, _ in READ_FROM_OURS)]
    return {where: ["vllm_jd/plugin/patches.py"] for where in tables} | imported()


def check(sources: Sources) -> dict[str, list[str]]:
    """`module:name` → what is wrong with it, of all that is used and is missing or changed."""
    reader = Reader(sources)
    faults: dict[str, list[str]] = {}
    for where in used():
        try:
            found = reader.look_up(where)
        except Missing as error:
            faults[where] = [f"{where}: missing ({error})"]
            continue
        here: list[str] = []
        if expected := EXPECTED.get(where):
            parameters = reader.parameters(found)
            if parameters is None:
                here.append(f"{where}: found no function or class, expected {expected}")
            else:
                here += changed(where, parameters, expected)
        lost = (name for name in SET_BY_INIT.get(where, ()) if not reader.sets(found, name))
        here += [not_set(where, name) for name in lost]
        for (place, name), known in READ_FROM_OURS.items():
            if place == where:
                here += reads_more(where, found.node, name, known)
        if here:
            faults[where] = here
    return faults


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", help="a release, a wheel, or a folder with vLLM's sources")
    parser.add_argument("--json", action="store_true", help="print JSON")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-jd"
    parser.add_argument("--cache", type=Path, default=home, help=f"cache folder ({home})")
    options = parser.parse_args(arguments)
    try:
        sources = open_sources(options.what, options.cache)
        faults = check(sources)
    except (SourcesError, OSError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    users, count = used(), sum(map(len, faults.values()))
    if options.json:
        listed = [
            {"where": where, "fault": fault, "used_by": users[where]}
            for where, here in faults.items()
            for fault in here
        ]
        print(
            json.dumps({"vllm": sources.label, "checked": len(users), "faults": listed}, indent=2)
        )
    else:
        for where, here in faults.items():
            print("\n".join(here) + f"\n    used by {', '.join(users[where])}")
        print(f"{sources.label}: {len(users)} attributes in use, {count} missing or changed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
