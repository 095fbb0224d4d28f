"""Where adapters came from: a column of the adapter table that a store may have."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.read.adapters import sources_of
from vllm_jd.compressor.report.summary import adapter_summary
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import BaseModelInfo, GenerationWriter, Store, StoreError, writing

TABLE = "adapters.safetensors"


def write(path, sources, change=lambda tensors: None):
    """A store of as many adapters without modules; `change` damages its table."""
    n = len(sources)
    with writing(path):
        writer = GenerationWriter(path)
        writer.write_table(
            [f"a{i}" for i in range(n)],
            chosen=torch.zeros(n, 0, 1),
            rank=torch.zeros(n, 0),
            norm=torch.zeros(n, 0),
            error=torch.zeros(n, 0),
            source_sha256=["00" * 32] * n,
            source_bytes=[1] * n,
            sources=sources,
        )
        tensors = load_file(writer.folder / TABLE)
        change(tensors)
        save_file(tensors, writer.folder / TABLE)
        return writer.publish(
            base_model=BaseModelInfo(name="org/tiny"),
            dtype="float32",
            method="none",
            settings={},
            adapters=n,
            modules=[],
            rows=1,
            core_row=0,
            core_shards=[],
            basis_shards=[],
        )


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(sources=st.lists(st.none() | texts, min_size=1, max_size=6))
def test_any_sources_read_back(tmp_path_factory, sources):
    path = tmp_path_factory.mktemp("sources") / "store"
    write(path, sources)
    assert Store.open(path).sources == sources


def test_a_table_without_the_column_has_none(tmp_path):
    store = write(tmp_path / "store", [None, None])
    assert not {"sources", "source_offsets"} & load_file(store.folder / TABLE).keys()
    assert store.sources == [None, None]


DAMAGES = {
    "no offsets": (lambda t: t.pop("source_offsets"), "one of sources and source_offsets"),
    "no texts": (lambda t: t.pop("sources"), "one of sources and source_offsets"),
    "offsets backwards": (
        lambda t: t.update(source_offsets=t["source_offsets"].flip(0)),
        "leave the sources' 12 bytes",
    ),
    "an offset less": (
        lambda t: t.update(source_offsets=t["source_offsets"][:-1].clone()),
        "source_offsets: found",
    ),
    "another type": (lambda t: t.update(sources=t["sources"].int()), "sources: found"),
    "not UTF-8": (lambda t: t["sources"].fill_(0xFF), "a source is not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_column_is_refused(tmp_path, case):
    change, message = DAMAGES[case]
    with pytest.raises(StoreError, match=message):
        write(tmp_path / "store", ["org/a@1", None, "org/b"], change)


def test_compressed_adapters_keep_their_sources(tmp_path, write_adapters):
    collection = read_adapters(write_adapters(tmp_path / "in", 3, kind="real"))
    collection.sources = [None, "org/name@0123/deep", "org/other@4567"]
    store = compress(collection, tmp_path / "store", Settings(rank=2))
    assert store.sources == collection.sources
    found = [adapter_summary(store, name)["source"] for name in store.names]
    assert found == collection.sources


def test_a_collection_may_know_nothing_of_sources():
    assert sources_of(SimpleNamespace(names=["a", "b"])) == [None, None]
    assert sources_of(SimpleNamespace(names=["a"], sources=["x"])) == ["x"]
