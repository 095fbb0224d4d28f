"""A Chromium to look at pages with: one that is installed, or else the one in npm's package
`@sparticuz/chromium`, kept in the user's cache folder."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_PACKAGE = "@sparticuz/chromium@147"
_UNPACK = """
import chromium from '@sparticuz/chromium';
console.log(await chromium.executablePath());
"""


def chromium():
    """Its path; skips the test where there is none to be had."""
    for name in (os.environ.get("CHROMIUM"), *_NAMES):
        if name and (found := shutil.which(name)):
            return found
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-jd/chromium"
    binary = folder / "tmp" / "chromium"
    if not binary.exists():
        if not shutil.which("npm"):
            pytest.skip("no Chromium here, and no npm to fetch one with")
        _fetch(folder)
    return str(binary)


def _fetch(folder):
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / "unpack.mjs").write_text(_UNPACK)
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    for command in (
        ["npm", "install", "--prefix", str(folder), "--no-save", "--no-audit", _PACKAGE],
        ["node", str(folder / "unpack.mjs")],
    ):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            pytest.skip(f"no Chromium here, and {command[0]} fetches none in 5 minutes")
        if done.returncode:
            pytest.skip(f"no Chromium here, and {command[0]} fetches none: {done.stderr[-300:]!r}")


@contextmanager
def browser():
    """A headless one, as Playwright has it."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = chromium()
    with playwright.sync_playwright() as control:
        try:
            # No sandbox: its page is ours, and root may not have one.
            found = control.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            if "shared libraries" in str(error):
                pytest.skip(f"{path} does not start: this machine lacks libraries of it")
            raise
        yield found
        found.close()
