"""The command line: what it prints for people and programs, and how it fails."""

import gc
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vllm_jd
from vllm_jd.cli.app import app
from vllm_jd.store import Store

SCRIPT = Path(sys.executable).with_name("vllm-jd")
TINY_CONFIG = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 11, "vocab_size": 50}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments, code=1):
    """Run what must fail with a message and no traceback; return stderr on one line, unboxed."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    said = " ".join(result.stderr.replace("│", " ").split())
    # A command's process would be gone, with all that it held: so is what its error's frames hold.
    del result
    gc.collect()
    return said


def script(*arguments, **options):
    """The installed command, in a process of its own."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def edit_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    """A folder of six adapters; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "adapters"
    write_adapters(folder, 6, kind="real", ranks=(2, 4))
    return folder


@pytest.fixture(scope="module")
def store(adapters):
    """A store of them; not to be changed."""
    out = adapters.with_name("store")
    succeed("compress", adapters, "--out", out, "--rank", 3, "--clusters", 2)
    return out


# --- what succeeds ---


def test_version_and_help():
    assert succeed("--version").stdout == f"vllm-jd {vllm_jd.__version__}\n"
    for command in ("compress", "inspect", "verify", "export", "serve"):
        assert command in succeed("--help").stdout
        assert "Usage:" in succeed(command, "-h").stdout
    assert "Usage:" in run().output


def test_compress_prints_an_overview_and_what_to_do_next(tmp_path, adapters):
    result = succeed("compress", adapters, "--out", tmp_path / "s", "--rank", 2)
    text = " ".join(result.stdout.split())
    assert "(generation 1)" in text
    assert "base model org/tiny-llama" in text
    assert "method jd-full (rank 2, clusters 1" in text
    assert "adapters 6 modules 4" in text
    assert "(relative, squared; mean over adapters and modules)" in text
    serve = result.stdout.splitlines()[-1]
    assert serve == f"Serve it:  vllm-jd serve {tmp_path / 's'} --model org/tiny-llama"
    assert "compressing modules" not in result.stdout
    assert "generation 2" in succeed("compress", adapters, "--out", tmp_path / "s").stdout


def test_the_serve_line_can_be_pasted_into_a_shell(tmp_path, adapters):
    out = tmp_path / ("my [red]stores' " + "long " * 20) / "s"
    result = succeed("compress", adapters, "--out", out, "--rank", 2)
    words = result.stdout.splitlines()[-1].removeprefix("Serve it:  ")
    shown = subprocess.run(
        ["bash", "-c", f'set -- {words}; printf "%s\\n" "$@"'], capture_output=True, text=True
    )
    assert shown.stdout.splitlines() == ["vllm-jd", "serve", str(out), "--model", "org/tiny-llama"]


@pytest.mark.parametrize(
    ("recorded", "given", "model", "what"),
    [
        ("Tiny-Llama", None, "BASE", "Tiny-Llama"),
        ("/home/trainer/Tiny-Llama", None, "BASE", "/home/trainer/Tiny-Llama"),
        (None, None, "BASE", "the adapters' base model"),
        ("Tiny-Llama", "my models/Tiny-Llama", "my models/Tiny-Llama", None),
        ("my models/Tiny-Llama", None, "my models/Tiny-Llama", None),
        ("Tiny-Llama", "org/Tiny-Llama", "org/Tiny-Llama", None),
    ],
)
def test_the_serve_line_names_a_model_that_can_be_served_or_what_to_put_in(
    tmp_path, write_adapters, monkeypatch, recorded, given, model, what
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models" / "Tiny-Llama").mkdir(parents=True)
    (tmp_path / "my models" / "Tiny-Llama" / "config.json").write_text(json.dumps(TINY_CONFIG))
    write_adapters(tmp_path / "in", 2, config={"base": recorded})
    options = [] if given is None else ["--base-model", given]
    lines = succeed("compress", "in", "--out", "s", "--rank", 2, *options).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Serve it:"))
    words = shlex.split(lines[at].removeprefix("Serve it:"))
    assert words == ["vllm-jd", "serve", "s", "--model", model]
    after = [f"           BASE: the folder or Hub id of {what}"] if what else []
    assert lines[at + 1 :] == after


def test_compress_json_has_the_facts_and_nothing_else_on_stdout(tmp_path, adapters):
    arguments = ["--rank", 3, "--clusters", 2, "--seed", 7]
    arguments += ["--iterations", 2, "--store-dtype", "float32", "--json"]
    summary = json.loads(succeed("compress", adapters, "--out", tmp_path / "s", *arguments).stdout)
    assert summary["settings"] == {
        "rank": 3,
        "clusters": 2,
        "iterations": 2,
        "seed": 7,
        "store_dtype": "float32",
    }
    assert (summary["generation"], summary["method"]) == (1, "jd-full")
    assert summary["base_model"]["name"] == "org/tiny-llama"
    assert 0 < summary["error"] < 1
    assert summary["sizes"]["store_bytes"] == Store.open(tmp_path / "s").stored_bytes
    assert summary["sizes"]["adapter_bytes"] == sum(
        file.stat().st_size for file in adapters.glob("*/*.safetensors")
    )


def test_inspect_json_agrees_with_the_store(store):
    summary = json.loads(succeed("inspect", store, "--json").stdout)
    opened = Store.open(store)
    assert [adapter["name"] for adapter in summary["adapters"]] == opened.names
    assert [module["name"] for module in summary["modules"]] == [
        module.name for module in opened.manifest.modules
    ]
    assert sum(summary["clusters"]) == 6
    assert summary["error"] == pytest.approx(float(opened.error.mean()), rel=1e-5)
    for row, adapter in enumerate(summary["adapters"]):
        assert adapter["error"] == pytest.approx(float(opened.error[row].mean()), rel=1e-5)
        worst = float(opened.error[row].max())
        assert adapter["worst_module_error"] == pytest.approx(worst, rel=1e-5)
        assert adapter["clusters"] == [int(opened.chosen[row, 0, 0])]
        assert adapter["source_ranks"] == [(2, 4)[row % 2]]
    ratio = summary["sizes"]["parameter_saved_ratio"]
    source = sum((2, 4)[i % 2] for i in range(6)) * (48 + 32 + 64 + 48)
    assert ratio == pytest.approx(1 - (2 * 3 * 192 + 6 * 4 * 9) / source)


def test_inspect_one_adapter(store):
    summary = json.loads(succeed("inspect", store, "adapter-003", "--json").stdout)
    assert summary["name"] == "adapter-003"
    assert len(summary["source_sha256"]) == 64
    assert [module["source_rank"] for module in summary["modules"]] == [4] * 4
    text = succeed("inspect", store, "adapter-003").stdout
    assert "adapter-003: error" in text
    assert "model.layers.10.self_attn.q_proj" in text


def test_inspect_lists_modules_and_adapters(store):
    lines = succeed("inspect", store).stdout.splitlines()
    for name in ("k_proj", "q_proj", "down_proj", *Store.open(store).names):
        assert sum(f" {name} " in line for line in lines) == 1
    assert any("8 × 24" in line for line in lines)


def test_inspect_of_many_adapters_lists_the_fifty_worst(tmp_path, write_adapters):
    write_adapters(tmp_path / "in", 300, kind="real", ranks=(2,), shapes={"m.q_proj": (16, 12)})
    out = tmp_path / "out"
    succeed("compress", tmp_path / "in", "--out", out, "--rank", 3)
    text = succeed("inspect", out).stdout
    everyone = json.loads(succeed("inspect", out, "--json").stdout)["adapters"]
    assert len(everyone) == 300
    listed = [line.split()[1] for line in text.splitlines() if "│ adapter-" in line]
    worst = sorted(everyone, key=lambda adapter: -adapter["error"])[:50]
    assert listed == [adapter["name"] for adapter in worst]
    assert "the 50 of 300 adapters with the largest error" in text


@pytest.mark.parametrize("name", ["[red]x", "my[v2]", "[b", "a b", "ü", "n" * 200, "-x"])
def test_odd_and_long_names_are_shown_whole(tmp_path, write_adapters, name):
    (folder,) = write_adapters(tmp_path / "in", 1)
    folder.rename(folder.with_name(name))
    out = tmp_path / "out"
    succeed("compress", tmp_path / "in", "--out", out, "--rank", 2)
    for arguments in ([out], [out, "--", name]):
        result = succeed("inspect", *arguments)
        cells = [line.split("│")[1] for line in result.stdout.splitlines() if "│" in line]
        title = "".join(line.rstrip() for line in result.stdout.splitlines())
        assert name in "".join(cell.strip() for cell in cells) or name in title
        assert max(map(len, result.stdout.splitlines())) <= 80
    assert json.loads(succeed("inspect", out, "--json").stdout)["adapters"][0]["name"] == name
    assert succeed("export", out, "--out", tmp_path / "[e]", "--", name).stdout.endswith("[e]\n")
    assert (tmp_path / "[e]" / "adapter_config.json").is_file()


def test_verify_and_export(tmp_path, store, adapters, peft_deltas):
    result = json.loads(succeed("verify", store, "--json").stdout)
    assert result["ok"] is True
    assert (result["generation"], result["adapters"], result["files"]) == (1, 6, 4)
    assert result["bytes"] == Store.open(store).stored_bytes
    assert "ok generation 1: 6 adapters, 4 files" in succeed("verify", store).stdout
    succeed("export", store, "adapter-001", "--out", tmp_path / "x")
    assert peft_deltas(tmp_path / "x").keys() == peft_deltas(adapters / "adapter-001").keys()


def test_export_of_several_and_of_all(tmp_path, store, adapters, tree):
    out = tmp_path / "out"
    some = ["adapter-001", "adapter-003"]
    found = json.loads(succeed("export", store, *some, "--out", out, "--json").stdout)
    assert found == {
        "generation": 1,
        "adapters": [{"name": n, "folder": str(out / n), "written": True} for n in some],
    }
    text = " ".join(succeed("export", store, "--all", "--out", out).stdout.split())
    assert text == f"wrote 4 adapters to {out}; 2 were there already"
    assert sorted(path.name for path in out.iterdir()) == Store.open(store).names
    one = tmp_path / "one"
    found = json.loads(succeed("export", store, "adapter-001", "--out", one, "--json").stdout)
    assert found["adapters"] == [{"name": "adapter-001", "folder": str(one), "written": True}]
    assert tree(one) == tree(out / "adapter-001")
    before = tree(tmp_path)
    message = fail("export", store, "adapter-00", "adapter-001", "x", "--out", tmp_path / "new")
    assert "no adapter 'adapter-00'" in message
    assert "no adapter 'x'" in message
    assert "nothing was written" in fail("export", store, "--all", "--out", adapters)
    assert tree(tmp_path) == before


def test_the_base_models_config_is_recorded(tmp_path, adapters):
    model = tmp_path / "Tiny-Llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    arguments = ["compress", adapters, "--out", tmp_path / "s", "--rank", 2, "--json"]
    recorded = json.loads(succeed(*arguments, "--base-model", model).stdout)["base_model"]
    assert recorded["name"] == "Tiny-Llama"
    assert recorded["config"] == TINY_CONFIG
    assert len(recorded["fingerprint"]) == 64
    recorded = json.loads(succeed(*arguments, "--base-model", "x/tiny-llama").stdout)["base_model"]
    nothing = {"fingerprint": None, "config": {}, "other_names": []}
    assert recorded == {"name": "x/tiny-llama", **nothing}


VISION, QUERY = "visual.blocks.0.attn.qkv", "model.layers.0.self_attn.q_proj"


@pytest.fixture
def unserved(tmp_path, write_adapters):
    """A base model and a store of it with modules that the server refuses."""
    model = tmp_path / "tiny-llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    shapes = {QUERY: (24, 24), VISION: (24, 8), VISION.replace("0", "1"): (24, 8)}
    write_adapters(tmp_path / "in", 2, shapes=shapes)
    arguments = ["compress", tmp_path / "in", "--out", tmp_path / "s", "--base-model", model]
    return model, tmp_path / "s", [*arguments, "--rank", 2]


def test_modules_that_the_server_refuses_are_told_instead_of_the_command(unserved):
    _, store, arguments = unserved
    result = succeed(*arguments)
    text = " ".join(result.stdout.split())
    assert "`vllm-jd serve` will refuse this store" in text
    assert f"- {VISION} and 1 more: not of the language model" in text
    assert QUERY not in text
    assert "Serve it" not in text
    (sentence,) = json.loads(succeed(*arguments, "--json").stdout)["unserved"]
    assert sentence.startswith(f"{VISION} and 1 more: ")
    stored = {module.name for module in Store.open(store).manifest.modules}
    assert {QUERY, VISION} < stored, "another server may have use for them"


def test_verify_tells_of_them_and_refuses_with_the_base_model(unserved, tmp_path):
    model, store, arguments = unserved
    succeed(*arguments)
    assert f"{VISION} and 1 more" in succeed("verify", store).stdout
    told = json.loads(succeed("verify", store, "--json").stdout)
    assert told["ok"] is True
    assert len(told["unserved"]) == 1
    assert f"{model} cannot be served with it: {VISION} and 1 more: not of the language" in fail(
        "verify", store, "--base-model", model
    )
    refused = json.loads(run("verify", store, "--base-model", model, "--json").stdout)
    assert refused["ok"] is False
    other = tmp_path / "other"
    other.mkdir()
    assert "found no config.json" in fail("verify", store, "--base-model", other)
    (other / "config.json").write_text(json.dumps(TINY_CONFIG | {"hidden_size": 32}))
    assert "hidden_size: store 24" in fail("verify", store, "--base-model", other)


def test_a_store_that_fits_verifies_with_its_base_model(tmp_path, adapters):
    model = tmp_path / "renamed"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    compress = ["compress", adapters, "--out", tmp_path / "s", "--rank", 2]
    assert json.loads(succeed(*compress, "--json").stdout)["unserved"] == []
    text = succeed("verify", tmp_path / "s", "--base-model", model).stdout
    assert text.startswith("ok generation 1")
    assert len(text.splitlines()) == 1


def test_an_adapter_with_the_base_models_name_gets_a_command_that_tells_them_apart(
    tmp_path, write_adapter, make_factors, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY_CONFIG))
    write_adapter(tmp_path / "in" / "tiny", make_factors(1)[0], base="tiny")
    result = succeed("compress", tmp_path / "in", "--out", tmp_path / "s", "--rank", 2)
    assert result.stdout.splitlines()[-1].endswith(" --model tiny --served-model-name tiny-base")


def test_a_base_model_that_the_adapters_name_as_a_folder_is_read(tmp_path, write_adapters):
    model = tmp_path / "Tiny-Llama"
    model.mkdir()
    write_adapters(tmp_path / "in", 2, config={"base": str(model)})
    arguments = ["compress", tmp_path / "in", "--out", tmp_path / "s", "--rank", 2, "--json"]
    without = json.loads(succeed(*arguments).stdout)["base_model"]
    nothing = {"fingerprint": None, "config": {}, "other_names": []}
    assert without == {"name": str(model), **nothing}
    (model / "config.json").write_text(json.dumps(TINY_CONFIG))
    assert json.loads(succeed(*arguments).stdout)["base_model"]["config"] == TINY_CONFIG


# --- what fails ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress"],
        ["compress", "x"],
        ["compress", "--out", "x"],
        ["compress", "x", "--out", "y", "--rank", "0"],
        ["compress", "x", "--out", "y", "--rank", "many"],
        ["compress", "x", "--out", "y", "--clusters", "0"],
        ["compress", "x", "--out", "y", "--iterations", "0"],
        ["compress", "x", "--out", "y", "--store-dtype", "int2"],
        ["compress", "x", "--out", "y", "--method", "nothing"],
        ["compress", "x", "--out", "y", "--experts", "none"],
        ["compress", "x", "--out", "y", "--unknown"],
        ["inspect"],
        ["verify"],
        ["verify", "x", "y"],
        ["export", "x", "y"],
        ["export", "x", "--out", "y"],
        ["export", "x", "name", "--all", "--out", "y"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert "Usage:" in fail(*arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store_is_there", [False, True])
def test_bad_adapters_are_all_named_and_nothing_is_written(
    tmp_path, write_adapters, tree, store_is_there
):
    good, dora, cut, other = write_adapters(tmp_path / "in", 4)
    out = tmp_path / "out"
    if store_is_there:
        succeed("compress", good, "--out", out, "--rank", 2)
    edit_config(dora, use_dora=True, bias="all")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    edit_config(other, base_model_name_or_path="org/another")
    before = tree(tmp_path)
    message = fail("compress", tmp_path / "in", "--out", out, "--rank", 2)
    assert "(4 faults)" in message
    assert f"{dora}: use_dora is true" in message
    assert f"{dora}: bias is 'all'" in message
    assert f"{cut}: adapter_model.safetensors cannot be read" in message
    assert f"{other}: trained on base model 'org/another', expected 'tiny-llama'" in message
    assert str(good) not in message
    assert "Nothing was written" in message
    assert tree(tmp_path) == before
    assert out.exists() == store_is_there


def test_adapters_of_another_base_model_than_the_given_are_refused(tmp_path, adapters):
    message = fail("compress", adapters, "--out", tmp_path / "s", "--base-model", "org/other")
    assert "'org/tiny-llama', expected 'other' (of --base-model)" in message
    (tmp_path / "empty").mkdir()
    arguments = ["compress", adapters, "--out", tmp_path / "s", "--base-model", tmp_path / "empty"]
    assert "found no config.json" in fail(*arguments)
    assert not (tmp_path / "s").exists()


def test_places_that_are_no_store_are_refused_and_left_alone(tmp_path, adapters, tree):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    before = tree(tmp_path)
    for out in (tmp_path / "mine", tmp_path / "mine" / "file"):
        assert str(out) in fail("compress", adapters, "--out", out, "--rank", 2)
    assert "cannot be written" in fail("compress", adapters, "--out", "/proc/none", "--rank", 2)
    for command in (
        ["inspect"],
        ["verify"],
        [
            "export",
            "--out",
            tmp_path / "x",
            "--",
        ],
    ):
        arguments = ["adapter-000"] if command[0] == "export" else []
        for path in (tmp_path / "mine", tmp_path / "none", tmp_path / "mine" / "file"):
            assert str(path) in fail(*command, path, *arguments)
    assert tree(tmp_path) == before


def test_an_unknown_adapter_suggests_the_closest(tmp_path, store):
    for arguments in (["inspect", store], ["export", store, "--out", tmp_path / "x"]):
        message = fail(*arguments, "adaptr-003")
        assert "no adapter 'adaptr-003' among its 6; did you mean adapter-003" in message
        assert "did you mean" not in fail(*arguments, "something-else-entirely")
    assert not (tmp_path / "x").exists()


def test_export_over_something_is_refused(store, adapters, tree):
    before = tree(adapters)
    message = fail("export", store, "adapter-001", "--out", adapters / "adapter-001")
    assert "choose another --out" in message
    message = fail("export", store, "adapter-001", "--out", "/proc/none/x")
    assert "/proc/none" in message
    assert tree(adapters) == before


def test_a_damaged_store_is_refused_by_every_command(tmp_path, store):
    damaged = Path(shutil.copytree(store, tmp_path / "damaged"))
    file = damaged / "generations" / "1" / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "bases-00000.safetensors: found sha256" in fail("verify", damaged)
    arguments = ["export", damaged, "adapter-001", "--out", tmp_path / "x"]
    assert "bases-00000.safetensors: found sha256" in fail(*arguments)
    result = run("verify", damaged, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert "bases-00000.safetensors" in json.loads(result.stdout)["error"]
    assert not (tmp_path / "x").exists()


# --- true processes ---


def test_the_script_compresses_verifies_and_pipes(tmp_path, adapters):
    env = os.environ | {"COLUMNS": "80"}
    done = script("compress", adapters, "--out", tmp_path / "s", "--rank", "2", env=env)
    assert (done.returncode, done.stdout.splitlines()[0].split()[0]) == (0, "store")
    assert "compressing modules" in done.stderr
    piped = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"'{SCRIPT}' inspect '{tmp_path}/s' --json | head -c 10"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert piped.stdout == '{\n  "path"'
    assert "Traceback" not in piped.stderr
    failed = script("compress", tmp_path / "none", "--out", tmp_path / "t")
    assert failed.returncode == 1
    assert "no such folder" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_undecodable_names_are_refused_without_a_traceback(tmp_path, write_adapters):
    (folder,) = write_adapters(tmp_path / "in", 1)
    os.rename(folder, os.fsencode(tmp_path / "in") + b"/bad\xff")  # noqa: PTH104
    failed = script("compress", tmp_path / "in", "--out", tmp_path / "s")
    assert failed.returncode == 1
    assert "control or undecodable characters" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_ctrl_c_stops_with_a_message_and_the_store_as_it_was(tmp_path, write_adapters):
    """Stopped while it works, whenever that is; the same command then ends as if undisturbed."""
    shapes = {f"layers.{i}.q_proj": (192, 192) for i in range(40)}
    write_adapters(tmp_path / "in", 30, kind="real", shapes=shapes)
    write_adapters(tmp_path / "few", 1)
    out = tmp_path / "out"
    succeed("compress", tmp_path / "few", "--out", out, "--rank", 2)
    arguments = ["compress", tmp_path / "in", "--out", out, "--rank", 30]
    process = subprocess.Popen(
        [SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and all that they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wanted = random.Random(0).randint(1, 10)
    while process.poll() is None:
        if len(list(out.glob(".compress/*/module-*.safetensors"))) >= wanted:
            process.send_signal(signal.SIGINT)
            break
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "stopped: nothing is lost; the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    assert Store.open(out).generation == 1
    assert len(list(out.glob(".compress/*/module-*.safetensors"))) < 40
    assert "generation 2" in succeed(*arguments).stdout


def test_a_second_writer_is_refused(tmp_path, adapters):
    from vllm_jd.store import writing

    with writing(tmp_path / "s"):
        failed = script("compress", adapters, "--out", tmp_path / "s", "--rank", "2")
    assert failed.returncode == 1
    assert "another process is writing this store; wait for it to end" in failed.stderr
    assert "Traceback" not in failed.stderr


WITHOUT_VLLM = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "transformers", "peft", "openai"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from vllm_jd.cli.app import app
app(sys.argv[1:])
"""


def test_the_compressor_needs_no_vllm(tmp_path, adapters):
    def run_without(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_VLLM, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
        )

    store = tmp_path / "s"
    name = sorted(folder.name for folder in adapters.iterdir())[0]
    for arguments in (
        ("compress", adapters, "--out", store, "--rank", 2),
        ("inspect", store),
        ("verify", store),
        ("export", store, name, "--out", tmp_path / "out"),
    ):
        result = run_without(*arguments)
        assert result.returncode == 0, result.stderr
