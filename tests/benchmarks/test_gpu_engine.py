"""Step `engine` of `make gpu-first`: vLLM from its Python files, in the bundle and on a GPU that is
none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from gpu_steps import carried, engine, served

from tests.benchmarks.test_gpu_first import carried as carried_folder
from tests.benchmarks.test_gpu_first import run
from vllm_jd.store import Store

carried_there = carried_folder  # the fixture, under a name that is free here


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / served.SERVED
    error = served.make(folder)
    return folder, error


def test_what_is_served_is_lossy_and_found_again(things):
    folder, error = things
    assert 0.05 < error < 0.5  # else the export, which is the reference, would show nothing
    found = engine.find(folder)
    store = Store.open(found["store"])
    assert {*store.names, served.UPLOAD, ""} == set(found["folders"])
    assert found["folders"][""] is None
    for place in filter(None, found["folders"].values()):
        assert (Path(place) / "adapter_model.safetensors").is_file()


def test_wrong_tokens_are_told_from_right_ones(things):
    """The answers that PEFT itself gives are right; another adapter's, or one wrong token, not."""
    folder, _ = things
    found = engine.find(folder)
    answers = []
    for name in found["folders"]:
        tokens: list[int] = []
        for _ in range(4):  # greedy, one by one
            asked = [{"adapter": name, "prompt": [5, 17], "tokens": [*tokens, 0]}]
            ((_, own),) = engine.reference(found, asked)
            tokens.append(own[-1])
        answers.append({"adapter": name, "prompt": [5, 17], "tokens": tokens})
    judged = engine.judge(found, answers, engine.TIE["float32"])
    assert (judged["asked"], judged["same"], judged["wrong"]) == (6, 6, 0)
    assert judged["different_answers"] == [6], "the adapters say the same: this shows nothing"
    exchanged = [
        {**answer, "adapter": other["adapter"]}
        for answer, other in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    assert engine.judge(found, exchanged, engine.TIE["bfloat16"])["wrong"] == 6
    last = dict(answers[0], tokens=[*answers[0]["tokens"][:-1], 7])
    judged = engine.judge(found, [last], engine.TIE["float32"])
    assert (judged["same"], judged["wrong"]) == (0, 1)


STAND_INS = """
import torch
from gpu_steps import compiled_ops

x, out = torch.randn(5, 14), torch.empty(5, 7)
torch.ops._C.silu_and_mul(out, x)
assert torch.allclose(out, x[:, :7] / (1 + (-x[:, :7]).exp()) * x[:, 7:], atol=1e-6)
same = torch.ops._C.weak_ref_tensor(x)
assert same.data_ptr() == x.data_ptr() and torch.equal(same, x)
assert not torch.ops._C.cutlass_scaled_mm_supports_fp8(90)
memory = compiled_ops._Memory(torch.zeros(3, 4, dtype=torch.int32)[:, ::2])
told = memory.__cuda_array_interface__
assert (told["shape"], told["strides"], told["typestr"]) == ((3, 2), (16, 8), "<i4")
assert told["data"][0] == memory.tensor.data_ptr()
"""


def test_stand_ins_for_compiled_operators():
    """In a process of their own: where vLLM is loaded, the operators are there already."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", STAND_INS], cwd=benchmarks, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_engine_that_does_not_start_is_a_finding(things, tmp_path, monkeypatch):
    """Both of vLLM's runners are tried, what each came to is noted, and the step ends well."""
    from gpu_steps.step import Step

    def process(step, one, runner, *rest):
        return {"came_to": "starting the engine", "error": "ImportError: no such thing"}

    monkeypatch.setattr(engine, "_process", process)
    step = Step("engine", tmp_path / "engine.json", 1000, small=True, bundle=None)
    engine.serve(step, engine.RUNS[0], engine.find(things[0]), tmp_path, tmp_path)
    assert step.end() == 0
    told = json.loads((tmp_path / "engine.json").read_text())["engines"]
    assert [(one["runner"], one["error"]) for one in told] == [
        (2, "ImportError: no such thing"),
        (1, "ImportError: no such thing"),
    ]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_quality_study_on_a_bare_gpu_is_told_what_is_not_there(things, monkeypatch, on_gpu):
    """No compiled operators anywhere; graphs where there is a GPU, and room for several engines."""
    vllm = pytest.importorskip("vllm")
    import gpu_quality

    told = {}
    monkeypatch.setattr(vllm, "LLM", lambda model, **options: told.update(options))
    found = engine.find(things[0])
    gpu_quality.engine(on_gpu, found["model"], found["store"], dtype="bfloat16")
    assert told["enforce_eager"] is not on_gpu
    graphs = told["compilation_config"]
    assert (graphs["mode"], graphs["custom_ops"]) == (0, ["none"])
    assert graphs["cudagraph_mode"] == ("FULL_DECODE_ONLY" if on_gpu else "NONE")
    if on_gpu:
        assert max(graphs["cudagraph_capture_sizes"]) == told["max_num_seqs"] == 256
    assert told["gpu_memory_utilization"] <= 0.1 and not told["enable_prefix_caching"]
    assert told["additional_config"]["vllm_jd"]["store"] == found["store"]


def test_without_a_bundle_it_says_so(tmp_path):
    from gpu_steps.step import Step

    step = Step("engine", tmp_path / "engine.json", 1000, small=True, bundle=tmp_path)
    engine.run(step)
    assert step.end() == 0
    assert "make gpu-first-bundle" in step.content["skipped"][0]["why"]


@pytest.mark.slow
def test_vllm_serves_on_its_cuda_platform(carried_there, tmp_path):
    """On a GPU that is none, in Triton's interpreter: vLLM's CUDA worker and runner, our plugin
    found by its entry point, our Triton kernels, and the tokens of PEFT."""
    _, bundle = carried_there
    out = tmp_path / "out"
    run(out, "--small", "--seconds", "850", "--only", "engine", "--bundle", bundle, code=0)
    told = json.loads((out / "engine.json").read_text())
    one = told["engines"][0]
    assert one.get("error") is None, one
    assert one["platform"].endswith("CudaPlatform") and one["runner"] == 2
    assert one["model_runner"] == "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
    assert (one["manager"], one["kernels"], one["layers"]) == ("ResidentLoRAManager", "triton", 10)
    assert one["asked"] == one["same"] and one["wrong"] == 0
    assert set(one["different_answers"]) == {6}


def test_what_is_unpacked_is_vllm_for_cuda_and_our_entry_points(carried_there, tmp_path):
    _, bundle = carried_there
    site = tmp_path / "site"
    needed = carried.unpack(bundle, site)
    assert all("-cp312-" not in name for name in needed) or sys.version_info[:2] == (3, 12)
    code = """
from importlib.metadata import entry_points, version
print(version("vllm"), *(point.value for point in entry_points(group="vllm.general_plugins")))
"""
    said = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(site)}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    installed = carried.installed()[1]
    assert said == [installed, "vllm_jd.plugin:register"]
    assert not [*site.glob("vllm/**/*.so")]


def test_the_quality_study_without_a_bundle_says_what_to_do(tmp_path, monkeypatch, capsys):
    import gpu_quality

    monkeypatch.setattr(gpu_quality, "BUNDLE", tmp_path)
    monkeypatch.delenv(gpu_quality.INSIDE, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert gpu_quality.main(["run"]) == 1
    assert "make gpu-first-bundle" in capsys.readouterr().err
