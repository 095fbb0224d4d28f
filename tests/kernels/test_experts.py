"""Experts: pairs of a token and an expert as tokens, a slot for each adapter and expert.

Bases shared by all experts of a cluster's adapters, a core for each adapter and expert: against
that formula in float64, which knows neither slots nor rows.
"""

import pytest
import torch

from tests.kernels.test_kernels import Case
from vllm_jd import kernels
from vllm_jd.kernels import ModulePools
from vllm_jd.row import CORE_FULL, ROW_FIELDS

ADAPTERS, EXPERTS, CLUSTERS, RANK, K = 5, 6, 2, 3, 2
D_IN, D_OUT = 40, (24, 17)


def experts_case(n_tokens, dtype, seed=0):
    """(a Case of pairs, for each pair what is added: float64 `[pairs, sum of d_out]`, an order
    that puts pairs of a cluster side by side)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) / 4).to(dtype)

    slices = len(D_OUT)
    v = randn(slices, CLUSTERS, RANK, D_IN)
    u = [randn(CLUSTERS, RANK, width) for width in D_OUT]
    cores = randn(ADAPTERS, slices, EXPERTS, RANK, RANK)
    cluster = torch.arange(ADAPTERS) % CLUSTERS
    rows = torch.zeros(ADAPTERS, EXPERTS, slices, 1, len(ROW_FIELDS), dtype=torch.int32)
    for a in range(ADAPTERS):
        for e in range(EXPERTS):
            for s in range(slices):
                c = int(cluster[a])
                own = (s * CLUSTERS + c) * RANK, c * RANK, RANK, CORE_FULL, -1
                rows[a, e, s, 0] = torch.tensor([*own, a, (s * EXPERTS + e) * RANK**2])
    pools = ModulePools(
        v=v.flatten(0, 2),
        u=[each.flatten(0, 1) for each in u],
        cores=cores.flatten(1),
        rows=rows.flatten(0, 1),
    )
    slots = torch.randint(ADAPTERS, (n_tokens,), generator=generator)
    slots[1::4] = -1
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in slots])
    x = randn(n_tokens, D_IN)
    added = torch.zeros(n_tokens, K, sum(D_OUT), dtype=torch.float64)
    for t, a in enumerate(slots.tolist()):
        for k, e in enumerate(chosen[t].tolist() if a >= 0 else ()):
            c = int(cluster[a])
            h = [
                cores[a, s, e].double() @ (v[s, c].double() @ x[t].double()) for s in range(slices)
            ]
            added[t, k] = torch.cat([z @ u[s][c].double() for s, z in enumerate(h)])
    pairs = torch.where(slots[:, None] < 0, -1, slots[:, None] * EXPERTS + chosen).flatten().int()
    order = torch.where(slots < 0, CLUSTERS, cluster[slots]).argsort(stable=True)
    order = (order[:, None] * K + torch.arange(K)).flatten().int()
    y = randn(n_tokens * K, sum(D_OUT))
    return Case(pools, x.repeat_interleave(K, 0), y, pairs), added.flatten(0, 1), order


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
@pytest.mark.parametrize("n_tokens", [5, 40])
def test_each_pair_gets_its_adapters_expert(backend, dtype, n_tokens):
    case, added, _ = experts_case(n_tokens, dtype)
    y = case.y.clone()
    kernels.BACKENDS[backend](y, case.x, case.pools, case.token_slots)
    check_experts(y, case, added)
