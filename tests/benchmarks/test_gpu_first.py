"""`make gpu-first` without a GPU: what becomes of steps that fail, hang or fill their folder, and
what it needs of the machine."""

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

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu_first
from gpu_first import STEPS, Result, Step

ROOT = Path(__file__).parents[2]
MOST_BYTES = 50 << 20  # of the repository and the bundle, to be carried to a GPU machine
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
    assert "is not an empty folder" in " ".join(result.output.split())


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


@pytest.mark.parametrize(("seconds", "all_of_them"), [(480, False), (570, True)])
def test_the_budget_is_enough_for_the_steps_of_fixed_length(seconds, all_of_them):
    """The last step is begun if others end early, or if it is given more time."""
    results = [Result(key, step.title) for key, step in STEPS.items()]
    gpu_first.plan(results, seconds - gpu_first.CLOSING_SECONDS)
    enough = [result.limit >= STEPS[result.key].least for result in results]
    assert all(enough[:-1]) and enough[-1] == all_of_them
    assert [key for key, step in STEPS.items() if not step.seconds] == [results[-1].key]


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
    wheels = {file.name.split("-")[0] for file in bundle.glob("wheels/*.whl")}
    if wheels:  # the registry could be reached
        wanted = (ROOT / "benchmarks/gpu_steps/wheels.txt").read_text()
        assert wheels == set(re.findall(r"^([\w-]+)==", wanted.replace("-", "_"), re.MULTILINE))
        assert any(file.name.startswith("pydantic_core-") and "-cp312-" in file.name
                   for file in bundle.glob("wheels/*.whl"))  # fmt: skip
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
