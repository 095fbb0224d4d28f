"""What `scripts/models_table.py` makes of a run of the tests; the tests themselves take minutes."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "models_table.py"
NAME = "test_a_family_says_what_its_export_says"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(script, tmp_path):
    """Of a run in which every family has passed, but for one that vLLM refuses."""
    pytest.importorskip("vllm")
    from tests.models.families import FAMILIES

    def write(last=""):
        cases = [f'<testcase name="{NAME}[{family.name}-lossless-1]"/>' for family in FAMILIES]
        cases[0] = f'<testcase name="{NAME}[{FAMILIES[0].name}-lossy-2]"/>'
        why = '<skipped message="vLLM: no LoRA yet"/>'
        cases[1] = f'<testcase name="{NAME}[{FAMILIES[1].name}-lossless-1]">{why}</testcase>'
        file = tmp_path / "result.xml"
        file.write_text(
            '<testsuites><testsuite name="pytest" timestamp="2026-01-31T23:30:00+00:00">'
            + "".join(cases)
            + last
            + "</testsuite></testsuites>"
        )
        return file

    return write


def test_the_page_says_what_the_run_said_when_and_with_what(script, report, tmp_path, monkeypatch):
    from tests.models.families import FAMILIES

    page, readme = tmp_path / "models.md", tmp_path / "README.md"
    page.write_text("# Models\n\n| old |\n| --- |\n\nRun on 1 May.\n\nRun on and on.\n")
    readme.write_text("| base models | old |\n| other | row |\n")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "README", readme)
    try:
        versions = {name: version(name) for name in script._PACKAGES}
    except PackageNotFoundError as error:
        pytest.skip(str(error))
    assert script.main([str(report())]) == 0
    head, _, *lines = page.read_text().split("\n\n")[1].splitlines()
    assert head.startswith("| family | class") and len(lines) == len(FAMILIES)
    assert lines[0].endswith("| yes; tensor parallel 2 |")
    assert lines[1].endswith("| no: vLLM: no LoRA yet |")
    run, rest = page.read_text().split("\n\n")[2:]
    assert run.startswith("Run on 2026-01-31 on CPU, with ") and rest == "Run on and on.\n"
    assert all(f"{name} {number}" in run for name, number in versions.items())
    row, other = readme.read_text().splitlines()
    assert (
        FAMILIES[0].name in row and f"{FAMILIES[1].name}," not in row and other == "| other | row |"
    )


def test_nothing_is_written_where_a_test_has_failed(script, report, tmp_path, monkeypatch, capsys):
    page = tmp_path / "models.md"
    page.write_text("| old |\n\nRun on 1 May.\n")
    monkeypatch.setattr(script, "PAGE", page)
    failed = f'<testcase name="{NAME}[Llama 3-lossless-1]"><failure/></testcase>'
    assert script.main([str(report(failed))]) == 1
    assert "has failed" in capsys.readouterr().err
    assert page.read_text() == "| old |\n\nRun on 1 May.\n"
