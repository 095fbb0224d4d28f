"""What compressing a module records and stores, against dense float64 computations."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_jd.compressor import AdapterError, Settings
from vllm_jd.compressor.algebra.approximation import Shared, best_cores, relative_errors
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.report.summary import store_summary, uncompressed_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_DIAGONAL, CORE_FULL
from vllm_jd.store import Store
from vllm_jd.store.quantise import dequantise, quantise

property_test = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

SHAPES = {"m.k": (20, 6), "m.down": (37, 18)}
DTYPES = ["float32", "bfloat16", "float16", "int8", "int4"]


class MemoryCollection:
    """Adapters in memory: a list of module → (B, A), or nothing where an adapter lacks it."""

    base_model = "org/tiny"

    def __init__(self, adapters):
        self.adapters = adapters
        self.shapes = SHAPES
        n = len(adapters)
        self.names = [f"a{i:02d}" for i in range(n)]
        self.source_sha256 = [f"{i:064x}" for i in range(n)]
        self.source_bytes = [1] * n
        self.factor_bytes = 1000

    def factors(self, module):
        pairs = [adapter.get(module) for adapter in self.adapters]
        pairs = [None if pair is None else (pair[1], pair[0]) for pair in pairs]
        return ModuleFactors.stack(pairs, *self.shapes[module])

    def delta(self, i, module):
        b, a = self.adapters[i][module]
        return b.double().numpy() @ a.double().numpy()

    def deltas(self):
        """(row, module, delta) of everything that is there."""
        for i, adapter in enumerate(self.adapters):
            for module in adapter:
                yield i, module, self.delta(i, module)


@pytest.fixture(scope="module")
def collection_of(make_factors):
    def collection_of(n=6, *, ranks=(3,), missing=False, seed=0):
        """Adapters that compress, but not perfectly; with `missing`, half of them lack a module."""
        adapters = make_factors(n, kind="real", ranks=ranks, shapes=SHAPES, seed=seed, shared=4)
        for i, factors in enumerate(adapters):
            for j, module in enumerate(SHAPES):
                b, a = factors[module]
                factors[module] = (b * (0.5 + i % 3), a)
                if missing and i % 4 == j:
                    del factors[module]
        return MemoryCollection(adapters)

    return collection_of


def square(delta):
    """‖D‖²_F."""
    return float(np.sum(delta * delta))


def stored_deltas(store):
    """(row, module) → what the store adds, dense float64, from its factors."""
    return {
        (i, module): b.double().numpy() @ a.double().numpy()
        for i, name in enumerate(store.names)
        for module, (b, a) in store.factors(name).items()
    }


def dense_errors(store, collection):
    """Relative squared errors of everything that is there, float64 `[n, m]`, else 0."""
    found = stored_deltas(store)
    errors = np.zeros((len(store), len(SHAPES)))
    present = set()
    for i, module, delta in collection.deltas():
        total = square(delta)
        left = square(delta - found[i, module])
        errors[i, store.module_index(module)] = left / total if total else left
        present.add((i, module))
    assert found.keys() == present
    return errors


def check_errors(recorded, expected):
    """Equal up to what float32 factors can say: a relative 3e-6 of the adapter's norm."""
    recorded = recorded.double().numpy()
    np.testing.assert_allclose(np.sqrt(recorded), np.sqrt(expected), rtol=2e-4, atol=3e-6)


def build(tmp_path, collection, **options):
    method = options.pop("method", "jd-full")
    settings = replace(Settings(method).adapted(rank=3, iterations=3), **options)
    store = compress(collection, tmp_path / "store", settings)
    return Store.open(store.path)


# --- what is recorded is true ---


@pytest.fixture(scope="module")
def exact():
    """Errors of float32 stores, by method and case, for the same test of another dtype."""
    return {}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *itertools.product(("jd-full", "svd", "none"), DTYPES),
        ("jd-diag", "int4"),
    ],
)
def test_recorded_errors_are_those_of_the_published_store(
    tmp_path, collection_of, exact, method, dtype
):
    """Every combination of clusters, missing adapters and ranks."""
    shares = method.startswith("jd")
    grid = itertools.product((1, 2) if shares else (1,), (False, True))
    step = 3 if method == "jd-diag" else 1  # which is slow, and differs in its cores alone
    for case, (clusters, missing) in list(enumerate(grid))[::step]:
        ranks = ((3,), (1, 4, 2))[(case + case // 2) % 2]
        collection = collection_of(6 - case % 2, ranks=ranks, missing=missing, seed=case)
        options = {"method": method}
        if shares:
            options["clusters"] = clusters
        store = build(tmp_path, collection, store_dtype=dtype, **options)
        check_errors(store.error, dense_errors(store, collection))
        norms = np.zeros(store.norm.shape)
        for i, module, delta in collection.deltas():
            norms[i, store.module_index(module)] = np.sqrt(square(delta))
        np.testing.assert_allclose(store.norm.numpy(), norms, rtol=1e-5)
        assert (store.exact_error is None) == (dtype not in ("int8", "int4"))
        if store.exact_error is not None:
            if (method, case) not in exact:
                whole = build(tmp_path, collection, store_dtype="float32", **options)
                exact[method, case] = dense_errors(whole, collection)
            check_errors(store.exact_error, exact[method, case])
        assert store.manifest.rows == store.chosen.shape[2] == 1
        has = np.array([[module in one for module in SHAPES] for one in collection.adapters])
        assert np.array_equal(store.present.numpy(), has)
        summary = store_summary(store)
        expected = store.error.double().numpy()[has].mean()
        assert summary["error"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if method != "svd":  # which leaves adapters of its own rank as they are
            assert summary["uncompressed"] == (len(store) if method == "none" else 0)


def test_a_store_of_none_holds_the_adapters_themselves(tmp_path, collection_of):
    collection = collection_of(5, ranks=(1, 4), missing=True)
    store = build(tmp_path, collection, method="none", store_dtype="float32")
    for i, module, _ in collection.deltas():
        b, a = store.factors(store.names[i])[module]
        assert torch.equal(b, collection.adapters[i][module][0])
        assert torch.equal(a, collection.adapters[i][module][1])
    assert float(store.error.max()) < 1e-12
    half = build(tmp_path, collection, method="none", store_dtype="bfloat16")
    for i, module, _ in collection.deltas():
        b, a = half.factors(half.names[i])[module]
        assert torch.equal(b, collection.adapters[i][module][0].bfloat16().float())
        assert torch.equal(a, collection.adapters[i][module][1].bfloat16().float())
    assert uncompressed_adapters(store).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_svd_is_the_best_of_its_rank(tmp_path, collection_of, rank):
    """Eckart–Young: what is lost are the singular values beyond the rank."""
    collection = collection_of(6, ranks=(1, 5, 3), missing=True)

    tails = np.zeros((6, len(SHAPES)))
    for i, module, delta in collection.deltas():
        values = np.linalg.svd(delta, compute_uv=False)
        tails[i, list(SHAPES).index(module)] = sum(values[rank:] ** 2) / sum(values**2)
    store = build(tmp_path, collection, method="svd", rank=rank, store_dtype="float32")
    check_errors(store.error, tails)
    for dtype in ("int8", "int4"):
        rounded = build(tmp_path, collection, method="svd", rank=rank, store_dtype=dtype)
        check_errors(rounded.exact_error, tails)


# --- cores ---


def lstsq_errors(factors, shared):
    """The least squared relative error that any cores give, by lstsq on vec(UΣVᵀ)."""
    deltas = []
    a, b = factors.a.double().numpy(), factors.b.double().numpy()
    start = 0
    for rank in factors.ranks.tolist():
        deltas.append(b[start : start + rank].T @ a[start : start + rank])
        start += rank
    errors, cores = [], []
    for delta, cluster in zip(deltas, shared.assignment.tolist(), strict=True):
        total = np.sum(delta**2)
        if cluster < 0:
            errors.append(float(total > 0))
            cores.append(np.zeros(shared.core_size))
            continue
        u, v = (side.double().numpy() for side in shared.bases(cluster))
        if shared.core == CORE_FULL:
            design = np.einsum("ik,jl->ijkl", u, v).reshape(delta.size, -1)
        else:
            design = np.einsum("ik,jk->ijk", u, v).reshape(delta.size, -1)
        core = np.linalg.lstsq(design, delta.flatten(), rcond=1e-10)[0]
        left = delta.flatten() - design @ core
        errors.append(np.sum(left**2) / total if total else 0.0)
        cores.append(core)
    return np.array(errors), np.stack(cores)


def random_bases(kind, clusters, rank, d, generator):
    basis = torch.randn(clusters, rank, d, generator=generator)
    if kind == "orthonormal":
        basis = torch.linalg.qr(basis.mT).Q.mT.contiguous()
    elif kind == "rounded":
        basis = torch.linalg.qr(basis.mT).Q.mT.contiguous().bfloat16().float()
    elif kind == "nearly collinear":
        basis[:, 1:] = basis[:, :1] + 0.01 * basis[:, 1:]
    elif kind == "deficient":
        basis[:, -1] = 0
        basis[:, 0] = basis[:, min(1, rank - 1)]
    return basis


@property_test
@given(
    core=st.sampled_from([CORE_FULL, CORE_DIAGONAL]),
    kind=st.sampled_from(["random", "orthonormal", "rounded", "nearly collinear", "deficient"]),
    one_side=st.sampled_from(["u", "v", None]),
    scaled=st.booleans(),
    rank=st.integers(2, 5),
    ranks=st.sampled_from([(2,), (1, 3)]),
    seed=st.integers(0, 1000),
)
def test_cores_are_the_least_squares_optimum(core, kind, one_side, scaled, rank, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    n, d_in, d_out = 5, 12, 9
    pairs = [
        (
            torch.randn(ranks[i % len(ranks)], d_in, generator=generator),
            torch.randn(d_out, ranks[i % len(ranks)], generator=generator),
        )
        for i in range(n)
    ]
    pairs[3] = None
    factors = ModuleFactors.stack(pairs, d_in, d_out)
    shared = Shared(
        u=random_bases(kind, 1 if one_side == "u" else 2, rank, d_out, generator),
        v=random_bases(kind, 1 if one_side == "v" else 2, rank, d_in, generator),
        assignment=torch.tensor([0, 1, 1, 0, -1]),
        core=core,
        scales=0.5 + torch.rand(2, d_out, generator=generator) if scaled else None,
    )
    errors, cores = lstsq_errors(factors, shared)
    found = best_cores(factors, shared)
    assert found.dtype is torch.float32
    assert found.shape == (n, rank**2 if core == CORE_FULL else rank)
    if kind in ("random", "orthonormal", "rounded"):
        largest = np.abs(cores).max()
        np.testing.assert_allclose(found.double().numpy(), cores, rtol=2e-2, atol=1e-3 * largest)
    assert not found[3].any()
    assert not found[4].any()
    norms = factors.squared_norms().sqrt()
    reached = relative_errors(factors, norms, shared, found).numpy()
    np.testing.assert_allclose(reached, errors, rtol=1e-3, atol=2e-5)


# --- what is odd ---


@pytest.mark.parametrize("options", [{}, {"method": "svd"}])
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_an_adapter_of_zeros_stays_zero(tmp_path, collection_of, options, dtype):
    collection = collection_of(4)
    for module, (b, a) in collection.adapters[2].items():
        collection.adapters[2][module] = (torch.zeros_like(b), a)
    for i in range(4):  # nobody has anything but zeros here
        b, a = collection.adapters[i]["m.k"]
        collection.adapters[i]["m.k"] = (b, torch.zeros_like(a))
    store = build(tmp_path, collection, store_dtype=dtype, **options)
    found = stored_deltas(store)
    for module in SHAPES:
        assert not found[2, module].any()
    for i in range(4):
        assert not found[i, "m.k"].any()
    assert not store.error[2].any()
    check_errors(store.error, dense_errors(store, collection))


def test_what_is_too_large_for_float16_is_refused_by_name(tmp_path, collection_of):
    collection = collection_of(4)
    for module, (b, a) in collection.adapters[2].items():
        collection.adapters[2][module] = (b * 1e7, a)
    with pytest.raises(AdapterError, match=r"a02: m\.k: too large for float16"):
        build(tmp_path, collection, store_dtype="float16")
    assert not (tmp_path / "store" / "CURRENT").exists()


# --- the guard: adapters that the method would hurt too much are kept as they are ---


def rounded(matrix, dtype):
    """What a store of `dtype` makes of a matrix, float32."""
    if dtype in ("int8", "int4"):
        return dequantise(*quantise(matrix, dtype), matrix.shape[1]).bfloat16().float()
    return matrix.to(getattr(torch, dtype)).float()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"method": "jd-full", "clusters": 2}, "float32"),
        ({"method": "jd-full", "clusters": 2}, "bfloat16"),
        ({"method": "jd-full"}, "float16"),
        ({"method": "jd-full"}, "int4"),
        ({"method": "jd-diag"}, "int8"),
        ({"method": "svd", "rank": 1}, "bfloat16"),
    ],
)
def test_the_guard_keeps_exactly_the_adapters_above_the_limit(
    tmp_path, collection_of, options, dtype
):
    collection = collection_of(7, ranks=(1, 4, 2), missing=True)
    options = {"store_dtype": dtype} | options
    free = build(tmp_path / "free", collection, **options)
    has = free.rank > 0
    means = (free.error.double().sum(dim=1) / has.sum(dim=1)).numpy()
    ordered = np.sort(means)
    for limit in (float(ordered[-1]), float(ordered[2]), (ordered[4] + ordered[5]) / 2, 0.0):
        store = build(tmp_path / "guarded", collection, max_adapter_error=limit, **options)
        kept = means > limit
        assert store.manifest.settings["max_adapter_error"] == limit
        for i, name in enumerate(store.names):
            if kept[i]:
                check_kept(store, collection, i, dtype)
            else:
                shared = torch.tensor([module.shared for module in store.manifest.modules])
                lines, before = store.chosen[i], free.chosen[i]
                assert torch.equal(lines >= 0, before >= 0)
                common = before < shared[:, None]
                assert torch.equal(lines[common], before[common])
                assert torch.equal(store.error[i], free.error[i])
                assert torch.equal(store.cores(i, i + 1), free.cores(i, i + 1))
                expected = free.factors(name)
                found = store.factors(name)
                assert found.keys() == expected.keys()
                for module, pair in found.items():
                    assert all(map(torch.equal, pair, expected[module]))
        for module in SHAPES:
            one, two = store.bases(module), free.bases(module)
            shared = store.manifest.modules[store.module_index(module)].shared
            assert torch.equal(one.rows[:shared], two.rows[:shared])
            rows = int((one.rows[:shared, 1] + one.rows[:shared, 2]).max()) if shared else 0
            assert torch.equal(one.u[:rows], two.u[:rows])
            assert torch.equal(one.v[:rows], two.v[:rows])
            check_nothing_is_left_over(store, module)
        check_errors(store.error, dense_errors(store, collection))
        whole = torch.from_numpy(kept)
        found = uncompressed_adapters(store)
        assert torch.equal(found & whole, whole)
        if options["method"] != "svd":  # which leaves adapters of rank 1 as they are
            assert torch.equal(found, whole)
            assert store_summary(store)["uncompressed"] == int(kept.sum())
    assert kept.sum() >= 5, "the last limit, 0, keeps whoever lost anything"


def check_nothing_is_left_over(store, module):
    """Every private line has an owner, and every row is in a line."""
    bases, info = store.bases(module), store.manifest.modules[store.module_index(module)]
    chosen = store.chosen[:, store.module_index(module)]
    own = chosen[chosen >= info.shared].tolist()
    assert sorted(own) == list(range(info.shared, info.rows))
    for start, rows in ((0, len(bases.v)), (1, len(bases.u))):
        used = {
            row for line in bases.rows.tolist() for row in range(line[start], line[start] + line[2])
        }
        assert used == set(range(rows))


def check_kept(store, collection, i, dtype):
    factors = store.factors(store.names[i])
    assert factors.keys() == collection.adapters[i].keys()
    if store.manifest.core_row:
        assert not store.cores(i, i + 1).any()
    for module, (b, a) in collection.adapters[i].items():
        found_b, found_a = factors[module]
        assert torch.equal(found_b, rounded(b.T.contiguous(), dtype).T)
        assert torch.equal(found_a, rounded(a, dtype))
        delta = collection.delta(i, module)
        left = found_b.double().numpy() @ found_a.double().numpy() - delta
        limit = {"float32": 1e-12, "bfloat16": 3e-5, "float16": 1e-6, "int8": 1e-3, "int4": 0.05}
        assert square(left) / square(delta) < limit[dtype]


def test_parts_of_other_modules_or_settings_do_not_change_one(tmp_path, collection_of):
    """Modules are independent: alone, one is what it is among others."""
    collection = collection_of(6, ranks=(3, 1))
    options = {"store_dtype": "int8"}
    whole = build(tmp_path / "whole", collection, **options)
    alone = collection_of(6, ranks=(3, 1))
    alone.shapes = {"m.k": SHAPES["m.k"]}  # the first: the place in the list goes into the seed
    store = build(tmp_path / "alone", alone, **options)
    one, two = store.bases("m.k"), whole.bases("m.k")
    for field in ("u", "v", "scales", "rows"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    module = whole.manifest.modules[whole.module_index("m.k")]
    at = slice(module.core_offset, module.core_offset + module.core_size)
    assert torch.equal(store.cores(0, 6), whole.cores(0, 6)[:, at])


def test_settings_that_do_not_matter_to_a_method_are_refused_or_left_out(tmp_path, collection_of):
    collection = collection_of(5)
    base = Settings(method="svd", rank=2)
    with pytest.raises(ValueError, match="method svd has no option clusters, iterations; it has"):
        replace(base, clusters=3, iterations=1)
    other = replace(Settings(rank=2, clusters=3, iterations=1), method="svd")
    assert other == base == base.adapted(clusters=3, iterations=1)
    one = compress(collection, tmp_path / "one", base)
    two = compress(collection, tmp_path / "two", replace(base, seed=1))
    for file in one.manifest.files:
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()
    assert one.manifest.settings == two.manifest.settings
