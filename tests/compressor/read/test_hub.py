"""Adapters of the Hub: the real huggingface_hub client against a server that imitates the Hub."""

import hashlib
import json
import logging
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.adapters import read_adapters

pytest.importorskip("huggingface_hub")

from vllm_jd.compressor.read.hub import Source, _import_hub, fetch, is_hub_source

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SLUG = "acme/all-adapters-0123456789abcdef01234567"


class Hub:
    """What the imitated Hub holds, and what it was asked."""

    def __init__(self):
        self.trees: dict[str, dict[str, dict[str, bytes]]] = {}  # repository → commit → files
        self.refs: dict[str, dict[str, str]] = {}  # repository → branch or tag → commit
        self.collections: dict[str, list[tuple[str, str]]] = {}  # slug → (id, type)
        self.gated: set[str] = set()
        self.private: dict[str, str] = {}  # repository → the token that opens it
        self.cut: set[str] = set()  # files whose transfer breaks off
        self.limited = 0  # answers 429 to so many calls of the API
        self.requests: list[tuple[str, str]] = []  # method, path
        self.ranges: list[str] = []
        self.url = ""

    def add(self, repository, files, branch="main"):
        """Push a commit; returns its hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.trees.setdefault(repository, {})[digest] = files
        self.refs.setdefault(repository, {})[branch] = digest
        return digest

    def downloads(self):
        """The files that were transferred, as `repository/file`."""
        found = []
        for method, path in self.requests:
            match = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path)
            if method == "GET" and match:
                found.append(f"{match[1]}/{match[2]}")
        return sorted(found)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path.startswith("/api/") and self.hub.limited:
            self.hub.limited -= 1
            return self.answer(429, headers={"RateLimit": '"api";r=0;t=0', "Retry-After": "0"})
        if match := re.fullmatch(r"/api/collections/(.+)", path):
            return self.collection(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            return self.model(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        return self.answer(404)

    def collection(self, slug):
        if slug not in self.hub.collections:
            return self.answer(404)
        items = [
            {"_id": str(i), "id": item, "type": kind, "position": i}
            for i, (item, kind) in enumerate(self.hub.collections[slug])
        ]
        return self.json(
            {
                "slug": slug,
                "title": "All adapters",
                "owner": {"name": "acme"},
                "items": items,
                "lastUpdated": "2024-06-30T10:00:00.000Z",
                "position": 0,
                "private": False,
                "theme": "blue",
                "upvotes": 0,
            }
        )

    def commit(self, repository, revision):
        """The commit of a revision; None once the answer is an error."""
        token = self.hub.private.get(repository)
        denied = token and self.headers.get("Authorization") != f"Bearer {token}"
        if repository not in self.hub.trees or denied:
            self.answer(404, "RepoNotFound")
            return None
        commit = self.hub.refs[repository].get(revision, revision)
        if commit not in self.hub.trees[repository]:
            self.answer(404, "RevisionNotFound")
            return None
        return commit

    def model(self, repository, route, revision):
        commit = self.commit(repository, revision)
        if commit is None:
            return None
        files = self.hub.trees[repository][commit]
        if route == "tree":
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                    for name, data in files.items()
                ]
            )
        siblings = [{"rfilename": name} for name in files]
        return self.json({"id": repository, "sha": commit, "siblings": siblings})

    def file(self, repository, revision, name):
        commit = self.commit(repository, revision)
        if commit is None:
            return None
        if repository in self.hub.gated:
            return self.answer(403, "GatedRepo")
        data = self.hub.trees[repository][commit].get(name)
        if data is None:
            return self.answer(404, "EntryNotFound")
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "GET" and f"{repository}/{name}" in self.hub.cut:
            if "Range" not in self.headers:  # half of it; later attempts get nothing at all
                self.head(200, len(data), headers)
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
            self.close_connection = True
            return None
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            self.hub.ranges.append(start[0])
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(206, body=data[first:], headers=headers)
        return self.answer(200, body=data, headers=headers)

    def json(self, value):
        self.answer(200, body=json.dumps(value).encode())

    def answer(self, status, code=None, *, body=b"", headers=None):
        headers = dict(headers or {})
        if code:
            headers |= {"X-Error-Code": code, "X-Error-Message": code}
        self.head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status, length, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _blob(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that the client takes for its own."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.close = server.server_close
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # no test may reach the real one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path, write_adapter, make_factors):
    """The files of an adapter with numbers of its own: `adapter(seed, folder)`."""

    def make(seed=0, folder="", **config):
        written = write_adapter(
            tmp_path / f"written-{seed}", make_factors(1, seed=seed)[0], **config
        )
        return {
            f"{folder}/{name}".lstrip("/"): (written / name).read_bytes()
            for name in (CONFIG, WEIGHTS)
        }

    return make


@pytest.fixture
def get(tmp_path):
    """`fetch` into a cache of the test's own."""

    def get(*sources, **options):
        return fetch(list(sources), cache_dir=tmp_path / "cache", **options)

    return get


def _faults(call, *args):
    with pytest.raises(AdapterError) as caught:
        call(*args)
    return caught.value.faults


def _files(source):
    return {path: (source.folder / path).read_bytes() for path in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("org/name@v1.0", True),
        ("org/name@refs/pr/3", True),
        (SLUG, True),
        ("hf://org/name@main", True),
        ("https://huggingface.co/org/name", True),
        ("https://huggingface.co/collections/org/t-0123456789abcdef01234567", True),
        ("adapters", False),
        ("./org/name", False),
        ("../org/name", False),
        ("/org/name", False),
        ("~/adapters", False),
        ("org/name/", False),
        ("org/name/deeper", False),
        ("org/na me", False),
        ("", False),
        (".", False),
    ],
)
def test_what_is_meant_for_the_hub(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_source(text) is expected


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_source("org/name")
    assert is_hub_source("hf://org/name")
    assert is_hub_source("other/name")


@pytest.mark.parametrize("text", ["org/typo", "org/name@main", SLUG.replace("acme", "org")])
def test_what_lies_in_a_folder_that_is_here_is_a_path(hub, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert not is_hub_source(text)
    # Nor is the Hub asked for the others before the mistake is told.
    [fault] = _faults(read_adapters, ["acme/one", text])
    assert fault.startswith(f"{text}: no such folder; expected")
    assert f"hf://{text}" in fault
    assert hub.requests == []


def test_a_file_of_that_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").write_text("")
    assert is_hub_source("org/name")


def test_two_files_of_an_adapter_are_fetched_and_can_be_read(hub, adapter, get, tmp_path):
    files = adapter()
    other = {"README.md": b"# Card", "optimizer.pt": b"0" * 1000, "tokenizer.json": b"{}"}
    commit = hub.add("acme/paraphrase", files | other)
    progress = []
    [source] = get("acme/paraphrase", on_progress=lambda *seen: progress.append(seen))
    assert source == Source(source.folder, "acme/paraphrase", commit, "paraphrase")
    assert _files(source) == files
    assert hub.downloads() == [f"acme/paraphrase/{CONFIG}", f"acme/paraphrase/{WEIGHTS}"]
    assert source.folder.is_relative_to(tmp_path / "cache" / "models--acme--paraphrase")
    assert progress == [(1, 1)]
    assert len(read_adapters([source.folder]).names) == 1


def test_all_spellings_of_a_repository(hub, adapter, get):
    commit = hub.add("acme/one", adapter(1))
    spellings = ["acme/one", "hf://acme/one", "hf://models/acme/one", f"{hub.url}/acme/one"]
    spellings += [f"acme/one@{commit}", f"{hub.url}/acme/one/tree/main", f"{hub.url}/acme/one/?x=1"]
    for spelling in spellings:
        assert [source.revision for source in get(spelling)] == [commit], spelling
    # All at once they are one adapter.
    assert len(get(*spellings)) == 1


def test_urls_of_the_public_site_are_understood(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.collections[SLUG] = [("acme/one", "model")]
    for url in ("acme/one", "acme/one/tree/main", f"collections/{SLUG}", f"collections/{SLUG}?a=b"):
        assert [source.name for source in get(f"https://huggingface.co/{url}")] == ["one"], url


def test_branches_tags_and_commits(hub, adapter, get):
    old = hub.add("acme/one", adapter(1))
    hub.add("acme/one", adapter(1), branch="v1")
    new = hub.add("acme/one", adapter(2))
    slash = hub.add("acme/one", adapter(3), branch="try/this")
    asked = ["acme/one", "acme/one@v1", f"acme/one@{old}", "hf://acme/one@try%2Fthis"]
    assert [get(text)[0].revision for text in asked] == [new, old, old, slash]
    assert _files(get("acme/one@v1")[0]) == adapter(1)


def test_a_branch_that_moved_is_fetched_anew(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    get("acme/one")
    new = hub.add("acme/one", adapter(2))
    [source] = get("acme/one")
    assert source.revision == new
    assert _files(source) == adapter(2)


def test_sub_folders(hub, adapter, get):
    files = adapter(1) | adapter(2, "german") | adapter(3, "deep/er/french")
    files |= adapter(4, "checkpoint-500") | adapter(5, "german/checkpoint-7")
    hub.add("acme/many", files)
    sources = get("acme/many")
    assert [source.name for source in sources] == ["many", "many/deep/er/french", "many/german"]
    assert [_files(source) for source in sources] == [adapter(1), adapter(3), adapter(2)]
    assert not [path for path in hub.downloads() if "checkpoint" in path and WEIGHTS in path]
    # A folder by name, and a checkpoint too if that is what was asked for.
    assert [source.name for source in get("hf://acme/many/german")] == ["many/german"]
    assert [s.name for s in get(f"{hub.url}/acme/many/tree/main/checkpoint-500")] == [
        "many/checkpoint-500"
    ]


def test_checkpoints_alone_and_folders_with_odd_names(hub, adapter, get):
    hub.add("acme/steps", adapter(1, "checkpoint-10") | adapter(2, "a [b]*?"))
    sources = get("acme/steps")
    assert [source.name for source in sources] == ["steps/a [b]*?", "steps/checkpoint-10"]
    assert [_files(source) for source in sources] == [adapter(2), adapter(1)]


def test_what_llama_factory_leaves_of_pissa_gives_the_converted_adapter(hub, adapter, get):
    files = adapter(1) | adapter(2, "pissa_init") | adapter(3, "pissa_backup")
    hub.add("acme/pissa", files | adapter(4, "pissa_converted"))
    (source,) = get("acme/pissa")
    assert (source.name, _files(source)) == ("pissa", adapter(4))
    assert source.address.endswith("/pissa_converted")


def test_mlx_adapters_are_fetched_and_read(hub, get):
    """Their weights have a name of their own, and there is no peft_type."""
    lora = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    config = {"model": "org/tiny", "fine_tune_type": "lora", "lora_parameters": lora}
    a, b = torch.randn(24, 2), torch.randn(2, 8)
    tensors = {
        f"model.layers.0.self_attn.k_proj.lora_{side}": t for side, t in (("a", a), ("b", b))
    }
    files = {CONFIG: json.dumps(config).encode(), "adapters.safetensors": save(tensors)}
    hub.add("acme/mlx", files | {"0000100_adapters.safetensors": b"x"})
    (source,) = get("acme/mlx")
    assert not [path for path in hub.downloads() if "0000100" in path]
    collection = read_adapters([source.folder])
    factors = collection.factors("model.layers.0.self_attn.k_proj")
    torch.testing.assert_close(factors.a.T @ factors.b, 3 * a @ b)


def test_a_collection_with_foreign_items(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.add("other/two", adapter(2))
    hub.add("acme/base-model", {"config.json": b"{}", "model.safetensors": b"0" * 100})
    hub.add("acme/prompt", adapter(3, peft_type="PROMPT_TUNING"))
    hub.collections[SLUG] = [
        ("acme/data", "dataset"),
        ("other/two", "model"),
        ("acme/base-model", "model"),
        ("acme/demo", "space"),
        ("2407.00066", "paper"),
        ("acme/prompt", "model"),
        ("acme/one", "model"),
    ]
    progress, skipped = [], []
    sources = get(SLUG, on_progress=lambda *s: progress.append(s), on_skip=skipped.append)
    assert [source.repository for source in sources] == ["other/two", "acme/one"]
    assert [source.name for source in sources] == ["two", "one"]
    assert progress == [(4, 7), (5, 7), (6, 7), (7, 7)]
    assert len(skipped) == 5
    assert any("acme/base-model" in what and CONFIG in what for what in skipped)
    assert any("acme/data" in what and "dataset" in what for what in skipped)
    assert any("acme/prompt" in what and "PROMPT_TUNING" in what for what in skipped)
    weights = [path for path in hub.downloads() if path.endswith(".safetensors")]
    assert weights == [f"acme/one/{WEIGHTS}", f"other/two/{WEIGHTS}"]


def test_skipped_items_make_no_noise(hub, adapter, get, caplog, capfd, monkeypatch):
    hub.add("acme/one", adapter(1))
    hub.add("acme/base-model", {"config.json": b"{}"})
    hub.collections[SLUG] = [("acme/one", "model"), ("acme/base-model", "model")]
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    get(SLUG)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_collections_by_slug_and_url(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.collections[SLUG] = [("acme/one", "model")]
    for text in (SLUG, f"hf://{SLUG}", f"{hub.url}/collections/{SLUG}", f"hf://collections/{SLUG}"):
        assert [source.name for source in get(text)] == ["one"], text
    # Named as well, it is there once and counts as the user's own.
    assert len(get(SLUG, "acme/one")) == 1
    assert len(get("acme/one", SLUG)) == 1


def test_a_collection_without_adapters_is_a_fault(hub, get):
    hub.collections[SLUG] = [("acme/data", "dataset")]
    [fault] = _faults(get, SLUG)
    assert SLUG in fault
    assert "no LoRA adapter" in fault


def test_what_the_user_names_is_not_skipped(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.add("acme/base-model", {"config.json": b"{}"})
    hub.collections[SLUG] = [("acme/one", "model"), ("acme/base-model", "model")]
    assert len(get(SLUG)) == 1
    for asked in ([SLUG, "acme/base-model"], ["acme/base-model", SLUG]):
        [fault] = _faults(get, *asked)
        assert fault.startswith("acme/base-model: ")


def test_many_repositories(hub, adapter, get):
    files = adapter(1)
    names = [f"acme/task{i:03d}" for i in range(60)]
    for name in names:
        hub.add(name, files)
    hub.collections[SLUG] = [(name, "model") for name in names]
    progress = []
    sources = get(SLUG, on_progress=lambda *seen: progress.append(seen))
    assert [source.repository for source in sources] == names
    assert progress == [(i + 1, 60) for i in range(60)]
    # Two calls of the API a repository: its rate limit is the tight one.
    assert sum(path.startswith("/api/models/") for _, path in hub.requests) == 120


def test_what_is_complete_is_not_fetched_again(hub, adapter, get):
    commit = hub.add("acme/one", adapter(1))
    first = get("acme/one")
    hub.requests.clear()
    assert get("acme/one") == first
    assert hub.requests == [("GET", "/api/models/acme/one/revision/main")]
    # A commit needs no request at all.
    hub.requests.clear()
    assert get(f"acme/one@{commit}") == first
    assert hub.requests == []


def test_an_interrupted_download_goes_on(hub, adapter, get, monkeypatch):
    repositories = ["acme/one", "acme/two", "acme/three"]
    for seed, repository in enumerate(repositories):
        hub.add(repository, adapter(seed))
    hub.cut = {f"acme/two/{WEIGHTS}"}
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: None)
        [fault] = _faults(get, *repositories)
    assert "acme/two" in fault
    assert "again" in fault
    assert hub.downloads().count(f"acme/three/{WEIGHTS}") == 1

    hub.cut = set()
    hub.requests.clear()
    sources = get(*repositories)
    assert [_files(source) for source in sources] == [adapter(seed) for seed in range(3)]
    assert hub.downloads() == [f"acme/two/{WEIGHTS}"]
    assert sum(method == "HEAD" for method, _ in hub.requests) == 1


def test_a_connection_that_breaks_once_is_taken_up_where_it_stopped(hub, adapter, get, monkeypatch):
    from huggingface_hub import constants

    files = adapter(1)
    hub.add("acme/one", files)
    hub.cut = {f"acme/one/{WEIGHTS}"}
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)  # 10 MB, more than the file has
    monkeypatch.setattr(time, "sleep", lambda seconds: hub.cut.clear())
    [source] = get("acme/one")
    assert _files(source) == files
    assert hub.ranges == [f"bytes={len(files[WEIGHTS]) // 2}-"]


def test_the_rate_limit_is_waited_for(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.collections[SLUG] = [("acme/one", "model")]
    hub.limited = 3
    assert [source.name for source in get(SLUG)] == ["one"]
    assert hub.limited == 0


def test_names_that_clash(hub, adapter, get):
    for seed, repository in enumerate(["acme/same", "other/same", "acme/unique"]):
        hub.add(repository, adapter(seed))
    names = {s.repository: s.name for s in get("acme/same", "other/same", "acme/unique")}
    assert names == {
        "acme/same": "acme/same",
        "other/same": "other/same",
        "acme/unique": "unique",
    }


def test_two_commits_of_a_repository(hub, adapter, get):
    old = hub.add("acme/one", adapter(1), branch="v1")
    new = hub.add("acme/one", adapter(2))
    names = [source.name for source in get("acme/one", "acme/one@v1")]
    assert names == [f"acme/one@{new[:8]}", f"acme/one@{old[:8]}"]


def test_a_long_name_that_is_another_ones_short_name(hub, adapter, get):
    hub.add("acme/b", adapter(1))
    hub.add("other/b", adapter(2))
    hub.add("third/acme", adapter(3, "b"))
    names = [source.name for source in get("acme/b", "other/b", "third/acme")]
    assert len(set(names)) == 3
    assert names[1:] == ["other/b", "third/acme/b"]


def test_all_faults_are_told_at_once(hub, adapter, get, tmp_path):
    hub.add("acme/fine", adapter(1))
    hub.add("acme/model", {"config.json": b"{}", "model.safetensors": b"0"})
    hub.add("acme/pickled", {CONFIG: adapter(1)[CONFIG], "adapter_model.bin": b"0"})
    hub.add("acme/ia3", adapter(2, peft_type="IA3"))
    hub.add("acme/gated", adapter(3))
    hub.gated = {"acme/gated"}
    hub.add("acme/secret", adapter(4))
    hub.private = {"acme/secret": "hf_secret"}
    asked = {
        "acme/model": (CONFIG, "model.safetensors", "PEFT"),
        "acme/pickled": ("adapter_model.bin", WEIGHTS),
        "acme/ia3": ("IA3", "LORA"),
        "acme/gated": ("gated", "HF_TOKEN"),
        "acme/secret": ("no such repository", "private", "no such folder here"),
        "acme/no-such": ("no such repository", "no such folder here"),
        "hf://acme/fine@nowhere": ("no such revision",),
        "hf://datasets/acme/data": ("dataset",),
        "hf://acme/fine/nowhere": (CONFIG, "in nowhere"),
        "https://example.com/acme/fine": ("example.com", "org/name"),
        "hf://": ("org/name",),
        f"acme/gone-{'0' * 24}": ("no such collection",),
    }
    faults = _faults(get, "acme/fine", *asked)
    assert len(faults) == len(asked)
    for text, words in asked.items():
        [fault] = [fault for fault in faults if fault.startswith(f"{text}: ")]
        assert all(word in fault for word in words), fault
    # What is in order was fetched for the next time.
    assert f"acme/fine/{WEIGHTS}" in hub.downloads()


def test_faults_inside_a_collection_name_it(hub, adapter, get):
    hub.add("acme/one", adapter(1))
    hub.add("acme/gated", adapter(2))
    hub.gated = {"acme/gated"}
    hub.collections[SLUG] = [("acme/one", "model"), ("acme/gated", "model")]
    [fault] = _faults(get, SLUG)
    assert fault.startswith(f"acme/gated of {SLUG}: ")


def test_a_token_opens_a_private_repository(hub, adapter, get, monkeypatch):
    hub.add("acme/secret", adapter(1))
    hub.private = {"acme/secret": "hf_secret"}
    assert "private" in _faults(get, "acme/secret")[0]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert [source.name for source in get("acme/secret")] == ["secret"]


def test_offline(hub, adapter, get, monkeypatch):
    from huggingface_hub import constants

    commit = hub.add("acme/one", adapter(1))
    hub.add("acme/two", adapter(2))
    hub.collections[SLUG] = [("acme/one", "model")]
    cached = get("acme/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert get("acme/one") == get(f"acme/one@{commit}") == cached
    faults = _faults(get, "acme/one", "acme/two", SLUG, "acme/one@v1")
    assert len(faults) == 3
    assert all("HF_HUB_OFFLINE" in fault for fault in faults)
    assert hub.requests == []


def test_offline_with_half_an_adapter_in_the_cache(hub, adapter, get, monkeypatch):
    from huggingface_hub import constants

    hub.add("acme/one", adapter(1))
    [source] = get("acme/one")
    (source.folder / WEIGHTS).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [fault] = _faults(get, "acme/one")
    assert fault.startswith("acme/one: not complete in the cache")
    # As another program leaves it: the list of the repository's files is not there either.
    for listing in (source.folder.parents[1] / "trees").glob("*.json"):
        listing.unlink()
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    [fault] = _faults(get, "acme/one")
    assert fault.startswith("acme/one: ")
    assert "in the cache" in fault


def test_no_network(hub, adapter, get, monkeypatch):
    commit = hub.add("acme/one", adapter(1))
    cached = get("acme/one")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert get("acme/one") == get(f"acme/one@{commit}") == cached
    asked = [f"acme/new-{i}" for i in range(5)]
    faults = _faults(get, "acme/one", *asked, SLUG)
    assert len(faults) == 2  # one for the collection, one for all repositories
    assert SLUG in faults[0]
    assert "acme/new-0, acme/new-1, acme/new-2 and 2 more" in faults[1]
    for fault in faults:
        assert "connection to http://127.0.0.1:9 failed" in fault
        assert "HF_ENDPOINT" in fault
        assert "no such folder here, and the connection" in fault
    [fault] = _faults(get, "hf://acme/new-1")
    assert "folder" not in fault


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    faults = _faults(_import_hub, ["acme/typo", "hf://acme/one"])
    assert all("pip install 'vllm-jd[hub]'" in fault for fault in faults)
    assert faults[0].startswith("acme/typo: no such folder here; ")
    assert faults[1].startswith("hf://acme/one: adapters of the Hugging Face Hub")
    # Telling what a text means needs no library.
    assert is_hub_source("org/name")


def test_the_client_is_not_imported_before_it_is_needed():
    source = Path(sys.modules["vllm_jd.compressor.read.hub"].__file__).read_text(encoding="utf-8")
    assert not re.search(r"^(import|from) huggingface_hub", source, re.MULTILINE)
