"""The commands that plan, choose, change a store and tell of it."""

import json
import os
import shlex
import shutil

import pytest

from tests.cli.test_cli import fail, succeed
from tests.compressor.change.test_uploads import delete, upload
from vllm_jd.compressor.choose.quality import error_for
from vllm_jd.store import Store


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_adapters):
    """Eight adapters' folders; not to be changed."""
    return write_adapters(tmp_path_factory.mktemp("many"), 8, kind="real", ranks=(2, 4))


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    """A store of the first six; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "store"
    succeed("compress", *folders[:6], "--out", out, "--rank", 3, "--clusters", 2)
    return out


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture(autouse=True)
def few_ranks(monkeypatch):
    """Fewer settings to look at, for the tests' time."""
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._RANKS", (4, 8))
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._DIAGONAL_RANKS", (8,))


# --- plan and targets ---


def test_plan_shows_the_trade_off_and_draws_it(folders, tmp_path):
    figure = tmp_path / "plan.png"
    result = succeed("plan", *folders, "--target-error", 0.3, "--figure", figure)
    assert "jd-full, r 4" in result.stdout
    assert "none" in result.stdout
    assert "Smallest with an error of at most 0.3" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("Make it:"))
    words = shlex.split(line.removeprefix("Make it:"))
    asked = ["--out", "STORE", "--target-error", "0.3"]
    assert words == ["vllm-jd", "compress", *map(str, folders), *asked]
    words[words.index("STORE")] = str(tmp_path / "made")
    assert json.loads(succeed(*words[1:], "--json").stdout)["error"] <= 0.3
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_plan_says_the_options_that_it_was_given_and_what_comes_closest(folders, tmp_path):
    odd = shutil.copytree(folders[0].parent, tmp_path / "my [red]adapters")
    arguments = ("--store-dtype", "int8", "--max-bytes", "40kB", "--base-model", "org/tiny-llama")
    text = succeed("plan", odd, *arguments).stdout
    line = next(line for line in text.splitlines() if line.startswith("Make it:"))
    words = shlex.split(line.removeprefix("Make it:"))
    asked = ["--max-bytes", "40000", "--store-dtype", "int8", "--base-model", "org/tiny-llama"]
    made = ["vllm-jd", "compress", str(odd), "--out", "STORE", "--target-quality", "0.99"]
    assert words == made + asked
    text = " ".join(succeed("plan", odd, "--target-error", 0, "--max-bytes", "20kB").stdout.split())
    assert "nothing here reaches an error of 0; the closest is " in text
    assert "Make it" not in text


def test_compress_takes_what_plan_chose(folders, tmp_path):
    found = json.loads(succeed("plan", *folders, "--target-error", 0.3, "--json").stdout)
    chosen = found["candidates"][found["chosen"]]
    assert chosen["error"] <= 0.3
    assert all(c["bytes"] >= chosen["bytes"] for c in found["candidates"] if c["error"] <= 0.3)
    arguments = ("--out", tmp_path / "s", "--target-error", 0.3, "--json")
    summary = json.loads(succeed("compress", *folders, *arguments).stdout)
    assert summary["error"] <= 0.3
    assert summary["method"] == chosen["settings"]["method"]


def test_auto_and_a_size(folders, tmp_path):
    auto = json.loads(
        succeed("compress", *folders, "--out", tmp_path / "auto", "--auto", "--json").stdout
    )
    assert auto["error"] <= error_for(0.99)
    assert auto["dtype"] in ("bfloat16", "int8", "int4")
    typed = ("--out", tmp_path / "typed", "--auto", "--store-dtype", "float16", "--json")
    assert json.loads(succeed("compress", *folders, *typed).stdout)["dtype"] == "float16"
    # A file's header weighs more here than in a store of real size.
    arguments = ("--out", tmp_path / "small", "--max-bytes", "24kB", "--store-dtype", "int8")
    small = json.loads(succeed("compress", *folders, *arguments, "--json").stdout)
    assert Store.open(tmp_path / "small").stored_bytes <= 24_000
    assert small["dtype"] == "int8"
    assert small["exact_error"] <= small["error"] + 1e-6


def test_a_wanted_share_is_an_error_that_keeps_it(folders, tmp_path):
    arguments = ("--target-quality", 0.95)
    planned = json.loads(succeed("plan", *folders, *arguments, "--json").stdout)
    assert planned["target_quality"] == 0.95
    assert planned["target_error"] == error_for(0.95)
    chosen = planned["candidates"][planned["chosen"]]
    assert chosen["expected"]["rouge_l"]["expected"] >= 0.95
    assert {c["expected"] is None for c in planned["candidates"] if c["error"] > 0.45} <= {True}
    made = succeed("compress", *folders, "--out", tmp_path / "s", *arguments)
    assert "should keep" in made.stdout
    found = json.loads(succeed("inspect", tmp_path / "s", "--json").stdout)
    assert 0 < found["error"] <= error_for(0.95)


def test_a_method_given_with_a_target_is_kept_to(folders, tmp_path):
    arguments = ("--method", "svd", "--target-error", 0.5, "--json")
    found = succeed("compress", *folders, "--out", tmp_path / "s", *arguments)
    assert json.loads(found.stdout)["method"] == "svd"


def test_targets_that_cannot_be_met_say_what_comes_closest(folders, tmp_path):
    arguments = ("--target-error", 0.001, "--max-bytes", "8kB")
    message = fail("compress", *folders, "--out", tmp_path / "s", *arguments)
    assert "no settings reach" in message
    assert "vllm-jd plan" in message
    assert not (tmp_path / "s" / "CURRENT").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--auto", "--rank", "8"], "--rank"),
        (["--max-bytes", "1MB", "--clusters", "2"], "--clusters"),
        (["--max-bytes", "many"], "256MB"),
        (["--target-quality", "0.9", "--target-error", "0.1"], "cannot be given together"),
        (["--target-quality", "0.2"], "was not measured"),
        (["--target-quality", "99"], "expected a share of LoRA's"),
        (["--auto", "--clusters", "1", "--experts", "joint"], "--clusters, --experts"),
        (["--auto", "--density", "0.5"], "method jd-full has no option --density; it has --rank"),
        (["--auto", "--method", "svd", "--iterations", "2"], "svd has no option --iterations"),
        (["--auto", "--method", "ties"], "choose among none, svd, jd-full, jd-diag"),
        (["--target-error", "0.1", "--method", "hydraopt", "--matrices", "2"], "--method hydraopt"),
        (["--method", "svd", "--iterations", "2"], "svd has no option --iterations"),
        (["--method", "ties", "--experts", "joint"], "ties has no option --experts"),
        (["--method", "svd", "--clusters", "1"], "svd has no option --clusters; it has --rank"),
        (["--method", "hydraopt", "--matrices", "99"], "--matrices is 99, but there are"),
        (["--method", "ties", "--clusters", "2"], "ties has no option --clusters"),
        (["--method", "none", "--rank", "16"], "method none has no option --rank; it has none"),
        (["--method", "dare", "--majority-sign", "total"], "it has --merge-weight, --density"),
        (["--method", "ties", "--density", "0"], "density is 0.0; expected a number, above 0"),
        (["--method", "ties", "--density", "2"], "--density"),
        (["--method", "jd"], "'jd-full', 'jd-diag', 'svd', 'hydraopt', 'ties'"),
        (
            [
                "--method",
                "jd-full",
                "--density",
                "0.3",
                "--temperature",
                "2",
                "--matrices",
                "3",
                "--merge-weight",
                "1",
            ],
            "no option --matrices, --temperature, --merge-weight, --density; it has --rank, "
            "--clusters, --iterations, --experts",
        ),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(folders, tmp_path, arguments, named):
    assert named in fail("compress", *folders, "--out", tmp_path / "s", *arguments, code=2)
    assert not (tmp_path / "s").exists()


def test_a_device_that_is_not_there_is_an_error(folders, tmp_path):
    message = fail("compress", *folders, "--out", tmp_path / "s", "--device", "cuda:99")
    assert "--device cuda:99" in message


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("jd-full", ["--rank", "4"]),
        ("jd-full", ["--rank", "4", "--clusters", "2"]),
        ("jd-diag", ["--rank", "8", "--store-dtype", "int4"]),
        ("svd", ["--rank", "1"]),
        ("hydraopt", ["--rank", "3", "--matrices", "2", "--steps", "5"]),
        ("none", ["--store-dtype", "float16"]),
    ],
)
def test_every_method_from_the_command_line(folders, tmp_path, method, options):
    out = tmp_path / "s"
    # One rank for all: PEFT's sums of A and B need it, and HydraOpt's too.
    succeed("compress", *folders[::2], "--out", out, "--method", method, *options)
    assert Store.open(out).manifest.method == method
    assert f"{method} (" in succeed("inspect", out).stdout
    succeed("export", out, "adapter-002", "--out", tmp_path / "export")


@pytest.mark.parametrize("method", ["ties", "task-arithmetic", "dare", "dare-ties"])
def test_merges_give_one_adapter_to_all(folders, tmp_path, method):
    succeed("compress", *folders, "--out", tmp_path / "s", "--method", method)
    store = Store.open(tmp_path / "s")
    first, *others = (store.factors(name) for name in store.names)
    for module, (b, a) in first.items():
        assert all((other[module][0] == b).all() for other in others)
        assert all((other[module][1] == a).all() for other in others)


def test_the_guard_keeps_adapters_and_says_so(folders, tmp_path):
    arguments = ("--rank", 2, "--max-adapter-error", 0.3)
    text = succeed("compress", *folders, "--out", tmp_path / "s", *arguments).stdout
    assert "kept as they were" in text
    found = json.loads(succeed("inspect", tmp_path / "s", "--json").stdout)
    assert found["uncompressed"] > 0
    assert all(a["uncompressed"] or a["error"] <= 0.3 for a in found["adapters"])


# --- changes ---


def test_add_remove_diff_and_prune(store, folders):
    with Store.open(store) as before:
        pass
    text = succeed("add", store, *folders[6:]).stdout
    assert "added adapter-006: error" in text
    after = Store.open(store)
    assert after.names == [f"adapter-{i:03d}" for i in range(8)]
    after.close()
    assert "error" in fail("add", store, folders[6])
    succeed("add", store, folders[6], "--replace")
    succeed("remove", store, "adapter-000", "adapter-001")
    assert "did you mean" in fail("remove", store, "adapter-00")
    found = json.loads(succeed("diff", store, 1, "--json").stdout)
    assert found["removed"] == ["adapter-000", "adapter-001"]
    assert sorted(found["added"]) == ["adapter-006", "adapter-007"]
    assert found["old"]["generation"] == before.generation
    assert "removed (2)" in succeed("diff", store).stdout
    assert "deleted generations: 1, 2" in succeed("prune", store, "--keep", 1).stdout
    assert "no generation" in fail("diff", store, 1)
    succeed("verify", store)


def test_prune_tells_who_reads_a_generation(store):
    opened = Store.open(store)
    succeed("remove", store, "adapter-000")
    text = succeed("prune", store, "--keep", 0).stdout
    assert "deleted generations: none" in text
    assert f"generation 1 kept: it is read by process {os.getpid()}; --force deletes it" in text
    held = [{"generation": 1, "pids": [os.getpid()]}]
    found = json.loads(succeed("prune", store, "--keep", 0, "--json").stdout)
    uploads = {"deleted": 0, "bytes": 0, "held": None}
    assert found == {"deleted": [], "held": held, "uploads": uploads}
    found = json.loads(succeed("prune", store, "--keep", 0, "--force", "--json").stdout)
    assert found == {"deleted": [1], "held": held, "uploads": uploads}
    assert opened.factors("adapter-000")
    opened.close()


def test_recompress_keeps_the_settings(store, folders):
    text = succeed("recompress", store, *folders).stdout
    assert "generation 2" in text
    manifest = Store.open(store).manifest
    assert manifest.adapters == 8
    assert (manifest.settings["rank"], manifest.settings["clusters"]) == (3, 2)


def test_uploads_are_compressed_tried_once_rolled_back_and_pruned(store, folders):
    assert "generation 1: 6 adapters" in succeed("recompress", store).stdout
    new, odd = upload(store, ("new", folders[6]), ("[odd]", folders[7]))
    delete(store, "adapter-000")
    found = json.loads(succeed("recompress", store, "--max-adapter-error", 0, "--json").stdout)
    assert (found["generation"], found["removed"]) == (2, ["adapter-000"])
    assert found["kept"].keys() == {"new", "[odd]"} and found["compressed"] == {}
    assert json.loads(succeed("recompress", store, "--json").stdout)["kept"] == {}, "tried before"
    (store / "recompress.json").unlink()
    text = succeed("recompress", store, "--max-adapter-error", 2, "--threads", 1).stdout
    assert "compressed new: error" in text and "compressed [odd]: error" in text
    assert "generation 3: 7 adapters" in text
    assert "sources of 5 of 7 adapters" in fail("recompress", store, "--refit")
    originals = ("--originals", folders[0].parent)
    found = json.loads(succeed("recompress", store, "--refit", *originals, "--json").stdout)
    assert found["refitted"] and found["adapters"] == 7 and found["generation"] == 4
    assert "generation 5: 5 adapters" in succeed("rollback", store, 2).stdout
    assert json.loads(succeed("rollback", store, "--json").stdout) == {
        "generation": 6,
        "adapters": 7,
    }
    assert "is the live one already" in fail("rollback", store, 6)
    found = json.loads(succeed("prune", store, "--keep", 0, "--json").stdout)
    assert (found["deleted"], found["uploads"]["deleted"]) == ([1, 2, 3, 4, 5], 0)
    assert "deleted 2 uploads" in succeed("prune", store, "--originals").stdout
    assert not (store / "uploads" / new).exists() and not (store / "uploads" / odd).exists()
    succeed("verify", store)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ADAPTERS", "--refit"], "--refit cannot be given together with ADAPTERS"),
        (["ADAPTERS", "--max-adapter-error", "1"], "--max-adapter-error cannot be given"),
        (["--originals", "ADAPTERS"], "--originals is for --refit"),
        (["--nice", "20"], "--nice"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_recompress_says_what_does_not_go_together(store, folders, arguments, named):
    arguments = [folders[0] if each == "ADAPTERS" else each for each in arguments]
    assert named in fail("recompress", store, *arguments, code=2)


def test_changing_what_is_no_store_is_refused(tmp_path, folders):
    changes = ["add", tmp_path, folders[0]], ["remove", tmp_path, "x"], ["diff", tmp_path]
    for arguments in (*changes, ["recompress", tmp_path], ["rollback", tmp_path]):
        assert "store" in fail(*arguments)
    assert not list(tmp_path.iterdir())


# --- reports ---


def test_report_of_a_store_and_of_its_adapters(store, folders, tmp_path):
    page = tmp_path / "report.html"
    succeed("report", store, "--out", page)
    without = page.read_text()
    succeed("report", store, "--out", page, *(f"--adapters={folder}" for folder in folders[:6]))
    assert len(page.read_text()) > len(without)
    assert "html" in fail("report", store, "--out", tmp_path / "report.txt")


def test_compress_writes_a_report(folders, tmp_path):
    page = tmp_path / "report.html"
    text = succeed(
        "compress", *folders, "--out", tmp_path / "s", "--rank", 3, "--report", page
    ).stdout
    assert "report.html" in "".join(text.split())
    assert "<html" in page.read_text()
