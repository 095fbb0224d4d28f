"""`docs/store-format.md` is enough to write a reader: here is one that knows nothing of vllm-jd."""

import json
import struct
from hashlib import sha256
from itertools import product
from math import prod

import numpy as np
import pytest

from tests.compressor.read.moe_folders import QWEN, own_layers
from tests.compressor.read.test_vera import save_vera
from tests.several_rows import compress
from tests.store.stores import RICH_KINDS, write_rich
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.store import Store

# --- the reader: json, struct, hashlib and numpy ---

TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1"}


def tensors(data):
    size = struct.unpack("<Q", data[:8])[0]
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            dtype, shape = TYPES.get(entry["dtype"], "u1"), entry["shape"]
            start = 8 + size + entry["data_offsets"][0]
            array = np.frombuffer(data, dtype, prod(shape), start).reshape(shape)
            bf16 = entry["dtype"] == "BF16"
            yield name, (array.astype("<u4") << 16).view("<f4") if bf16 else array


def rounded(x, dtype):
    if dtype != "bfloat16":
        return x.astype(dtype).astype("f4")
    bits = x.astype("f4").view("u4")  # to the nearest, ties to even
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view("f4")


def numbers(files, name, width, dtype):
    parts = [np.zeros((0, width), "f4")]
    for file in files:
        if name in file:
            part = file[name]
            if f"{name}.steps" in file:
                if part.dtype == np.uint8:
                    halves = np.stack([part & 15, part >> 4], axis=2).reshape(
                        len(part), 2 * part.shape[1]
                    )
                    part = halves[:, :width].astype("f4") - 8
                steps = np.repeat(file[f"{name}.steps"], 32, axis=1)[:, :width]
                part = rounded(part.astype("f4") * steps, dtype)
            parts.append(part.astype("f4"))
    return np.concatenate(parts)


def deltas(path):
    """Yield (adapter, layer, B·A) of a store, float64; of experts a layer for each."""
    number, digest = (path / "CURRENT").read_text().split()
    folder = path / "generations" / number
    text = (folder / "manifest.json").read_bytes()
    assert sha256(text).hexdigest() == digest
    manifest = json.loads(text)
    assert manifest["schema_version"] == 2
    files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    for name, info in manifest["files"].items():
        assert (len(files[name]), sha256(files[name]).hexdigest()) == (
            info["bytes"],
            info["sha256"],
        )
    table = dict(tensors(files["adapters.safetensors"]))
    bases = [dict(tensors(files[name])) for name in manifest["basis_shards"]]
    cores = [dict(tensors(files[shard["file"]])) for shard in manifest["core_shards"]]
    dtype = manifest["dtype"]
    cores = numbers(cores, "cores", manifest["core_row"], dtype)
    ends = table["name_offsets"]
    for j, module in enumerate(manifest["modules"]):
        name, widths = module["name"], {"U": "d_out", "V": "d_in", "scales": "d_out"}
        u, v, scales = (
            numbers(bases, f"{name}.{pool}", module[width], dtype).astype("f8")
            for pool, width in widths.items()
        )
        each = max(1, module["experts"])
        found = [file[f"{name}.clusters"] for file in bases if f"{name}.clusters" in file]
        rows = np.concatenate([x.reshape(-1, each, 5) for x in [np.zeros((0, 5), "i4"), *found]])
        for i, e in product(range(manifest["adapters"]), range(each)):
            adapter = bytes(table["names"][ends[i] : ends[i + 1]]).decode()
            total = np.zeros((module["d_out"], module["d_in"]))
            for v_start, u_start, rank, kind, scale_row in rows[
                [row for row in table["cluster"][i, j] if row >= 0], e
            ]:
                sigma = np.eye(rank)
                if kind:
                    first = module["core_offset"] + e * module["core_size"] // each
                    core = cores[i, first:].astype("f8")
                    sigma = core[: rank**2].reshape(rank, rank) if kind == 1 else core[:rank]
                    sigma = np.diag(sigma) if kind == 2 else sigma
                part = u[u_start : u_start + rank].T @ sigma @ v[v_start : v_start + rank]
                total += part if scale_row < 0 else scales[scale_row][:, None] * part
            experts, _, projection = name.rpartition(".")
            yield adapter, f"{experts}.{e}.{projection}" if module["experts"] else name, total


# --- what it must agree with ---


def check(path):
    store = Store.open(path)
    found = {(adapter, layer): delta for adapter, layer, delta in deltas(path)}
    assert len(found) == len(store) * sum(info.each for info in store.manifest.modules)
    seen = 0
    for name in store.names:
        factors = store.factors(name)
        for info, e in [(i, e) for i in store.manifest.modules for e in range(i.each)]:
            layer = info.layer(e)
            delta = found[name, layer]
            if layer not in factors:
                assert not delta.any()
                continue
            b, a = (side.double().numpy() for side in factors[layer])
            scale = np.abs(delta).max()
            assert scale > 0
            # `factors` multiplies out in float32.
            np.testing.assert_allclose(delta, b @ a, rtol=0, atol=2e-6 * scale)
            seen += 1
    assert seen
    return store


@pytest.mark.parametrize(("quantised", "dtype"), RICH_KINDS)
def test_all_that_the_format_knows(tmp_path, quantised, dtype):
    """Scales, shared vectors, cores of both kinds, several shards, an adapter without anything."""
    write_rich(tmp_path / "store", quantised=quantised, dtype=dtype)
    check(tmp_path / "store")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_vera_adapters_as_they_are(tmp_path, dtype):
    for i in range(3):
        save_vera(tmp_path / "in" / f"a{i}", i)
    collection = read_adapters([tmp_path / "in"])
    compress(collection, tmp_path / "store", Settings(method="none", store_dtype=dtype))
    store = check(tmp_path / "store")
    assert all(info.scale_rows == 3 for info in store.manifest.modules)


KINDS = {
    "bfloat16": {"rank": 3, "clusters": 2},
    "float16, a cluster a module": {
        "rank": 3,
        "clusters": 2,
        "store_dtype": "float16",
    },
    "float32": {"rank": 5, "store_dtype": "float32"},
    "int8": {"rank": 3, "clusters": 2, "store_dtype": "int8"},
    "int4": {"rank": 3, "clusters": 2, "store_dtype": "int4"},
    "int4, a diagonal": {"method": "jd-diag", "rank": 5, "store_dtype": "int4"},
    "private rows and a mean": {"rank": 3, "clusters": 2},
    "int4, private rows and a mean": {"rank": 3, "store_dtype": "int4"},
    "kept as they were": {"rank": 2, "max_adapter_error": 0.3},
    "none": {"method": "none"},
    "svd": {"method": "svd", "rank": 2, "store_dtype": "int8"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_agrees_with_the_stores_own(tmp_path, write_adapters, kind):
    folders = write_adapters(tmp_path / "in", 7, kind="real", ranks=(2, 4))
    rows = {"own": 1, "mean": 2} if "a mean" in kind else {}
    settings = Settings(**KINDS[kind])
    apart = "a cluster a module" in kind
    compress(read_adapters(folders[:6]), tmp_path / "store", settings, **rows, by_module=apart)
    check(tmp_path / "store")
    if not rows:
        add(tmp_path / "store", read_adapters(folders[6:]))
    remove(tmp_path / "store", ["adapter-001"])
    store = check(tmp_path / "store")
    assert (store.generation, store.manifest.rows) == ((2, 3) if rows else (3, 1))


@pytest.mark.parametrize("kind", ["joint", "separate, int4", "kept as they were", "none"])
def test_experts(tmp_path, kind):
    """Shared and own bases, cores of each expert, and experts that adapters lack."""
    options = {
        "joint": {"rank": 3, "clusters": 2, "experts": "joint"},
        "separate, int4": {"rank": 3, "store_dtype": "int4"},
        "kept as they were": {"rank": 3, "max_adapter_error": 0.5},
        "none": {"method": "none"},
    }
    for i in range(5):
        own_layers(tmp_path / "in" / f"a{i}", QWEN, seed=i, experts=(0, 1, 3) if i else (2,))
    folders = [tmp_path / "in" / f"a{i}" for i in range(5)]
    compress(read_adapters(folders[:4]), tmp_path / "store", Settings(**options[kind]))
    add(tmp_path / "store", read_adapters(folders[4:]))
    remove(tmp_path / "store", ["a1"])
    assert all(info.experts == 4 for info in check(tmp_path / "store").manifest.modules)
