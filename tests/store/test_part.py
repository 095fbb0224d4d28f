"""Parts of a module, cut, joined, saved and loaded: every adapter keeps its product, dense."""

import random
from dataclasses import replace

import pytest
import torch

from vllm_jd.row import CORE_FULL, CORE_NONE, Row
from vllm_jd.store.part import Matrix, ModulePart, load_cores
from vllm_jd.store.quantise import dequantise, quantise

D_IN, D_OUT, N, RANK = 33, 20, 6, 2


def matrix(values, kind):
    if kind is None:
        return Matrix(values)
    return Matrix(*quantise(values, kind))


def made(seed, kind, *, cores=True, n=N, shared=3, own=2):
    """`n` adapters: each has a shared row, with a core and some with a scale, a mean, and up to
    `own` rows of its own, whose vectors lie in another order than the rows."""
    generator = torch.Generator().manual_seed(seed)
    chance = random.Random(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    rows, u_start, v_start = [], 0, 0
    for c in range(shared):
        scale = c if c < 2 else -1
        rows.append(Row(v_start, u_start, RANK, CORE_FULL, scale))
        v_start += RANK
        u_start += RANK * (c % 2)  # two of them have one U
    u_start += RANK
    if shared:
        rows.append(Row(v_start, u_start, 1))
        v_start, u_start = v_start + 1, u_start + 1
    shared_rows = len(rows)
    chosen = torch.full((n, 2 + own), -1, dtype=torch.int32)
    private = []
    for i in range(n):
        if shared:
            chosen[i, 0] = i % shared
            chosen[i, 1] = shared_rows - 1 if i % 2 else -1
        for k in range(chance.randint(0 if shared else 1, own)):
            chosen[i, 2 + k if shared else k] = shared_rows + len(private)
            private.append(1 + chance.randrange(3))
    starts = {}
    for place in chance.sample(range(len(private)), len(private)):
        starts[place] = (v_start, u_start)
        v_start, u_start = v_start + private[place], u_start + private[place]
    rows += [Row(*starts[place], rank) for place, rank in enumerate(private)]
    numbers = torch.zeros(n, 32)
    numbers[:, : RANK**2] = randn(n, RANK**2)
    return ModulePart(
        u=matrix(randn(u_start, D_OUT), kind),
        v=matrix(randn(v_start, D_IN), kind),
        scales=matrix(randn(2 if shared else 0, D_OUT), kind),
        rows=torch.tensor([row[:5] for row in rows], dtype=torch.int32),
        cores=matrix(numbers if cores else numbers[:, :0], kind),
        chosen=chosen,
        rank=torch.full((n,), 4, dtype=torch.int32),
        norm=torch.ones(n),
        error=0.1 + torch.arange(n) / 100,
        shared=shared_rows,
        shared_rank=RANK if shared else 0,
        core_size=32 if cores else 0,
        exact_error=None if kind is None else 0.05 + torch.arange(n) / 100,
    )


def numbers(stored, width):
    if stored.steps is None:
        return stored.data.double()
    return dequantise(stored.data, stored.steps, width).double()


def products(part, adapter, rows=None):
    """What an adapter's rows (those in `rows`, or all) add up to: float64 `[d_out, d_in]`."""
    u, v = numbers(part.u, D_OUT), numbers(part.v, D_IN)
    scales = numbers(part.scales, D_OUT)
    total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for place in part.chosen[adapter].tolist():
        if place < 0 or (rows is not None and place not in rows):
            continue
        v_start, u_start, rank, kind, scale_row = part.rows[place].tolist()
        sigma = torch.eye(rank, dtype=torch.float64)
        if kind != CORE_NONE:
            core = numbers(part.cores, part.core_size)[adapter]
            sigma = core[: rank**2].view(rank, rank)
        product = u[u_start : u_start + rank].T @ sigma @ v[v_start : v_start + rank]
        total += product if scale_row < 0 else scales[scale_row][:, None] * product
    return total


def used(part, pool):
    column, length = {"V": (0, None), "U": (1, None), "scales": (4, 1)}[pool]
    found = set()
    for row in part.rows.tolist():
        if row[column] >= 0:
            found |= set(range(row[column], row[column] + (length or row[2])))
    return found


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("seed", range(8))
def test_without_private_rows_the_shared_products_stay(kind, seed):
    part = made(seed, kind)
    gone = torch.tensor([0, 3, 4])
    cut = part.without_private(gone)
    shared = set(range(part.shared))
    for i in range(N):
        rows = shared if i in gone.tolist() else None
        assert torch.equal(products(cut, i), products(part, i, rows))
    assert (cut.chosen[gone] < cut.shared).all()
    for pool, vectors in cut.pools.items():
        assert used(cut, pool) == set(range(len(vectors)))
    assert len(cut.rows) == part.shared + int((cut.chosen >= cut.shared).sum())
    assert cut.without_private(gone) is cut


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("seed", range(8))
def test_adapters_that_are_kept_have_their_own_product_and_no_core(kind, seed):
    part = made(seed, kind)
    own = made(seed + 100, kind, cores=False, n=3, shared=0, own=1)
    places = torch.tensor([5, 1, 2])
    both = part.without_private(places).with_kept(own, places)
    for i in range(N):
        if i in places.tolist():
            j = places.tolist().index(i)
            assert torch.equal(products(both, i), products(own, j))
            assert both.error[i] == own.error[j]
            assert numbers(both.cores, 32)[i].eq(0).all()
        else:
            assert torch.equal(products(both, i), products(part, i))
            assert both.error[i] == part.error[i]
    assert (both.exact_error is None) == (kind is None)
    if kind is not None:
        assert torch.equal(both.exact_error[places], own.exact_error)
        unknown = part.with_kept(replace(own, exact_error=None), places)
        assert unknown.exact_error[places].eq(0).all()
    assert (both.shared, both.shared_rank, both.core_size) == (part.shared, RANK, 32)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_saved_part_loads_whole_or_with_some_cores(tmp_path, kind):
    part = made(1, kind)
    part.save(tmp_path / "part.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["part.safetensors"]
    loaded = ModulePart.load(tmp_path / "part.safetensors")
    none = ModulePart.load(tmp_path / "part.safetensors", cores=slice(0, 0))
    some = load_cores(tmp_path / "part.safetensors", 2, 5)
    for name, value in vars(part).items():
        found = getattr(loaded, name)
        if isinstance(value, Matrix):
            assert value.tensors(name).keys() == found.tensors(name).keys()
            for key, tensor in value.tensors(name).items():
                assert torch.equal(found.tensors(name)[key], tensor)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found, value)
            assert torch.equal(getattr(none, name), value)
        else:
            assert found == value
    assert len(none.cores) == 0
    assert torch.equal(numbers(some, 32), numbers(part.cores, 32)[2:5])
