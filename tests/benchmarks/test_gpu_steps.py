"""The steps of `make gpu-first` without a GPU: on tiny shapes in Triton's interpreter, dry through
the dispatch of the GPU machine's Triton, and the parts of them that need no device."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from gpu_steps import cliff, limit, mistral, tuned
from gpu_steps.layers import ADAPTERS, CLUSTERS, RANK, StockPools, draw
from gpu_steps.traffic import least

from tests.benchmarks.test_gpu_first import ROOT, bare, run
from vllm_jd.kernels import reference
from vllm_jd.kernels.triton.plan import CONFIGS, DEFAULT, LayerShape, plan

TRITON_THERE = "3.6"  # of a bare GPU machine


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
        for tokens in (1, 32, 33, 256, 300):
            slots, order = draw(tokens, 64, "cpu")
            call, *_ = our_call(layer, tokens, pools, None, slots, order)
            launched.clear()
            call()
            made = backend.plan_of(pools, tokens, places=len(order))
            wanted = [(one.kernel, one.grid) for one in made.launches]
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
def test_all_cases_can_be_checked():
    """With the plain torch path in the kernels' place, all but those that need a GPU or vLLM."""
    said = bare(ROOT, ALL_CASES, OMP_NUM_THREADS="1")
    names = sorted(config.name for config in CONFIGS)
    assert said == f"79 {{'right': 69, 'impossible': 10}} 132 {names}\n"


@pytest.mark.parametrize("tokens", limit.TOKENS)
def test_bytes_and_operations_of_each_layer(tokens):
    """By the launch plan, against counting them by hand: bases and cores once, y twice."""
    step = SimpleNamespace(small=False)
    for _, layer in limit.layers(step):
        slots, order = draw(tokens, ADAPTERS, "cpu")
        assert sorted(order[order >= 0].tolist()) == list(range(tokens))
        drawn = slots.tolist()
        shape = LayerShape(layer.d_in, layer.d_out, max_rank=RANK)
        made = plan(shape, tokens, DEFAULT, places=len(order))
        places = [drawn[t] if t >= 0 else -1 for t in order.tolist()]
        moved, flops = least(made, drawn if made.variant == "rows" else places, CLUSTERS, RANK)
        clusters, adapters = len({s % CLUSTERS for s in drawn}), len(set(drawn))
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
