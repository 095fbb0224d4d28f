"""Adapters fetched from where they lie: a folder, the Hub, an object store."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.compressor.read.test_hub import hub as imitated_hub  # noqa: F401 - a fixture
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read import hub
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import disk_fault, fetch

MOST = 1 << 20


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


@pytest.fixture
def adapter(folders, tmp_path):
    return Path(shutil.copytree(folders[0], tmp_path / "adapter"))


def test_a_folder_is_copied(adapter, into, tree, monkeypatch):
    (adapter / "README.md").write_text("more")
    assert fetch(str(adapter), into, MOST) == str(adapter)
    copied = tree(into)
    assert copied.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert copied.items() <= tree(adapter).items()
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert fetch("~/adapter", into, MOST) == "~/adapter"


def refused(source, into, status, said):
    with pytest.raises(FleetFault, match=said) as caught:
        fetch(str(source), into, MOST)
    assert (caught.value.status, caught.value.answer.error.param) == (status, "source")
    return caught.value


def test_a_folder_without_an_adapter_is_not_found(adapter, into):
    refused(adapter / "missing", into, 404, "found no adapter_config.json")
    refused(adapter / "adapter_config.json", into, 404, "found no adapter_config.json")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, into, 404, "found no adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").mkdir()
    refused(adapter, into, 400, "cannot be read: Is a directory")


def test_larger_weights_are_not_copied_whole(adapter, into):
    with pytest.raises(FleetFault, match="found more than 7 bytes") as caught:
        fetch(str(adapter), into, 7)
    assert caught.value.status == 413
    copy = into / "adapter_model.safetensors"
    assert not copy.exists() or copy.stat().st_size <= 7


@pytest.mark.parametrize(("number", "status"), [(28, 507), (122, 507), (5, 503), (30, 503)])
def test_a_disk_that_cannot_be_written_is_told(number, status):
    fault = disk_fault(OSError(number, "words of the system"))
    assert fault.status == status and "words of the system" in str(fault)


def test_the_hub_gives_one_adapter_by_its_commit(adapter, into, tree, monkeypatch):
    commit = "a" * 40
    snapshot = shutil.copytree(adapter, adapter.parent / commit / "sub")
    found = [hub.Source(Path(snapshot), "org/name", commit, "name/sub")]
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda sources: asked.append(sources) or found)
    assert fetch("hf://org/name@main/sub", into, MOST) == f"hf://org/name@{commit}/sub"
    assert asked == [["hf://org/name@main/sub"]]
    assert tree(into) == tree(adapter)
    found.append(found[0])
    fault = refused("hf://org/name", into, 400, "found 2 adapters")
    assert "expected one" in str(fault)
    refused("hf://org", into, 400, "found an owner, expected hf://org/name")


def test_what_the_hub_says_is_passed_on(into, monkeypatch):
    def fail(sources):
        raise AdapterError(["hf://org/name: no such repository"])

    monkeypatch.setattr(hub, "fetch", fail)
    fault = refused("hf://org/name", into, 400, "no such repository")
    assert "Nothing was written" not in str(fault)


def test_the_real_client_fetches_from_a_hub(imitated_hub, adapter, into, tree):  # noqa: F811
    content = {file.name: file.read_bytes() for file in adapter.iterdir()}
    commit = imitated_hub.add("org/name", content | {"README.md": b"more"})
    address = f"hf://org/name@{commit}"
    assert fetch("hf://org/name", into, MOST) == address
    assert tree(into) == content
    other = content | {"adapter_model.safetensors": b"another version"}
    imitated_hub.add("org/name", {f"sub/{name}": data for name, data in other.items()}, "v2")
    fetch("hf://org/name@v2/sub", into, MOST)
    assert tree(into) == other
    fetch(address, into, MOST)
    assert tree(into) == content
    refused("hf://org/other", into, 400, "org/other")


# ---------------------------------------------------------------- an object store


@pytest.fixture(scope="module")
def object_store(tmp_path_factory):
    """An S3 of this machine (moto's), and the client's settings for it; gives a function that puts
    a file."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    patch = pytest.MonkeyPatch()
    started = server.ThreadedMotoServer(port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="bucket")

    def put(key, content):
        client.put_object(Bucket="bucket", Key=key, Body=content)

    yield put
    started.stop()
    patch.undo()


def put_adapter(put, key, adapter):
    for file in adapter.iterdir():
        put(f"{key}/{file.name}", file.read_bytes())


def test_an_object_store_gives_an_adapter(object_store, adapter, into, tree):
    put_adapter(object_store, "deep/ü x/one", adapter)
    source = "s3://bucket/deep/ü x/one"
    assert fetch(source, into, MOST) == source
    assert tree(into) == tree(adapter)


def test_another_version_there_is_seen_at_once(object_store, adapter, into, tree):
    put_adapter(object_store, "two", adapter)
    fetch("s3://bucket/two/", into, MOST)
    object_store("two/adapter_model.safetensors", b"another version, and longer")
    fetch("s3://bucket/two/", into, MOST)
    assert tree(into)["adapter_model.safetensors"] == b"another version, and longer"


def test_what_is_not_in_an_object_store_is_not_found(object_store, adapter, into):
    refused("s3://bucket/nothing", into, 404, "found no adapter_config.json")
    refused("s3://nowhere/x", into, 404, "found no adapter_config.json")
    object_store("half/adapter_config.json", b"{}")
    refused("s3://bucket/half", into, 404, "found no adapter_model.safetensors")


def test_larger_weights_are_not_fetched(object_store, adapter, into):
    put_adapter(object_store, "large", adapter)
    with pytest.raises(FleetFault, match="found more than 7 bytes") as caught:
        fetch("s3://bucket/large", into, 7)
    assert caught.value.status == 413
    assert not (into / "adapter_model.safetensors").exists()


def test_an_object_store_that_does_not_answer_is_told(object_store, into, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    fault = refused("s3://bucket/x", into, 502, "cannot be read")
    assert "secret-of-the-test" not in str(fault)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("source", "package"), [("gs://b/x", "gcsfs"), ("az://b/x", "adlfs")])
def test_the_package_that_is_missing_is_named(into, monkeypatch, source, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    fault = refused(source, into, 502, f"needs the package {package}")
    assert "pip install 'vllm-jd[remote]'" in str(fault)
