"""The store: what was written reads back, damage is named, and only the right model is served."""

import json
import random
import shutil
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_NONE, STORED_FIELDS
from vllm_jd.store import (
    BaseModelInfo,
    CoreShard,
    GenerationWriter,
    ModuleInfo,
    Store,
    StoreError,
    check_base_model,
    read_base_model,
    short_name,
    writing,
)
from vllm_jd.store.base_model import fingerprint
from vllm_jd.store.quantise import quantise

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


@pytest.fixture(scope="module")
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


def live(store):
    return store / "generations" / (store / "CURRENT").read_text().split()[0]


def live_files(store):
    return [store / "CURRENT", *sorted(live(store).iterdir())]


def refused(store, match):
    with pytest.raises(StoreError, match=match):
        Store.open(store)


def rewrite_manifest(store, change):
    """Change the manifest and make CURRENT agree with it, as an attacker or a bug would."""
    file = live(store) / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    name = live(store).name
    (store / "CURRENT").write_text(f"{name} {sha256(file.read_bytes()).hexdigest()}\n")


def rewrite_file(store, name, content):
    """Replace a file and make the manifest agree with it."""
    (live(store) / name).write_bytes(content)
    info = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    rewrite_manifest(store, lambda manifest: manifest["files"].update({name: info}))


def rewrite_tensors(store, name, change):
    tensors = load_file(live(store) / name)
    change(tensors)
    temporary = store / "temporary"
    save_file(tensors, temporary)
    content = temporary.read_bytes()
    temporary.unlink()
    rewrite_file(store, name, content)


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
    assert (store.exact_error, store.input_error) == (None, None)
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


def write_synthetic(path, n, *, modules=2, rank=2, shard=None, names=None):
    """A store of `n` made-up adapters, straight by the writer. Returns all core rows."""
    infos = [
        ModuleInfo(
            name=f"m{i}",
            d_in=4,
            d_out=6,
            rank=rank,
            rows=1,
            shared=1,
            u_vectors=rank,
            v_vectors=rank,
            scale_rows=0,
            core_offset=i * rank**2,
            core_size=rank**2,
        )
        for i in range(modules)
    ]
    width = modules * rank**2
    cores = torch.arange(n * width, dtype=torch.float32).view(n, width)
    with writing(path):
        writer = GenerationWriter(path)
        clusters = torch.tensor([[0, 0, rank, CORE_FULL, -1]], dtype=torch.int32)
        bases = {f"m{i}.U": torch.ones(rank, 6) for i in range(modules)}
        bases |= {f"m{i}.V": torch.ones(rank, 4) for i in range(modules)}
        bases |= {f"m{i}.clusters": clusters.clone() for i in range(modules)}
        writer.write_tensors("bases-00000.safetensors", bases)
        writer.write_table(
            names or [f"customer-{i}" for i in range(n)],
            chosen=torch.zeros(n, modules, 1),
            rank=torch.full((n, modules), 8),
            norm=torch.ones(n, modules),
            error=torch.zeros(n, modules),
            source_sha256=["00" * 32] * n,
            source_bytes=[1] * n,
        )
        shards = []
        for first in range(0, n, shard or n):
            rows = min(shard or n, n - first)
            file = f"cores-{len(shards):05d}.safetensors"
            writer.write_tensors(file, {"cores": cores[first : first + rows]})
            shards.append(CoreShard(file=file, first=first, adapters=rows))
        writer.publish(
            base_model=BaseModelInfo(name="org/tiny"),
            dtype="float32",
            method="jd-full",
            settings={},
            adapters=n,
            modules=infos,
            rows=1,
            core_row=width,
            core_shards=shards,
            basis_shards=["bases-00000.safetensors"],
        )
    return cores


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

# module → (d_in, d_out, rows of U, of V, of scales, core size, clusters, how many are shared)
RICH = {
    "m0": (
        5,
        70,
        12,
        15,
        0,
        9,
        [
            [0, 0, 3, CORE_FULL, -1],
            [3, 0, 3, CORE_FULL, -1],  # another V, the same U
            [6, 3, 2, CORE_NONE, -1],  # a mean
            [8, 5, 1, CORE_NONE, -1],
            [9, 6, 6, CORE_NONE, -1],
        ],
        3,
    ),
    "m1": (
        33,
        7,
        6,
        4,
        2,
        4,
        [[0, 0, 4, CORE_DIAGONAL, 0], [0, 0, 4, CORE_DIAGONAL, 1], [0, 2, 4, CORE_DIAGONAL, -1]],
        3,
    ),
    "m2": (64, 32, 5, 6, 1, 0, [[0, 0, 2, CORE_NONE, 0], [2, 2, 3, CORE_NONE, -1]], 0),
}
RICH_ROWS = [  # adapter → module → its rows
    [[0, 2, 3], [1, -1, -1], [-1, -1, -1]],
    [[1, 2, -1], [0, -1, -1], [-1, 1, -1]],
    [[-1, -1, 4], [2, -1, -1], [-1, -1, 0]],
    [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1]],
]


def encoded(key, matrix, quantised, dtype):
    if quantised is None:
        return {key: matrix.to(dtype)}
    codes, steps = quantise(matrix, quantised)
    return {key: codes, f"{key}.steps": steps}


def write_rich(path, *, quantised=None, dtype="bfloat16"):
    """A store with all that the format knows, straight by the writer, in two basis shards."""
    generator = torch.Generator().manual_seed(5)

    def random_matrix(*shape):
        return encoded_as(torch.randn(*shape, generator=generator))

    def encoded_as(matrix):
        return lambda key: encoded(key, matrix, quantised, getattr(torch, dtype))

    n = len(RICH_ROWS)
    infos, offset = [], 0
    shards = [{}, {}]
    for name, (d_in, d_out, u_rows, v_rows, scale_rows, core, clusters, shared) in RICH.items():
        table = torch.tensor(clusters, dtype=torch.int32)
        for i, shard in enumerate(shards):
            for key, count, width in (("U", u_rows, d_out), ("V", v_rows, d_in)):
                rows = (2, count - 2)[i]
                shard |= random_matrix(rows, width)(f"{name}.{key}")
            shard[f"{name}.clusters"] = (table[:1], table[1:])[i].clone()
        if scale_rows:  # in the second shard alone
            shards[1] |= random_matrix(scale_rows, d_out)(f"{name}.scales")
        size = 32 * (core > 0) if quantised else core
        infos.append(
            ModuleInfo(
                name=name,
                d_in=d_in,
                d_out=d_out,
                rank=clusters[0][2] if shared else 0,
                rows=len(clusters),
                shared=shared,
                u_vectors=u_rows,
                v_vectors=v_rows,
                scale_rows=scale_rows,
                core_offset=offset,
                core_size=size,
            )
        )
        offset += size
    with writing(path):
        writer = GenerationWriter(path)
        for i, shard in enumerate(shards):
            writer.write_tensors(f"bases-{i:05d}.safetensors", shard)
        writer.write_tensors("cores-00000.safetensors", random_matrix(3, offset)("cores"))
        writer.write_tensors("cores-00001.safetensors", random_matrix(n - 3, offset)("cores"))
        writer.write_table(
            [f"a{i}" for i in range(n)],
            chosen=torch.tensor(RICH_ROWS),
            rank=torch.full((n, 3), 8),
            norm=torch.ones(n, 3),
            error=torch.zeros(n, 3),
            exact_error=torch.full((n, 3), 0.25) if quantised else None,
            input_error=torch.full((n, 3), 0.5),
            source_sha256=["00" * 32] * n,
            source_bytes=[1] * n,
        )
        return writer.publish(
            base_model=BaseModelInfo(name="org/tiny"),
            dtype=dtype,
            quantised=quantised,
            method="jd-full",
            settings={},
            adapters=n,
            modules=infos,
            rows=3,
            core_row=offset,
            core_shards=[
                CoreShard(file="cores-00000.safetensors", first=0, adapters=3),
                CoreShard(file="cores-00001.safetensors", first=3, adapters=n - 3),
            ],
            basis_shards=["bases-00000.safetensors", "bases-00001.safetensors"],
        )


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


RICH_KINDS = [(None, "float32"), (None, "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")]


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
    assert opened.input_error.unique().tolist() == [0.5]
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


def test_a_header_damaged_behind_an_unverified_open_is_refused(store):
    file = live(store) / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[:40] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(StoreError, match="bases-00000"):
        Store.open(store, verify=False)


def test_a_table_renamed_behind_an_unverified_open_is_refused(store):
    file = live(store) / "bases-00000.safetensors"
    content = bytearray(file.read_bytes())
    at = content.index(b"k_proj.clusters")
    content[at : at + 6] = b"x_proj"
    file.write_bytes(content)
    opened = Store.open(store, verify=False)
    with pytest.raises(StoreError, match="bases-00000"):
        opened.rows("model.layers.0.self_attn.k_proj")


# --- damage ---


def test_one_flipped_byte_anywhere_is_refused(store):
    generator = random.Random(0)
    for file in live_files(store):
        original = file.read_bytes()
        size = len(original)
        places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1}
        places |= {generator.randrange(size) for _ in range(25)}
        if file.name == "CURRENT":
            places = set(range(size))
        for at in sorted(places):
            for flip in (1, 0x20, 0x80) if file.name == "CURRENT" else (generator.randint(1, 255),):
                damaged = bytearray(original)
                damaged[at] ^= flip
                file.write_bytes(damaged)
                with pytest.raises(StoreError) as caught:
                    Store.open(store)
                assert str(store) in str(caught.value)
        file.write_bytes(original)
    assert len(Store.open(store)) == 5


@pytest.mark.parametrize("how", ["missing", "empty", "shorter", "longer", "a folder"])
def test_a_missing_or_resized_file_is_refused_by_name(store, how):
    for file in live_files(store):
        original = file.read_bytes()
        file.unlink()
        if how == "empty":
            file.write_bytes(b"")
        elif how == "shorter":
            file.write_bytes(original[:-1])
        elif how == "longer":
            file.write_bytes(original + b"\0")
        elif how == "a folder":
            file.mkdir()
        with pytest.raises(StoreError, match=file.name):
            Store.open(store)
        if how != "missing":
            with pytest.raises(StoreError, match=file.name):
                Store.open(store, verify=False)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(original)


def test_swapped_files_are_refused(store):
    one, two = live(store) / "bases-00000.safetensors", live(store) / "cores-00000.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    refused(store, "bases-00000.safetensors|cores-00000.safetensors")


@pytest.mark.parametrize(
    "text",
    ["", "1", "x", "1 \n", "0 " + "0" * 64 + "\n", "-1 " + "0" * 64, "1 " + "0" * 64, "../1 " * 9],
)
def test_a_malformed_current_is_refused(store, text):
    (store / "CURRENT").write_text(text)
    refused(store, "CURRENT: found .*, expected '<generation> <sha256 of its manifest>'")


def test_current_that_names_no_generation_is_refused(store):
    text = (store / "CURRENT").read_text()
    (store / "CURRENT").write_text("7" + text[1:])
    refused(store, "generations/7/manifest.json: missing")


def test_places_without_a_store_are_refused(tmp_path):
    refused(tmp_path / "none", "no such folder; expected a store")
    refused(tmp_path, "found no CURRENT file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_the_manifest_of_another_store_is_refused(store, tmp_path):
    write_synthetic(tmp_path / "other", 5)
    shutil.copy(live(tmp_path / "other") / "manifest.json", live(store) / "manifest.json")
    refused(store, "manifest.json: found sha256 .*, expected")
    shutil.copy(tmp_path / "other" / "CURRENT", store / "CURRENT")
    refused(store, "found .* bytes, expected")


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, [2]])
def test_another_schema_version_is_refused_with_what_to_do(store, version):
    rewrite_manifest(store, lambda manifest: manifest.update(schema_version=version))
    refused(store, f"schema version {version!r}, this vllm-jd reads 2".replace("[", r"\["))


MANIFEST_LIES = {
    "unknown field": lambda m: m.update(extra=1),
    "missing field": lambda m: m.pop("dtype"),
    "no adapters": lambda m: m.update(adapters=0),
    "more adapters": lambda m: m.update(adapters=6),
    "negative size": lambda m: m["modules"][0].update(d_in=-1),
    "wrong width": lambda m: m["modules"][0].update(d_in=25),
    "wrong rank": lambda m: m["modules"][0].update(rank=2),
    "more clusters": lambda m: m["modules"][0].update(clusters=3),
    "fewer modules": lambda m: m["modules"].pop(),
    "a module renamed": lambda m: m["modules"][0].update(name="other"),
    "a module twice": lambda m: m["modules"].append(m["modules"][0]),
    "core outside of the row": lambda m: m["modules"][3].update(core_offset=28),
    "cores that overlap": lambda m: m["modules"][1].update(core_offset=0),
    "core row": lambda m: m.update(core_row=35),
    "no shards": lambda m: m.update(core_shards=[]),
    "shard gap": lambda m: m["core_shards"][0].update(first=1),
    "shard too short": lambda m: m["core_shards"][0].update(rows=4),
    "shard elsewhere": lambda m: m["core_shards"][0].update(file="../../CURRENT"),
    "file elsewhere": lambda m: m["files"].update(
        {"../../CURRENT": m["files"]["bases-00000.safetensors"]}
    ),
    "file unhashed": lambda m: m["files"].pop("bases-00000.safetensors"),
    "hash no hex": lambda m: m["files"]["bases-00000.safetensors"].update(sha256="x" * 64),
    "dtype": lambda m: m.update(dtype="float16"),
    "unknown dtype": lambda m: m.update(dtype="int8"),
}


@pytest.mark.parametrize("case", MANIFEST_LIES)
def test_a_manifest_that_does_not_fit_its_files_is_refused(store, case):
    rewrite_manifest(store, MANIFEST_LIES[case])
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(live(store)) in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema_version": 2}']
)
def test_a_manifest_that_is_none_is_refused(store, text):
    file = live(store) / "manifest.json"
    file.write_bytes(text)
    (store / "CURRENT").write_text(f"1 {sha256(text).hexdigest()}\n")
    refused(store, "manifest.json")


TABLE_LIES = {
    "cluster too high": lambda t: t["cluster"].fill_(2),
    "cluster too low": lambda t: t["cluster"].fill_(-2),
    "a row less": lambda t: t.update(norm=t["norm"][:-1].clone()),
    "another type": lambda t: t.update(error=t["error"].double()),
    "a column less": lambda t: t.update(rank=t["rank"][:, :-1].clone()),
    "no names": lambda t: t.pop("names"),
    "offsets backwards": lambda t: t.update(name_offsets=t["name_offsets"].flip(0)),
    "offsets beyond the names": lambda t: t["name_offsets"].mul_(3),
    "name not UTF-8": lambda t: t["names"].fill_(0xFF),
    "equal names": lambda t: t["names"].fill_(65),
    "short hashes": lambda t: t.update(source_sha256=t["source_sha256"][:, :31].clone()),
}


@pytest.mark.parametrize("case", TABLE_LIES)
def test_a_table_that_does_not_fit_is_refused(store, case):
    rewrite_tensors(store, "adapters.safetensors", TABLE_LIES[case])
    refused(store, "adapters.safetensors: ")


TENSOR_LIES = {
    "bases transposed": (
        "bases-00000.safetensors",
        lambda t: t.update({k: v.mT.contiguous() for k, v in t.items()}),
    ),
    "bases of another type": (
        "bases-00000.safetensors",
        lambda t: t.update({k: v.float() for k, v in t.items()}),
    ),
    "one basis of another type": (
        "bases-00000.safetensors",
        lambda t: t.update({max(t): t[max(t)].half()}),
    ),
    "a basis more": ("bases-00000.safetensors", lambda t: t.update(x=torch.ones(1))),
    "a basis less": ("bases-00000.safetensors", lambda t: t.pop(min(t))),
    "cores of another type": (
        "cores-00000.safetensors",
        lambda t: t.update(cores=t["cores"].half()),
    ),
    "cores flat": ("cores-00000.safetensors", lambda t: t.update(cores=t["cores"].flatten())),
    "cores renamed": ("cores-00000.safetensors", lambda t: t.update(core=t.pop("cores"))),
}


@pytest.mark.parametrize("case", TENSOR_LIES)
def test_tensors_that_do_not_fit_the_manifest_are_refused(store, case):
    name, change = TENSOR_LIES[case]
    rewrite_tensors(store, name, change)
    refused(store, name)


@pytest.mark.parametrize("name", ["adapters", "bases-00000", "cores-00000"])
def test_a_file_that_is_no_safetensors_is_refused_although_its_hash_fits(store, name):
    for content in (b"", b"x", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"):
        rewrite_file(store, f"{name}.safetensors", content)
        refused(store, f"{name}.safetensors")


RICH_MANIFEST_LIES = {
    "not quantised": lambda m: m.update(quantised=None),
    "the other kind": lambda m: m.update(quantised="int8" if m["quantised"] else "int4"),
    "unknown kind": lambda m: m.update(quantised="int2"),
    "dtype": lambda m: m.update(dtype="float16"),
    "fewer rows": lambda m: m.update(rows=2),
    "no rows": lambda m: m.update(rows=0),
    "more shared than there are": lambda m: m["modules"][0].update(shared=6),
    "cores in what is one adapter's": lambda m: m["modules"][0].update(shared=0),
    "private that two have": lambda m: m["modules"][0].update(shared=2),
    "a rank that no cluster has": lambda m: m["modules"][0].update(rank=4),
    "a rank beyond all numbers": lambda m: m["modules"][0].update(rank=10**30),
    "a rank without a shared cluster": lambda m: m["modules"][2].update(rank=2),
    "fewer rows of U": lambda m: m["modules"][0].update(u_rows=11),
    "more rows of U": lambda m: m["modules"][0].update(u_rows=13),
    "rows of V beyond all numbers": lambda m: m["modules"][0].update(v_rows=10**30),
    "fewer rows of scales": lambda m: m["modules"][1].update(scale_rows=1),
    "no scales": lambda m: m["modules"][1].update(scale_rows=0),
    "more scales": lambda m: m["modules"][0].update(scale_rows=1),
    "fewer clusters": lambda m: m["modules"][0].update(clusters=4),
    "more clusters": lambda m: m["modules"][0].update(clusters=6),
    "smaller core": lambda m: m["modules"][0].update(core_size=8),
    "core outside of the row": lambda m: m["modules"][1].update(core_offset=50),
    "a core row more": lambda m: m.update(core_row=m["core_row"] + 1),
    "wider U": lambda m: m["modules"][0].update(d_out=71),
    "narrower V": lambda m: m["modules"][0].update(d_in=3),
    "a basis shard less": lambda m: m["basis_shards"].pop(),
    "a basis shard twice": lambda m: m["basis_shards"].append(m["basis_shards"][0]),
    "a basis shard that is none": lambda m: m["basis_shards"].append("cores-00000.safetensors"),
    "no basis shards": lambda m: m.update(basis_shards=[]),
    "core shards in another order": lambda m: m["core_shards"].reverse(),
    "a core shard twice": lambda m: m["core_shards"].append(m["core_shards"][1]),
    "a module called as another": lambda m: m["modules"][0].update(name="m1"),
}


@pytest.fixture(scope="module", params=["float32", "int8", "int4"])
def rich(request, tmp_path_factory):
    """A store with all that the format knows; not to be changed."""
    path = tmp_path_factory.mktemp("rich") / "store"
    quantised = None if request.param == "float32" else request.param
    write_rich(path, quantised=quantised, dtype="bfloat16" if quantised else "float32")
    return path


def refuses(rich, tmp_path, change):
    store = Path(shutil.copytree(rich, tmp_path / "store"))
    change(store)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(live(store)) in str(caught.value)


@pytest.mark.parametrize("case", RICH_MANIFEST_LIES)
def test_a_manifest_that_does_not_fit_many_kinds_of_rows_is_refused(rich, tmp_path, case):
    change = RICH_MANIFEST_LIES[case]
    manifest = json.loads((live(rich) / "manifest.json").read_text())
    changed = json.loads(json.dumps(manifest))
    change(changed)
    if changed == manifest or (case == "dtype" and manifest["quantised"]):
        return  # no lie about this store
    refuses(rich, tmp_path, lambda store: rewrite_manifest(store, change))


def set_cluster(line, field, value):
    def change(tensors):
        tensors["m0.clusters"][line, STORED_FIELDS.index(field)] = value

    return change


CLUSTER_LIES = {
    f"{field} {value} of line {line}": set_cluster(line, field, value)
    for line, field, values in [
        (0, "v_start", [-1, 13, 15, 2**31 - 1]),
        (0, "u_start", [-1, 10, 12, 2**31 - 1]),
        (0, "rank", [-1, 0, 1, 13, 2**31 - 1]),
        (0, "core_kind", [-1, 3]),
        (0, "scale_row", [-2, 0, 2**31 - 1]),
        (3, "v_start", [-1, 10]),
        (3, "u_start", [-1, 7]),
        (3, "rank", [0, 7]),
        (3, "core_kind", [-1, 3]),
        (3, "scale_row", [-2, 0]),
    ]
    for value in values
}


@pytest.mark.parametrize("case", CLUSTER_LIES)
def test_an_index_of_a_cluster_outside_of_its_pool_is_refused(rich, tmp_path, case):
    """Line 0 of the second shard is line 1 of the table; its line 3 an adapter's own."""
    name = "bases-00001.safetensors"
    change = CLUSTER_LIES[case]
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


def set_choice(adapter, module, row, value):
    def change(tensors):
        tensors["cluster"][adapter, module, row] = value

    return change


CHOICE_LIES = {
    "beyond the clusters": set_choice(0, 1, 0, 3),
    "far beyond": set_choice(3, 2, 2, 2**31 - 1),
    "below -1": set_choice(0, 0, 2, -2),
    "far below": set_choice(0, 0, 2, -(2**31)),
    "two cores": set_choice(0, 0, 1, 1),
    "the same core twice": set_choice(0, 0, 1, 0),
    "another adapter's own": set_choice(1, 0, 2, 3),
    "its own twice": set_choice(0, 0, 1, 3),
    "fewer rows": lambda t: t.update(cluster=t["cluster"][:, :, :2].clone()),
    "flat": lambda t: t.update(cluster=t["cluster"][:, :, 0].clone()),
    "wide numbers": lambda t: t.update(cluster=t["cluster"].long()),
    "errors of another type": lambda t: t.update(input_error=t["input_error"].double()),
    "errors of fewer": lambda t: t.update(input_error=t["input_error"][:1].clone()),
}


@pytest.mark.parametrize("case", CHOICE_LIES)
def test_a_row_that_no_cluster_fits_is_refused(rich, tmp_path, case):
    name = "adapters.safetensors"
    change = CHOICE_LIES[case]
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


def renamed(old, new):
    return lambda t: t.update({new: t.pop(old)})


BASIS_LIES = {
    "a row of U less": lambda t: t.update({"m0.U": t["m0.U"][1:].clone()}),
    "a column of U less": lambda t: t.update({"m0.U": t["m0.U"][:, 1:].clone()}),
    "U flat": lambda t: t.update({"m0.U": t["m0.U"].flatten()}),
    "U a number": lambda t: t.update({"m0.U": t["m0.U"][0, 0].clone()}),
    "U of another type": lambda t: t.update({"m0.U": t["m0.U"].to(torch.int16)}),
    "no U": lambda t: t.pop("m0.U"),
    "no clusters": lambda t: t.pop("m0.clusters"),
    "clusters flat": lambda t: t.update({"m0.clusters": t["m0.clusters"].flatten()}),
    "clusters of wide numbers": lambda t: t.update({"m0.clusters": t["m0.clusters"].long()}),
    "a field less": lambda t: t.update({"m0.clusters": t["m0.clusters"][:, :4].clone()}),
    "steps of clusters": lambda t: t.update({"m0.clusters.steps": torch.ones(1, 1).bfloat16()}),
    "another module": renamed("m0.U", "m9.U"),
    "steps of nothing": lambda t: t.update({"m9.U.steps": torch.ones(1, 1).bfloat16()}),
    "steps of steps": lambda t: t.update({"m0.U.steps.steps": torch.ones(1, 1).bfloat16()}),
    "scales that are none": lambda t: t.update({"m0.scales": t["m0.U"][:1].clone()}),
}
STEP_LIES = {
    "no steps": lambda t: t.pop("m0.U.steps"),
    "steps alone": lambda t: t.pop("m0.U"),
    "a row of steps less": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][1:].clone()}),
    "a step less": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][:, 1:].clone()}),
    "steps a number": lambda t: t.update({"m0.U.steps": t["m0.U.steps"][0, 0].clone()}),
    "steps of another type": lambda t: t.update({"m0.U.steps": t["m0.U.steps"].float()}),
}


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("case", BASIS_LIES | STEP_LIES)
def test_basis_tensors_that_do_not_fit_are_refused(rich, tmp_path, shard, case):
    name = f"bases-{shard:05d}.safetensors"
    change = (BASIS_LIES | STEP_LIES)[case]
    if case in STEP_LIES and "m0.U.steps" not in load_file(live(rich) / name):
        change = lambda t: t.update({"m0.U.steps": torch.ones(2, 3).bfloat16()})  # noqa: E731
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


@pytest.mark.parametrize("case", ["none", "narrower", "of another type", "fewer"])
def test_core_steps_that_do_not_fit_are_refused(rich, tmp_path, case):
    def change(tensors):
        steps = tensors.pop("cores.steps", torch.ones(3, 2).bfloat16())
        changed = {
            "narrower": steps[:, 1:].clone(),
            "of another type": steps.half(),
            "fewer": steps[1:].clone(),
        }
        if case in changed:
            tensors["cores.steps"] = changed[case]
        elif tensors["cores"].is_floating_point():
            tensors["cores"] = tensors["cores"].to(torch.int8)

    name = "cores-00000.safetensors"
    refuses(rich, tmp_path, lambda store: rewrite_tensors(store, name, change))


# --- the base model ---


def info(name="org/Tiny-Llama", **changes):
    digest, fields = fingerprint(CONFIG | changes)
    return BaseModelInfo(name=name, fingerprint=digest, config=fields)


@pytest.mark.parametrize(
    "name",
    [
        "org/tiny-llama",
        "tiny-llama",
        "Tiny-Llama",
        "/models/Tiny-Llama",
        "/models/Tiny-Llama/",
        "/hf/hub/models--org--Tiny-Llama/snapshots/0123abc",
        "/hf/hub/models--org--Tiny-Llama/snapshots/0123abc/",
        "/hf/hub/models--Tiny-Llama/snapshots/0123abc",
        "other-org/tiny-llama",
    ],
)
def test_the_same_model_by_another_path_is_accepted(name):
    check_base_model(info(), name, CONFIG)
    check_base_model(info(name=name), "org/tiny-llama", CONFIG)


def test_another_save_of_the_same_model_is_accepted():
    other = CONFIG | {"torch_dtype": "float32", "use_cache": False, "transformers_version": "9"}
    check_base_model(info(), "tiny-llama", other)
    del other["rope_theta"]
    other["head_dim"] = 16
    check_base_model(info(), "tiny-llama", other)
    check_base_model(BaseModelInfo(name="tiny-llama"), "tiny-llama", CONFIG)


def test_another_name_is_refused_unless_it_is_said_to_be_the_same():
    with pytest.raises(StoreError) as caught:
        check_base_model(info(), "org/renamed", CONFIG)
    assert "made for base model 'org/Tiny-Llama', but 'org/renamed' is served" in str(caught.value)
    assert "--store-base-model org/Tiny-Llama" in str(caught.value)
    check_base_model(info(), "org/renamed", CONFIG, alias="org/Tiny-Llama")
    check_base_model(info(), "org/renamed", CONFIG, alias="tiny-llama")
    with pytest.raises(StoreError, match="is served"):
        check_base_model(info(), "org/renamed", CONFIG, alias="another")


@pytest.mark.parametrize("alias", [None, "org/Tiny-Llama"])
def test_another_config_is_refused_field_by_field(alias):
    served = CONFIG | {"hidden_size": 96, "model_type": "qwen2"}
    with pytest.raises(StoreError) as caught:
        check_base_model(info(), "org/Tiny-Llama", served, alias=alias)
    assert "hidden_size: store 64, served model 96" in str(caught.value)
    assert "model_type: store 'llama', served model 'qwen2'" in str(caught.value)
    assert "vocab_size" not in str(caught.value)


def test_a_base_model_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert read_base_model(folder) == info(name="Tiny-Llama")
    assert read_base_model(folder, "org/x") == info(name="org/x")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_base_model_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"config\.json"):
        read_base_model(tmp_path)


def test_a_relative_folder_has_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "Tiny" / "sub").mkdir(parents=True)
    (tmp_path / "Tiny" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path / "Tiny")
    assert read_base_model(Path()).name == "Tiny"
    monkeypatch.chdir(tmp_path / "Tiny" / "sub")
    assert read_base_model(Path("..")).name == "Tiny"


def test_short_names():
    assert short_name("org/model") == "model"
    assert short_name("model") == "model"
    assert short_name("/a/b/model//") == "model"
    assert short_name("models--a--b-c/snapshots/x") == "b-c"
    assert short_name("C:\\\\models\\\\Llama 3\\\\".replace("\\\\", "\\")) == "Llama 3"


def test_a_mere_number_is_no_name():
    """Else two models of Kaggle's, or two runs' checkpoints, would be one."""
    for path in ("/kaggle/input/gemma/pytorch/2b/1", "runs/sql/checkpoint-500"):
        assert short_name(path) == short_name(path + "/") == path
    assert short_name("/models/qwen2.5") == "qwen2.5"
    stored = BaseModelInfo(name="/kaggle/input/gemma/pytorch/2b/1")
    check_base_model(stored, "/kaggle/input/gemma/pytorch/2b/1/", {})
    with pytest.raises(StoreError, match="is served"):
        check_base_model(stored, "/kaggle/input/llama-3/pytorch/8b/1", {})


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
