"""Experts: pairs of a token and an expert as tokens, a slot for each adapter and expert.

Bases shared by all experts of a cluster's adapters, a core for each adapter and expert; one adapter
whose experts have V of their own, and one that lacks an expert: against that formula in float64,
which knows neither slots nor rows.
"""

import pytest
import torch

from tests.kernels.test_kernels import Case
from vllm_jd import kernels
from vllm_jd.kernels import ModulePools
from vllm_jd.row import CORE_FULL, ROW_FIELDS

ADAPTERS, EXPERTS, CLUSTERS, RANK, K = 5, 6, 2, 3, 2
APART, LACKS = 3, (4, 2)
"""The adapter whose experts have V of their own; the one that lacks an expert, and which."""
D_IN, D_OUT = 40, (24, 17)


def experts_case(n_tokens, dtype, seed=0, long=False):
    """(a Case of pairs, an input for each K of them; for each pair what is added: float64 `[pairs,
    sum of d_out]`; an order that puts pairs of a cluster side by side).

    With `long` the slots of the last two adapters are among those that may have many rows, of which
    they have the third."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) / 4).to(dtype)

    slices = len(D_OUT)
    v = randn(slices, CLUSTERS + EXPERTS, RANK, D_IN)  # the clusters', those of APART's experts
    u = [randn(CLUSTERS, RANK, width) for width in D_OUT]
    cores = randn(ADAPTERS, slices, EXPERTS, RANK, RANK)
    cluster = torch.arange(ADAPTERS) % CLUSTERS

    def v_of(a, e):
        return CLUSTERS + e if a == APART else int(cluster[a])

    rows = torch.zeros(ADAPTERS, EXPERTS, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
    for a in range(ADAPTERS):
        for e in range(EXPERTS):
            for s in range(slices):
                c, place = int(cluster[a]), v_of(a, e)
                if (a, e) == LACKS:
                    continue
                own = (s * v.shape[1] + place) * RANK, c * RANK, RANK, CORE_FULL, -1
                rows[a, e, s, 0] = torch.tensor([*own, a, (s * EXPERTS + e) * RANK**2])
    rows, long_rows = rows.flatten(0, 1), None
    if long:
        rows, last = rows.split([(ADAPTERS - 2) * EXPERTS, 2 * EXPERTS])
        long_rows = torch.cat([torch.zeros_like(last).repeat(1, 1, 2, 1), last], dim=2)
    pools = ModulePools(
        v=v.flatten(0, 2),
        u=[each.flatten(0, 1) for each in u],
        cores=cores.flatten(1),
        rows=rows,
        long_rows=long_rows,
    )
    slots = torch.randint(ADAPTERS, (n_tokens,), generator=generator)
    slots[1::4] = -1
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in slots])
    x = randn(n_tokens, D_IN)
    added = torch.zeros(n_tokens, K, sum(D_OUT), dtype=torch.float64)
    for t, a in enumerate(slots.tolist()):
        for k, e in enumerate(chosen[t].tolist() if a >= 0 else ()):
            if (a, e) == LACKS:
                continue
            c, place = int(cluster[a]), v_of(a, e)
            h = [
                cores[a, s, e].double() @ (v[s, place].double() @ x[t].double())
                for s in range(slices)
            ]
            added[t, k] = torch.cat([z @ u[s][c].double() for s, z in enumerate(h)])
    pairs = torch.where(slots[:, None] < 0, -1, slots[:, None] * EXPERTS + chosen).flatten().int()
    order = torch.where(slots < 0, CLUSTERS, cluster[slots]).argsort(stable=True)
    order = (order[:, None] * K + torch.arange(K)).flatten().int()
    y = randn(n_tokens * K, sum(D_OUT))
    return Case(pools, x, y, pairs), added.flatten(0, 1), order


def check_experts(found, case, added):
    """`found` is y with what is added to each pair, rounded once."""
    bits = {torch.float32: 20, torch.bfloat16: 8}[found.dtype]
    expected = case.y.double() + added
    assert float(added.abs().max()) > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-bits, atol=2.0**-bits / 4)
    without = case.token_slots < 0
    assert without.any() and torch.equal(found[without], case.y[without])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_tokens", "long"), [(5, False), (40, False), (40, True)])
def test_each_pair_gets_its_adapters_expert(backend, dtype, n_tokens, long):
    case, added, _ = experts_case(n_tokens, dtype, long=long)
    y = case.y.clone()
    kernels.BACKENDS[backend](y, case.x, case.pools, case.token_slots, fan=K)
    check_experts(y, case, added)


@pytest.mark.parametrize("n_tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_input_for_all_pairs_changes_no_bit(dtype, n_tokens, threads):
    case, _, _ = experts_case(n_tokens, dtype)
    apart, shared = case.y.clone(), case.y.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend = kernels.BACKENDS["cpu"]
        backend(apart, case.x.repeat_interleave(K, 0), case.pools, case.token_slots)
        backend(shared, case.x, case.pools, case.token_slots, fan=K)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(shared, case.y) and torch.equal(shared, apart)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_inputs_that_do_not_go_with_the_pairs_are_refused(backend):
    case, _, _ = experts_case(4, torch.float32)
    run = kernels.BACKENDS[backend]
    with pytest.raises(ValueError, match=r"y must be \[12, 41\], got \(8, 41\)"):
        run(case.y, case.x, case.pools, case.token_slots, fan=3)
    with pytest.raises(ValueError, match="fan must be 1 or more tokens of one input, got 0"):
        run(case.y, case.x, case.pools, case.token_slots, fan=0)
