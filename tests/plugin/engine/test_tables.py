"""Bases by number against the store's own tables, row by row; and how many slots a budget buys."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from peft import VeraConfig, get_peft_model

from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.tables import SIDES, Tables
from vllm_jd.row import CORE_KIND, RANK

N = 7
METHODS = {
    "clusters": Settings(rank=3, clusters=3, store_dtype="float32"),
    "by module": Settings(rank=3, clusters=3, store_dtype="float32"),
    "diagonal": Settings(method="jd-diag", rank=3, store_dtype="float32"),
    "svd": Settings(method="svd", rank=2, store_dtype="float32"),
    "own rows": Settings(rank=3, clusters=2, store_dtype="float32"),
    "mean": Settings(method="task-arithmetic", store_dtype="float32"),
    "hydraopt": Settings(method="hydraopt", rank=3, matrices=2, steps=20, store_dtype="float32"),
    "none": Settings(method="none", store_dtype="float32"),
    "guarded": Settings(rank=2, clusters=2, max_adapter_error=0.3, store_dtype="float32"),
    "int8": Settings(rank=3, clusters=3, store_dtype="int8"),
    "vera": Settings(method="none", store_dtype="float32"),
}
ROWS = {"own rows": {"own": 1}, "by module": {"by_module": True}}


def write_vera(folder):
    for i in range(N):
        torch.manual_seed(i)
        linear = torch.nn.ModuleDict({"q": torch.nn.Linear(24, 8)})
        base = torch.nn.ModuleDict({"attn": linear})
        config = VeraConfig(r=6, target_modules=["q"], init_weights=False)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / f"a{i}")


@pytest.fixture(scope="module", params=METHODS)
def named(request, tmp_path_factory, write_adapters):
    """(the method's name above, a store by it)."""
    folder = tmp_path_factory.mktemp("tables")
    if request.param == "vera":
        write_vera(folder / "adapters")
    else:
        write_adapters(folder / "adapters", N, kind="real", ranks=(4, 3))
    collection = read_adapters([folder / "adapters"])
    method = request.param
    rows = ROWS.get(method, {})
    return method, compress(collection, folder / "store", METHODS[method], **rows)


@pytest.fixture
def store(named):
    return named[1]


def chosen_rows(store):
    """(adapter, column, the row as the store has it) of all that adapters choose."""
    for adapter in range(len(store)):
        for column, module in enumerate(store.manifest.modules):
            table = store.rows(module.name).tolist()
            for row in store.chosen[adapter, column].tolist():
                if row >= 0:
                    yield adapter, column, table[row]


def vectors_of(store):
    """side → (column, start) → (how many vectors, which adapters) by looking at every row."""
    found = {side: defaultdict(lambda: (0, set())) for side in SIDES}
    for adapter, column, row in chosen_rows(store):
        for side, field in SIDES.items():
            if row[field] >= 0:
                count, who = found[side][column, row[field]]
                rank = 1 if side == "scales" else row[RANK]
                found[side][column, row[field]] = max(count, rank), who | {adapter}
    return found


def test_the_bases_of_an_adapter_are_what_its_rows_read(named):
    """All of it; and nothing else, unless what modules share differs from module to module."""
    method, store = named
    tables = Tables(store)
    expected = vectors_of(store)
    for side in SIDES:
        for adapter in range(len(store)):
            bases = np.array(tables.bases_of(adapter)[side], dtype=np.int64)
            for column in range(len(store.manifest.modules)):
                starts, ranks = tables.spans(side, column, bases)
                found = {
                    (int(start), int(rank))
                    for start, rank in zip(starts, ranks, strict=True)
                    if rank
                }
                needed = {
                    (start, count)
                    for (of, start), (count, who) in expected[side].items()
                    if of == column and adapter in who
                }
                assert needed <= found
                if method not in ("by module", "hydraopt"):
                    assert needed == found


def test_a_basis_has_one_run_of_vectors_in_a_module_and_as_much_room_as_its_longest(store):
    tables = Tables(store)
    expected = vectors_of(store)
    for side in SIDES:
        every = np.arange(len(tables.ranks[side]))
        runs, longest = Counter(), np.zeros(len(every), dtype=np.int64)
        for column in range(len(store.manifest.modules)):
            starts, ranks = tables.spans(side, column, every)
            used = [(column, int(s)) for s, r in zip(starts, ranks, strict=True) if r]
            runs.update(used)
            longest = np.maximum(longest, ranks)
        assert set(expected[side]) <= set(runs), "each run is a basis's"
        assert set(runs.values()) <= {1}, "and one's only"
        assert longest.tolist() == tables.ranks[side].tolist()


def test_rows_are_the_stores_and_number_0_is_none(store):
    tables = Tables(store)
    chosen = tables.chosen(range(len(store)))
    assert tables.rows[0, RANK] == 0 and all(bases[0] == -1 for bases in tables.bases.values())
    seen = [
        (adapter, column, tables.rows[number].tolist())
        for adapter, columns in enumerate(chosen)
        for column, numbers in enumerate(columns)
        for number in numbers
        if number
    ]
    assert seen == list(chosen_rows(store))


def test_bases_lie_where_the_store_has_them(store):
    tables = Tables(store)
    rng = np.random.default_rng(0)
    for side in SIDES:
        count = len(tables.ranks[side])
        # By looking at every row of the module.
        expected = np.zeros((len(store.manifest.modules), count, 2), dtype=np.int64)
        for column, module in enumerate(store.manifest.modules):
            for k, row in enumerate(store.rows(module.name).tolist()):
                basis = tables.bases[side][tables.first[column] + k]
                if basis >= 0:
                    rank = 1 if side == "scales" else row[RANK]
                    least = expected[column, basis, 1]
                    expected[column, basis] = row[SIDES[side]], max(least, rank)
        for size in {0, 1, min(2, count), count}:
            bases = rng.permutation(count)[:size]
            for column in range(len(store.manifest.modules)):
                starts, ranks = tables.spans(side, column, bases)
                assert np.stack([starts, ranks], axis=-1).tolist() == (
                    expected[column, bases].tolist()
                )


def test_what_is_shared_is_numbered_by_cluster_and_the_rest_by_adapter(named):
    method, store = named
    tables = Tables(store)
    of = [tables.bases_of(adapter) for adapter in range(N)]
    sharing = {side: Counter(basis for each in of for basis in each[side]) for side in SIDES}
    if method in ("clusters", "int8"):
        for adapter in range(N):
            cluster = int(store.chosen[adapter, 0, 0])
            assert of[adapter] == {"v": (cluster,), "u": (cluster,), "scales": ()}
    elif method == "mean":
        assert all(each == {"v": (0,), "u": (0,), "scales": ()} for each in of)
    elif method == "hydraopt":
        assert {each["v"] for each in of} == {(0,)} and set(sharing["u"]) == {0, 1}
    elif method in ("svd", "none"):
        assert set(sharing["v"].values()) == set(sharing["u"].values()) == {1}
        assert len(sharing["v"]) == N
    elif method == "own rows":
        assert all(len(each["v"]) == len(each["u"]) == 2 for each in of)
        assert sum(count == 1 for count in sharing["v"].values()) >= N
    elif method == "vera":
        assert {each["v"] for each in of} == {(0,)} and len(sharing["scales"]) == N
    elif method == "guarded":
        kept = [i for i, each in enumerate(of) if max(each["v"]) >= 2]
        assert 0 < len(kept) < N
        for i in range(N):
            full = any(row[CORE_KIND] for adapter, _, row in chosen_rows(store) if adapter == i)
            assert full == (i not in kept)
            assert len(of[i]["v"]) == 1, "one basis for all modules, of the cluster or its own"


# ---------------------------------------------------------------- capacity


def capacity(store, *, in_codes=False, seqs=2, **config):
    config = PluginConfig(store=str(store.path), **{"max_loras": 3, **config})
    return capacity_of(
        store, Tables(store), config, max_num_seqs=seqs, max_lora_rank=8, in_codes=in_codes
    )


def bytes_of(store, found, uploads=3):
    """What the slots of a store in float32 take, counted basis by basis."""
    width = {
        "v": sum(module.d_in for module in store.manifest.modules),
        "u": sum(module.d_out for module in store.manifest.modules),
    }
    width["scales"] = width["u"]
    bases = sum(
        4 * width[side] * each.rank * each.count
        for side, classes in found.bases.items()
        for each in classes
    )
    row = 4 * store.manifest.core_row
    row += len(store.manifest.modules) * store.manifest.rows * 7 * 4  # int32 numbers of a row
    return bases + (found.cores - uploads) * row


def test_without_a_budget_all_bases_have_slots_and_uploads_theirs(store):
    found = capacity(store)
    assert found.whole and found.cores == N + 3
    ranks = Tables(store).ranks
    for side, classes in found.bases.items():
        expected = Counter(rank for rank in ranks[side].tolist() if rank)
        assert {each.rank: each.count for each in classes} == expected
        slots = [at for each in classes for at in range(each.first, each.first + each.count)]
        assert slots == list(range(len(slots))), "each its own"
        assert [each.rank for each in classes] == sorted(each.rank for each in classes)
    assert {side: tuple(each) for side, each in found.uploads.items()} == {
        "v": (8, 0, 3, False),
        "u": (8, 0, 3, False),
    }


def test_a_budget_is_never_exceeded_and_spent_where_it_can_be(store):
    if store.manifest.quantised:
        pytest.skip("counted in float32")
    whole = bytes_of(store, capacity(store))
    assert capacity(store, adapter_memory=whole).whole
    for side in SIDES:
        assert capacity(store, adapter_memory=whole).bases[side] == capacity(store).bases[side]
    served = 0
    for budget in np.linspace(1, whole - 1, 60).astype(int).tolist():
        try:
            found = capacity(store, adapter_memory=budget)
        except ValueError as error:
            assert f"found --adapter-memory {budget:,} bytes, expected at least" in str(error)
            assert not served, "less was enough"
            continue
        served += 1
        assert bytes_of(store, found) <= budget
        assert found.cores >= 2 + 3
        ranks = Tables(store).ranks
        for side in SIDES:
            counts = Counter(rank for rank in ranks[side].tolist() if rank)
            assert {each.rank for each in found.bases[side]} == set(counts)
            assert all(1 <= each.count <= counts[each.rank] for each in found.bases[side])
    assert served


def test_the_least_budget_is_as_told(store):
    with pytest.raises(ValueError, match="--adapter-memory 1 bytes") as caught:
        capacity(store, adapter_memory=1)
    least = int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))
    found = capacity(store, adapter_memory=least)
    assert {each.count for each in found.bases["v"]} == {1}
    with pytest.raises(ValueError):
        capacity(store, adapter_memory=least - 1)


def test_slots_for_cores_are_at_least_those_of_one_step(store):
    assert capacity(store, core_slots=4).cores == 4 + 3
    assert capacity(store, core_slots=4).whole, "bases are all there"
    assert capacity(store, core_slots=400).cores == N + 3
    with pytest.raises(ValueError, match=r"found 2 slots for cores .* at least 3 .*max-num-seqs"):
        capacity(store, core_slots=2, seqs=3)
    assert capacity(store, core_slots=N, seqs=4000).cores == N + 3


def test_without_a_number_as_many_cores_are_resident_as_fit_into_a_gibibyte(named, monkeypatch):
    _, store = named
    row = 4 * store.manifest.core_row + len(store.manifest.modules) * store.manifest.rows * 28
    if store.manifest.quantised:
        pytest.skip("counted in float32")
    monkeypatch.setattr("vllm_jd.plugin.engine.capacity._CORE_BYTES", 3 * row + 1)
    assert capacity(store).cores == 3 + 3
    assert capacity(store, seqs=5).cores == 5 + 3, "as many as one step may have"


def test_codes_take_less_than_what_they_stand_for(named):
    method, store = named
    if method != "int8":
        pytest.skip("of quantised stores")
    whole = replace(capacity(store), uploads={})
    budget = bytes_of(store, whole) // 4  # float32 numbers to one byte, and some steps
    codes, numbers = (
        sum(each.count for each in capacity(store, adapter_memory=budget, in_codes=c).bases["v"])
        for c in (True, False)
    )
    assert codes > numbers
