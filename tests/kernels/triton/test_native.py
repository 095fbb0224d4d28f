"""The Triton backend on a GPU: float64 oracle, CUDA graphs, every configuration.

Skipped without a CUDA device, where the interpreter's tests beside this file run. `make gpu-check`
sets VLLM_JD_TEST_DEVICE=cuda: then a missing device is a failure. VLLM_JD_TEST_DEVICE=cpu with
TRITON_INTERPRET=1 runs what needs no graph in the interpreter (minutes), to try this file itself.
"""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import test_embedding
from tests.kernels.test_kernels import KINDS, ROW_FIELDS, make_case, oracle
from vllm_jd.kernels import ModulePools, tiles
from vllm_jd.kernels.pools import Int8Rows
from vllm_jd.kernels.triton import backend
from vllm_jd.kernels.triton.embedding import look_up
from vllm_jd.kernels.triton.plan import CONFIGS

DEVICE = os.environ.get("VLLM_JD_TEST_DEVICE")
pytestmark = pytest.mark.skipif(
    DEVICE is None and not torch.cuda.is_available(), reason="needs a CUDA device"
)
DEVICE = DEVICE or "cuda"
needs_graphs = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 4e-5, torch.float16: 4e-5}
"""Error of a sum in float32, of the sum of the magnitudes: 16-bit tensor cores get z and h in two
parts of 2^-17."""
LAYER = {"d_in": 576, "d_out": (576, 192, 192), "ranks": (16, 16), "slots": 40, "clusters": 25}


def moved(rows):
    return None if rows is None else Int8Rows(rows.codes.to(DEVICE), rows.steps.to(DEVICE))


def on_device(pools):
    """The same pools there, rows of a basis still apart where they were strided."""

    def matrix(tensor):
        beside = float("nan") if tensor.is_floating_point() else 77
        wide = torch.full((tensor.shape[0], tensor.stride(0)), beside, dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide.to(DEVICE)[:, : tensor.shape[1]]

    return ModulePools(
        v=matrix(pools.v),
        u=[matrix(u) for u in pools.u],
        cores=matrix(pools.cores),
        rows=pools.rows.to(DEVICE),
        scales=None if pools.scales is None else [matrix(part) for part in pools.scales],
        v_int8=moved(pools.v_int8),
        u_int8=None if pools.u_int8 is None else [moved(rows) for rows in pools.u_int8],
        core_steps=None if pools.core_steps is None else matrix(pools.core_steps),
    )


def run(case, *, order=None, config=None):
    """What the backend makes of a case's y, on the CPU."""
    pools = on_device(case.pools)
    if config is not None:
        backend.prepare(pools, config=config)
    y, x, slots = (part.to(DEVICE) for part in (case.y.clone(), case.x, case.token_slots))
    backend.add_adapters(y, x, pools, slots, None if order is None else order.to(DEVICE))
    return y.cpu()


def assert_close(y, case):
    """Sums of float32, and one rounding. Returns the largest error, in units of the last place."""
    result, magnitude = oracle(case)
    largest = torch.maximum(result.abs(), y.double().abs()).clamp(min=2.0**-14)
    unit = 2.0 ** (torch.floor(torch.log2(largest)) - MANTISSA_BITS[y.dtype])
    error = (y.double() - result).abs()
    excess = error - 0.5 * unit - ROUNDED[y.dtype] * magnitude
    worst = float((error / unit).max()) if error.numel() else 0.0
    assert (excess <= 0).all(), f"{worst} units in the last place"
    without = case.token_slots[: len(case.x)] < 0
    assert torch.equal(y[without], case.y[without]), "a token without adapter changed"
    return worst


def by_cluster(case):
    """The tokens as tiles take them: those with the same bases have tiles of their own."""
    n = len(case.x)
    slots = case.token_slots[:n].long()
    start = case.pools.rows[slots.clamp(min=0), 0, 0, ROW_FIELDS.index("v_start")]
    keys = tiles.keys_of(start.numpy(), slots.numpy())
    return torch.from_numpy(tiles.pack(keys, tiles.places(n), tiles.tile_of(n)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["equal", "distinct", "runs", "mixed"])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 16, 17, 45, 64, 300])
def test_a_typical_layer(n_tokens, layout, dtype):
    case = make_case(n_tokens=n_tokens, layout=layout, dtype=dtype, **LAYER)
    assert_close(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [5, 33])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("ranks", [(1, 3), (13, 13), (1, 40), (60, 70), (256, 256)], ids=str)
def test_ranks_and_widths_that_are_no_round_numbers(ranks, depth, n_tokens, dtype):
    case = make_case(
        n_tokens=n_tokens, d_in=70, d_out=(150, 33), ranks=ranks, depth=depth, dtype=dtype,
        strided=True,
    )  # fmt: skip
    assert_close(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [3, 40])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_core_and_basis(kind, int8, scaled, n_tokens, dtype):
    case = make_case(
        n_tokens=n_tokens, d_in=96, d_out=(160, 64), ranks=(8, 21), dtype=dtype,
        kinds=(KINDS[kind],), scaled=(scaled,), int8=int8,
    )  # fmt: skip
    assert_close(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [3, 70, 300])
@pytest.mark.parametrize(
    "ranks", [(8, 8), (13, 13), (16, 16), (1, 40), (64, 64), (100, 150)], ids=str
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_cores_in_codes(kind, ranks, n_tokens, dtype):
    # Here, for it needs the store's packages: what else is here runs on a bare GPU machine, too.
    from tests.kernels.test_quantised_cores import coded

    case = make_case(
        n_tokens=n_tokens, d_in=96, d_out=(160, 64), ranks=ranks, depth=2, dtype=dtype, int8=True
    )
    mine, decoded = coded(case, kind, shift=37, strided=True)
    y = run(mine)
    assert_close(y, decoded)
    assert torch.equal(run(mine, order=by_cluster(mine)), y)


@pytest.mark.parametrize("n_tokens", [7, 40, 300])
@pytest.mark.parametrize("variant", ["as it is", "rows", "tiles"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_configuration(config, variant, n_tokens):
    if variant != "as it is":
        config = replace(config, row_tokens=n_tokens if variant == "rows" else 0)
    case = make_case(n_tokens=n_tokens, dtype=torch.bfloat16, **LAYER)
    assert_close(run(case, config=config, order=by_cluster(case)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [9, 100])
def test_any_order_of_the_tokens_and_the_same_bits_again(n_tokens, dtype):
    case = make_case(n_tokens=n_tokens, dtype=dtype, **LAYER)
    for order in (by_cluster(case), torch.randperm(n_tokens).int()):
        first = run(case, order=order)
        assert_close(first, case)
        assert torch.equal(run(case, order=order), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@test_embedding.CASES
def test_an_embedding_is_the_tokens_column_of_v(dtype, int8, plain):
    def there(z, ids, pools, slots):
        long_rows = None if pools.long_rows is None else pools.long_rows.to(DEVICE)
        pools = replace(on_device(pools), long_rows=long_rows)
        found, ids, slots = (part.to(DEVICE) for part in (z, ids, slots))
        look_up(found, ids, pools, slots)
        z.copy_(found)

    test_embedding.check(there, dtype, int8=int8, plain=plain)


@needs_graphs
def test_a_graph_of_an_embedding_sees_what_changes():
    pools, whole, slots = test_embedding.make_pools(torch.bfloat16, int8=True)
    pools, slots_there = on_device(pools), slots.to(DEVICE)
    ids = torch.arange(test_embedding.TOKENS, device=DEVICE)
    z = torch.zeros(len(ids), pools.depth * test_embedding.WIDTH, dtype=pools.dtype, device=DEVICE)
    look_up(z, ids, pools, slots_there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        look_up(z, ids, pools, slots_there)
    for turn in (0, 7):
        ids.copy_(torch.arange(len(ids)) + turn)
        slots_there.copy_(slots.roll(turn).clamp(max=pools.slots - 1))
        graph.replay()
        wanted = test_embedding.expected(whole, ids.cpu(), slots_there.cpu())
        assert torch.equal(z.cpu(), wanted)


@needs_graphs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 8, 32, 128, 300])
def test_one_graph_serves_any_adapters_and_sees_what_changes(n_tokens, dtype):
    """Captured once; then other slots, tokens, orders, cores and rows, and no adapter at all."""
    case = make_case(n_tokens=n_tokens, dtype=dtype, layout="mixed", **LAYER)
    pools = on_device(case.pools)
    y, x = case.y.to(DEVICE), case.x.to(DEVICE)
    slots, order = case.token_slots.to(DEVICE), by_cluster(case).to(DEVICE)
    backend.prepare(pools, 16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backend.add_adapters(y.clone(), x, pools, slots, order)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.add_adapters(y, x, pools, slots, order)
    for seed, layout in enumerate(["mixed", "equal", "distinct", "runs", "none"]):
        other = make_case(
            seed=seed, n_tokens=n_tokens, dtype=dtype,
            layout="equal" if layout == "none" else layout, **LAYER,
        )  # fmt: skip
        if layout == "none":
            other.token_slots[:] = -1
        for mine, theirs in ((pools.v, other.pools.v), (pools.cores, other.pools.cores)):
            mine.copy_(theirs)
        for mine, theirs in zip(
            (*pools.u, *pools.scales), (*other.pools.u, *other.pools.scales), strict=True
        ):
            mine.copy_(theirs)
        pools.rows.copy_(other.pools.rows)
        y.copy_(other.y)
        x.copy_(other.x)
        slots.copy_(other.token_slots)
        order.copy_(by_cluster(other))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(y.cpu(), other)
        if layout == "none":
            assert torch.equal(y.cpu(), other.y)


@needs_graphs
def test_pools_must_be_prepared_before_a_capture():
    case = make_case(n_tokens=4, dtype=torch.bfloat16, **LAYER)
    pools = on_device(case.pools)
    y, x, slots = (part.to(DEVICE) for part in (case.y, case.x, case.token_slots))
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="being captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        backend.add_adapters(y, x, pools, slots)


@needs_graphs
@pytest.mark.parametrize("n_tokens", [4, 40, 300])
def test_dependent_launches_change_no_bit(n_tokens, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch needs sm_90")
    case = make_case(n_tokens=n_tokens, dtype=torch.bfloat16, **LAYER)
    chains = {}
    for pdl in "0", "1":
        monkeypatch.setenv("VLLM_JD_PDL", pdl)
        chains[pdl] = chain(case)
    assert not torch.equal(chains["0"].found, chains["0"].x)
    for _ in range(20):
        for one in chains.values():
            one.graph.replay()
        assert torch.equal(chains["1"].found, chains["0"].found)


def chain(case):
    """A captured graph of twelve layers, each of which reads what the one before has written."""
    pools = on_device(case.pools)
    backend.prepare(pools, 16)
    x, slots, order = case.x.to(DEVICE), case.token_slots.to(DEVICE), by_cluster(case).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(x.shape[1], case.y.shape[1], generator=generator) / x.shape[1] ** 0.5
    weight = weight.to(DEVICE, x.dtype)
    found = torch.empty_like(x)

    def layers():
        now = x
        for _ in range(12):
            y = torch.mm(now, weight).tanh_()
            backend.add_adapters(y, now, pools, slots, order)
            now = y[:, : x.shape[1]]
        found.copy_(now)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layers()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    return SimpleNamespace(graph=graph, found=found, x=x, kept=(pools, slots, order, weight))
