"""Stores that many tests read."""

import shutil
from pathlib import Path

import pytest

from tests.store.stores import write_rich
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress


@pytest.fixture(scope="session")
def good(tmp_path_factory, write_adapters):
    """A good store of five adapters; not to be changed."""
    folder = tmp_path_factory.mktemp("good")
    collection = read_adapters(write_adapters(folder / "in", 5, kind="real", ranks=(2, 4)))
    compress(collection, folder / "store", Settings(rank=3, clusters=2))
    return folder / "store"


@pytest.fixture
def store(good, tmp_path):
    """A copy of the good store."""
    return Path(shutil.copytree(good, tmp_path / "store"))


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def rich(request, tmp_path_factory):
    """A store with all that the format knows; not to be changed."""
    path = tmp_path_factory.mktemp("rich") / "store"
    quantised = None if request.param == "float32" else request.param
    write_rich(path, quantised=quantised, dtype="bfloat16" if quantised else "float32")
    return path
