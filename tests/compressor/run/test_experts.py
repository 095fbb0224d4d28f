"""Experts compressed: errors against dense products, what is shared, what is refused."""

from dataclasses import replace

import pytest
import torch

from vllm_jd.compressor import Settings
from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.change.incremental import add, remove
from vllm_jd.compressor.change.verify import check_errors
from vllm_jd.compressor.choose.blend_weights import BlendFitError, fit_blend
from vllm_jd.compressor.choose.plan import candidate_settings, plan, stored_size
from vllm_jd.compressor.errors import AdapterError, SettingsError
from vllm_jd.compressor.report.report_data import adapter_map, byte_parts, shared_clusters
from vllm_jd.compressor.report.summary import (
    adapter_summary,
    sizes,
    store_summary,
    uncompressed_adapters,
)
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import RANK, U_START, V_START
from vllm_jd.store import Store

E, D_IN, D_OUT, RANK_OF = 4, 22, 18, 2
UP, DOWN, Q = (
    "model.layers.0.mlp.experts.up_proj",
    "model.layers.1.mlp.experts.down_proj",
    "model.layers.0.self_attn.q_proj",
)


class Made:
    """A collection in memory: module → `[n, E, d_out, rank]` and `[n, E, rank, d_in]`."""

    base_model = "org/tiny-moe"

    def __init__(self, factors, names=None, experts=E):
        self.made = factors
        n = len(next(iter(factors.values()))[0])
        self.names = names or [f"a{i}" for i in range(n)]
        self.shapes = {m: (a.shape[-1], b.shape[-2]) for m, (b, a) in factors.items()}
        self.experts = {m: experts for m in factors if ".experts." in m}
        self.source_sha256 = [f"{i:064x}" for i in range(n)]
        self.source_bytes = [10**7] * n
        self.factor_bytes = 4 * sum(b.numel() + a.numel() for b, a in factors.values())

    def factors(self, module):
        b, a = (side.flatten(0, 1) for side in self.made[module])
        pairs = [None if not y.any() else (x, y) for x, y in zip(a, b, strict=True)]
        return ModuleFactors.stack(pairs, *self.shapes[module], [1.0] * len(pairs))

    def delta(self, module, i):
        """float64 `[E, d_out, d_in]`."""
        b, a = self.made[module]
        return b[i].double() @ a[i].double()

    def some(self, indices):
        part = Made({m: (b[indices], a[indices]) for m, (b, a) in self.made.items()})
        for field in ("names", "source_sha256"):
            setattr(part, field, [getattr(self, field)[i] for i in indices])
        return part


def made(n=6, *, seed=0, shared=None, modules=(UP, DOWN, Q)):
    """Random factors; with `shared` all experts of all adapters of a module in subspaces of that
    rank, an expert's size falling with its number."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    factors = {}
    for module in modules:
        each = E if ".experts." in module else 1
        b, a = randn(n, each, D_OUT, RANK_OF), randn(n, each, RANK_OF, D_IN)
        if shared:
            b = randn(D_OUT, shared) @ randn(n, each, shared, RANK_OF)
            a = randn(n, each, RANK_OF, shared) @ randn(shared, D_IN)
        factors[module] = b * 0.6 ** torch.arange(each)[:, None, None], a
    return Made(factors)


def served(store, name, module):
    """What a store adds for an adapter's experts: float64 `[E, d_out, d_in]`."""
    info = store.manifest.modules[store.module_index(module)]
    factors = store.factors(name)
    result = torch.zeros(info.each, info.d_out, info.d_in, dtype=torch.float64)
    for expert in range(info.each):
        if info.layer(expert) in factors:
            b, a = factors[info.layer(expert)]
            result[expert] = b.double() @ a.double()
    return result


def check(store, collection, rel=2e-3):
    """Every norm and error that the store says is the dense one. Returns the mean error."""
    errors = []
    for i, name in enumerate(collection.names):
        row = store.index(name)
        for module in collection.shapes:
            column, delta = store.module_index(module), collection.delta(module, i)
            lost = (delta - served(store, name, module)).square().sum() / delta.square().sum()
            assert float(store.error[row, column]) == pytest.approx(float(lost), rel=rel, abs=1e-6)
            assert float(store.norm[row, column]) == pytest.approx(float(delta.norm()), rel=1e-5)
            errors.append(float(lost))
    check_errors(store, collection)  # what a server's uploads go through, other arithmetic
    return sum(errors) / len(errors)


KINDS = {
    "joint": {"rank": 6, "experts": "joint"},
    "separate": {"rank": 3},
    "clusters, joint": {"rank": 4, "clusters": 2, "experts": "joint"},
    "clusters": {"rank": 3, "clusters": 2},
    "a diagonal, joint": {"method": "jd-diag", "rank": 8, "experts": "joint"},
    "a diagonal": {"method": "jd-diag", "rank": 4},
    "int8, joint": {"rank": 4, "store_dtype": "int8", "experts": "joint"},
    "int4": {"rank": 4, "store_dtype": "int4"},
    "guarded, joint": {"rank": 4, "max_adapter_error": 0.8, "experts": "joint"},
    "svd": {"method": "svd", "rank": 1},
    "none": {"method": "none"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_the_dense_ones_after_every_change(tmp_path, kind):
    everyone = made(7)
    first, more = everyone.some([0, 1, 2, 3, 4]), everyone.some([5, 6])
    store = compress(first, tmp_path / "s", Settings(**{"store_dtype": "float32"} | KINDS[kind]))
    mean = check(store, first)
    assert mean < 1e-6 if kind == "none" else 0.01 < mean < 0.95
    check(add(tmp_path / "s", more), everyone)
    left = remove(tmp_path / "s", ["a1", "a5"])
    check(left, everyone.some([0, 2, 3, 4, 6]))
    assert Store.open(tmp_path / "s").names == ["a0", "a2", "a3", "a4", "a6"]


def test_experts_share_bases_or_have_their_own(tmp_path):
    collection = made(5)
    for way in ("joint", "separate"):
        settings = Settings(rank=3, clusters=2, experts=way)
        store = compress(collection, tmp_path / way, settings)
        info = store.manifest.modules[store.module_index(UP)]
        table = store.rows(UP)
        assert table.shape == (2, E, 5)
        assert (info.experts, info.shared, info.core_size) == (E, 2, E * 9)
        bases = 2 if way == "joint" else 2 * E
        assert (info.u_vectors, info.v_vectors) == (3 * bases, 3 * bases)
        starts = table[..., [V_START, U_START]]
        if way == "joint":
            assert (starts == starts[:, :1]).all()
        else:
            assert len(starts.flatten(0, 1).unique(dim=0)) == 2 * E
        assert (table[..., RANK] == 3).all()
        assert store.manifest.settings["experts"] == way
        plain = store.manifest.modules[store.module_index(Q)]
        assert (plain.experts, plain.u_vectors, store.rows(Q).shape) == (0, 6, (2, 5))
        store.close()


def test_one_pair_of_bases_finds_what_all_experts_have_in_common(tmp_path):
    """Deltas within one subspace on either side: bases of that rank lose nothing, and these of all
    experts are a pair where each expert's own take E of them."""
    collection = made(5, shared=3, modules=(UP,))
    for way in ("joint", "separate"):
        settings = Settings(rank=3, experts=way, store_dtype="float32")
        store = compress(collection, tmp_path / way, settings)
        assert check(store, collection) < 1e-6
        store.close()


def test_the_bases_are_those_of_the_best_whole(tmp_path):
    """With one adapter and one expert the best bases of rank r are its singular vectors: what
    `separate` leaves is the sum of the squares beyond r, of all experts together."""
    collection = made(1, modules=(UP,))
    settings = Settings(rank=1, experts="separate", store_dtype="float32")
    store = compress(collection, tmp_path / "s", settings)
    values = torch.linalg.svdvals(collection.delta(UP, 0)).square()
    expected = float(values[:, 1:].sum() / values.sum())
    assert float(store.error[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_large_experts_count_more_than_small_ones(tmp_path):
    """Of an adapter, rank 2 has room for one of two experts: it goes to the larger one."""
    factors = made(1, modules=(UP,)).made[UP]
    size = torch.tensor([1.0, 0.01, 0.01, 0.01])[:, None, None]
    collection = Made({UP: (factors[0] * size, factors[1])})
    settings = Settings(rank=2, experts="joint", store_dtype="float32")
    store = compress(collection, tmp_path / "s", settings)
    assert check(store, collection, rel=0.05) < 1e-3
    lost = collection.delta(UP, 0) - served(store, "a0", UP)
    assert lost[0].norm() < 0.02 * collection.delta(UP, 0)[0].norm()


def test_clusters_are_of_adapters_by_all_their_experts(tmp_path):
    """Two families that have nothing in common but their experts' numbers."""
    one, other = (made(6, seed=seed, shared=3, modules=(UP, DOWN)) for seed in (1, 2))
    both = {
        m: tuple(map(torch.cat, zip(one.made[m], other.made[m], strict=True))) for m in one.made
    }
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    collection = Made({m: (b[order], a[order]) for m, (b, a) in both.items()})
    for way in ("joint", "separate"):
        settings = Settings(rank=3, clusters=2, experts=way, store_dtype="float32")
        store = compress(collection, tmp_path / way, settings)
        assert check(store, collection) < 1e-5
        cluster = store.chosen[:, 0, 0]
        assert (store.chosen[:, :, 0] == cluster[:, None]).all()
        assert len(set(zip((order < 6).tolist(), cluster.tolist(), strict=True))) == 2
        newcomer = Made({m: (b[:1] * 0.5, a[:1]) for m, (b, a) in other.made.items()}, ["new"])
        store = add(tmp_path / way, newcomer)
        check(store, newcomer)
        assert store.chosen[-1, 0, 0] == cluster[int((order == 6).nonzero())]
        store.close()


@pytest.mark.parametrize("kind", ["joint", "separate", "none", "svd"])
def test_experts_that_adapters_lack(tmp_path, kind):
    collection = made(5, modules=(UP, Q))
    collection.made[UP][0][0, 1:] = 0  # the first has expert 0 alone,
    collection.made[UP][0][1, 2] = 0  # the second all but one
    store = compress(collection, tmp_path / "s", Settings(**KINDS[kind]))
    check(store, collection, rel=0.02)
    names = {name for name in store.factors("a0") if ".experts." in name}
    own = "model.layers.0.mlp.experts.0.up_proj"
    if kind in ("none", "svd"):
        assert names == {own}
    assert not served(store, "a0", UP)[1:].any()
    assert store.rank[0, store.module_index(UP)] == RANK_OF
    newcomer = Made({UP: tuple(side[:1, :2] for side in collection.made[UP])}, ["new"], experts=2)
    newcomer.source_sha256 = ["f" * 64]
    store = add(tmp_path / "s", newcomer)
    whole = Made({UP: tuple(side[:1] for side in collection.made[UP])}, ["new"])
    check(store, whole, rel=0.02)


def test_a_store_tells_of_its_experts(tmp_path):
    collection = made(9)
    collection.made[DOWN][0][2] = 0  # the third has none there
    settings = Settings(rank=4, clusters=2, experts="joint", store_dtype="float32")
    with compress(collection, tmp_path / "all", settings) as store:
        errors = store.error.sum(1) / store.present.sum(1)
    settings = replace(settings, max_adapter_error=float(errors.median()))
    store = compress(collection, tmp_path / "s", settings)
    summary = store_summary(store)
    by_name = {module["name"]: module for module in summary["modules"]}
    assert (by_name[UP]["experts"], by_name[Q]["experts"]) == (E, 0)
    assert by_name[DOWN]["adapters"] == 8
    numbers = RANK_OF * (D_IN + D_OUT) * (9 * E + 8 * E + 9)
    assert sizes(store).adapter_parameters == numbers
    kept = uncompressed_adapters(store)
    assert 0 < int(kept.sum()) < 7
    assert summary["uncompressed"] == int(kept.sum())
    (entry, *_) = summary["adapters"]
    assert entry["source_ranks"] == [RANK_OF]
    modules = {m["name"]: m for m in adapter_summary(store, "a0")["modules"]}
    assert modules[UP]["source_rank"] == RANK_OF
    parts = byte_parts(store)
    assert sum(parts.values()) == store.stored_bytes
    # Two clusters of rank 4 in three modules, whatever the experts.
    assert parts["shared bases"] == 4 * 3 * 2 * 4 * (D_IN + D_OUT)
    assert parts["cores"] == 4 * 9 * 16 * (E + E + 1)
    vectors = RANK_OF * (D_IN + D_OUT)
    owned = (2 * E + 1) * int(kept.sum()) - (E if kept[2] else 0)
    assert parts["private vectors"] == 4 * vectors * owned
    found = adapter_map(store, shared_clusters(store))
    assert found is not None and found.points.shape[0] == 9 - int(kept.sum())


def test_plan_has_both_ways_and_what_they_cost(tmp_path):
    collection = made(8, modules=(UP, DOWN))
    candidates = plan(
        collection,
        base=Settings(store_dtype="float32"),
        candidates=[
            Settings(rank=4, experts="joint", store_dtype="float32"),
            Settings(rank=4, store_dtype="float32"),
            Settings(method="svd", rank=1, store_dtype="float32"),
            Settings(method="none", store_dtype="float32"),
        ],
    )
    for candidate in candidates:
        store = compress(collection, tmp_path / candidate.label, candidate.settings)
        numbers = stored_size(collection, candidate.settings)[0]
        assert numbers == sizes(store).store_parameters
        assert candidate.error == pytest.approx(float(store.error.double().mean()), abs=0.02)
        store.close()
    ways = {s.experts for s in candidate_settings(collection, Settings()) if s.has("experts")}
    assert ways == {"joint", "separate"}
    labels = [c.label for c in candidates]
    assert sum("joint experts" in label for label in labels) == 1


def test_a_warm_start_goes_on_from_bases_of_the_same_kind(tmp_path):
    collection = made(6, shared=5, modules=(UP,))
    for way in ("joint", "separate"):
        settings = Settings(rank=3, experts=way, iterations=1, store_dtype="float32")
        store = compress(collection, tmp_path / way, settings)
        before = float(store.error.mean())
        warm = compress(collection, tmp_path / f"{way}-2", settings, warm=store)
        assert float(warm.error.mean()) < before - 1e-5
        other = "separate" if way == "joint" else "joint"
        settings = Settings(rank=3, experts=other, iterations=1, store_dtype="float32")
        cold = compress(collection, tmp_path / f"{other}-3-{way}", settings, warm=store)
        check(cold, collection)


REFUSED = {
    "a merge": (Settings(method="ties"), "ties does not do; expected one of jd-full, jd-diag, svd"),
    "hydraopt": (Settings(method="hydraopt"), "hydraopt does not do"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_have_is_refused_by_name(tmp_path, case):
    settings, message = REFUSED[case]
    with pytest.raises(SettingsError, match="adapt experts") as caught:
        compress(made(3), tmp_path / "s", settings)
    assert message in str(caught.value)
    assert UP in str(caught.value)
    compress(made(3, modules=(Q,)), tmp_path / "s", settings.adapted(matrices=2, steps=1))


def test_another_number_of_experts_is_not_added(tmp_path):
    collection = made(3, modules=(UP,))
    compress(collection, tmp_path / "s", Settings(rank=2))
    b, a = collection.made[UP]
    more = Made({UP: (torch.cat([b, b], 1), torch.cat([a, a], 1))}, ["x", "y", "z"], experts=2 * E)
    with pytest.raises(AdapterError, match=f"found {2 * E} experts, expected {E}"):
        add(tmp_path / "s", more)


def test_weights_of_blends_are_not_searched_for(tmp_path):
    store = compress(made(3, modules=(UP,)), tmp_path / "s", Settings(rank=2))
    with pytest.raises(BlendFitError, match="adapts experts"):
        fit_blend(store, torch.nn.Linear(1, 1), [])
