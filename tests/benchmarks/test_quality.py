"""The quality study without its engine: which cells, what is asked anew, agreement, tables, and
what predicts what."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import spearmanr
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import baselines
import quality
import quality_cells
import quality_errors
import quality_predict
import quality_results
import rebuilt
import tasks
from lora_hub import SHIPPED

from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.change.incremental import add
from vllm_jd.compressor.report.summary import sizes
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store

NAMES = [f"task{i}_x" for i in (3, 5, 8, 13, 21, 34)]


def values(rng, shift=0.0, items=4):
    """Series of one adapter's items, as the files have them."""
    return {
        "rouge_l": list(np.round(np.clip(rng.random(items) - shift, 0, 1), 4)),
        "rouge_1": list(np.round(np.clip(rng.random(items) - shift, 0, 1), 4)),
        "exact": list(rng.integers(0, 2, items).astype(float)),
        "loss": list(np.round(1 + rng.random(items) + shift, 4)),
        "said": ["same", "same", f"other{shift}", f"more{shift}"][:items],
    }


def write_results(folder, shifts=(0.1, 0.3, 0.2), seed=0):
    """Results of three cells: the more shift, the larger their errors and what they lose."""
    rng = np.random.default_rng(seed)
    of = {"items": 4, "asked": len(NAMES), "seed": 0, "sources": "s"}
    plain = {name: values(rng) for name in NAMES}
    for who in ("base", "lora"):
        answers = plain if who == "lora" else {name: values(rng, 0.5) for name in NAMES}
        quality.write(folder / f"{who}.json", {"of": of, "answers": answers})
    methods = ("svd", "jd-full", "jd-diag")
    for method, shift in zip(methods, shifts, strict=True):
        cell = quality_cells.Cell(8, Settings(method=method, rank=1))
        each = {
            name: values(rng, shift * (1 + i / 9)) | {"loss": plain[name]["loss"]}
            for i, name in enumerate(NAMES)
        }
        for i, one in enumerate(each.values()):
            one["loss"] = [loss + shift * (1 + i / 9) for loss in one["loss"]]
            one["said"][1] = "same" if i > 10 * shift else "another"
        errors = {
            name: dict.fromkeys(quality_errors.NAMES, shift * (1 + i / 9))
            for i, name in enumerate(NAMES)
        }
        head = {
            "of": of,
            "n": 8,
            "label": cell.label,
            "settings": cell.settings.as_dict(),
            "bytes": int(1e6 * shift),
            "adapter_bytes": int(1e7),
            "saved": 1 - shift,
            "errors": errors,
        }
        quality.write(folder / cell.file, head | {"answers": each})
    return folder


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_cells_have_names_of_their_own_and_fit_their_collections(n):
    small, full = (quality_cells.cells(suite, n) for suite in quality_cells.SUITES)
    assert {cell.file for cell in small} < {cell.file for cell in full}
    assert len({cell.file for cell in full}) == len(full) > 25 and 10 <= len(small) <= 14
    for cell in full:
        assert cell.settings.clusters <= n
        assert not cell.settings.has("matrices") or cell.settings.matrices <= n
    assert {"svd r1 int4", f"jd-full r{n // 2 + 7 + (n // 2 + 7) % 2}"} <= {c.label for c in small}
    with pytest.raises(ValueError, match="small, full"):
        quality_cells.cells("medium", n)


def test_the_room_has_place_for_every_cell(tmp_path, write_adapters):
    pytest.importorskip("vllm")
    from vllm_jd.plugin.engine.tables import Tables

    collection = read_adapters(write_adapters(tmp_path, 3, ranks=(2, 4)))
    chosen = [cell.settings for cell in quality_cells.cells("full", 8)]
    most = max(each.rank for each in chosen)
    clusters = min(3, max(each.clusters for each in chosen))  # no more than adapters
    with compress(collection, tmp_path / "room", quality.room(chosen)) as store:
        assert all(info.core_size == most**2 for info in store.manifest.modules)
        for side in ("u", "v"):
            ranks = sorted(rank for _, rank in Tables(store).kinds(side))
            assert ranks == [2, 2, 4, *[most] * clusters]


@pytest.fixture
def study(tmp_path, write_adapters, monkeypatch):
    """A study of four adapters, whose engine is a function that answers at once."""
    folders = write_adapters(tmp_path / "adapters", 4, kind="real")
    data = tmp_path / "data"
    data.mkdir()
    for folder in folders:
        (data / f"{folder.name}.jsonl").write_text("{}\n")
    monkeypatch.setattr(quality, "ensure_smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(
        quality, "read_base_model", lambda path: type("Base", (), {"name": "org/tiny-llama"})
    )
    jobs = []

    def engine(script, job):
        jobs.append(job)
        rng = np.random.default_rng(0)
        for who, names in job["plain"].items():
            found = {"answers": {name: values(rng) for name in names}}
            quality.add_plain(Path(job["out"]) / f"{who}.json", found, job["of"])
        for cell in job["cells"]:
            answers = {name: values(rng) for name in job["tasks"]}
            quality.write(
                Path(cell["file"]), {"of": job["of"]} | cell["head"] | {"answers": answers}
            )
        return {}

    monkeypatch.setattr(quality, "in_process", engine)

    def make(count=4, items=3, asked=3):
        of = {"items": items, "seed": 0, "dtype": "float32"}
        return quality.Study(folders[:count], data, tmp_path / "work", tmp_path / "out", asked, of)

    return make, jobs


def test_only_what_is_missing_is_asked(study):
    make, jobs = study
    cells = [
        quality_cells.Cell(4, settings)
        for settings in (
            Settings(method="svd", rank=1),
            Settings(rank=2),
            Settings(method="ties"),
        )
    ]
    make().ask(cells[:2])
    assert [Path(cell["file"]).name for cell in jobs[0]["cells"]] == [
        "svd-r1.json",
        "jd-full-r2.json",
    ]
    asked = ["adapter-000", "adapter-001", "adapter-002"]
    assert jobs[0]["plain"] == {"base": asked, "lora": asked}
    make().ask(cells[:2])
    assert len(jobs) == 1
    make().ask(cells)
    assert [Path(cell["file"]).name for cell in jobs[1]["cells"]] == ["ties.json"]
    assert jobs[1]["plain"] == {"base": [], "lora": []}
    found = quality_results.load(make().out)
    assert {each.label for each in found} == {"base", "LoRA", "svd r1", "ties", "jd-full r2"}
    svd = next(each for each in found if each.label == "svd r1")
    assert 0 < svd.figures("error").mean() < 1 and 0 < svd.raw["saved"] < 1


def test_share_is_stored_as_it_rebuilds_the_adapters_and_counted_as_it_stores_them(study):
    pytest.importorskip("lorashare")
    make, jobs = study
    cell = quality_cells.Cell(4, Settings(method="none", store_dtype="float32"), share=2)
    made = make()
    made.ask([cell])
    share = rebuilt.Share(made.collection, 2)
    (result,) = (each.raw for each in quality_results.load(made.out) if each.label == "share r2")
    assert result["bytes"] == 2 * share.fit.parameters
    with Store.open(jobs[0]["cells"][0]["store"]) as store:
        for i, name in enumerate(made.collection.names):
            for module, (b, a) in store.factors(name).items():
                own_a, own_b = share.pairs(module)[i]
                torch.testing.assert_close(b @ a, own_b @ own_a)
    expected = baselines.report(
        share.fit, {m: rebuilt.pairs_of(made.collection.factors(m)) for m in made.collection.shapes}
    )
    errors = [each["error"] for each in result["errors"].values()]
    assert sum(errors) / len(errors) == pytest.approx(expected.error, rel=1e-3)


def test_results_of_something_else_are_not_mixed_in(study):
    make, jobs = study
    cells = [quality_cells.Cell(4, Settings(method="svd", rank=1))]
    make().ask(cells)
    with pytest.raises(quality.Mistake, match="choose another --out"):
        make(items=2).ask(cells)
    with pytest.raises(quality.Mistake, match="choose another --out"):
        make(count=3).ask(cells)
    assert len(jobs) == 1


def test_a_cell_alone_is_kept_beside(study):
    make, jobs = study
    cell = quality_cells.Cell(4, Settings(method="svd", rank=1))
    make().ask([cell])
    make().ask_alone(cell)
    assert jobs[1]["room"] == jobs[1]["cells"][0]["store"] and jobs[1]["plain"] == {}
    assert Path(jobs[1]["cells"][0]["file"]).name == "svd-r1.alone.json"
    assert [result.label for result in quality_results.load(make().out)] == [
        "base",
        "LoRA",
        "svd r1",
    ]


def test_stores_with_trained_cores_are_counted_as_the_adapters_they_stand_for(study, tmp_path):
    """What `cores_together.py` leaves: each adapter came again, of another rank than it had."""
    make, jobs = study
    made = make(asked=4)
    settings = Settings(rank=2, store_dtype="int8")
    path = tmp_path / "trained"
    with compress(made.collection, path, settings) as store:
        plain = sizes(store)
        names = store.names
        exported = [export_adapter(store, name, tmp_path / "made" / name) for name in names]
    again = read_adapters(exported, base_model="org/tiny-llama", same_base=True)
    with add(path, again, replace=True) as store:
        assert sizes(store).adapter_parameters != plain.adapter_parameters
    asking = {"data": made.data, "work": made.work.parent, "out": made.out, "items": 3}
    adapters = [tmp_path / "adapters"]
    quality.ask([path], adapters=adapters, dtype="float32", seed=0, **asking)
    assert jobs[0]["plain"] == {"lora": names} and len(jobs[0]["cells"]) == 1
    quality.ask([path], adapters=adapters, dtype="float32", seed=0, **asking)
    assert len(jobs) == 1
    lora, trained = quality_results.load(made.out)
    assert (lora.label, trained.label) == ("LoRA", "jd-full r2 int8 trained")
    assert trained.raw["adapter_bytes"] == plain.adapter_bytes
    assert trained.raw["saved"] == pytest.approx(plain.parameter_saved_ratio, abs=1e-5)
    assert trained.raw["trained"] and quality_predict.candidates([lora, trained]) == []
    with pytest.raises(typer.Exit):
        quality.ask([path], adapters=[SHIPPED], dtype="float32", seed=0, **asking)


def test_series_of_scores():
    found = quality.series(
        [tasks.Score(0.123456, 0.5, 1.0, 2.0, "yes"), tasks.Score(0, 0, 0, 1.5, "no")]
    )
    assert found["rouge_l"] == [0.1235, 0] and found["loss"] == [2.0, 1.5]
    assert len(set(found["said"])) == 2 and "yes" not in json.dumps(found)


def test_means_shares_and_agreement(tmp_path):
    _, lora, *cells = quality_results.load(write_results(tmp_path))
    assert [cell.label for cell in cells] == ["svd r1", "jd-diag r1", "jd-full r1"]
    assert lora.kept("rouge_l").value == 1 and lora.added("loss").value == 0
    assert lora.mean("agreement").value == 1
    for cell in cells:
        shift = cell.raw["errors"][NAMES[0]]["error"]
        same = np.mean([0.5 if i > 10 * shift else 0.25 for i in range(len(NAMES))])
        assert cell.mean("agreement").value == pytest.approx(same)
        raw = json.loads(
            (
                tmp_path
                / quality_cells.Cell(
                    8, Settings(method=cell.raw["settings"]["method"], rank=1)
                ).file
            ).read_text()
        )
        mean = [np.mean(raw["answers"][name]["rouge_l"]) for name in NAMES]
        plain = json.loads((tmp_path / "lora.json").read_text())["answers"]
        theirs = [np.mean(plain[name]["rouge_l"]) for name in NAMES]
        assert cell.kept("rouge_l").value == pytest.approx(np.mean(mean) / np.mean(theirs))
        share, name = cell.worst_kept("rouge_l")
        assert share == pytest.approx(min(np.array(mean) / theirs))
        assert name == NAMES[int((np.array(mean) / theirs).argmin())]
        added, worst = cell.worst_added()
        shift = cell.raw["errors"][NAMES[0]]["error"]
        assert worst == NAMES[-1] and added == pytest.approx(shift * (1 + 5 / 9), rel=1e-3)
    with pytest.raises(ValueError, match=r"found no lora\.json"):
        quality_results.load(tmp_path / "elsewhere")


def test_tables_and_figures(tmp_path):
    write_results(tmp_path)
    done = CliRunner().invoke(quality.app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "tables.md").read_text()
    lines = text.split("\n")
    start = lines.index("## Loss of the target (as the paper's table 12)")
    head, _, *rows = (line.strip("| ").split(" | ") for line in lines[start + 2 : start + 9])
    assert head == ["n", "way", "3", "5", "8", "13", "21", "34", "mean"]
    by = {row[0] if row[0] in ("base", "LoRA") else row[1]: row for row in rows if len(row) > 3}
    result = next(r for r in quality_results.load(tmp_path) if r.label == "svd r1")
    assert by["svd r1"][2:8] == [f"{value:.2f}" for value in result.each("loss")]
    for number in range(7, 15):
        assert f"(as the paper's table {number})" in text
    errors = text[text.index("table 14") :]
    assert "| LoRA |" not in errors and "| base |" not in errors
    for figure in ("figure2.png", "figure3.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_what_predicts_the_loss(tmp_path):
    cells = [r for r in quality_results.load(write_results(tmp_path)) if r.n]
    found = quality_predict.study(cells, splits=4, seed=1)
    # The loss rises by exactly what the errors are.
    for figure in quality_errors.NAMES:
        each = found["ranks"]["loss"][figure]
        assert {each[over]["rest"]["low"] for over in quality_predict.OVER} == {1}
        assert each["adapters"] == {"mean": 1, "low": 1, "high": 1}
        assert found["calibration"][figure]["mean"] < found["calibration"]["nothing"]["mean"]
    chosen = set(NAMES[:4])
    x, y = [], []
    for cell in cells:
        for i, name in enumerate(cell.names):
            if name in chosen:
                x.append(cell.raw["errors"][name]["error"])
                y.append(np.mean(cell.lora["rouge_l"][i]) - np.mean(cell.values["rouge_l"][i]))
    pairs = quality_predict.correlations(cells, "rouge_l", "error", chosen)["pairs"]
    assert pairs == pytest.approx(spearmanr(x, y).statistic)
    assert "| error | " in quality_predict.markdown(found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--n", "64"], "expected at least 64"),
        (["--suite", "medium"], "expected one of small, full"),
        ([], "found no adapter-000.jsonl"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, write_adapters, arguments, expected):
    write_adapters(tmp_path / "adapters", 8)
    paths = [str(tmp_path / name) for name in ("data", "work", "out", "adapters")]
    options = [
        x
        for pair in zip(("--data", "--work", "--out", "--adapters"), paths, strict=True)
        for x in pair
    ]
    done = CliRunner().invoke(quality.app, ["run", *options, *arguments])
    assert done.exit_code == 1 and expected in done.output and "Traceback" not in done.output
