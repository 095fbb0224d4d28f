"""The body of an upload, as it comes in, against the body as httpx writes it."""

import tracemalloc
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import CONFIG_BYTES, Multipart

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def body_of(data, files):
    """(content type, body)."""
    request = httpx.Request("POST", "http://x/", data=data, files=files)
    return request.headers["content-type"], request.read()


def receive(kind, body, folder, cuts=(), *, most=1 << 20, named=True):
    parts = Multipart(kind, folder, most)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    try:
        for first, last in pairwise(edges):
            parts.write(body[first:last])
        return parts.finish(named=named)
    finally:
        parts.abandon()


@given(
    name=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40),
    config=st.binary(max_size=300),
    weights=st.binary(max_size=3000),
    cuts=st.lists(st.integers(min_value=0), max_size=8),
    first=st.booleans(),
)
def test_what_was_sent_comes_in_however_it_is_cut(
    tmp_path_factory, name, config, weights, cuts, first
):
    folder = tmp_path_factory.mktemp("in")
    files = {"adapter_config": config, "adapter_model": weights}
    if not first:
        files = dict(reversed(files.items()))
    kind, body = body_of({"name": name}, files)
    assert receive(kind, body, folder, cuts) == name
    assert (folder / CONFIG).read_bytes() == config
    assert (folder / WEIGHTS).read_bytes() == weights


GOOD = {"adapter_config": b"{}", "adapter_model": b"w"}
LARGE_CONFIG = GOOD | {"adapter_config": b" " * (CONFIG_BYTES + 1)}
BAD = [
    ({"name": "x"}, {"adapter_config": b"{}"}, 400, "adapter_model", "parts adapter_config, name;"),
    ({}, GOOD, 400, "name", "expected adapter_config, adapter_model, name"),
    ({"name": "x", "more": "y"}, GOOD, 400, "more", "found a part 'more'"),
    ({"name": "x"}, GOOD | {"../x": b""}, 400, "../x", "found a part '../x'"),
    ({"name": ["x", "y"]}, GOOD, 400, "name", "found the part name twice"),
    ({"name": "x" * 600}, GOOD, 400, "name", "found a name of more than 512 bytes"),
    ({"name": "x"}, GOOD | {"adapter_model": b"w" * 11}, 413, "adapter_model", "than 10 bytes"),
    ({"name": "x"}, LARGE_CONFIG, 413, "adapter_config", "than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("data", "files", "status", "param", "said"), BAD)
def test_a_body_of_another_form_is_refused(tmp_path, data, files, status, param, said):
    with pytest.raises(FleetFault, match=said) as caught:
        receive(*body_of(data, files), tmp_path, most=10)
    assert (caught.value.status, caught.value.param) == (status, param)
    assert {file.name for file in tmp_path.iterdir()} <= {CONFIG, WEIGHTS}


def test_a_name_is_not_asked_for_twice(tmp_path):
    assert receive(*body_of({}, GOOD), tmp_path, named=False) is None
    with pytest.raises(FleetFault, match="expected adapter_config, adapter_model"):
        receive(*body_of({"name": "x"}, GOOD), tmp_path, named=False)


KINDS = ["multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x"]
KINDS += [f"multipart/form-data; boundary={'x' * 300}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_without_a_boundary_is_refused(tmp_path, kind):
    with pytest.raises(FleetFault, match="found a body"):
        Multipart(kind, tmp_path, 10)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, body):
    with pytest.raises(FleetFault, match="found"):
        receive("multipart/form-data; boundary=x", body, tmp_path_factory.mktemp("in"))


def test_a_large_upload_is_not_held_in_memory(tmp_path):
    kind, body = body_of({"name": "x"}, GOOD | {"adapter_model": bytes(40 << 20)})
    pieces = [body[i : i + (1 << 20)] for i in range(0, len(body), 1 << 20)]
    parts = Multipart(kind, tmp_path, 1 << 30)
    tracemalloc.start()
    try:
        for piece in pieces:
            parts.write(piece)
        assert parts.finish(named=True) == "x"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / WEIGHTS).stat().st_size == 40 << 20
