"""What README and docs/ point to is there, and the commands that they show exist."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from vllm_jd.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchor(heading):
    """As GitHub makes it of a heading."""
    text = re.sub(r"`|\[(.+?)\]\(.+?\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in found:
        if link.startswith(("http://", "https://")):
            continue
        path, _, part = unquote(link).partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if part:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name}" not in readme] == []


def shown():
    """Every `vllm-jd …` of a code block: (page, words)."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                for command in re.split(r"\s·\s", line.split(" #")[0]):
                    if command.startswith("vllm-jd "):
                        yield page.name, command.split()[1:]


def test_commands_that_are_shown_exist():
    commands = typer.main.get_command(app).commands
    seen = set()
    for page, (name, *words) in shown():
        assert name in commands, f"{page}: vllm-jd {name}"
        command = commands[name]
        if hasattr(command, "commands"):  # a group of them
            assert words[0] in command.commands, f"{page}: vllm-jd {name} {words[0]}"
            command = command.commands[words[0]]
        options = command.get_params(typer.Context(command))  # the methods' ones too
        known = {option for parameter in options for option in parameter.opts}
        for word in words:
            flag = word.strip("[]").split("=")[0]
            if flag.startswith("--"):
                assert flag in known, f"{page}: vllm-jd {name} {flag}"
        seen.add(name)
    assert seen == set(commands) - {"demo"}  # none is left out
