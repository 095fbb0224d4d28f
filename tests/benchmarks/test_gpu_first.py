"""`make gpu-first` without a GPU: what becomes of steps that fail, hang or fill their folder, what
it needs of the machine, and its own steps on tiny shapes in Triton's interpreter."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_first
from gpu_first import STEPS, Result, Step
from gpu_steps import cliff, limit, mistral, tuned
from gpu_steps.layers import ADAPTERS, CLUSTERS, RANK, StockPools, draw
from gpu_steps.traffic import least

from vllm_jd.kernels import reference
from vllm_jd.kernels.triton.plan import DEFAULT, LayerShape

ROOT = Path(__file__).parents[2]
MOST_BYTES = 50 << 20  # of the repository and the bundle, to be carried to a GPU machine
TRITON_THERE = "3.6"  # of a bare GPU machine
MOST_FILES = 8  # that may be carried back

# A step's process: `say` writes its file; what follows is what it does then.
SAY = """
import json, os, subprocess, sys, tempfile, time
out = sys.argv[sys.argv.index("--out") + 1]
def say(**more):
    content = {"device": {"name": "Fake GPU 9000"}, "doing": None, "skipped": [], "faults": []}
    open(out, "w").write(json.dumps(content | more))
"""
FAKES = {
    "good": "say(found=1); print('all is well')",
    "crash": "say(found=2, doing='the bad case'); print('boom'); os.abort()",
    "hang": """
say(found=3, doing='the slow case')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.path.join(os.path.dirname(out), "child"), "w").write(str(child.pid))
time.sleep(600)
""",
    "fill": """
say(found=4, doing='the large case')
for n in range(1000):
    open(os.path.join(tempfile.gettempdir(), str(n)), "wb").write(bytes(1 << 20))
    time.sleep(0.01)
""",
    "silent": "sys.exit(3)",
    "last": "say(found=6); print(sys.argv)",
}


def fake(key, seconds=20.0, least=1.0, needs=()):
    return Step(f"fake {key}", seconds, least, ("-c", SAY + FAKES[key]), needs)


@pytest.fixture
def fakes(monkeypatch):
    steps = {key: fake(key, seconds=2.0 if key == "hang" else 20.0) for key in FAKES}
    monkeypatch.setattr(gpu_first, "STEPS", steps)
    monkeypatch.setattr(gpu_first, "MOST_BYTES", 20 << 20)
    monkeypatch.setattr(gpu_first, "has_gpu", lambda: False)
    monkeypatch.setattr(gpu_first, "SLOWER", 1)
    return steps


@dataclass
class Said:
    """What a command printed."""

    output: str


def call(*words, code):
    """Run the script as its command line does, in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        gpu_first.console.file = errors
        try:
            found = gpu_first.main([*map(str, words)])
        except SystemExit as end:
            found = end.code
        finally:
            gpu_first.console.file = None
    said = Said(errors.getvalue() + out.getvalue())
    assert found == code, said.output
    assert "Traceback" not in said.output
    return said


def run(out, *arguments, code):
    return call("run", "--out", out, *arguments, code=code)


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def test_steps_that_crash_hang_and_fill_their_folder_leave_the_others(fakes, tmp_path):
    result = run(tmp_path, "--small", "--seconds", "120", code=1)
    (file,) = tmp_path.glob("gpu-first-*.json")
    assert file.name == "gpu-first-fake-gpu-9000.json"
    content = json.loads(file.read_text())
    assert {step["key"]: step["outcome"] for step in content["steps"]} == {
        "good": "done", "crash": "failed", "hang": "timed out", "fill": "too large",
        "silent": "failed", "last": "done",
    }  # fmt: skip
    by_key = {step["key"]: step for step in content["steps"]}
    assert by_key["crash"]["code"] == -6 and by_key["crash"]["reason"] == "exit code -6: boom"
    assert by_key["hang"]["seconds"] < 8
    # What each had written before is there, in its own file and in the one of all.
    for number, key in enumerate(("good", "crash", "hang", "fill"), 1):
        assert content[key]["found"] == number
        assert json.loads((tmp_path / f"{key}.json").read_text())["found"] == number
    assert "silent" not in content and content["last"]["found"] == 6
    assert "it was at: the slow case" in result.output
    assert "it wrote more than 20 MiB" in result.output
    log = (tmp_path / "log.txt").read_text()
    assert "==== good\nall is well" in log and "boom" in log and "==== last" in log
    # Nothing is left behind: no process, no temporary file.
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if gone(child):
            break
        time.sleep(0.1)
    assert gone(child)
    kept = sum(part.stat().st_size for part in tmp_path.iterdir())
    assert kept < 1 << 20


def test_it_says_first_what_it_will_skip(fakes, tmp_path, monkeypatch):
    fakes["good"] = fake("good", seconds=30, least=10)
    fakes["crash"] = fake("silent", needs=("a_package_that_is_not_there",))
    fakes["hang"] = fake("last", seconds=0, least=5)
    fakes["fill"] = fake("last", seconds=30, least=20)
    for key in ("silent", "last"):
        del fakes[key]
    result = run(tmp_path, "--small", "--seconds", "45", code=0)
    first = [line for line in result.output.splitlines() if line.split(":")[0] in fakes][:4]
    assert first[0].startswith("good: at most 30 s")
    assert first[1].startswith("crash: skipped: needs a_package_that_is_not_there, which is not")
    assert re.match(r"hang: at most (9|10) s", first[2])
    assert first[3].startswith("fill: skipped: 0 s would be left of the budget, it needs 20")
    # A step that ended early leaves its time to those after it; here to all of them.
    content = json.loads(next(tmp_path.glob("gpu-first-*.json")).read_text())
    outcomes = {step["key"]: step["outcome"] for step in content["steps"]}
    assert outcomes == {"good": "done", "crash": "not run", "hang": "done", "fill": "done"}


def test_only_the_steps_that_were_asked_for_with_what_they_are_told(fakes, tmp_path):
    run(tmp_path / "out", "--small", "--only", "last", "--bundle", str(tmp_path), code=0)
    content = json.loads(next((tmp_path / "out").glob("gpu-first-*.json")).read_text())
    assert [step["key"] for step in content["steps"]] == ["last"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"'--seconds', '12', '--small', '--bundle', '{tmp_path}'" in log


def test_what_was_done_before_ctrl_c_is_kept(fakes, tmp_path, monkeypatch):
    watch = gpu_first._watch

    def interrupted(process, result, *rest):
        if result.key == "hang":
            while not (tmp_path / "child").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt
        watch(process, result, *rest)

    monkeypatch.setattr(gpu_first, "_watch", interrupted)
    result = run(tmp_path, "--small", "--seconds", "60", code=130)
    assert "what was done is kept" in result.output
    content = json.loads((tmp_path / "gpu-first-fake-gpu-9000.json").read_text())
    assert [step["outcome"] for step in content["steps"]] == [
        "done", "failed", "stopped", "not run", "not run", "not run",
    ]  # fmt: skip
    assert content["hang"]["found"] == 3 and "==== hang" in (tmp_path / "log.txt").read_text()
    child = int((tmp_path / "child").read_text())
    assert any(gone(child) or time.sleep(0.1) for _ in range(50))


def test_no_link_of_the_repository_hides_a_package(fakes, tmp_path):
    """Its folder `kernels` at the top is not what transformers asks for by that name."""
    code = """
import importlib.util
found = [importlib.util.find_spec(name) for name in ("kernels", "vllm_jd")]
say(origins=[spec and os.path.realpath(spec.origin) for spec in found])
"""
    fakes.clear()
    fakes["look"] = Step("fake", 20, 1, ("-c", SAY + code), ())
    run(tmp_path, "--small", code=0)
    hidden, ours = json.loads((tmp_path / "look.json").read_text())["origins"]
    assert Path(ours) == ROOT / "vllm_jd" / "__init__.py"
    assert hidden is None or not Path(hidden).is_relative_to(ROOT)


def test_without_a_gpu_nothing_is_run(fakes, tmp_path):
    result = run(tmp_path / "out", code=3)
    assert "no CUDA GPU found" in result.output and "--small" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "rihgt"), "invalid choice: 'rihgt' (choose from "),
        (("--seconds", "0"), "seconds must be a number from 1 on, not 0"),
        (("--seconds", "soon"), "seconds must be a number from 1 on, not soon"),
    ],
)
def test_wrong_usage(fakes, tmp_path, arguments, message):
    result = run(tmp_path / "out", "--small", *arguments, code=2)
    assert message in result.output


def test_results_of_another_run_are_not_overwritten(fakes, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    result = run(tmp_path, "--small", code=2)
    assert "is not an empty folder" in result.output


def test_a_full_disk_ends_no_step(tmp_path, capsys):
    """What can't be written is said; the file that was there stays whole."""
    from gpu_steps.step import Step as Running

    step = Running("fake", tmp_path / "fake.json", 10, small=True, bundle=None)
    step.put("found", 1)
    step.out = tmp_path / "missing" / "fake.json"
    step.put("found", 2)
    assert step.end() == 0
    assert json.loads((tmp_path / "fake.json").read_text())["found"] == 1
    assert "was not written" in capsys.readouterr().out


def test_its_files_can_be_carried_back():
    """Each step's own, the log, and the one of all; names that any tool takes."""
    names = [*(f"{key}.json" for key in STEPS), "log.txt", "gpu-first-nvidia-h100.json"]
    assert len(names) <= MOST_FILES
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert gpu_first.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_first.file_name("Ü/../") == "unknown"


def test_the_budget_is_enough_for_the_steps_of_fixed_length():
    results = [Result(key, step.title) for key, step in STEPS.items()]
    gpu_first.plan(results, 480 - gpu_first.CLOSING_SECONDS)
    assert all(result.limit >= STEPS[result.key].least for result in results)


# --- what it needs of the machine ---

BARE = """
import importlib.machinery, socket, sys
from pathlib import Path
root, missing = Path(sys.argv[1]), sys.argv[2].split(",")
sys.path[:0] = [str(root), str(root / "benchmarks")]

def there(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
    absent = path is None and name in missing  # what is below it may be put up
    return None if absent else find(name, path, target)

def no_network(*_, **__):
    raise OSError("no network on a bare GPU machine")

importlib.machinery.PathFinder.find_spec = staticmethod(there)
socket.socket.connect = socket.getaddrinfo = no_network
"""
NOT_THERE = (
    "typer,vllm,pydantic,pydantic_core,fastapi,prometheus_client,msgspec,zmq,gguf,openai,ruff"
)


def bare(root, code, **environment):
    """What Python prints with nothing but the folder, and without NOT_THERE and a network."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE + code, str(root), NOT_THERE],
        cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """What is carried to a GPU machine: the repository's files, and the bundle in its place."""
    pytest.importorskip("vllm")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is carried is what git lists")
    folder = tmp_path_factory.mktemp("carried")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    target = folder / gpu_first.BUNDLE.relative_to(ROOT)
    call("bundle", "--out", target, code=0)
    return folder, target


def test_the_bundle_is_small(carried):
    folder, bundle = carried
    size = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
    assert size <= MOST_BYTES
    assert sum(file.stat().st_size for file in bundle.rglob("*")) <= 20 << 20
    assert (bundle / "VLLM_VERSION").read_text().startswith("vllm")
    assert (bundle / "LICENSE.vllm").exists()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    from gpu_steps.step import carried_commit

    assert carried_commit(bundle).rstrip("+") == head.stdout.strip()


def test_all_that_a_gpu_machine_imports_is_there(carried):
    folder, bundle = carried
    code = f"""
import gpu_first
import gpu_steps.limit, gpu_steps.right, gpu_steps.tuned, gpu_steps.cliff
from gpu_steps import stock
import vllm_jd.kernels, vllm_jd.kernels.triton.backend, vllm_jd.row
from tests.kernels.triton import test_native
assert Path(vllm_jd.__file__).is_relative_to(root), vllm_jd.__file__
assert not [name for name in missing if name in sys.modules]
ops = stock.load(Path({str(bundle)!r}))
try:
    import pydantic
except ModuleNotFoundError:
    print(ops.lora_shrink.__module__, stock.packed_version(Path({str(bundle)!r})))
"""
    said = bare(folder, code).split()
    assert said[0] == "vllm.lora.ops.triton_ops.lora_shrink_op"


@pytest.mark.slow
def test_vllms_kernels_from_the_bundle_compute_what_they_should(carried):
    folder, bundle = carried
    code = f"""
import torch
from gpu_steps import right
import os
os.environ["VLLM_JD_TEST_DEVICE"] = "cpu"
checks = right.cases(True, Path({str(bundle)!r}))
checks["vLLM's kernels, 5 tokens"]()
print("right")
"""
    assert bare(folder, code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == "right\n"


def test_no_bundle_without_vllm(tmp_path, monkeypatch):
    from gpu_steps import stock

    def nothing(name):
        raise stock.PackageNotFoundError(name)

    monkeypatch.setattr(stock, "version", nothing)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    said = call("bundle", "--out", tmp_path / "bundle", code=1)
    assert (tmp_path / "bundle" / "old").exists()
    assert "vLLM is not installed here: run make setup" in said.output


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    pytest.importorskip("vllm")
    from gpu_steps import stock

    folder = tmp_path_factory.mktemp("bundle")
    stock.pack(folder)
    return folder


@pytest.fixture(scope="module")
def older_triton():
    """Folder of the GPU machine's Triton, its wheel alone: kept in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base) / "vllm-jd" / f"triton-{TRITON_THERE}-{sys.version_info.minor}"
    if not (folder / "triton" / "__init__.py").exists():
        new = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--no-deps", "--retries", "1", "--target", str(new), f"triton=={TRITON_THERE}.*"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"no Triton {TRITON_THERE} from the package registry: {said}")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def with_triton(folder, *words):
    """Python with that Triton before the installed one."""
    paths = [str(folder), str(ROOT), str(ROOT / "benchmarks")]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_our_kernels_compile_with_the_gpu_machines_triton(older_triton):
    """Those of the quick suite, for sm_90, with all that it asserts of them."""
    version = with_triton(older_triton, "-c", "import triton; print(triton.__version__)")
    assert version.startswith(f"{TRITON_THERE}.")
    (file,) = ROOT.glob("tests/**/test_compiled.py")
    words = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
    said = with_triton(older_triton, *words, str(file))
    assert int(re.search(r"(\d+) passed", said)[1]) > 15


# A driver that compiles for an H100 and only notes what would be launched: the way through Triton's
# own dispatch, which the interpreter leaves out. CPU tensors stand for the device's.
DRY = """
import sys, types
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []

class Launcher:
    def __init__(self, source, metadata):
        self.metadata = metadata

    def __call__(self, x, y, z, *_):
        launched.append((self.metadata.name, (x, y, z), self.metadata))

class H100:
    launcher_cls = Launcher
    utils = types.SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "warpSize": 32},
    )
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

driver.set_active(H100())
from gpu_steps import stock
from gpu_steps.layers import CLUSTERS, RANK, draw, make_pools, our_call, stock_call
from shapes import LLAMA, MISTRAL
from vllm_jd.kernels.triton import backend

kernels = types.SimpleNamespace(**vars(backend._kernels()) | {"INTERPRET": True})
backend._kernels = lambda: kernels
backend._check_content = lambda *_: None
ops = stock.load(Path(sys.argv[1]))
layers = [*MISTRAL.linear().values(), *LLAMA.linear(8).values()]
for dependent in (False, True):
    backend.uses_pdl = lambda device: dependent
    for layer in layers:
        pools = make_pools(layer, 64, RANK, CLUSTERS, "cpu", torch.bfloat16)
        for tokens in (1, 64, 65, 256, 300):
            slots, order = draw(tokens, 64, "cpu")
            call, *_ = our_call(layer, tokens, pools, None, slots, order)
            launched.clear()
            call()
            wanted = [(one.kernel, one.grid) for one in backend.plan_of(pools, tokens).launches]
            assert [(name, grid) for name, grid, _ in launched] == wanted
            for *_, built in launched:
                assert built.launch_pdl == dependent and built.target.arch == 90
                assert built.shared <= 227 << 10 and built.maxnreg == 255
for layer in layers:
    for tokens in (1, 128, 300):
        ops.forget()
        slots, _ = draw(tokens, 64, "cpu")
        call, *_ = stock_call(
            ops, layer, tokens, 28, "cpu", torch.bfloat16, slots, specialised=False
        )
        launched.clear()
        call()
        assert [name for name, *_ in launched] == ["_lora_shrink_kernel", "_lora_expand_kernel"]
        assert all(grid[1:] == (len(layer.d_out), 29) for _, grid, _ in launched)
print("launched")
"""


@pytest.mark.slow
def test_a_dry_run_through_the_gpu_machines_triton(older_triton, packed):
    """All layers at all variants, ours and vLLM's: compiled as Triton's dispatch has them for the
    tensors of a call, and launched with the grids of the plan."""
    assert with_triton(older_triton, "-c", DRY, str(packed)) == "launched\n"


# --- its own steps ---


def rehearse(tmp_path, bundle, *keys):
    """The steps as the script runs them, small; what each wrote."""
    if torch.cuda.is_available():
        pytest.skip("a rehearsal for machines without a GPU")
    arguments = [word for key in keys for word in ("--only", key)]
    run(tmp_path, "--small", "--seconds", "1800", "--bundle", str(bundle), *arguments, code=0)
    (file,) = tmp_path.glob("gpu-first-*.json")
    content = json.loads(file.read_text())
    assert [step["outcome"] for step in content["steps"]] == ["done"] * len(keys)
    for key in keys:
        assert content[key]["faults"] == [] and content[key]["doing"] is None
    return content


@pytest.mark.slow
def test_the_step_right(tmp_path, packed):
    part = rehearse(tmp_path, packed, "right")["right"]
    assert part["summary"] == {"right": 5, "wrong": 0, "not checked": 1, "not reached": 0}
    assert [one["why"] for one in part["skipped"]] == ["CUDA graphs need a CUDA device"]


def test_the_step_limit(tmp_path, packed):
    part = rehearse(tmp_path, packed, "limit")["limit"]
    (cell,) = part["cells"]
    assert set(cell["microseconds"]) == {"ours", "base", "stock"}
    assert cell["tokens"] == 2 and cell["launches"] == 2
    # Two tokens of two adapters: V and U of their clusters, their cores, x, and y twice.
    slots = {"d_in": 64, "d_out": 128, "rank": 4, "slices": 3, "bytes": 2}
    bases = cell["clusters"] * slots["rank"] * (slots["slices"] * 64 + 128)
    cores = cell["adapters"] * slots["slices"] * slots["rank"] ** 2
    assert cell["bytes"] == 2 * (bases + cores + 2 * 64 + 2 * 2 * 128)
    assert cell["flops"] == 2 * 2 * (3 * 4 * 64 + 3 * 4 * 4 + 4 * 128)
    assert part["vllm"].startswith("vllm")


@pytest.mark.slow
def test_the_step_model(tmp_path, packed):
    part = rehearse(tmp_path, packed, "model")["model"]
    assert part["right"]["unchanged_without_adapter"] is True
    assert part["right"]["error"] < 0.01 and part["right"]["changed_by"] > 0.05
    assert [batch["batch"] for batch in part["batches"]] == ["decode 2", "prefill 3"]
    for batch in part["batches"]:
        assert set(batch["microseconds"]) == {
            "base", "merged", "ours", "ours, one adapter", "vLLM, one adapter", "vLLM, 3 resident",
        }  # fmt: skip
        for name, times in batch["microseconds"].items():
            base = batch["microseconds"]["base"]["median"]
            assert batch["of_base"][name] == pytest.approx(base / times["median"])


@pytest.mark.slow
def test_the_step_cliff(tmp_path, packed):
    part = rehearse(tmp_path, packed, "cliff")["cliff"]
    assert part["copy"]["adapter_bytes"] == 2 * 2 * 16 * (3 * 64 + 64 + 32 + 32)
    rows = {row["system"]: row for row in part["loops"]}
    assert set(rows) == {"ours", "vLLM, 2 slots", "vLLM, 3 slots"}
    # In one step of four requests for up to four adapters: what fits into the slots runs.
    assert rows["ours"]["running"] == 4 and rows["ours"]["copies"] == 0
    for slots in (2, 3):
        row = rows[f"vLLM, {slots} slots"]
        assert 0 < row["copies"] <= slots and row["running"] <= 4


def test_the_step_tuned(tmp_path, packed):
    part = rehearse(tmp_path, packed, "tuned")["tuned"]
    (entry,) = part["entries"]
    assert entry["best"] in entry["microseconds"] and entry["failed"] == {}
    assert entry["config"]["name"] == entry["best"].split(",")[0]
    assert part["file"] == "cpu-triton-s-interpreter.json"
    # The file is the table that the kernels read.
    from vllm_jd.kernels.triton import tuning
    from vllm_jd.kernels.triton.plan import LayerShape

    entries = tuning.read_table(tmp_path / "tuned.json")
    shape = LayerShape(64, (64, 32, 32), max_rank=4)
    assert tuning.choose(tuning.of_layer(entries, shape), 2).name == entry["config"]["name"]


# --- the parts of them that need no device ---

ALL_CASES = """
import os
os.environ["VLLM_JD_TEST_DEVICE"] = "cpu"
from gpu_steps import right
from tests.kernels.triton import test_native as native
from vllm_jd.kernels import reference

ran = []
def run(case, *, order=None, config=None):
    ran.append((len(case.x), order is not None, config))
    y = case.y.clone()
    reference.add_adapters(y, case.x, case.pools, case.token_slots)
    return y

native.run = run
cases = right.cases(False, None)
found = {"right": 0, "impossible": 0}
for name, check in cases.items():
    try:
        check()
        found["right"] += 1
    except right.Impossible as why:
        found["impossible"] += 1
print(len(cases), found, len(ran), sorted({config.name for _, _, config in ran if config}))
"""


@pytest.mark.slow
def test_all_cases_can_be_checked(carried):
    """With the plain torch path in the kernels' place, all but those that need a GPU or vLLM."""
    folder, _ = carried
    said = bare(folder, ALL_CASES)
    names = ["default", "more splits", "narrow", "row limit 16", "unfused", "wide"]
    assert said == f"79 {{'right': 69, 'impossible': 10}} 132 {names}\n"


@pytest.mark.parametrize("tokens", limit.TOKENS)
def test_bytes_and_operations_of_each_layer(tokens):
    """By the launch plan, against counting them by hand: bases and cores once, y twice."""
    step = SimpleNamespace(small=False)
    for _, layer in limit.layers(step):
        slots, order = draw(tokens, ADAPTERS, "cpu")
        in_order = slots[order.long()].tolist()
        shape = LayerShape(layer.d_in, layer.d_out, max_rank=RANK)
        moved, flops = least(shape, DEFAULT, in_order, CLUSTERS, RANK)
        clusters, adapters = len({s % CLUSTERS for s in in_order}), len(set(in_order))
        slices, out = len(layer.d_out), sum(layer.d_out)
        bases = clusters * RANK * (slices * layer.d_in + out)
        numbers = bases + adapters * slices * RANK**2 + tokens * (layer.d_in + 2 * out)
        assert moved == 2 * numbers
        of_a_token = slices * RANK * layer.d_in + slices * RANK**2 + RANK * out
        assert flops == 2 * tokens * of_a_token


def linear(weight):
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = torch.nn.Parameter(weight.detach().clone())
    return made


class Shifted(mistral.Ours):
    """Ours with a fault: each token gets the adapter behind its own."""

    def add(self, layer, x, y):
        behind = (self._slots + 1) % len(self.pools[layer].rows)
        slots = torch.where(self._slots < 0, self._slots, behind)
        reference.add_adapters(y, x, self.pools[layer], slots)


class Torch(mistral.Ours):
    """Ours by the plain torch path, so that the interpreter isn't needed."""

    def add(self, layer, x, y):
        reference.add_adapters(y, x, self.pools[layer], self._slots)


@pytest.mark.parametrize(("system", "faults"), [(Torch, 0), (Shifted, 1)])
def test_logits_of_the_wrong_adapters_are_found(tmp_path, monkeypatch, system, faults):
    from gpu_steps import model
    from gpu_steps.step import Step as Running

    monkeypatch.setattr(mistral.backend, "prepare", lambda *_: None)
    monkeypatch.setattr(model, "Ours", system)
    step = Running("model", tmp_path / "model.json", 60, small=True, bundle=None)
    with torch.inference_mode():
        found = model.right(step, model.Adapted(step, 12, (1,)))
    assert found["changed_by"] > model.LEAST_CHANGE
    assert [fault["what"] for fault in step.content["faults"]] == ["logits"] * faults


def test_the_model_is_transformers_own():
    """Its prefill gives the logits of transformers' forward, and a decoded token those of one
    more token; only the products are one."""
    torch.manual_seed(0)
    model = mistral.Model("cpu", torch.float32, small=True)
    batch = mistral.Batch.prefill(model, 3, 7)
    mine = batch.logits()
    whole = model._whole
    for block, qkv in zip(whole.model.layers, model.qkv, strict=True):  # the layers it came from
        attention, mlp = block.self_attn, block.mlp
        parts = zip(("q_proj", "k_proj", "v_proj"), qkv.weight.split(qkv.widths), strict=True)
        for name, weight in parts:
            setattr(attention, name, linear(weight))
        gate, up = mlp.gate_proj.weight.chunk(2)
        mlp.gate_proj, mlp.up_proj = linear(gate), linear(up)
    prompt = batch.tokens
    theirs = whole(prompt, use_cache=True)
    torch.testing.assert_close(mine, theirs.logits[:, -1], rtol=1e-4, atol=1e-5)

    # The cache that transformers filled, in ours: one more token.
    cache = mistral.Cache(model, 3, 8)
    for layer, held in enumerate(cache.layers):
        held[0, :, :, :7] = theirs.past_key_values.layers[layer].keys
        held[1, :, :, :7] = theirs.past_key_values.layers[layer].values
    token = torch.randint(model.config.vocab_size, (3, 1))
    batch = mistral.Batch(model, token, torch.full((3, 1), 7), cache)
    again = whole(torch.cat([prompt, token], dim=1))
    torch.testing.assert_close(batch.logits(), again.logits[:, -1], rtol=1e-4, atol=1e-5)


class Clock:
    """Time that only steps take: 10 ms each, and 5 ms each adapter that is copied."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def graphs(self, *sizes):
        def step():
            self.now += 0.010

        return dict.fromkeys(sizes, step)


@dataclass
class Host:
    clock: Clock
    copied: list

    def copy(self, adapter, pools, slot):
        self.clock.now += 0.005
        self.copied.append((adapter, slot))


class Asked:
    """A system that only notes what it was asked."""

    def __init__(self, slots):
        self.pools = [StockPools((torch.zeros(slots, 1, 2, 4),), (torch.zeros(slots, 1, 4, 2),))]
        self.asked = []

    def ask(self, slots):
        self.asked.append(list(slots))


def serve(clock, system, adapters, *, seconds=20.0, concurrent=8, sizes=(4, 8)):
    outcome = cliff.Outcome()
    cliff.loop(
        outcome, system, clock.graphs(*sizes), adapters,
        concurrent=concurrent, seconds=seconds, seed=1, synchronise=False,
    )  # fmt: skip
    return outcome.row()


def test_a_closed_loop_with_all_resident(monkeypatch):
    """Eight requests at a time, ten steps of 10 ms each: 800 tokens a second, no one waits."""
    clock = Clock(monkeypatch)
    systems = {size: Asked(1) for size in (4, 8)}
    row = serve(clock, cliff.Resident(systems), 1000)
    assert row["tokens_per_second"] == pytest.approx(800)
    assert row["running"] == 8 and row["copies"] == 0
    assert row["first_token_ms"]["p99"] == pytest.approx(10)
    assert not systems[4].asked and len(systems[8].asked) == row["steps"]


def test_a_closed_loop_with_too_few_slots(monkeypatch):
    """No step has more adapters than slots, tokens are where their adapters are, copies cost."""
    clock = Clock(monkeypatch)
    systems = {size: Asked(2) for size in (4, 8)}
    host = Host(clock, [])
    row = serve(clock, cliff.Paged(systems, host), 16)
    asked = [one for system in systems.values() for one in system.asked]
    assert all(set(one) <= {-1, 0, 1} for one in asked)
    assert {len(one) for one in systems[4].asked} == {4}
    assert row["copies"] == len(host.copied) > 10
    assert row["running"] < 5 and row["tokens_per_second"] < 500
    assert row["first_token_ms"]["p99"] > 100
    # As many adapters as slots: each is copied once, and all run.
    clock = Clock(monkeypatch)
    host = Host(clock, [])
    row = serve(clock, cliff.Paged({n: Asked(2) for n in (4, 8)}, host), 2)
    assert sorted(adapter for adapter, _ in host.copied) == [0, 1]
    assert row["running"] == 8


def test_the_least_recently_used_slot_is_given_up(monkeypatch):
    host = Host(Clock(monkeypatch), [])
    system = cliff.Paged({2: Asked(2)}, host)
    for adapters in ([7], [8], [7], [9], [7, 9]):
        system.bring(adapters)
    assert host.copied == [(7, 0), (8, 1), (9, 1)]
    system.ask(2, [9])
    assert system._systems[2].asked == [[1, -1]]


def test_a_cached_address_is_forgotten(packed):
    """vLLM keeps strides by address for ever: a tensor that comes to lie there has others."""
    code = f"""
import torch
from gpu_steps import stock
ops = stock.load(Path({str(packed)!r}))
a = [torch.zeros(3, 1, 8, 32)]
assert ops._utils._get_lora_a_ptr(a, a[0].device)[2] == 32
b = [a[0].view(3, 1, 16, 16)]
assert ops._utils._get_lora_a_ptr(b, a[0].device)[2] == 32  # the fault
ops.forget()
assert ops._utils._get_lora_a_ptr(b, a[0].device)[2] == 16
print("forgotten")
"""
    assert bare(ROOT, code) == "forgotten\n"


def test_configurations_that_launch_the_same_are_timed_once():
    from vllm_jd.kernels.triton.plan import CONFIGS, LayerShape, plan

    shape = LayerShape(4096, (4096, 1024, 1024), max_rank=16)
    for tokens in (1, 64, 256, 2048):
        found = tuned.distinct(shape, tokens)
        assert "default" in found and len(found) < 3 * len(CONFIGS)
        plans = [plan(shape, tokens, config) for config in found.values()]
        assert len({(one.launches, one.split_width) for one in plans}) == len(plans)


def test_a_wrong_number_is_a_fault(tmp_path, monkeypatch):
    """A case that fails, one that ends its process, and those behind it."""
    from gpu_steps import right
    from gpu_steps.step import Step as Running

    module = tmp_path / "broken.py"
    module.write_text("""
import os, sys
from gpu_steps import right, step
def wrong():
    assert False, "7 units in the last place"
def cases(small, bundle):
    fine = lambda: 0.5
    return {"a": fine, "b": wrong, "c": lambda: os._exit(9), "d": fine, "e": fine}
right.cases = cases
parser = step.arguments("right")
parser.add_argument("--worker")
parser.add_argument("--after", type=int, default=0)
right.work(parser.parse_args())
""")
    monkeypatch.setattr(right.Worker, "MODULE", (str(module),))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}")
    step = Running("right", tmp_path / "right.json", 120, small=True, bundle=None)
    right.run(step)
    assert step.end() == 1
    content = json.loads((tmp_path / "right.json").read_text())
    assert {case["case"]: case["right"] for case in content["cases"]} == {
        "a": True, "b": False, "c": False, "d": True, "e": True,
    }  # fmt: skip
    why = {fault["what"]: fault["error"] for fault in content["faults"]}
    assert "7 units in the last place" in why["b"] and why["c"] == "exit code 9"
    assert content["summary"] == {"right": 3, "wrong": 2, "not checked": 0, "not reached": 0}
