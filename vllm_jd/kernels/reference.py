"""The three-stage product in plain torch: any device, any dtype, no compiler."""

import torch

from vllm_jd.kernels.pools import ModulePools, check_call


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor
) -> None:
    """Add to each token's output what its adapter contributes.

    Semantics, for each token t of slot a = token_slots[t] >= 0, each slice and each of the slot's
    rows of rank > 0:

        y[t, slice] += U[u_start : u_start + rank]ᵀ · core · V[v_start : v_start + rank] · x[t]

    Products and the sum over the rows are taken in float32 (float64 for float64 pools); y is
    rounded once. Compress then Serve, Listing 1; the grouping is Punica's.

    Args:
        y: [n_tokens, sum of d_out], changed in place.
        x: [n_tokens, d_in].
        pools: of the dtype and on the device of x and y.
        token_slots: int32 [>= n_tokens]; -1: no adapter, y stays as it is, bit by bit.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, or an index in its rows, lies outside its pool.
    """
    check_call(y, x, pools, token_slots)
    tokens = (token_slots[: x.shape[0]] >= 0).nonzero().flatten()
    if tokens.numel() == 0:
        return
    slots = token_slots[tokens].long()
    if int(slots.max()) >= pools.rows.shape[0]:
        raise IndexError(f"token_slots has {int(slots.max())} of {pools.rows.shape[0]} slots")
    x = x[tokens].to(_accumulator(pools.dtype))
    column = 0
    for s, u in enumerate(pools.u):
        part = y[:, column : column + u.shape[1]]
        column += u.shape[1]
        rows = pools.rows[slots, s]
        active = (rows[..., 2] > 0).any(dim=1).nonzero().flatten()
        if active.numel() == 0:
            continue
        delta = _slice_delta(x[active], pools, u, rows[active])
        part[tokens[active]] = (part[tokens[active]].to(delta.dtype) + delta).to(y.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slice_delta(
    x: torch.Tensor, pools: ModulePools, u: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """[n, d_out] of one slice, summed over the rows [n, K, 5]."""
    delta = x.new_zeros(x.shape[0], u.shape[1])
    for k in range(rows.shape[1]):
        bases, group_of = rows[:, k, :3].unique(dim=0, return_inverse=True)
        for group, (v_start, u_start, rank) in enumerate(bases.tolist()):
            if rank <= 0:
                continue
            if v_start < 0 or v_start + rank > pools.v.shape[0]:
                raise IndexError(f"V rows {v_start}..{v_start + rank} of {pools.v.shape[0]}")
            if u_start < 0 or u_start + rank > u.shape[0]:
                raise IndexError(f"U rows {u_start}..{u_start + rank} of {u.shape[0]}")
            members = (group_of == group).nonzero().flatten()
            h = x[members] @ pools.v[v_start : v_start + rank].to(x.dtype).T
            h = _apply_cores(h, pools.cores, rows[members, k, 3:].long())
            delta[members] += h @ u[u_start : u_start + rank].to(x.dtype)
    return delta


def _apply_cores(h: torch.Tensor, cores: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """core · h for each row of h [n, rank]; place [n, 2] holds core_slot and core_offset."""
    rank = h.shape[1]
    with_core = (place[:, 0] >= 0).nonzero().flatten()
    if with_core.numel() == 0:
        return h
    slots, offsets = place[with_core].unbind(1)
    if int(slots.max()) >= cores.shape[0]:
        raise IndexError(f"core slot {int(slots.max())} of {cores.shape[0]}")
    if int(offsets.min()) < 0 or int(offsets.max()) + rank * rank > cores.shape[1]:
        raise IndexError(f"a core of rank {rank} reaches outside a core row of {cores.shape[1]}")
    entries = torch.arange(rank * rank, device=cores.device)
    core = cores[slots[:, None], offsets[:, None] + entries].view(-1, rank, rank)
    h[with_core] = torch.bmm(core.to(h.dtype), h[with_core, :, None]).squeeze(2)
    return h
