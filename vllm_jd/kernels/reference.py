"""The three-stage product in plain torch: any device, any dtype, no compiler."""

import torch

from vllm_jd.kernels.pools import Int8Rows, ModulePools, check_call
from vllm_jd.row import (
    BLOCK,
    CORE_DIAGONAL,
    CORE_FULL,
    CORE_KIND,
    CORE_NONE,
    CORE_OFFSET,
    CORE_SLOT,
    RANK,
    SCALE_ROW,
)

MAX_ENTRIES = 1 << 24


def add_adapters(
    y: torch.Tensor, x: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor, fan: int = 1
) -> None:
    """Add to each token's output what its adapter contributes.

    Semantics, for each token t of slot a = token_slots[t] >= 0, each slice and each of the slot's
    rows of rank > 0:

        y[t, slice] += scale ∘ (Uᵀ · core · V · x[t // fan])

    with U and V the row's `rank` basis vectors from u_start and v_start on, its core (full,
    diagonal or none) and its output scale (or none), all as in `ModulePools`.

    Products and the sum over the rows are taken in float32 (float64 for float64 pools); y is
    rounded once. Compress then Serve, Listing 1; the grouping is Punica's. Diagonal cores
    and scales are VeRA's (equation 2). Where tokens of one input have one V, V · x is made once.

    Args:
        y: [n_tokens, sum of d_out], changed in place.
        x: [n_tokens / fan, d_in].
        pools: of the dtype and on the device of x and y.
        token_slots: int32 [>= n_tokens]; -1: no adapter, y stays as it is, bit by bit.
        fan: how many neighbouring tokens have one input: the pairs of a token and its experts.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a slot, or an index in its rows, lies outside its pool, or a core kind is
            unknown; y is unchanged.
    """
    check_call(y, x, pools, token_slots, fan)
    tokens = (token_slots[: y.shape[0]] >= 0).nonzero().flatten()
    if tokens.numel() == 0:
        return
    slots = token_slots[tokens].long()
    if int(slots.max()) >= pools.slots:
        raise IndexError(f"token_slots has {int(slots.max())} of {pools.slots} slots")
    check_rows(pools.rows_at(slots.unique()), pools)
    inputs = tokens // fan
    x = x.to(_accumulator(pools.dtype))
    column = 0
    for s, u in enumerate(pools.u):
        part = y[:, column : column + u.shape[1]]
        column += u.shape[1]
        rows = pools.rows_at(slots)[:, s]
        active = (rows[..., RANK] > 0).any(dim=1).nonzero().flatten()
        if active.numel() == 0:
            continue
        delta = _slice_delta(x, inputs[active], pools, s, rows[active])
        part[tokens[active]] = (part[tokens[active]].to(delta.dtype) + delta).to(y.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rows(rows: torch.Tensor, pools: ModulePools) -> None:
    """Raise IndexError where an index in rows [n, n_slices, K, 7] lies outside its pool."""
    for s in range(len(pools.u)):
        used = rows[:, s].flatten(0, 1)
        used = used[used[:, RANK] > 0].long()
        v_start, u_start, rank, kind, scale_row, _, _ = used.unbind(1)
        _check_basis("V rows", v_start, rank, len(pools.v_int8 or ()), pools.v_rows())
        in_8_bits = len(pools.u_int8[s]) if pools.u_int8 else 0
        _check_basis("U rows", u_start, rank, in_8_bits, pools.u_rows(s))
        _check_range("core kind", kind, kind + 1, 0, CORE_DIAGONAL + 1)
        scale_rows = 0 if pools.scales is None else pools.scales[s].shape[0]
        _check_range("scale row", scale_row, scale_row + 1, -1, scale_rows)

        _, _, rank, kind, _, core_slot, offset = used[kind != CORE_NONE].unbind(1)
        length = torch.where(kind == CORE_FULL, rank * rank, rank)
        _check_range("core slot", core_slot, core_slot + 1, 0, pools.cores.shape[0])
        _check_range("core entries", offset, offset + length, 0, pools.core_length)


def _check_basis(
    name: str, start: torch.Tensor, rank: torch.Tensor, in_8_bits: int, limit: int
) -> None:
    """A basis lies as a whole among the rows in 8 bits, which come first, or behind them."""
    end = start + rank
    _check_range(name, start, end, 0, limit)
    across = ((start < in_8_bits) & (end > in_8_bits)).nonzero().flatten()
    if across.numel() > 0:
        found = f"{int(start[across[0]])}..{int(end[across[0]])}"
        raise IndexError(f"{name} {found} of a row reach across the end of 8 bits, {in_8_bits}")


def _check_range(name: str, begin: torch.Tensor, end: torch.Tensor, first: int, limit: int) -> None:
    wrong = ((begin < first) | (end > limit)).nonzero().flatten()
    if wrong.numel() > 0:
        found = f"{int(begin[wrong[0]])}..{int(end[wrong[0]])}"
        raise IndexError(f"{name} {found} of a row lie outside {first}..{limit}")


def _slice_delta(
    x: torch.Tensor,
    inputs: torch.Tensor,
    pools: ModulePools,
    s: int,
    rows: torch.Tensor,
) -> torch.Tensor:
    """[n, d_out] of slice s, summed over the rows [n, K, 7], of x at inputs [n]."""
    u = pools.u[s]
    u_int8 = None if pools.u_int8 is None else pools.u_int8[s]
    scales = None if pools.scales is None else pools.scales[s]
    delta = x.new_zeros(inputs.shape[0], u.shape[1])
    for k in range(rows.shape[1]):
        bases, group_of = rows[:, k, : RANK + 1].unique(dim=0, return_inverse=True)
        for group, (v_start, u_start, rank) in enumerate(bases.tolist()):
            if rank <= 0:
                continue
            members = (group_of == group).nonzero().flatten()
            mine = rows[members, k].long()
            distinct, input_of = inputs[members].unique(return_inverse=True)
            z = x[distinct] @ _basis(pools.v_int8, pools.v, v_start, rank).to(x.dtype).T
            h = _apply_cores(z[input_of], pools, mine)
            product = h @ _basis(u_int8, u, u_start, rank).to(x.dtype)
            scaled = (mine[:, SCALE_ROW] >= 0).nonzero().flatten()
            if scaled.numel() > 0:
                product[scaled] *= scales[mine[scaled, SCALE_ROW]].to(x.dtype)
            delta[members] += product
    return delta


def _basis(in_8_bits: Int8Rows | None, floats: torch.Tensor, start: int, rank: int) -> torch.Tensor:
    n = len(in_8_bits or ())
    if in_8_bits is not None and start < n:
        return in_8_bits.decode(floats.dtype, start, start + rank)
    return floats[start - n : start - n + rank]


def _apply_cores(h: torch.Tensor, pools: ModulePools, rows: torch.Tensor) -> torch.Tensor:
    """core · h for each row of h [n, rank], whose rows of indices are rows [n, 7]."""
    rank = h.shape[1]
    diagonal = (rows[:, CORE_KIND] == CORE_DIAGONAL).nonzero().flatten()
    if diagonal.numel() > 0:
        h[diagonal] *= _core_entries(pools, rows[diagonal], rank).to(h.dtype)
    full = (rows[:, CORE_KIND] == CORE_FULL).nonzero().flatten()
    # A core is copied for every token that uses it: as many tokens at once as memory allows.
    for some in full.split(max(1, MAX_ENTRIES // rank**2)):
        core = _core_entries(pools, rows[some], rank * rank).view(-1, rank, rank)
        h[some] = torch.bmm(core.to(h.dtype), h[some, :, None]).squeeze(2)
    return h


def _core_entries(pools: ModulePools, rows: torch.Tensor, length: int) -> torch.Tensor:
    """[n, length]: the entries of the cores that rows [n, 7] name, decoded where they are codes."""
    slots = rows[:, CORE_SLOT, None]
    places = rows[:, CORE_OFFSET, None] + torch.arange(length, device=rows.device)
    if pools.core_steps is None:
        return pools.cores[slots, places]
    if pools.core_bits == 8:
        codes = pools.cores[slots, places]
    else:
        pairs = pools.cores[slots, places // 2].int()
        codes = (pairs >> 4 * (places % 2)).bitwise_and(15) - 8
    steps = pools.core_steps[slots, places // BLOCK]
    return (codes.float() * steps.float()).to(pools.dtype)
