"""Adapters added to a store, and removed from it."""

import shutil

import pytest
import torch

from tests.compressor.change.made import (
    METHODS,
    SHAPES,
    Made,
    bits,
    build,
    check_errors,
    delta,
    linked,
    relative,
    source,
)
from vllm_jd.compressor import AdapterError, Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors, VeraFactors
from vllm_jd.compressor.change.incremental import add, recompress, remove
from vllm_jd.compressor.report.summary import store_summary
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL
from vllm_jd.store import Store, StoreError, writing
from vllm_jd.store.generations import open_number, prune
from vllm_jd.store.part import ModulePart

# --- add ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_added_adapters_have_true_errors_and_the_others_keep_every_bit(
    tmp_path, some, method, dtype
):
    before = build(tmp_path / "s", some(0, 7), **METHODS[method], store_dtype=dtype)
    expected = bits(before)
    after = add(tmp_path / "s", Made(some(7, 12)))
    assert after.generation == 2
    assert after.names == [*before.names, *some(7, 12)]
    found = bits(after)
    assert all(found[name] == expected[name] for name in before.names)
    check_errors(after, some(7, 12))
    assert (after.exact_error is not None) == (dtype in ("int8", "int4"))
    assert {"bases-00000.safetensors"} <= linked(after, before)
    for shard in before.manifest.core_shards:
        assert shard.file in linked(after, before)
    assert after.manifest.settings == before.manifest.settings
    store_summary(after)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_adding_what_was_compressed_gives_what_compress_gave(tmp_path, some, method, dtype):
    adapters = some(0, 9)
    first = build(tmp_path / "s", adapters, **METHODS[method], store_dtype=dtype)
    again = add(tmp_path / "s", Made(adapters), replace=True)
    assert again.names == first.names
    assert torch.equal(again.chosen, first.chosen)
    torch.testing.assert_close(again.error, first.error, rtol=1e-4, atol=1e-7)
    n = len(first)
    tolerance = {"float32": 1e-5, "int8": 2e-2}[dtype]
    scale = float(first.cores(0, n).abs().max()) if first.manifest.core_row else 1.0
    torch.testing.assert_close(again.cores(0, n), first.cores(0, n), rtol=0, atol=tolerance * scale)


def best_errors(store, module, expected):
    """The least relative squared error that each cluster's stored bases allow: dense, float64."""
    bases = store.bases(module)
    info = store.manifest.modules[store.module_index(module)]
    errors = []
    for v_start, u_start, rank, kind, _ in bases.rows[: info.shared].tolist():
        u = bases.u[u_start : u_start + rank].double()
        v = bases.v[v_start : v_start + rank].double()
        if kind == CORE_FULL:
            found = torch.linalg.pinv(u) @ u @ expected @ torch.linalg.pinv(v) @ v
        elif kind == CORE_DIAGONAL:
            design = torch.einsum("ro,ri->oir", u, v).flatten(0, 1)
            core = torch.linalg.lstsq(design, expected.flatten()[:, None]).solution
            found = (design @ core).view(expected.shape)
        else:
            found = u.T @ v
        errors.append(relative(found, expected))
    return torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("method", ["jd-full", "jd-diag", "hydraopt", "ties"])
def test_the_cluster_that_loses_least_is_chosen(tmp_path, some, method):
    build(tmp_path / "s", some(0, 9), **METHODS[method], store_dtype="float32")
    new = some(9, 20)
    store = add(tmp_path / "s", Made(new))
    shared = [info.shared for info in store.manifest.modules]
    for name in new:
        row = store.index(name)
        errors = torch.stack([best_errors(store, m, source(new, name, m)) for m in SHAPES])
        chosen = store.chosen[row, :, 0].long()
        if method in ("jd-full", "jd-diag"):
            assert chosen.tolist() == [int(errors.sum(0).argmin())] * len(SHAPES)
        else:
            assert chosen.tolist() == errors.argmin(1).tolist()
        expected = errors.gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(store.error[row].double(), expected, rtol=1e-3, atol=1e-6)
    if max(shared) > 1:
        assert len(set(store.chosen[9:, :, 0].flatten().tolist())) > 1


def test_sources_are_kept(tmp_path, some):
    first = Made(some(0, 3))
    first.sources = ["org/one@1", None, "org/three@3"]
    compress(first, tmp_path / "s", Settings(rank=2))
    more = Made(some(3, 5))
    more.sources = [None, "org/five@5"]
    add(tmp_path / "s", more)
    store = remove(tmp_path / "s", ["adapter-00"])
    assert store.sources == [None, "org/three@3", None, "org/five@5"]
    assert b"org/one" not in (store.folder / "adapters.safetensors").read_bytes()


def test_exact_error_is_that_of_the_best_core_on_the_stored_bases(tmp_path, some):
    build(tmp_path / "s", some(0, 8), rank=3, store_dtype="int4")
    new = some(8, 11)
    store = add(tmp_path / "s", Made(new))
    for name in new:
        for column, module in enumerate(SHAPES):
            (best,) = best_errors(store, module, source(new, name, module)).tolist()
            exact = float(store.exact_error[store.index(name), column])
            assert exact == pytest.approx(best, rel=1e-3)
            assert exact < float(store.error[store.index(name), column])


def test_absent_modules_and_zeros(tmp_path, some):
    new = some(8, 12)
    del new["adapter-08"]["m.0"]
    new["adapter-09"] = {m: (torch.zeros_like(b), a) for m, (b, a) in new["adapter-09"].items()}
    del new["adapter-10"]["m.1"]
    for method in METHODS:
        build(tmp_path / method, some(0, 8), **METHODS[method])
        store = add(tmp_path / method, Made(new))
        check_errors(store, {name: f for name, f in new.items() if name != "adapter-09"})
        if method not in ("ties", "hydraopt"):  # they have something for everyone
            assert not any(delta(store, "adapter-09", module).any() for module in SHAPES)
        assert store.error[store.index("adapter-09")].tolist() == [0, 0]
    only = Made({"x": {"m.1": some(0, 1)["adapter-00"]["m.1"]}}, {"m.1": SHAPES["m.1"]})
    store = add(tmp_path / "jd-full", only)
    assert list(store.factors("x")) == ["m.1"]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("jd-full", "float32"), ("one cluster", "int8"), ("svd", "float32"), ("hydraopt", "int8")],
)
def test_adapters_above_the_limit_are_kept_as_they_are(tmp_path, some, make_factors, method, dtype):
    strange = make_factors(2, ranks=(4,), shapes=SHAPES, seed=99)
    new = some(8, 11) | {"x": strange[0], "y": strange[1]}
    most = 0.1 if method == "svd" else 0.3
    for limit, asked in ((None, most), (most, None)):
        path = tmp_path / str(limit)
        options = METHODS[method] | {"max_adapter_error": limit, "store_dtype": dtype}
        build(path, some(0, 8), **options)
        loose = add(path, Made(new), max_adapter_error=1e9)
        errors = {name: float(loose.error[loose.index(name)].mean()) for name in new}
        far = {name for name in new if errors[name] > most}
        store = add(path, Made(new), max_adapter_error=asked, replace=True)
        assert {"x", "y"} <= far
        summary = {line["name"]: line for line in store_summary(store)["adapters"]}
        for name in new:
            if method != "svd" or name in far:  # rank 2 is all that some adapters have
                assert summary[name]["uncompressed"] == (name in far)
        check_errors(store, new)
        lossless = 1e-9 if dtype == "float32" else 1e-3
        assert all(float(store.error[store.index(name)].max()) < lossless for name in far)
        assert store.manifest.settings.get("max_adapter_error") == limit


def test_numbers_too_large_for_the_store_are_refused(tmp_path, some, tree):
    build(tmp_path / "s", some(0, 5), rank=3, store_dtype="float16")
    huge = {"huge": {m: (1e6 * b, a) for m, (b, a) in some(5, 6)["adapter-05"].items()}}
    before = tree(tmp_path / "s")
    with pytest.raises(AdapterError, match=r"huge: m\.0: too large for float16"):
        add(tmp_path / "s", Made(huge | some(6, 8)))
    assert tree(tmp_path / "s") == before


def test_what_does_not_fit_the_store_is_refused_and_all_of_it_is_said(tmp_path, some, tree):
    build(tmp_path / "s", some(0, 5), rank=3)
    before = tree(tmp_path / "s")
    other = Made(some(3, 7), {"m.0": (16, 13), "m.7": (16, 12)}, base_model="org/large")
    with pytest.raises(AdapterError) as caught:
        add(tmp_path / "s", other)
    faults = "\n".join(caught.value.faults)
    assert "'org/large', expected 'org/tiny'" in faults
    assert "1 modules that the store has no bases for (m.7)" in faults
    assert "recompress" in faults
    assert "m.0: found a layer of [13, 16] (d_out, d_in), the store's has [12, 16]" in faults
    assert "adapter-03, adapter-04 (2 in all)" in faults
    assert tree(tmp_path / "s") == before
    # The same model by another path, or unnamed.
    assert len(add(tmp_path / "s", Made(some(5, 6), base_model="/models/Tiny/"))) == 6
    assert len(add(tmp_path / "s", Made(some(6, 7), base_model="unknown"))) == 7


def test_replaced_adapters_are_the_new_ones(tmp_path, some):
    old = build(tmp_path / "s", some(0, 6), **METHODS["guarded"])
    news = {"adapter-02": some(20, 21)["adapter-20"], "b": some(21, 22)["adapter-21"]}
    with pytest.raises(AdapterError, match="adapter-02"):
        add(tmp_path / "s", Made(news))
    store = add(tmp_path / "s", Made(news), replace=True)
    assert store.names == [
        "adapter-00",
        "adapter-01",
        "adapter-03",
        "adapter-04",
        "adapter-05",
        "adapter-02",
        "b",
    ]
    check_errors(store, news)
    before, after = bits(old), bits(store)
    assert all(
        after[name] == before[name]
        for name in ("adapter-00", "adapter-01", "adapter-03", "adapter-04", "adapter-05")
    )


def test_no_store_no_folder(tmp_path, some):
    for change in (
        lambda path: add(path, Made(some(0, 1))),
        lambda path: remove(path, ["a"]),
        lambda path: recompress(path, Made(some(0, 1))),
        lambda path: prune(path, 0),
        lambda path: open_number(path, 1),
    ):
        with pytest.raises(StoreError, match="no such folder"):
            change(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_second_writer_is_refused(tmp_path, some):
    build(tmp_path / "s", some(0, 3), rank=2)
    with writing(tmp_path / "s"):
        for change in (
            lambda: add(tmp_path / "s", Made(some(3, 4))),
            lambda: remove(tmp_path / "s", ["adapter-00"]),
            lambda: recompress(tmp_path / "s", Made(some(3, 4))),
            lambda: prune(tmp_path / "s", 0),
        ):
            with pytest.raises(StoreError, match="another process is writing"):
                change()


def test_many_single_adds_make_few_files(tmp_path, some):
    """As a binary counter: joined with the last file while that is not larger."""
    build(tmp_path / "s", some(0, 8), **METHODS["guarded"])
    expected = {}
    for i in range(8, 28):
        store = add(tmp_path / "s", Made(some(i, i + 1)))
        expected[f"adapter-{i:02d}"] = bits(store)[f"adapter-{i:02d}"]
        rows = [shard.adapters for shard in store.manifest.core_shards]
        assert sum(rows) == i + 1
        assert rows == sorted(set(rows), reverse=True)
        assert len(rows) <= 6
        assert len(store.manifest.basis_shards) <= 2 + 6
    found = bits(store)
    assert all(found[name] == value for name, value in expected.items())


# --- remove ---


@pytest.mark.parametrize("method", METHODS)
def test_removed_data_is_in_no_file(tmp_path, some, method):
    dtype = "int8" if method in ("guarded", "none") else "float32"
    build(tmp_path / "s", some(0, 8), **METHODS[method], store_dtype=dtype)
    before = add(tmp_path / "s", Made(some(8, 12)), max_adapter_error=0.05)
    expected = bits(before)
    gone = ["adapter-01", "adapter-09", "adapter-04", "adapter-11"]
    private = set()  # rows that only these have: their cores and what their own lines cover
    for name in gone:
        row = before.index(name)
        for column, info in enumerate(before.manifest.modules):
            for line in before.chosen[row, column].tolist():
                if line >= info.shared:
                    private.add((info.name, line))
    store = remove(tmp_path / "s", gone)
    assert store.names == [name for name in before.names if name not in gone]
    found = bits(store)
    assert all(found[name] == expected[name] for name in store.names)
    Store.open(tmp_path / "s")
    for info, old in zip(store.manifest.modules, before.manifest.modules, strict=True):
        lines = [line for module, line in private if module == info.name]
        table = before.rows(info.name)
        assert info.rows == old.rows - len(lines)
        assert info.u_vectors == old.u_vectors - int(table[lines, 2].sum())
        assert info.v_vectors == old.v_vectors - int(table[lines, 2].sum())
        left = store.bases(info.name)
        whole = before.bases(info.name)
        for line in lines:
            v_start, u_start, rank, _, _ = table[line].tolist()
            for row in whole.u[u_start : u_start + rank]:
                assert not (left.u == row).all(dim=1).any()
            for row in whole.v[v_start : v_start + rank]:
                assert not (left.v == row).all(dim=1).any()
    if store.manifest.core_row:
        kept = [before.index(name) for name in store.names]
        assert torch.equal(store.cores(0, len(store)), before.cores(0, len(before))[kept])
    content = b"".join(file.read_bytes() for file in store.folder.iterdir())
    assert not any(name.encode() in content for name in gone)
    assert a_hash(before, "adapter-01") in (before.folder / "adapters.safetensors").read_bytes()
    assert not any(a_hash(before, name) in content for name in gone)


def a_hash(store, name):
    return bytes(store.source_sha256[store.index(name)].tolist())


def test_files_that_hold_none_of_the_removed_are_linked(tmp_path, some):
    build(tmp_path / "s", some(0, 8), **METHODS["jd-full"], max_adapter_error=0.0)
    add(tmp_path / "s", Made(some(8, 12)))
    before = add(tmp_path / "s", Made(some(12, 14)))
    assert before.manifest.basis_shards == [
        *(f"bases-{i:05d}.safetensors" for i in range(3)),
        "clusters.safetensors",
    ]
    cores = [f"cores-{i:05d}.safetensors" for i in range(3)]
    assert [shard.file for shard in before.manifest.core_shards] == cores
    for name, touched in (("adapter-03", 0), ("adapter-09", 1), ("adapter-13", 2)):
        store = remove(tmp_path / "s", [name])
        common = linked(store, before)
        for i in range(3):
            assert (f"bases-{i:05d}.safetensors" in common) == (i != touched)
            assert (cores[i] in common) == (i != touched)
        before = store
    store = remove(tmp_path / "s", ["adapter-12"])
    assert "bases-00002.safetensors" not in store.manifest.files
    assert [shard.adapters for shard in store.manifest.core_shards] == [7, 3]
    check_errors(store, {n: f for n, f in some(0, 12).items() if n in store})


def rows_of_nobody(store):
    """(module, row) of rows that no adapter chooses and that are not shared."""
    return [
        (info.name, row)
        for column, info in enumerate(store.manifest.modules)
        for row in range(info.shared, info.rows)
        if not bool((store.chosen[:, column] == row).any())
    ]


def test_adapters_kept_as_they_are_leave_no_rows_of_nobody(tmp_path, some, monkeypatch):
    build(tmp_path / "s", some(0, 8), **METHODS["svd"])
    before = {path: shutil.copytree(tmp_path / "s", tmp_path / path) for path in ("now", "once")}
    store = add(before["now"], Made(some(8, 11)), max_adapter_error=0.0)
    assert store_summary(store)["uncompressed"] >= 3
    assert not rows_of_nobody(store)
    # Earlier versions left what the method had made of them: it goes with the next removal.
    monkeypatch.setattr(ModulePart, "without_private", lambda part, adapters: part)
    made = add(before["once"], Made(some(8, 11)), max_adapter_error=0.0)
    assert rows_of_nobody(made)
    store = remove(before["once"], ["adapter-09"])
    assert not rows_of_nobody(store)
    found, expected = bits(store), bits(made)
    assert all(found[name] == expected[name] for name in store.names)


def test_unknown_names_and_the_last_adapter(tmp_path, some, tree):
    build(tmp_path / "s", some(0, 3), rank=2)
    before = tree(tmp_path / "s")
    with pytest.raises(
        StoreError, match=r"(?s)nothing was removed.*'adapter-0x'.*did you mean adapter-0.*'zzz'"
    ):
        remove(tmp_path / "s", ["adapter-01", "adapter-0x", "zzz"])
    with pytest.raises(StoreError, match="all 3 adapters, but a store has at least one"):
        remove(tmp_path / "s", ["adapter-01", "adapter-00", "adapter-02", "adapter-01"])
    assert tree(tmp_path / "s") == before
    assert remove(tmp_path / "s", iter(["adapter-01", "adapter-01"])).names == [
        "adapter-00",
        "adapter-02",
    ]


# --- VeRA ---


class MadeVera(Made):
    """VeRA adapters in memory, over projections that all share: name → module → (λ_d, λ_b)."""

    method = "VERA"

    def __init__(self, first, last, modules=SHAPES):
        generator = torch.Generator().manual_seed(7)
        self.projections = {
            m: (
                torch.randn(6, d_in, generator=generator),
                torch.randn(d_out, 6, generator=generator),
            )
            for m, (d_in, d_out) in SHAPES.items()
        }
        adapters = {}
        for i in range(last):
            adapters[f"adapter-{i:02d}"] = {
                m: (torch.randn(6, generator=generator), torch.randn(d_out, generator=generator))
                for m, (_, d_out) in SHAPES.items()
            }
        chosen = list(adapters)[first:last]
        super().__init__({n: {m: adapters[n][m] for m in modules} for n in chosen})

    def factors(self, module):
        pairs = [
            f.get(module, (torch.zeros(6), torch.zeros(SHAPES[module][1])))
            for f in self.adapters.values()
        ]
        present = torch.tensor([module in f for f in self.adapters.values()])
        d, b = (torch.stack(side) for side in zip(*pairs, strict=True))
        return ModuleFactors.of_vera(VeraFactors(d, b, *self.projections[module]), present)

    def dense(self):
        """name → module → (B, A) of the same deltas."""
        return {
            n: {
                m: (b[:, None] * self.projections[m][1] * d, self.projections[m][0])
                for m, (d, b) in modules.items()
            }
            for n, modules in self.adapters.items()
        }


@pytest.mark.parametrize("method", ["jd-full", "guarded", "svd", "hydraopt"])
def test_vera_adapters_are_added_and_removed(tmp_path, some, method):
    path = tmp_path / "s"
    before = compress(MadeVera(0, 5), path, Settings(**METHODS[method], store_dtype="float32"))
    new = MadeVera(5, 8)
    expected = bits(before)
    store = add(path, new)
    check_errors(store, new.dense())
    found = bits(store)
    assert all(found[name] == expected[name] for name in before.names)
    kept = add(path, MadeVera(5, 6), replace=True, max_adapter_error=0.0)
    check_errors(kept, MadeVera(5, 6).dense())
    store = remove(path, ["adapter-00", "adapter-05", "adapter-06"])
    left = bits(store)
    assert all(left[name] == found[name] for name in store.names)
    # What is no longer chosen may be gone, and what is chosen now is there.
    store = add(path, MadeVera(3, 4), replace=True)
    check_errors(store, MadeVera(3, 4).dense())
    with pytest.raises(AdapterError, match="found LORA adapters, expected VERA"):
        add(path, Made(some(10, 11)))


def test_vera_vectors_of_removed_adapters_are_in_no_file(tmp_path):
    path = tmp_path / "s"
    adapters = MadeVera(0, 5)
    before = compress(adapters, path, Settings(method="none", store_dtype="float32"))
    expected = bits(before)
    store = remove(path, ["adapter-01", "adapter-03"])
    assert all(bits(store)[name] == expected[name] for name in store.names)
    content = b"".join(file.read_bytes() for file in store.folder.iterdir())
    for row, (name, modules) in enumerate(adapters.adapters.items()):
        vectors = [scale for _, scale in modules.values()] + [before.cores(row, row + 1)[0]]
        for vector in vectors:
            assert (vector.numpy().tobytes() in content) == (name in store)
    assert [info.rows for info in store.manifest.modules] == [3, 3]
    check_errors(store, {n: f for n, f in adapters.dense().items() if n in store})
    with pytest.raises(AdapterError, match="keeps VERA adapters as they are"):
        add(path, MadeVera(5, 6))
