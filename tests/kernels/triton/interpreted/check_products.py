"""Every variant of the Triton kernels against the float64 formula, in Triton's interpreter.

`test_interpreter.py` runs this file in a process of its own: Triton decides when it is imported
whether it interprets.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_kernels import (
    CORE_KIND,
    CORE_OFFSET,
    CORE_SLOT,
    KINDS,
    RANK,
    U_START,
    V_START,
    assert_close,
    make_case,
)
from tests.kernels.triton.interpreted.cases import (
    ROWS,
    TILES,
    TILES_16,
    TILES_64,
    VARIANTS,
    check,
    kernels_of,
    run,
    shuffled,
)
from vllm_jd import kernels
from vllm_jd.kernels.triton import backend
from vllm_jd.kernels.triton.plan import CONFIGS
from vllm_jd.row import CORE_FULL, CORE_NONE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# d_in and d_out are no multiples of any tile; tokens fill no tile of 16 or 64.
SHAPE = {"d_in": 65, "d_out": (75, 17), "dtype": BF16}
CASES = {
    "one token": {"n_tokens": 1, "layout": "equal"},
    "ragged runs": {"n_tokens": 19, "layout": "runs"},
    "all distinct": {"n_tokens": 19, "layout": "distinct", "slots": 19, "clusters": 1},
    "all of one adapter": {"n_tokens": 20, "layout": "equal"},
    "rank 13": {"n_tokens": 18, "ranks": (13, 13)},
    "mixed ranks, three rows": {"n_tokens": 17, "ranks": (1, 21), "depth": 3, "d_out": (20,)},
    "int8": {"n_tokens": 18, "ranks": (5, 16), "int8": True, "depth": 2},
    "float16": {"n_tokens": 18, "ranks": (5, 16), "dtype": FP16},
    "strided": {"n_tokens": 17, "strided": True, "ranks": (1, 9)},
}


def fit(variant, n_tokens):
    """So many tokens for tiles; few where each token has programs of its own, which cost time."""
    return n_tokens if variant in TILES else min(n_tokens, 5)


# The others run when there is time; in these every kernel is met, and the cores in every stage.
QUICK = {
    "rows, cores in expand",
    "tiles of 16, cores apart",
    "tiles of 64, cores in shrink",
}
VARIANTS_EACH = [
    pytest.param(variant, marks=[] if variant in QUICK else pytest.mark.slow)
    for variant in VARIANTS
]


def with_slow(names, quick):
    """Each variant with each name: `quick` is the name that variants outside of QUICK meet."""
    return [
        pytest.param(
            variant, name, marks=[] if variant in QUICK or name == quick else pytest.mark.slow
        )
        for variant in VARIANTS
        for name in names
    ]


@pytest.mark.parametrize(("variant", "name"), with_slow(CASES, "int8"))
def test_shapes_that_hurt(variant, name):
    config, expected = VARIANTS[variant]
    case = make_case(**SHAPE | CASES[name] | {"n_tokens": fit(variant, CASES[name]["n_tokens"])})
    order = shuffled(len(case.x)) if "one" not in name else None
    check(case, config, order)
    assert kernels_of(backend.plan_of(case.pools, len(case.x))) == expected


@pytest.mark.parametrize("variant", VARIANTS_EACH)
def test_no_adapters(variant):
    case = make_case(**SHAPE, n_tokens=fit(variant, 20))
    case.token_slots[:] = -1
    assert torch.equal(run(case, VARIANTS[variant][0]), case.y)
    case.token_slots[:] = 0
    case.pools.rows[..., RANK] = 0
    assert torch.equal(run(case, VARIANTS[variant][0]), case.y)


@pytest.mark.parametrize(("variant", "kind"), with_slow(KINDS, None))
def test_every_kind_of_core_without_scale(variant, kind):
    case = make_case(
        **SHAPE,
        n_tokens=fit(variant, 17),
        ranks=(3, 18),
        kinds=(KINDS[kind],),
        scaled=(False,),
        layout="runs",
    )
    check(case, VARIANTS[variant][0])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("config", [ROWS, TILES_16, TILES_64], ids=["rows", "16", "64"])
def test_ranks_beyond_a_block(config, kind, int8):
    """Chunks of 64 basis vectors: in grids, in loops, and ranks that end within one."""
    case = make_case(
        n_tokens=5,
        d_in=70,
        d_out=(40,),
        ranks=(40, 150),
        slots=4,
        clusters=2,
        kinds=(KINDS[kind],),
        int8=int8,
        dtype=BF16,
        layout="distinct",
    )
    check(case, config)
    assert backend.plan_of(case.pools, 5).shape.chunks == 3


@pytest.mark.parametrize("n_tokens", [1, 17])
def test_what_ships(n_tokens):
    """The default configuration, with its own tiles, for a layer like a real one."""
    case = make_case(
        n_tokens=n_tokens,
        d_in=576,
        d_out=(576, 192, 192),
        ranks=(16, 16),
        slots=17,
        clusters=5,
        dtype=BF16,
        layout="distinct",
    )
    check(case)


def test_float32_goes_by_rows():
    case = make_case(n_tokens=25, dtype=FP32, depth=2)
    check(case)
    assert backend.plan_of(case.pools, 25).variant == "rows"


@pytest.mark.parametrize("variant", VARIANTS_EACH)
def test_same_bits_in_every_run_and_order(variant):
    """No sum depends on when a program runs, or on which tokens are beside one in a tile."""
    n_tokens = fit(variant, 17)
    case = make_case(**SHAPE, n_tokens=n_tokens)
    config = VARIANTS[variant][0]
    first = run(case, config)
    assert torch.equal(run(case, config), first)
    assert torch.equal(run(case, config, shuffled(n_tokens)), first)
    others = torch.tensor(
        [3, *[0] * (n_tokens - 1)]
    )  # token 3, among others than its own neighbours
    assert torch.equal(run(case, config, tokens=others)[0], first[3])


@pytest.mark.parametrize("variant", TILES)
def test_sums_beyond_the_range_of_float16(variant):
    """V x overflows 16 bits, and V x of another token would vanish in them; the product fits."""
    case = make_case(
        n_tokens=2, d_in=40, d_out=(33,), ranks=(8, 8), dtype=FP16, scaled=(False,), layout="equal"
    )
    case.pools.rows[0, :, :, CORE_SLOT : CORE_OFFSET + 1] = 0
    case.pools.rows[0, :, :, CORE_KIND] = CORE_FULL
    case.pools.v.mul_(4000)
    case.pools.u[0].mul_(1e-3)
    case.x[0] *= 100
    case.x[1] *= 1e-5
    z = case.x.double() @ case.pools.v.double().T
    assert z[0].abs().max() > 2**17 and case.x[1].abs().max() < 1e-4
    check(case, VARIANTS[variant][0])


@pytest.mark.parametrize("variant", VARIANTS_EACH)
def test_nan_stays_with_its_tokens(variant):
    case = make_case(**SHAPE, n_tokens=fit(variant, 17), ranks=(8, 8), slots=2, layout="distinct")
    rows = case.pools.rows
    rows[0, ..., V_START], rows[1, ..., V_START] = 0, 8
    rows[0, ..., U_START], rows[1, ..., U_START] = 0, 8
    rows[..., RANK], rows[..., CORE_KIND] = 8, CORE_FULL
    rows[0, ..., CORE_SLOT], rows[1, ..., CORE_SLOT] = 0, 1
    rows[..., CORE_OFFSET] = 0
    expected = run(case, VARIANTS[variant][0])
    for broken in (case.pools.v, case.pools.u[1], case.pools.cores):
        kept = broken[0].clone() if broken is case.pools.cores else broken[:8].clone()
        broken[: len(kept) if kept.dim() > 1 else 1] = float("nan")
        y = run(case, VARIANTS[variant][0])
        broken[: len(kept) if kept.dim() > 1 else 1] = kept
        assert torch.equal(y[1::2], expected[1::2])
        assert y[::2].isnan().any()


def test_changes_in_place_are_seen():
    case = make_case(**SHAPE, n_tokens=5, depth=2)
    run(case)
    case.pools.rows[1] = case.pools.rows[0]
    case.pools.cores.mul_(-2)
    case.pools.v[3:9].neg_()
    case.pools.u[0][4:].zero_()
    case.pools.scales[1].mul_(3)
    case.token_slots[:5] = 1
    check(case)


def test_no_tokens():
    case = make_case(**SHAPE, n_tokens=0)
    assert run(case).shape == (0, 92)


def test_through_the_package(monkeypatch):
    monkeypatch.setenv("VLLM_JD_KERNEL", "triton")
    case = make_case(n_tokens=3, dtype=BF16)
    assert_close(case.run(), case)
    y = case.y.clone()
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    kernels.backend("cpu")(y, case.x, case.pools, case.token_slots, order=order)
    assert torch.equal(y, case.run())


@pytest.mark.parametrize("field", [V_START, U_START, CORE_SLOT, CORE_KIND])
def test_index_out_of_range(field):
    case = make_case(n_tokens=4, ranks=(8, 8), layout="equal")
    case.pools.rows[0, 0, 0, RANK] = 8
    case.pools.rows[0, 0, 0, CORE_KIND] = CORE_FULL
    case.pools.rows[0, 0, 0, field] = 10**6
    before = case.y.clone()
    with pytest.raises(IndexError):
        backend.add_adapters(case.y, case.x, case.pools, case.token_slots)
    assert torch.equal(case.y, before)


def test_rank_above_what_was_prepared():
    case = make_case(n_tokens=4, ranks=(8, 8), layout="equal", kinds=(CORE_NONE,))
    backend.prepare(case.pools, 7)
    with pytest.raises(IndexError, match="prepared for 7"):
        backend.add_adapters(case.y, case.x, case.pools, case.token_slots)


@pytest.mark.parametrize("config", [ROWS, TILES_16], ids=["rows", "tiles"])
def test_rank_above_what_was_prepared_is_nan_where_nobody_looks(config, monkeypatch):
    """As on a GPU: no memory beside z's is touched, and the token's y says that it is wrong."""
    case = make_case(n_tokens=4, ranks=(40, 40), layout="distinct", kinds=(CORE_NONE,), dtype=BF16)
    case.pools.rows[..., RANK] = torch.tensor([40, 3, 40, 3, 3, 3])[:, None, None]
    backend.prepare(case.pools, 16, config)
    monkeypatch.setattr(backend, "_check_content", lambda *_: None)
    y = case.y.clone()
    backend.add_adapters(y, case.x, case.pools, case.token_slots)
    assert y[::2].isnan().all() and not y[1::2].isnan().any()


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (torch.tensor([0, 1, 1, 3], dtype=torch.int32), IndexError),
        (torch.tensor([1, 2, 3, 4], dtype=torch.int32), IndexError),
        (torch.arange(3, dtype=torch.int32), IndexError),
        (torch.tensor([0, -1, 2, 3], dtype=torch.int32), IndexError),
        (torch.arange(4), ValueError),
        (torch.arange(8, dtype=torch.int32)[::2], ValueError),
    ],
)
def test_order_that_is_none(order, error):
    case = make_case(n_tokens=4)
    with pytest.raises(error, match="order"):
        backend.add_adapters(case.y, case.x, case.pools, case.token_slots, order)


def test_preparing_again_leaves_the_table_that_graphs_read_where_it_is():
    """On a GPU a captured graph has its address: a new one's memory would be another tensor's."""
    case = make_case(n_tokens=3)
    backend.prepare(case.pools)
    table = case.pools.handles["triton"].table
    backend.prepare(case.pools, 64, TILES_16)
    assert case.pools.handles["triton"].table is table
    moved = replace(case.pools, u=[u.clone() for u in case.pools.u])
    backend.prepare(moved)
    assert moved.handles["triton"].table is not table
    assert_close(run(case, TILES_16), case)


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match="float64"):
        run(make_case(dtype=torch.float64))
    case = make_case()
    with pytest.raises(ValueError, match="contiguous"):
        backend.add_adapters(case.y, case.x.T.contiguous().T, case.pools, case.token_slots)


cases = st.builds(
    make_case,
    seed=st.integers(0, 2**20),
    n_tokens=st.integers(1, 20),
    d_in=st.sampled_from([1, 7, 31, 64, 100]),
    d_out=st.lists(st.sampled_from([1, 13, 32, 70]), min_size=1, max_size=3),
    ranks=st.sampled_from([(1, 1), (1, 3), (13, 13), (16, 16), (1, 40)]),
    depth=st.integers(1, 2),
    slots=st.sampled_from([1, 5, 30]),
    clusters=st.integers(1, 4),
    dtype=st.sampled_from([BF16, FP16]),
    layout=st.sampled_from(["equal", "distinct", "runs", "mixed"]),
    strided=st.booleans(),
    scaled=st.sampled_from([(False,), (True, False)]),
    int8=st.booleans(),
)


@settings(max_examples=8, deadline=None)
@given(case=cases, variant=st.sampled_from(list(VARIANTS)), ordered=st.booleans())
def test_any_shape(case, variant, ordered):
    config = replace(VARIANTS[variant][0], name=variant)
    check(case, config, shuffled(len(case.x)) if ordered else None)


def test_configurations_have_names():
    assert len({config.name for config in CONFIGS}) == len(CONFIGS)
