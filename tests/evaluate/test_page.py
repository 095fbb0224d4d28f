"""The report page of an evaluation: its figures, its texts, and that it is one page alone."""

import base64
import json
import warnings
from io import BytesIO

import numpy as np
import pytest

from tests.cli.test_cli import succeed
from tests.compressor.report.test_report import Page
from tests.evaluate.conftest import NAMES, RUINED, items, write_items
from tests.serve.fleet.browser import browser
from vllm_jd.compressor.report.figures import kept_by_adapter, png

HOSTILE = "<script>alert(1)</script> & cat"


@pytest.fixture
def made(collection, tokens, engine, tmp_path):
    """(Folder, results, page) of an evaluation, one of whose prompts is HTML."""
    store, adapters, data = collection
    lines = items(RUINED, 5)
    lines[0]["prompt"] = f"{HOSTILE} says :"
    write_items(data / f"{RUINED}.jsonl", lines)
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib: a layout that failed, a missing glyph
        succeed(
            *("evaluate", store, "--adapters", adapters, "--data", data),
            *("--base-model", tokens, "--out", out),
        )
    found = json.loads((out / "results.json").read_text())
    return out, found, Page((out / "report.html").read_text(encoding="utf-8"))


def test_numbers_and_answers_are_those_of_the_results(made):
    out, found, page = made
    assert found["headline"] in page.text
    assert all(sentence.replace("`", "") in page.text for sentence in found["advice"])
    rows = page.tables["All adapters, the one that lost most first"][1:]
    order = sorted(found["adapters"], key=lambda each: -each["loss_added"])
    assert [row[0] for row in rows] == [each["name"] for each in order]
    for row, each in zip(rows, order, strict=True):
        assert row[1] == str(each["items"])
        assert float(row[2]) == pytest.approx(each["loss_added"], abs=6e-5)
        assert float(row[4]) == pytest.approx(each["rouge_l_kept"], abs=6e-3)
        assert float(row[6].rstrip("%")) == pytest.approx(100 * each["store"]["agreement"], abs=0.6)
    ways = {row[0]: row[1:] for row in page.tables["What was answered"][1:]}
    means = {way: each["mean"] for way, each in found["ways"].items()}
    for name, metric in (("Rouge-L", "rouge_l"), ("exact match", "exact")):
        for cell, way in zip(ways[name], ("base", "lora", "store"), strict=True):
            assert float(cell) == pytest.approx(means[way][metric][0], abs=6e-4)
    # Every item and answer is in the results, and some of the worst adapter's on the page.
    assert len(found["answers"]) == found["items"] == 4 + 5 + 5
    (hostile,) = [each for each in found["answers"] if HOSTILE in each["prompt"]]
    assert {"said", "rouge_l", "loss"} <= set(hostile["store"])
    text = (out / "report.html").read_text(encoding="utf-8")
    worst = text[text.index('<section class="items">') :]
    assert f"<caption>{RUINED}</caption>" in worst
    shown = [each for each in found["answers"] if each["adapter"] == RUINED]
    assert sum(each["store"]["said"] in worst for each in shown) >= 4


def test_the_page_is_alone_and_runs_nothing(made):
    out, _, page = made
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "script" not in page.tags and "<script" not in text
    assert not [v for _, key, v in page.attributes if key in ("src", "href") and "data:" not in v]
    (image,) = page.images
    assert base64.b64decode(image.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"


def test_a_browser_shows_all_of_it(made):
    out, _, _ = made
    with browser() as chromium:
        for width in (1280, 400):
            page = chromium.new_page(viewport={"width": width, "height": 900})
            errors = []
            page.on("console", lambda said, errors=errors: errors.append(said.text))
            page.goto((out / "report.html").as_uri())
            assert HOSTILE in page.inner_text("section.items")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width and errors == []
            page.close()


@pytest.mark.parametrize("name", [*NAMES[:1], "x" * 90, "$a_b$", "名"])
def test_odd_figures(name):
    """One adapter, names that are long or look like something else, nothing to keep."""
    from matplotlib.image import imread

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept, rise in ((0.9, 0.2), (1.0, 0.0), (2.0, -3.0)):
            both = np.array([kept, np.nan]), np.array([rise, 9.0])
            figure = kept_by_adapter(*both, [name, "b"], [0])
            assert imread(BytesIO(png(figure))).std() > 0.01
