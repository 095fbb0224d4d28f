"""From where a client may have adapters loaded."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import ParallelConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.adapter_paths import AdapterPaths
from vllm_jd.plugin.api.endpoints import StoreEndpoints
from vllm_jd.plugin.api.requests import split_upload_path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A root with adapters in it, one outside of it, and links between the two."""
    for folder in ("root/mine", "root/deep/er", "outside/theirs", "root-2/near"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    (tmp_path / "root/link").symlink_to(tmp_path / "outside/theirs")
    (tmp_path / "root/alias").symlink_to(tmp_path / "root/mine")
    (tmp_path / "outside/into").symlink_to(tmp_path / "root/mine")
    (tmp_path / "root/part").mkdir()
    (tmp_path / "root/part/adapter_model.safetensors").symlink_to("/etc/hostname")
    (tmp_path / "root/blob").mkdir()  # as the Hub's cache has it
    (tmp_path / "root/blob/adapter_config.json").symlink_to("../mine/adapter_config.json")
    (tmp_path / "root/file").write_text("")
    (tmp_path / "current").symlink_to(tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "root"))
    return tmp_path


@pytest.fixture
def rule(tree):
    return AdapterPaths((str(tree / "root"),))


ALLOWED = ["{}/root/mine", "{}/root/deep/er", "{}/root/../root/mine", "root/mine", "~/mine"]
ALLOWED += ["{}/root/alias", "{}/outside/into", "{}/current/mine", "./root/blob", "{}/root/missing"]


@pytest.mark.parametrize("path", ALLOWED)
def test_folders_inside_of_a_root_are_allowed(rule, tree, path):
    assert rule.refusal(path.format(tree)) is None


FORBIDDEN = ["{}/outside/theirs", "{}/outside/missing", "/", "/etc", "{}", "..", "outside/theirs"]
FORBIDDEN += ["{}/root/../outside/theirs", "{}/root/link", "root/link", "{}/root-2/near"]
FORBIDDEN += ["~/../outside/theirs", "~root/adapter", "{}/root/part", "/not/a/real/path"]
FORBIDDEN += ["org/name", "hf://org/name", "root/missing", "vllm-jd:/store@1", "x" * 5000]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_everything_else_is_forbidden_with_what_was_found_and_expected(rule, tree, path):
    refusal = rule.refusal(path.format(tree))
    assert refusal is not None and refusal.forbidden
    assert repr(path.format(tree)) in refusal.message
    assert "found" in refusal.message
    assert f"inside of {tree / 'root'}" in refusal.message


def test_of_a_path_outside_it_is_not_told_whether_it_exists(rule, tree):
    there, missing = f"{tree}/outside/theirs", f"{tree}/outside/missing"
    answers = [rule.refusal(path).message.replace(repr(path), "") for path in (there, missing)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path", ["{}/root/mi\0ne", "{}/root/file"])
def test_what_is_no_folder_is_bad_input(rule, tree, path):
    assert not rule.refusal(path.format(tree)).forbidden


def test_names_of_the_hub_are_taken_where_that_is_allowed_but_no_other_folder(tree):
    remote = AdapterPaths((str(tree / "root"),), remote=True)
    for path in ("org/name", "root/mine", f"{tree}/root/mine"):
        assert remote.refusal(path) is None
    for path in ("outside/theirs", f"{tree}/outside/theirs", "/etc", "~/../outside/theirs"):
        assert remote.refusal(path).forbidden
    assert AdapterPaths(remote=True).refusal("org/name") is None


def test_without_roots_nothing_is_allowed_and_with_the_top_one_every_folder(tree):
    for path in ("/", f"{tree}/root/mine", "root/mine", "org/name"):
        refusal = AdapterPaths().refusal(path)
        assert refusal.forbidden and "--adapter-root" in refusal.message
    everything = AdapterPaths(("/",))
    assert everything.refusal(f"{tree}/root/link") is None
    assert everything.refusal("org/name").forbidden, "no folder, and not from the network"


def test_a_root_that_is_a_link_is_followed_when_asked(tree):
    rule = AdapterPaths((str(tree / "current"),))
    assert rule.refusal(f"{tree}/root/mine") is None
    (tree / "current").unlink()
    (tree / "current").symlink_to(tree / "outside")
    assert rule.refusal(f"{tree}/root/mine").forbidden
    assert rule.refusal(f"{tree}/current/theirs") is None


PLACES = ("s3://bucket/a", "gs://other", "hf://org", "hf://acme/one", "hf://acme/two@v1")
PLACES += ("hf://acme/three/sub",)
THERE = ["s3://bucket/a", "s3://bucket/a/", "s3://bucket/a/b/c", "gs://other/x", "hf://org/any"]
THERE += ["hf://org/any@main/sub", "hf://acme/one@v7", "hf://acme/two@v1", "hf://acme/two@v1/sub"]
THERE += ["hf://acme/three/sub", "hf://acme/three@v1/sub/deeper"]
ELSEWHERE = ["s3://bucket", "s3://bucket/ab", "s3://bucket/b", "s3://other/a", "gs://bucket/a"]
ELSEWHERE += ["s3://bucket/a/../b", "s3://bucket//a", "s3://bucket/./a", "s3://key@bucket/a"]
ELSEWHERE += ["s3://bucket/a?x=1", "s3://bucket/a#x", "s3://bucket/a\\b", "S3://bucket/a"]
ELSEWHERE += ["az://other/x", "file:///etc", "http://host/x", "memory://x", "://", "s3://", "hf://"]
ELSEWHERE += ["zip://x::s3://bucket/a", "simplecache::s3://bucket/a", "s3://bucket/a::zip://x"]
ELSEWHERE += [
    "hf://acme/two",
    "hf://acme/two@v2",
    "hf://acme/other",
    "hf://acme",
    "hf://acme/three",
]
ELSEWHERE += ["hf://datasets/org/any", "hf://collections/org/any", "hf://models/org/any"]
ELSEWHERE += ["hf://o rg/any", "hf://acme/three/subs", "hf://acme/one@v7/../two"]


@pytest.mark.parametrize("address", THERE)
def test_addresses_at_or_below_a_named_one_are_allowed(tree, address):
    assert AdapterPaths(addresses=PLACES).refusal(address) is None
    assert AdapterPaths((str(tree / "root"),)).refusal(address).forbidden


@pytest.mark.parametrize("address", ELSEWHERE)
def test_other_addresses_are_forbidden_with_what_was_expected(tree, address):
    refusal = AdapterPaths((str(tree / "root"),), addresses=PLACES).refusal(address)
    assert refusal.forbidden
    assert repr(address) in refusal.message and "found" in refusal.message
    assert f"inside of {tree / 'root'}, s3://bucket/a, gs://other" in refusal.message


def test_all_of_the_hub_is_allowed_where_that_was_asked_for_and_nothing_else():
    rule = AdapterPaths(remote=True)
    assert rule.refusal("hf://acme/two@v2/sub") is None
    for address in ("s3://bucket/a", "hf://datasets/org/any", "file:///etc"):
        assert rule.refusal(address).forbidden


PIECES = ["root", "outside", "mine", "theirs", "link", "alias", "into", "current", "..", ".", "~"]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.booleans())
def test_what_is_allowed_lies_inside_whatever_the_spelling(tmp_path_factory, pieces, absolute):
    base = tmp_path_factory.getbasetemp() / "spelling"
    if not base.exists():
        for folder in ("root/mine", "outside/theirs"):
            (base / folder).mkdir(parents=True)
        (base / "root/link").symlink_to("../outside")
        (base / "outside/into").symlink_to("../root/mine")
        (base / "current").symlink_to("root")
    path = "/".join([*([str(base)] if absolute else []), *pieces])
    refusal = AdapterPaths((str(base / "root"),)).refusal(path)
    # vLLM opens this, by the operating system's own reading of it.
    opened = Path(path.replace("~", str(Path.home()), 1) if path[0] == "~" else path)
    if refusal is None and opened.exists():
        root = (base / "root").stat()
        at = os.open(opened, os.O_RDONLY | os.O_DIRECTORY)
        inside = False
        for _ in range(40):
            here = os.fstat(at)
            inside |= (here.st_dev, here.st_ino) == (root.st_dev, root.st_ino)
            above = os.open("..", os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = above
        os.close(at)
        assert inside, path


# ---------------------------------------------------------------- in the server


class Engine:
    """As much of vLLM's EngineClient as loading an adapter needs."""

    renderer = input_processor = None

    def __init__(self):
        self.model_config = SimpleNamespace(served_model_name="base", max_model_len=64)
        self.vllm_config = SimpleNamespace(parallel_config=ParallelConfig())
        self.logger_manager = None
        self.added = []

    async def add_lora(self, request):
        self.added.append((request.lora_name, split_upload_path(request.lora_path)[1]))

    async def generate(self, *args, **kwargs):
        yield None


@pytest.fixture(scope="module")
def store(write_adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    adapters = read_adapters(write_adapters(folder / "adapters", 2))
    return compress(adapters, folder / "store", Settings(rank=2, clusters=1))


def server(store, engine, monkeypatch, modules=(), **config):
    """vLLM's own routes for loading, on its own OpenAIServingModels."""
    from vllm.entrypoints.serve.lora import api_router

    models = OpenAIServingModels(engine, [BaseModelPath("base", "/base")], lora_modules=modules)
    asyncio.run(models.init_static_loras())
    state = SimpleNamespace(openai_serving_models=models)
    args = SimpleNamespace(additional_config={"vllm_jd": {"store": str(store.path), **config}})
    for _ in range(2):  # harmless when repeated, but for the names, which are ours the second time
        asyncio.run(StoreEndpoints().init_state(engine, state, args))
        for name in store.names:
            models.lora_requests.pop(name)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = FastAPI()
    app.state.openai_serving_models = models
    api_router.attach_router(app)
    return TestClient(app)


def test_the_route_refuses_with_openais_error_object(store, tree, monkeypatch):
    engine = Engine()
    client = server(store, engine, monkeypatch, adapter_roots=[str(tree / "root")])

    def load(name, path, **options):
        body = {"lora_name": name, "lora_path": str(path), **options}
        return client.post("/v1/load_lora_adapter", json=body)

    assert load("mine", tree / "root/mine").status_code == 200
    for path in (tree / "outside/theirs", "org/name", tree / "root/link"):
        for options in ({}, {"load_inplace": True}):
            refused = load("mine" if options else "other", path, **options)
            assert refused.status_code == 403
            error = refused.json()["error"]
            assert (error["code"], error["param"]) == (403, "lora_path")
            assert error["type"] == "PermissionDeniedError"
            assert str(path) in error["message"] and str(tree / "root") in error["message"]
    bad = load("other", tree / "root/file")
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "InvalidUserInput")
    # vLLM's own checks come first.
    assert "already been loaded" in load("mine", "/etc").json()["error"]["message"]
    assert load("", "/etc").status_code == 400
    assert engine.added == [("mine", str(tree / "root/mine"))]


def test_what_the_operator_names_at_the_start_is_loaded_from_anywhere(store, tree, monkeypatch):
    engine = Engine()
    outside = str(tree / "outside/theirs")
    client = server(store, engine, monkeypatch, [LoRAModulePath("plain", outside)])
    assert engine.added == [("plain", outside)]
    again = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": outside})
    assert again.status_code == 403
    assert "--adapter-root" in again.json()["error"]["message"]


def test_vllms_routes_for_sagemaker_are_refused_too(store, tree, monkeypatch):
    from vllm.entrypoints.serve.sagemaker.api_router import sagemaker_standards_bootstrap

    engine = Engine()
    client = server(store, engine, monkeypatch, adapter_roots=[str(tree / "root")])
    client = TestClient(sagemaker_standards_bootstrap(client.app))
    refused = client.post("/adapters", json={"name": "x", "src": str(tree / "outside/theirs")})
    assert refused.status_code == 403
    assert engine.added == []
    taken = client.post("/adapters", json={"name": "x", "src": str(tree / "root/mine")})
    assert taken.status_code == 200
    assert engine.added == [("x", str(tree / "root/mine"))]
