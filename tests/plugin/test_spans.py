"""Bases by number: where they lie in the modules' pools, and which bytes of the files they are."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from safetensors import safe_open

from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.engine.tables import POOLS, SIDES, Tables
from vllm_jd.store import Store

N = 12

METHODS = {
    "clusters": Settings(rank=3, clusters=4),
    "by module": Settings(rank=3, clusters=3),
    "private": Settings(method="svd", rank=2),
    "own rows": Settings(rank=3, clusters=2),
    "int8": Settings(rank=3, clusters=2, store_dtype="int8"),
}
ROWS = {"own rows": {"own": 1}, "by module": {"by_module": True}}


@pytest.fixture(scope="module", params=METHODS)
def store(request, tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("tables")
    write_adapters(folder / "adapters", N, kind="random")
    rows = ROWS.get(request.param, {})
    collection = read_adapters([folder / "adapters"])
    return compress(collection, folder / "s", METHODS[request.param], **rows)


def by_hand(store, tables, side):
    """(column, basis) → (first vector, most vectors), from the rows that adapters choose."""
    found = {}
    for column, module in enumerate(store.manifest.modules):
        rows = store.rows(module.name)
        for number, row in enumerate(rows.tolist()):
            basis = int(tables.bases[side][tables.first[column] + number])
            if basis >= 0:
                start, count = found.get((column, basis), (row[SIDES[side]], 0))
                assert start == row[SIDES[side]], "a basis lies in one place of a module"
                count = max(count, row[2]) if side != "scales" else 1
                found[column, basis] = start, count
    return found


@pytest.mark.parametrize("side", SIDES)
def test_a_basis_lies_where_its_rows_say(store, side):
    tables = Tables(store)
    expected = by_hand(store, tables, side)
    columns, count = len(store.manifest.modules), len(tables.ranks[side])
    for basis in range(count):
        starts, ranks = tables.spans(side, np.arange(columns), np.array([basis]))
        for column in range(columns):
            assert (starts[column], ranks[column]) == expected.get((column, basis), (0, 0))
    some = np.arange(count)[::-1]
    for column in range(columns):
        starts, ranks = tables.spans(side, column, some)
        pairs = list(zip(starts.tolist(), ranks.tolist(), strict=True))
        assert pairs == [expected.get((column, int(basis)), (0, 0)) for basis in some]
    if side != "scales":
        assert expected


def test_prefetch_names_the_bytes_of_a_basis_and_no_others(store, monkeypatch):
    tables = Tables(store)
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda *args: asked.append(args))
    opened = Store.open(store.path)
    tables = Tables(opened)
    (shard,) = opened.manifest.basis_shards
    data = (opened.folder / shard).read_bytes()
    for side in ("v", "u"):
        places = by_hand(opened, tables, side)
        basis = len(tables.ranks[side]) - 1
        asked.clear()
        tables.prefetch(side, basis)
        found = [data[offset : offset + size] for _, offset, size, _ in asked]
        expected = []
        with safe_open(opened.folder / shard, "pt") as file:
            for column, module in enumerate(opened.manifest.modules):
                if (column, basis) not in places:
                    continue
                first, count = places[column, basis]
                key = f"{module.name}.{POOLS[side]}"
                for each in (key, f"{key}.steps"):
                    if each in file.keys():  # noqa: SIM118
                        part = file.get_tensor(each)[first : first + count].contiguous()
                        expected.append(part.view(-1).view(torch.uint8).numpy().tobytes())
        assert found == expected and found
