"""V · x of an embedding: x is 1 at a token's number, so that the product is a column of V."""

import torch

from vllm_jd.kernels.pools import ModulePools
from vllm_jd.row import BLOCK, RANK, V_START


def look_up(
    z: torch.Tensor, ids: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor
) -> None:
    """Write V · x of each token's rows into z, in plain torch: any device, any dtype.

    Semantics, for each token t of slot a = token_slots[t], each of the slot's rows k of slice 0,
    and j < its rank:

        z[t, k · W + j] = V[v_start + j, ids[t]],  W = z.shape[1] / pools.depth

    All else of z becomes 0.

    Args:
        z: [n_tokens, pools.depth · W], W at least the highest rank; changed in place.
        ids: int [n_tokens], the tokens' numbers; where there is no such token z becomes 0.
        pools: of z's dtype and on its device. Of these only V and the rows' fields v_start and rank
            are looked at.
        token_slots: int32 [>= n_tokens]; -1: no adapter, z becomes 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    width = check_look_up(z, ids, pools, token_slots)
    z.zero_()
    known = (ids >= 0) & (ids < pools.d_in)
    tokens = ((token_slots[: len(ids)] >= 0) & known).nonzero().flatten()
    if tokens.numel() == 0:
        return
    rows = pools.rows_at(token_slots[tokens].long())[:, 0].long()
    columns = ids[tokens].long()[:, None]
    for k, most in enumerate(rows[..., RANK].amax(dim=0).tolist()):
        if most <= 0:
            continue
        entries = torch.arange(most, device=z.device)
        mine = entries < rows[:, k, RANK, None]
        index = torch.where(mine, rows[:, k, V_START, None] + entries, 0)
        found = _numbers(pools, index, columns.expand_as(index))
        z[tokens, k * width : k * width + most] = found.masked_fill(~mine, 0)


def check_look_up(
    z: torch.Tensor, ids: torch.Tensor, pools: ModulePools, token_slots: torch.Tensor
) -> int:
    """W of a call of `look_up`, whose errors it raises."""
    if len(pools.u) != 1:
        raise ValueError(f"an embedding has one slice, got pools of {len(pools.u)}")
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"ids must be int [n_tokens], got {ids.dtype} {tuple(ids.shape)}")
    if z.dim() != 2 or len(z) != len(ids) or z.shape[1] % pools.depth:
        raise ValueError(
            f"z must be [{len(ids)}, {pools.depth} · W] for so many tokens and rows a slot, got "
            f"{tuple(z.shape)}"
        )
    if z.dtype != pools.dtype:
        raise ValueError(f"z is {z.dtype}, but the pools are {pools.dtype}")
    if token_slots.dtype != torch.int32 or len(token_slots) < len(ids):
        raise ValueError(
            f"token_slots must be int32 [>= {len(ids)}], got {token_slots.dtype} "
            f"{tuple(token_slots.shape)}"
        )
    return z.shape[1] // pools.depth


def _numbers(pools: ModulePools, index: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """V[index, columns] of V's rows, those in 8 bits first: `[n, r]`."""
    in_8_bits = pools.v_int8
    if in_8_bits is None or not len(in_8_bits):
        return pools.v[index, columns]
    found = pools.v.new_empty(index.shape)
    coded = index < len(in_8_bits)
    at, column = index[coded], columns[coded]
    steps = in_8_bits.steps[at, column // BLOCK].float()
    found[coded] = (in_8_bits.codes[at, column].float() * steps).to(pools.dtype)
    found[~coded] = pools.v[index[~coded] - len(in_8_bits), columns[~coded]]
    return found
