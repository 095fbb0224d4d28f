"""The timing benchmark (Figure 5): what it times against float64 formulas, and its bytes against
the formulas of the paper's App. F. Times themselves are not looked at."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from typer import Typer
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import timing

SHAPES = [(24, 24), (24, 8), (24, 8)]
RANKS, CLUSTERS, RESIDENTS = (2, 5), (1, 3), 7


def make(dtype, residents=RESIDENTS):
    torch.manual_seed(3)
    layer = timing.Layer.random(SHAPES, dtype)
    return layer, timing.make_systems(layer, RANKS, CLUSTERS, residents)


def dense(system, layer, adapter):
    """The one matrix that takes x to the layer's output with this adapter, float64."""
    parts = []
    for s, w in enumerate(layer.weight.double().split(layer.d_out)):
        if system.clusters is None:
            ba = system.weights.b[s][adapter].double() @ system.weights.a[s][adapter].double()
            parts.append(w * ba if system.name == timing.F_LORA else w + ba)
            continue
        r, c, pools = system.rank, system.clusters, system.pools
        first = adapter % c * r
        u = pools.u[s][first : first + r].double().T
        v = pools.v[s * c * r + first : s * c * r + first + r].double()
        if system.name == timing.DIAGONAL:
            core = torch.diag(pools.cores[adapter, s * r : (s + 1) * r].double())
        else:
            core = pools.cores[adapter, s * r * r : (s + 1) * r * r].double().view(r, r)
        parts.append(w + u @ core @ v)
    return torch.cat(parts)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_every_system_is_there_at_every_rank():
    _, systems = make(torch.float32)
    found = sorted((s.name, s.rank, s.clusters or 0) for s in systems)
    paths = [timing.BMM, timing.KERNEL, timing.F_LORA] + [timing.VLLM] * timing.HAS_VLLM
    wanted = [(name, rank, 0) for rank in RANKS for name in paths]
    for name in (timing.FULL, timing.DIAGONAL):
        wanted += [(name, rank, c) for rank in RANKS for c in CLUSTERS]
    assert found == sorted(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_forward_is_the_float64_formula(dtype):
    layer, systems = make(dtype)
    batch = layer.batch(5, RESIDENTS)
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for system in systems:
        y = linear(batch.x, layer.weight)
        pairs = zip(batch.index.tolist(), batch.x.double(), strict=True)
        wanted = torch.stack([dense(system, layer, adapter) @ x for adapter, x in pairs])
        expected = torch.stack([system.expected(y, batch, token) for token in range(5)])
        assert relative(expected, wanted) < limit, system.name
        system.run(y, batch)
        assert relative(y, wanted) < limit, system.name
        assert timing.check(system, layer, batch) < limit, system.name


@pytest.mark.parametrize("what", ["slots", "nothing added", "not a number"])
def test_a_wrong_forward_stops(what, monkeypatch):
    layer, systems = make(torch.bfloat16)
    batch = layer.batch(5, RESIDENTS)
    for system in systems:
        right = system.run
        wrong = {
            "slots": lambda y, b, f=right: f(
                y, b._replace(slots=b.slots.roll(1), index=b.index.roll(1))
            ),
            "nothing added": lambda y, b: None,
            "not a number": lambda y, b: y.fill_(float("nan")),
        }[what]
        monkeypatch.setattr(system, "run", wrong)
        with pytest.raises(timing.Mismatch, match=f"{system.name}, rank {system.rank}"):
            timing.check(system, layer, batch)


def test_a_batch_has_different_adapters():
    layer, _ = make(torch.float32)
    batch = layer.batch(RESIDENTS, RESIDENTS)
    assert sorted(batch.index.tolist()) == list(range(RESIDENTS))
    assert batch.slots.dtype == torch.int32 and batch.slots.tolist() == batch.index.tolist()


@given(
    d=st.integers(1, 9000),
    r=st.integers(1, 128),
    c=st.integers(2, 64),
    n=st.integers(1, 5000),
    modules=st.integers(1, 200),
)
@settings(deadline=None)
def test_memory_is_the_papers_formula(d, r, c, n, modules):
    shapes = [(d, d)] * modules
    assert timing.lora_numbers(shapes, 16, n) == modules * n * (d * 2 * 16)
    full = timing.jd_numbers(shapes, r, 1, n, diagonal=False)
    assert full == modules * (d * 2 * r + n * r**2)
    clustered = timing.jd_numbers(shapes, r, c, n, diagonal=False)
    assert clustered == modules * (d * 2 * r * c + n * (r**2 + 1))
    diagonal = timing.jd_numbers(shapes, r, 1, n, diagonal=True)
    assert diagonal == full - modules * n * (r**2 - r)


def test_memory_is_what_the_tensors_take():
    _, systems = make(torch.bfloat16)
    for system in systems:
        if system.clusters is None:
            tensors = [*system.weights.a, *system.weights.b]
            numbers = timing.lora_numbers(SHAPES, system.rank, RESIDENTS)
        else:
            tensors = [system.pools.v, *system.pools.u, system.pools.cores]
            diagonal = system.name == timing.DIAGONAL
            numbers = timing.jd_numbers(
                SHAPES, system.rank, system.clusters, RESIDENTS, diagonal=diagonal
            )
            # The adapter's cluster: kept in the rows of indices, one for each adapter and module.
            assert system.pools.rows.shape[:2] == (RESIDENTS, len(SHAPES))
            numbers -= RESIDENTS * len(SHAPES) * (system.clusters > 1)
        stored = sum(t.untyped_storage().nbytes() for t in tensors)
        assert stored == sum(t.nbytes for t in tensors) == 2 * numbers, system.name


def test_tensors_of_other_sizes_stop(monkeypatch):
    monkeypatch.setattr(timing, "jd_numbers", lambda *_, diagonal: 1)
    with pytest.raises(timing.Mismatch, match="JD-Full of rank 2 takes"):
        make(torch.bfloat16)


def test_memory_table_has_ratios_to_lora_of_the_first_rank():
    rows = timing.memory_table([(4096, 4096)] * 96, [16, 32], [1, 25])
    by_key = {(row["system"], row["rank"], row["clusters"], row["adapters"]): row for row in rows}
    row = by_key[timing.FULL, 16, 25, 1024]
    numbers = 96 * (4096 * 2 * 16 * 25 + 1024 * (16**2 + 1))
    assert row["bytes"] == 2 * numbers
    slots = row["over_lora_rank_16"] * 1024
    assert slots == pytest.approx(numbers / (96 * 4096 * 2 * 16), rel=1e-3)
    assert round(slots) == 27  # the paper gives vLLM 28 slots for this setting
    assert by_key["LoRA, F-LoRA", 32, None, 1]["over_lora_rank_16"] == 2


def test_loading_brings_the_adapters_own_numbers(tmp_path):
    lora, full, diagonal = timing.make_loadables(SHAPES, 4, tmp_path, "cpu")
    assert lora.nbytes == 2 * timing.lora_numbers(SHAPES, 4, 1)
    assert (full.nbytes, diagonal.nbytes) == (2 * 3 * 16, 2 * 3 * 4)
    for case in (lora, full, diagonal):
        with pytest.raises(timing.Mismatch, match="from file differs"):
            case.check()
        case.read()
        with pytest.raises(timing.Mismatch, match="from memory differs"):
            case.check()
        case.copy()
        case.check()
        (file,) = tmp_path.glob(f"{case.name}-*.safetensors")
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
        case.read()
        with pytest.raises(timing.Mismatch, match="from file differs"):
            case.check()


def run(*arguments):
    app = Typer()
    app.command()(timing.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SMALL = ["--model=smollm2", "--rank=4", "--rank=2", "--clusters=3", "--adapters=2", "--rounds=1"]


def test_a_small_run(tmp_path):
    out = tmp_path / "new" / "timing.json"
    done = run("--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert (result["model"], result["modules"], result["threads"]) == ("smollm2", 90, 1)
    assert {(row["system"], row["rank"]) for row in result["load"]["rows"]} == {
        (name, rank) for name in ("LoRA", timing.FULL, timing.DIAGONAL) for rank in (2, 4)
    }
    forward = result["forward"]
    assert (forward["d_in"], forward["d_out"]) == (576, [576, 192, 192])
    for row in forward["rows"]:
        assert set(row["added_over_same_rank"]) == set(row["added_over_rank_2"])
        assert set(row["added_over_rank_2"]) >= {timing.BMM, timing.KERNEL}
        if row["system"] in timing.LORA_PATHS:
            assert row["added_over_same_rank"][row["system"]] == 1


def test_a_mismatch_stops_the_run_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.BmmLora, "run", lambda *_: None)
    done = run("--out", tmp_path / "timing.json", *SMALL)
    assert done.exit_code == 1
    assert "stopped: LoRA, gathered bmm, rank 2, 2 adapters" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama"], "mistral-7b"),
        (["--rank", "0"], "--rank"),
        (["--rank", "193", "--model", "smollm2"], "at most 192"),
        (["--clusters", "0"], "--clusters"),
        (["--adapters", "1025"], "--adapters"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "none"], "--threads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_a_usage_error(arguments, said, tmp_path):
    done = run("--out", tmp_path / "timing.json", *arguments)
    assert done.exit_code == 2
    assert "Usage" in done.output and said in " ".join(done.output.split())


def test_out_is_required():
    done = run()
    assert done.exit_code == 2
    assert "--out" in done.output


@pytest.mark.parametrize(("kernel", "said"), [("reference", "reference"), ("tpu", "unknown")])
def test_a_kernel_that_is_not_ours_stops(kernel, said, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", kernel)
    done = run("--out", tmp_path / "timing.json", *SMALL)
    assert done.exit_code == 1
    assert said in done.output and "Traceback" not in done.output
