"""The command line has the options that the methods state, and a new method needs no more."""

import json
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Literal

import pytest

from tests.cli.test_cli import fail, succeed
from vllm_jd.compressor.methods.jd import fit_shared
from vllm_jd.compressor.methods.jd_full import jd_full
from vllm_jd.compressor.methods.method import Method
from vllm_jd.compressor.methods.options import Options, option
from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.methods.svd import truncated
from vllm_jd.compressor.run.compress import compress
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import CORE_FULL, RANK
from vllm_jd.store import Store


@pytest.fixture
def adapters(tmp_path, write_adapters):
    write_adapters(tmp_path / "in", 3, kind="real", ranks=(4,))
    return tmp_path / "in"


@pytest.fixture
def wide(monkeypatch):
    """Help that is not broken into lines."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)


def line_of(text, flag):
    """What the help says of one option: its line, and those below that begin no other one."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{flag} ")]
    below = takewhile(lambda line: not line.startswith(("-", "*", "╰")), lines[at + 1 :])
    return " ".join(" ".join([lines[at], *below]).split())


def test_help_has_each_option_once_with_the_methods_that_have_it(wide):
    text = succeed("compress", "--help").stdout
    for name in {name for method in METHODS.values() for name in method.stated}:
        having = [method for method in METHODS.values() if name in method.stated]
        stated = having[0].stated[name]
        line = line_of(text, f"--{name.replace('_', '-')}")
        assert stated.help in line
        assert f"({', '.join(method.name for method in having)})" in line
        shown = f"({stated.default_help})" if stated.default_help else stated.default
        assert f"[default: {shown}]" in line
    assert "[default: jd-full]" in line_of(text, "--method")
    assert "--rank" not in succeed("plan", "--help").stdout


@dataclass(frozen=True)
class HalvedOptions(Options):
    least_rank: int = option(2, "Rank that is never gone below.", least=1, most=9)
    share: float = option(0.5, "Part of the ranks that stay.", above=0, most=1)
    rounding: Literal["up", "down"] = option("down", "Where half a rank goes.")


def _halved(factors, assignment, options, start, seed):
    rank = int(factors.ranks.max()) * options.share
    rank = -int(-rank // 1) if options.rounding == "up" else int(rank)
    return truncated(factors, max(rank, options.least_rank))


@pytest.fixture
def halved(monkeypatch):
    method = Method("halved", "for this test", "this file", _halved, HalvedOptions)
    monkeypatch.setitem(METHODS, "halved", method)


def test_a_new_method_is_its_options_and_a_function(tmp_path, adapters, halved, wide):
    text = succeed("compress", "--help").stdout
    assert "Part of the ranks that stay. (halved) [default: 0.5]" in line_of(text, "--share")
    assert "Where half a rank goes. (halved) [default: down]" in line_of(text, "--rounding")
    out = tmp_path / "s"
    arguments = ["compress", adapters, "--out", out, "--method", "halved"]
    assert "halved" in succeed(*arguments, "--share", 0.75, "--rounding", "up").stdout
    store = Store.open(out)
    assert store.manifest.settings == {
        "least_rank": 2,
        "share": 0.75,
        "rounding": "up",
        "store_dtype": "bfloat16",
    }
    assert set(store.rows(store.manifest.modules[0].name)[:, RANK].tolist()) == {3}
    summary = json.loads(succeed("recompress", out, adapters, "--json").stdout)
    assert summary["settings"]["share"] == 0.75
    assert "no option --rank; it has --least-rank, --share" in fail(*arguments, "--rank", 2, code=2)
    assert "--least-rank" in fail(*arguments, "--least-rank", 10, code=2)
    assert "--share" in fail(*arguments, "--share", "half", code=2)
    assert "share is 0.0" in fail(*arguments, "--share", 0, code=2)
    assert "--rounding" in fail(*arguments, "--rounding", "away", code=2)
    assert "has no option --share" in fail(*arguments[:-2], "--share", 0.5, code=2)


def test_a_new_method_may_have_clusters(tmp_path, adapters, monkeypatch):
    @dataclass(frozen=True)
    class Grouped(Options):
        rank: int = option(1, "Rank.", least=1)
        clusters: int = option(1, "Groups.", least=1)

    def fit(factors, assignment, options, start, seed):
        bases = partial(jd_full, seed=seed)
        return fit_shared(factors, assignment, options, start, bases, CORE_FULL)

    method = Method("grouped", "", "", fit, Grouped, normalise=True, seeded=True)
    monkeypatch.setitem(METHODS, "grouped", method)
    arguments = ["compress", adapters, "--out", tmp_path / "s", "--method", "grouped"]
    succeed(*arguments, "--clusters", 2)
    alone = Store.open(tmp_path / "s")
    assert {module.shared for module in alone.manifest.modules} == {2}
    # It is JD-Full in all but name.
    succeed(*arguments[:-1], "jd-full", "--rank", 1, "--clusters", 2)
    assert Store.open(tmp_path / "s").error.tolist() == alone.error.tolist()


def test_options_of_one_name_and_other_limits(tmp_path, adapters, monkeypatch, wide):
    """The help shows what all have in common, and each method goes by its own limits."""

    @dataclass(frozen=True)
    class Other(Options):
        rank: int = option(3, "Rank of its own.", least=0, most=4)

    def fit(factors, assignment, options, start, seed):
        return truncated(factors, options.rank + 1)

    monkeypatch.setitem(METHODS, "other", Method("other", "", "", fit, Other))
    line = line_of(succeed("compress", "--help").stdout, "--rank")
    assert "[default: (the method's)]" in line and "x>=" not in line
    arguments = ["compress", adapters, "--out", tmp_path / "s"]
    succeed(*arguments, "--method", "other", "--rank", 0)
    assert Store.open(tmp_path / "s").manifest.settings["rank"] == 0
    succeed(*arguments, "--method", "other")
    assert Store.open(tmp_path / "s").manifest.settings["rank"] == 3
    assert "rank is 5" in fail(*arguments, "--method", "other", "--rank", 5, code=2)
    assert "rank is 0" in fail(*arguments, "--rank", 0, code=2)


def test_with_a_target_what_is_not_chosen_counts(tmp_path, adapters, monkeypatch):
    """Iterations and scope reach every candidate that has them, seed and dtype all of them."""
    seen = []

    def spied(collection, out, settings, **options):
        seen.append(settings)
        return compress(collection, out, settings, **options)

    monkeypatch.setattr("vllm_jd.compressor.choose.targets.compress", spied)
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._RANKS", (1,))
    monkeypatch.setattr("vllm_jd.compressor.choose.plan._DIAGONAL_RANKS", ())
    arguments = ["compress", adapters, "--out", tmp_path / "s", "--target-error", 1]
    arguments += ["--store-dtype", "float32", "--seed", 5]
    given = ["--method", "jd-full", "--iterations", 3]
    succeed(*arguments, *given)
    assert seen[-1] == Settings(
        rank=1,
        iterations=3,
        seed=5,
        store_dtype="float32",
    )
    succeed(*arguments, "--method", "svd")
    assert seen[-1] == Settings("svd", rank=1, seed=5, store_dtype="float32")
    succeed(*arguments, "--method", "none", "--max-adapter-error", 0.5)
    common = {"seed": 5, "store_dtype": "float32", "max_adapter_error": 0.5}
    assert seen[-1] == Settings("none", **common)
