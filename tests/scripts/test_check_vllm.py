"""`scripts/check_vllm.py`: sources of vLLM, read without importing them."""

import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("vllm")

from vllm_jd.plugin import patches

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_vllm.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_vllm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@functools.cache
def installed():
    """The folder that has `vllm/`."""
    return Path(importlib.util.find_spec("vllm").submodule_search_locations[0]).parent


@pytest.fixture(scope="module")
def sources(script):
    return script.open_sources(str(installed()), Path("unused"))


@pytest.fixture
def copy(script, sources, tmp_path):
    """A copy of those files of the installed vLLM that are looked at."""
    read = []

    def recorded(name):
        read.append(name)
        return sources.read(name)

    script.check(script.Sources("recorded", sources.files, recorded))
    for name in {*read, "vllm/__init__.py"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(sources.read(name))
    return tmp_path


def run(script, capsys, *arguments):
    code = script.main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


def test_the_installed_vllm_is_clean(script, capsys):
    code, said = run(script, capsys, installed(), "--json")
    assert (code, json.loads(said.out)["faults"]) == (0, [])
    assert json.loads(said.out)["checked"] >= len(patches.EXPECTED) >= 40
    assert run(script, capsys, installed() / "vllm")[0] == 0


def test_what_is_read_is_what_python_finds(script, sources):
    """Parameters and places of everything in use, against `inspect` on the imported vLLM."""
    reader, compared = script.Reader(sources), 0
    for where in {**patches.EXPECTED, **dict.fromkeys(script.imported())}:
        module, _, path = where.partition(":")
        if not path:
            continue
        expected = importlib.import_module(module)
        for part in path.split("."):
            expected = getattr(expected, part)
        found = reader.look_up(where)
        if inspect.ismodule(expected):
            assert found.module == expected.__name__
        elif where in patches.EXPECTED and callable(expected):  # a field need only be there
            known = patches.EXPECTED[where]
            parameters = tuple(inspect.signature(expected).parameters)
            assert reader.parameters(found)[: len(known)] == parameters[: len(known)] == known
            compared += len(known)
        ours = getattr(expected, "vllm_jd", False)  # put there by another test of this process
        if inspect.isfunction(expected) and not ours and not hasattr(expected, "__wrapped__"):
            assert found.module == expected.__module__
            assert reader.parameters(found) == tuple(inspect.signature(expected).parameters)
    assert compared > 80


def test_every_function_that_the_plugin_calls_has_its_parameters_in_the_table(script, sources):
    reader = script.Reader(sources)
    functions = {
        where
        for where in script.imported()
        if isinstance(reader.look_up(where).node, ast.FunctionDef)
    }
    assert len(functions) >= 5
    assert functions <= patches.EXPECTED.keys()
    used = {where.split(":")[0] for where in script.imported()}
    assert {"vllm.lora.utils", "vllm.lora.worker_manager", "vllm.v1.metrics.loggers"} <= used


def test_a_missing_name_a_renamed_parameter_and_a_moved_module_are_each_reported(
    script, copy, capsys
):
    assert run(script, capsys, copy)[0] == 0

    def change(file, pattern, replacement, times=1):
        path = copy / "vllm" / file
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.M)
        assert count == times, pattern
        path.write_text(text)

    change("lora/utils.py", r"^def replace_submodule\(", "def put_submodule(")
    change("lora/lora_model.py", r"def get_lora\(self, module_name", "def get_lora(self, name")
    change(
        "v1/metrics/loggers.py", r"self\.gauge_lora_info(?=\b.* = )", "self.gauge_loras", times=2
    )
    protocol = copy / "vllm/entrypoints/serve/engine/protocol.py"
    protocol.rename(protocol.with_name("protocols.py"))
    asked = r"_adapter_manager\._validate_moe_lora_format"
    change("lora/worker_manager.py", asked, "_adapter_manager.ask")
    code, said = run(script, capsys, copy, "--json")
    found = {fault["where"]: fault for fault in json.loads(said.out)["faults"]}
    utils = found["vllm.lora.utils:replace_submodule"]
    assert "module vllm.lora.utils has no 'replace_submodule'" in utils["fault"]
    assert utils["used_by"] == ["vllm_jd/plugin/worker/wrap.py"]
    renamed = found["vllm.lora.lora_model:LoRAModel.get_lora"]["fault"]
    assert "found parameters ('self', 'name')" in renamed
    assert "expected ('self', 'module_name')" in renamed
    gauge = found["vllm.v1.metrics.loggers:PrometheusStatLogger"]["fault"]
    assert "sets no 'gauge_lora_info'" in gauge
    moved = found["vllm.entrypoints.serve.engine.protocol:ModelCard"]["fault"]
    assert "no module vllm.entrypoints.serve.engine.protocol" in moved
    reads = found["vllm.lora.worker_manager:WorkerLoRAManager._load_adapter"]["fault"]
    assert "reads self._adapter_manager.ask, which ours lacks" in reads
    protocols = {
        f"vllm.entrypoints.serve.engine.protocol:{name}"
        for name in ("ModelCard", "ErrorInfo", "ErrorResponse")
    }
    assert code == 1
    assert found.keys() == protocols | {
        "vllm.lora.utils:replace_submodule",
        "vllm.lora.lora_model:LoRAModel.get_lora",
        "vllm.v1.metrics.loggers:PrometheusStatLogger",
        "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    }
    code, said = run(script, capsys, copy)
    assert code == 1
    assert "7 missing or changed" in said.out
    assert "used by vllm_jd/plugin/worker/wrap.py" in said.out


def test_names_are_found_through_imports_and_classes(script):
    files = {
        "vllm/__init__.py": "from .a import *\nfrom .a import f as g\nimport numpy as np\n",
        "vllm/a.py": """
from typing import TYPE_CHECKING
from .b import Base, overloaded
if TYPE_CHECKING:
    from .c import only_types
try:
    from .b import fast
except ImportError:
    fast = None
class Inner(Base):
    y: int = 0
    @classmethod
    def make(cls, z): ...
def f(a, /, b, *args, c, **kwargs): ...
alias = f
""",
        "vllm/b.py": """
class Base:
    x: int
    def method(self, p): ...
def fast(q): ...
def overloaded(r): ...
""",
    }
    reader = script.Reader(script.Sources("small", frozenset(files), files.__getitem__))

    def parameters(where):
        return reader.parameters(reader.look_up(where))

    assert parameters("vllm:f") == parameters("vllm:g") == ("a", "b", "args", "c", "kwargs")
    assert parameters("vllm.a:alias") == ("a", "b", "args", "c", "kwargs")
    assert parameters("vllm.a:fast") == ("q",)
    assert parameters("vllm:Inner") == ("x", "y")
    assert parameters("vllm:Inner.method") == ("self", "p")
    assert parameters("vllm:Inner.make") == ("z",)
    reader.look_up("vllm:np")
    reader.look_up("vllm:b")
    for where in ("vllm.a:only_types", "vllm.a:nothing", "vllm.c:x", "vllm:Inner.other"):
        with pytest.raises(script.Missing):
            reader.look_up(where)


@pytest.mark.parametrize("what", ["nowhere", "0.0.0.nothing/", "pyproject.toml"])
def test_what_is_no_vllm_is_told(script, capsys, tmp_path, what):
    (tmp_path / "pyproject.toml").write_text("")
    code, said = run(script, capsys, tmp_path / what)
    assert code == 2
    assert what.rstrip("/") in said.err and "Traceback" not in said.err


class Releases(BaseHTTPRequestHandler):
    """A page that links to a wheel, and the wheel, in parts if `parts`."""

    wheel, parts, asked = Path(), True, []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if not self.path.endswith(".whl"):
            name = self.wheel.name
            return self.answer(200, f'<a href="/{name}">{name}</a>'.encode(), "text/html")
        data = self.wheel.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not part or not self.parts:
            return self.answer(200, data, "application/zip")
        first, last = int(part[1]), min(int(part[2]), len(data) - 1)
        self.asked.append((first, last))
        self.answer(206, data[first : last + 1], "application/zip", (first, last, len(data)))

    def answer(self, status, data, kind, part=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if part:
            self.send_header("Content-Range", "bytes {}-{}/{}".format(*part))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def releases(copy, tmp_path, monkeypatch):
    """A server with one release, 0.99.0, which has a large file beside vLLM's sources."""
    Releases.wheel = tmp_path / "vllm-0.99.0-py3-none-any.whl"
    with ZipFile(Releases.wheel, "w") as wheel:
        wheel.writestr("vllm/_C.abi3.so", b"\1" * 30_000_000)
        for file in sorted((copy / "vllm").rglob("*.py")):
            wheel.write(file, file.relative_to(copy))
        about = "vllm-0.99.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    server = HTTPServer(("127.0.0.1", 0), Releases)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setattr(Releases, "asked", [])
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("parts", [True, False])
def test_a_release_is_fetched_in_parts_where_the_server_sends_them_and_kept(
    script, releases, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Releases, "parts", parts)
    monkeypatch.setattr(script, "_BLOCK", 100_000)
    arguments = ("0.99.0", "--cache", tmp_path / "cache")
    code, said = run(script, capsys, *arguments)
    assert code == 0, said
    assert ("whole wheel" in said.err) is not parts
    if parts:
        read = sum(last - first + 1 for first, last in Releases.asked)
        assert 0 < read < Releases.wheel.stat().st_size / 2
    # Kept: a second run asks nobody.
    releases.shutdown()
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert run(script, capsys, *arguments)[0] == 0
    code, said = run(script, capsys, "0.98.0", "--cache", tmp_path / "cache")
    assert code == 2
    assert "vllm==0.98.0" in said.err


@pytest.mark.slow
def test_vllm_0_33_has_all_that_is_in_use(script, tmp_path, monkeypatch):
    """Needs the package registry."""
    try:
        sources = script.open_sources("0.33.0", tmp_path)
    except script.SourcesError as error:
        pytest.skip(f"vLLM 0.33.0 cannot be fetched here: {error}")
    assert script.check(sources) == {}
    # It asks for what 0.32 does not, of an object of ours.
    where = "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter"
    old = patches.READ_FROM_OURS[where, "self._adapter_manager"][:-1]
    monkeypatch.setitem(patches.READ_FROM_OURS, (where, "self._adapter_manager"), old)
    assert "_validate_classification_head_lora" in script.check(sources)[where][0]
    assert {version.split(" ")[0] for version in patches.TRIED.split(" and ")} == {
        "0.32.0",
        "0.33.0",
    }
