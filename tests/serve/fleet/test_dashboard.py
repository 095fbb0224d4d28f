"""`/dashboard`: looked at in a headless Chromium, with the server's own HTTP behind it."""

import re
import shutil
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

pytest.importorskip("vllm")

import uvicorn
from prometheus_client import make_asgi_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from tests.serve.fleet.browser import browser
from tests.serve.fleet.conftest import application, serving
from vllm_jd.compressor.change.progress import recording
from vllm_jd.plugin.api.metrics import count_requests
from vllm_jd.serve.fleet import observed
from vllm_jd.store.blend import of_mapping
from vllm_jd.store.fleet import blended, change_fleet, uploaded

EVIL = "<img src=x onerror=alert(1)>"


@contextmanager
def listening(path, key=None):
    """(address, engine, stop) of a server that browsers reach."""
    app, engine, _ = application(path, max_blend=8)
    app.mount("/metrics", make_asgi_app())
    if key:
        app.add_middleware(AuthenticationMiddleware, tokens=[key])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
        assert thread.is_alive()

    def stop():
        server.should_exit = server.force_exit = True
        thread.join(20)

    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine, stop
    finally:
        stop()


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture
def open_page(chromium, monkeypatch):
    """Open a dashboard; afterwards nothing may have gone wrong in it, and nothing been fetched from
    elsewhere."""
    monkeypatch.setattr(observed, "_EVERY", 0.1)
    pages, faults, fetched = [], [], []

    def open_page(url, **options):
        page = chromium.new_page(viewport={"width": 1280, "height": 1000}, **options)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(f"{url}/dashboard")
        pages.append((page, url))
        return page

    yield open_page
    for page, _ in pages:
        page.close()
    assert faults == []
    urls = tuple(f"{url}/" for _, url in pages)
    assert [url for url in fetched if not url.startswith((*urls, "data:"))] == []


def text(page, selector):
    return page.inner_text(selector)


def wait(page, selector, said):
    """Until an element says something (a regular expression)."""
    page.wait_for_function(
        "([selector, said]) => new RegExp(said).test(document.querySelector(selector).innerText)",
        arg=[selector, said],
        timeout=10_000,
    )


def first_names(page):
    return page.locator("#rows td:first-child").all_inner_texts()


def test_the_page_is_one_file_that_needs_nothing_else(path):
    with serving(path) as server:
        reply = server.http.get("/dashboard")
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert not re.findall(r"https?://|\bimport\b|@import|url\(", reply.text)
        assert re.findall(r'(?:src|href)="([^"]*)"', reply.text) == ["data:,"]
        assert "/dashboard" not in server.http.get("/openapi.json").json()["paths"]


@pytest.mark.slow
def test_it_shows_the_fleet_with_search_and_pages(path, folders, open_page):
    names = {
        f"customer-{i:05d}": of_mapping({folders[0].name: (1 + i) / 1e5}) for i in range(10_000)
    }
    entries = {name: blended(blend, pinned=False) for name, blend in names.items()}
    entries[EVIL] = entries["customer-00000"].model_copy(update={"pinned": True})
    change_fleet(path, lambda fleet: fleet.update(entries))
    with listening(path) as (url, engine, _):
        engine.told = {folders[0].name: (True, True, 7, time.time())}
        begun = time.perf_counter()
        page = open_page(url)
        wait(page, "#count", "of 10,004")
        assert time.perf_counter() - begun < 5, "ten thousand adapters take no longer than few"
        assert text(page, "#adapters") == "10,004" and text(page, "#live").startswith("as of")
        assert text(page, "#model").startswith("org/tiny-llama · jd-full")
        shown = first_names(page)
        assert shown[:3] == [folder.name for folder in folders[:3]] and len(shown) == 50
        cells = page.locator("#rows tr").first.locator("td").all_inner_texts()
        assert cells[1] == "compressed" and (cells[5], cells[7]) == ("yes", "7")
        assert EVIL in shown, "as text"
        page.click("#next")
        wait(page, "#count", "51–100 of 10,004")
        second = first_names(page)
        assert len(second) == 50 and not set(second) & set(shown)
        page.click("#previous")
        wait(page, "#count", "^1–50 of")
        assert first_names(page) == shown
        begun = time.perf_counter()
        page.fill("#search", "OMER-0123")
        wait(page, "#count", "1–10 of 10$")
        assert time.perf_counter() - begun < 2
        assert first_names(page) == [f"customer-0123{i}" for i in range(10)]
        page.fill("#search", "nobody")
        wait(page, "#empty", "No adapter's name contains “nobody”")
        assert page.locator("#rows tr").count() == 0


@pytest.mark.slow
def test_it_shows_memory_generations_uploads_and_load(path, folders, open_page):
    change_fleet(path, lambda fleet: fleet.update({"up": uploaded("0" * 64, pinned=False)}))
    with listening(path) as (url, engine, _), recording(path, refit=False) as recorder:
        recorder.on_progress("projecting", 30, 120)
        engine.measures |= {"draining": [(1, 3), (None, 1)], "waiting": 2, "whole": False}
        page = open_page(url)
        wait(page, "#memory-note", "2 requests wait for slots")
        assert "4 of 6 bases, 3 of 3 cores" in text(page, "#memory-note")
        assert page.locator("#slots .bar").count() == 4
        widths = page.eval_on_selector_all("#slots .bar i", "all => all.map(i => i.style.width)")
        assert widths[0].startswith("16.66") and widths[1].startswith("33.33"), "1 and 2 of 6"
        assert "generation 1 (3 requests), an upload (1 request)" in text(page, "#generations")
        assert re.search("projecting 30 of 120", text(page, "#recompression"))
        assert page.eval_on_selector("#progress i", "i => i.style.width") == "25%"
        assert "1 upload" in text(page, "#recompression")
        assert re.search("compressed 3", text(page, "#states-key"))
        assert page.locator("#clusters i").count() >= 1
        count_requests(engine)
        for _ in range(40):
            engine.generate("p", "s", "r")
        wait(page, "#requests", "^[1-9]")
        wait(page, "#load-note", "at most [1-9]")
        page.wait_for_selector('#line-requests path[d*="L"]', state="attached", timeout=10_000)


@pytest.mark.slow
def test_it_asks_for_a_key_where_the_server_does(path, open_page):
    with listening(path, key="secret") as (url, _, _):
        assert httpx.get(f"{url}/v1/store").status_code == 401
        page = open_page(url)
        page.wait_for_selector("#ask:not([hidden])")
        assert page.locator("#rows tr").count() == 0
        page.fill("#key", "wrong")
        page.click("#ask button")
        wait(page, "#refused", "not known here")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        wait(page, "#count", "1–3 of 3")
        assert page.is_hidden("#ask") and page.is_hidden("#banner")
        assert "secret" not in page.url and page.input_value("#key") == ""


@pytest.mark.slow
def test_it_says_that_the_server_is_gone_and_keeps_what_it_knew(path, open_page):
    with listening(path) as (url, _, stop):
        page = open_page(url, color_scheme="dark")
        wait(page, "#count", "1–3 of 3")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        stop()
        wait(page, "#banner", "does not answer")
        assert page.locator("#rows tr").count() == 3


@pytest.mark.slow
def test_an_empty_fleet_says_how_to_begin(small_store, tmp_path, open_page):
    path = shutil.copytree(small_store.path, tmp_path / "empty")
    with listening(path) as (url, _, _):
        for name in small_store.names:
            assert httpx.delete(f"{url}/v1/adapters/{name}").status_code == 200
        page = open_page(url)
        wait(page, "#empty", "no adapters yet")
        assert text(page, "#adapters") == "0"
