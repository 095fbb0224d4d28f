"""What README and docs/models.md say of families is what `scripts/models_table.py` wrote."""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.models.families import FAMILIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts/models_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPORT = (
    '<testsuites><testsuite name="pytest" timestamp="2026-01-31T23:30:00+00:00">{cases}'
    "</testsuite></testsuites>"
)
CASE = '<testcase name="test_a_family_says_what_its_export_says[{}-{}-{}]">{}</testcase>'


def report(folder, cases):
    file = folder / "result.xml"
    file.write_text(REPORT.format(cases="".join(CASE.format(*case) for case in cases)))
    return file


def test_a_run_becomes_a_table(script, tmp_path):
    runs = [(family.name, "lossless", 1, "") for family in FAMILIES[:-1]]
    runs.append((FAMILIES[0].name, "lossy", 2, ""))
    with pytest.raises(script.Failed, match=f"{FAMILIES[-1].name} has not been run"):
        script.rows(script.results(report(tmp_path, runs)))
    skipped = '<skipped message="vLLM on CPU: it cannot"/>'
    runs.append((FAMILIES[-1].name, "lossless", 1, skipped))
    rows = script.rows(script.results(report(tmp_path, runs)))
    assert [row[0] for row in rows] == [family.name for family in FAMILIES]
    assert rows[0][3] == "yes; tensor parallel 2"
    assert rows[1][3] == "yes"
    assert rows[-1][3] == "no: vLLM on CPU: it cannot"
    row = script.readme_row(rows)
    assert FAMILIES[0].name in row and FAMILIES[-1].name not in row
    page = "a\n\n| x |\n| y |\n\nRun on 1 May.\n\nRun on and on.\n"
    new = script.with_table(page, "| z |\n", "Run on 2 May.")
    assert new == "a\n\n| z |\n\nRun on 2 May.\n\nRun on and on.\n"
    with pytest.raises(script.Failed, match="'Run on ' below the table"):
        script.with_table("Run on 1 May.\n\n| x |\n", "| z |\n", "Run on 2 May.")
    runs.append((FAMILIES[1].name, "lossy", 1, "<failure/>"))
    with pytest.raises(script.Failed, match="has failed"):
        script.results(report(tmp_path, runs))


def test_the_pages_say_when_and_with_what_or_stay(script, tmp_path, monkeypatch, capsys):
    page, readme = tmp_path / "models.md", tmp_path / "README.md"
    old = "| old |\n| --- |\n\nRun on 1 May.\n"
    page.write_text(old)
    readme.write_text("| base models | old |\n| other | row |\n")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "README", readme)
    monkeypatch.setattr(script, "_PACKAGES", ("torch", "transformers"))
    runs = [(family.name, "lossless", 1, "") for family in FAMILIES]
    failed = report(tmp_path, [*runs, (FAMILIES[1].name, "lossy", 1, "<failure/>")])
    assert script.main([str(failed)]) == 1
    assert "has failed" in capsys.readouterr().err
    assert page.read_text() == old and "| old |" in readme.read_text()
    assert script.main([str(report(tmp_path, runs))]) == 0
    table, run = page.read_text().split("\n\n")
    assert table.startswith("| family | class") and table.count("\n") == 1 + len(FAMILIES)
    installed = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    assert run.startswith(f"Run on 2026-01-31 on CPU, with {installed}, by ")
    row, other = readme.read_text().splitlines()
    assert FAMILIES[-1].name in row and other == "| other | row |"


def test_the_pages_name_the_families_that_are_tried(script):
    """Of which each that vLLM can run is served."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line.strip("|\n").split("|") for line in page.splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in cells) for cells in lines[2:]]
    assert [row[:2] for row in rows] == [(each.name, f"`{each.model}`") for each in FAMILIES]
    for row, family in zip(rows, FAMILIES, strict=True):
        assert row[3].startswith("no: " if family.cannot else "yes"), row
        assert (max(family.workers) > 1) == ("tensor parallel" in row[3])
        for layer in (*family.attention, *family.mlp, *family.experts, *family.heads):
            assert f"`{layer}`" in row[2]
    assert script.readme_row(rows) in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
