"""The store: what was written reads back."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.store.stores import (
    RICH,
    RICH_KINDS,
    RICH_ROWS,
    live,
    live_files,
    write_rich,
    write_synthetic,
)
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL
from vllm_jd.store import (
    ModuleInfo,
    Store,
    StoreError,
)

# --- reading ---


def test_a_store_reads_back_what_was_put_in(good):
    store = Store.open(good)
    assert store.names == [f"adapter-{i:03d}" for i in range(5)]
    assert len(store) == 5
    assert "adapter-003" in store
    assert "adapter-9" not in store
    assert [store.index(name) for name in store.names] == list(range(5))
    assert store.dtype is torch.bfloat16
    assert store.generation == 1
    assert store.manifest.base_model.name == "org/tiny-llama"
    assert [module.name for module in store.manifest.modules] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.10.self_attn.q_proj",
    ]
    for column, module in enumerate(store.manifest.modules):
        assert store.module_index(module.name) == column
        bases = store.bases(module.name)
        assert bases.u.shape == (2 * 3, module.d_out)
        assert bases.v.shape == (2 * 3, module.d_in)
        assert bases.scales.shape == (0, module.d_out)
        assert bases.rows.tolist() == [[0, 0, 3, CORE_FULL, -1], [3, 3, 3, CORE_FULL, -1]]
        assert torch.equal(store.rows(module.name), bases.rows)
        assert (module.shared, module.rows, module.rank, module.core_size) == (2, 2, 3, 9)
    assert store.chosen.shape == (5, 4, 1)
    assert store.present.all()
    assert store.exact_error is None
    assert store.rank.tolist() == [[2] * 4, [4] * 4] * 2 + [[2] * 4]
    assert store.stored_bytes == sum(file.stat().st_size for file in live_files(good)[1:-1])
    with pytest.raises(KeyError):
        store.index("none")
    with pytest.raises(KeyError):
        store.factors("none")


def test_factors_are_u_sigma_and_v_of_the_adapters_cluster(good):
    store = Store.open(good)
    rows = store.cores(0, 5).double()
    for row, name in enumerate(store.names):
        for column, module in enumerate(store.manifest.modules):
            b, a = store.factors(name)[module.name]
            bases = store.bases(module.name)
            first = 3 * int(store.chosen[row, column, 0])
            u, v = (side[first : first + 3].double() for side in (bases.u, bases.v))
            core = rows[row, module.core_offset : module.core_offset + 9].view(3, 3)
            expected = u.T @ core @ v
            torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["a b", "ü", "u\u0308", "-x", "con", ".hidden", "n" * 255, "[red]", "日本語", "%s", "'"]
)
def test_odd_names_read_back(tmp_path, write_adapters, name):
    (folder,) = write_adapters(tmp_path / "in", 1)
    folder.rename(folder.with_name(name))
    write_adapters(tmp_path / "in", 1, seed=1)
    compress(read_adapters([tmp_path / "in"]), tmp_path / "store", Settings(rank=2))
    opened = Store.open(tmp_path / "store")
    assert sorted(opened.names) == sorted([name, "adapter-000"])
    assert name in opened
    assert set(opened.factors(name)) == {module.name for module in opened.manifest.modules}


def test_twenty_thousand_adapters_open_at_once(tmp_path):
    cores = write_synthetic(tmp_path / "store", 20_000, modules=8, shard=7_000)
    for verify in (True, False):
        begin = time.perf_counter()
        opened = Store.open(tmp_path / "store", verify=verify)
        assert time.perf_counter() - begin < 2
    assert len(opened) == 20_000
    assert opened.index("customer-19999") == 19_999
    for i in (0, 6_999, 7_000, 13_999, 14_000, 19_999):
        assert torch.equal(opened.cores(i, i + 1), cores[i : i + 1])
    assert torch.equal(opened.cores(6_990, 14_010), cores[6_990:14_010])


def test_one_core_row_is_read_without_the_others(tmp_path):
    cores = write_synthetic(tmp_path / "store", 20_000, modules=8, rank=5)
    opened = Store.open(tmp_path / "store")
    row = opened.cores(12_345, 12_346)
    assert torch.equal(row, cores[12_345:12_346])
    # Either the row alone is in memory, or the file is mapped and few of its pages were touched.
    resident, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            mapped = str(tmp_path) in line and "cores" in line
        elif mapped and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    assert resident < cores.nbytes / 4  # a page may have 2 MB
    assert resident or row.untyped_storage().nbytes() <= 2 * row.nbytes


def test_a_name_that_repeats_is_refused_at_publishing(tmp_path):
    with pytest.raises(StoreError, match="repeated name"):
        write_synthetic(tmp_path / "store", 2, names=["a", "a"])
    assert not (tmp_path / "store" / "CURRENT").exists()
    write_synthetic(tmp_path / "store", 2)
    assert Store.open(tmp_path / "store").generation == 1


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        min_size=1,
        max_size=20,
        unique=True,
    )
)
def test_any_names_read_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "store"
    write_synthetic(path, len(names), names=names)
    opened = Store.open(path)
    assert opened.names == names
    assert [opened.index(name) for name in names] == list(range(len(names)))


# --- several rows an adapter, scales, clusters of one, shards, quantised numbers ---


def raw_matrix(files, key, width):
    """A matrix of a store by an independent reading of the files, float64."""
    parts = []
    for file in files:
        tensors = load_file(file)
        if key not in tensors:
            continue
        codes = tensors[key].double().numpy()
        if f"{key}.steps" in tensors:
            if tensors[key].dtype is torch.uint8:
                pairs = np.stack([codes % 16, codes // 16], axis=2)
                codes = pairs.reshape(len(codes), -1)[:, :width] - 8
            steps = tensors[f"{key}.steps"].double().numpy()
            codes = codes * np.repeat(steps, 32, axis=1)[:, :width]
            codes = torch.from_numpy(codes).bfloat16().double().numpy()
        parts.append(codes)
    return np.concatenate(parts) if parts else np.zeros((0, width))


@pytest.mark.parametrize(("quantised", "dtype"), RICH_KINDS)
def test_every_kind_of_row_reads_back_as_a_float64_reading_of_the_files(tmp_path, quantised, dtype):
    written = write_rich(tmp_path / "store", quantised=quantised, dtype=dtype)
    opened = Store.open(tmp_path / "store")
    assert opened.manifest == written.manifest
    assert opened.dtype is getattr(torch, dtype)
    assert opened.present.tolist() == [
        [any(c >= 0 for c in rows) for rows in adapter] for adapter in RICH_ROWS
    ]
    assert (opened.exact_error is None) == (quantised is None)
    folder = live(tmp_path / "store")
    bases, cores = sorted(folder.glob("bases-*")), sorted(folder.glob("cores-*"))
    core_row = raw_matrix(cores, "cores", opened.manifest.core_row)
    for first in range(5):
        for last in range(first, 5):
            found = opened.cores(first, last)
            assert found.dtype is opened.dtype
            assert np.array_equal(found.double().numpy(), core_row[first:last])
    for column, module in enumerate(opened.manifest.modules):
        expected = {
            "u": raw_matrix(bases, f"{module.name}.U", module.d_out),
            "v": raw_matrix(bases, f"{module.name}.V", module.d_in),
            "scales": raw_matrix(bases, f"{module.name}.scales", module.d_out),
        }
        found = opened.bases(module.name)
        for key, matrix in expected.items():
            assert getattr(found, key).dtype is opened.dtype
            assert np.array_equal(getattr(found, key).double().numpy(), matrix)
        clusters = RICH[module.name][6]
        assert found.rows.tolist() == clusters
        for i, name in enumerate(opened.names):
            delta = np.zeros((module.d_out, module.d_in))
            for cluster in RICH_ROWS[i][column]:
                if cluster < 0:
                    continue
                v, u, rank, kind, scale = clusters[cluster]
                core = core_row[i, module.core_offset : module.core_offset + module.core_size]
                sigma = np.eye(rank)
                if kind == CORE_FULL:
                    sigma = core[: rank**2].reshape(rank, rank)
                elif kind == CORE_DIAGONAL:
                    sigma = np.diag(core[:rank])
                product = expected["u"][u : u + rank].T @ sigma @ expected["v"][v : v + rank]
                delta += product * (expected["scales"][scale][:, None] if scale >= 0 else 1)
            factors = opened.factors(name)
            assert (module.name in factors) == bool(opened.present[i, column])
            if module.name in factors:
                b, a = factors[module.name]
                assert b.dtype is a.dtype is torch.float32
                np.testing.assert_allclose(b.double() @ a.double(), delta, rtol=1e-4, atol=1e-4)
                assert np.abs(delta).max() > 0.1
    assert opened.factors("a3") == {}


@pytest.mark.parametrize(("quantised", "dtype"), RICH_KINDS)
def test_vectors_of_many_at_once_are_a_float64_reading_of_the_files(tmp_path, quantised, dtype):
    """Wherever they begin: a file ends behind the second of each pool."""
    write_rich(tmp_path / "store", quantised=quantised, dtype=dtype)
    opened = Store.open(tmp_path / "store")
    bases = sorted(live(tmp_path / "store").glob("bases-*"))
    for module in opened.manifest.modules:
        for pool, width in (("U", module.d_out), ("V", module.d_in), ("scales", module.d_out)):
            whole = raw_matrix(bases, f"{module.name}.{pool}", width)
            for count in range(len(whole) + 1):
                firsts = list(range(len(whole) - count + 1))[::-1]
                modules = [module.name] * len(firsts)
                found = opened.vectors_of(modules, pool, firsts, count)
                expected = np.concatenate([whole[first : first + count] for first in firsts])
                assert found.dtype is opened.dtype
                assert np.array_equal(found.double().numpy(), expected)
                for first in firsts:
                    alone = opened.vectors(module.name, pool, first, first + count)
                    assert np.array_equal(alone.double().numpy(), whole[first : first + count])
                if quantised and count:
                    codes, steps = opened.vector_codes_of(modules, pool, firsts, count)
                    assert codes.dtype is torch.int8 and steps.dtype is torch.bfloat16
                    product = codes.double() * steps.double().repeat_interleave(32, 1)[:, :width]
                    assert np.array_equal(product.bfloat16().double().numpy(), expected)
            with pytest.raises(StoreError, match=rf"{pool}: found {len(whole)} vectors"):
                opened.vectors_of([module.name], pool, [max(0, len(whole) - 1)], 2)
            beyond = opened.vectors(module.name, pool, 1, len(whole) + 5)
            assert np.array_equal(beyond.double().numpy(), whole[1:])


def test_a_store_without_cores_gives_out_rows_of_none(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 3)
    opened = compress(read_adapters(folders), tmp_path / "store", Settings(method="none"))
    assert opened.manifest.core_row == 0
    assert opened.manifest.core_shards == []
    assert opened.cores(0, 3).shape == (3, 0)
    assert opened.cores(1, 2).shape == (1, 0)


def test_a_module_that_no_table_names_is_refused(good):
    store = Store.open(good)
    for read in (store.bases, store.rows, store.module_index):
        with pytest.raises(KeyError):
            read("none")


def test_manifest_models_are_strict():
    with pytest.raises(ValidationError):
        ModuleInfo(
            name="m",
            d_in=4,
            d_out=4,
            rank=1,
            rows=1,
            shared=1,
            u_vectors=1,
            v_vectors=1,
            scale_rows=0,
            core_offset=0,
            core_size=1,
            other=1,
        )
