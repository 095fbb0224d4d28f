"""V · x of an embedding against a loop over tokens, rows and vectors."""

import pytest
import torch

from tests.kernels.test_kernels import DTYPES, RANK, V_START, decoded, make_case
from tests.kernels.test_long_rows import split
from vllm_jd.kernels.embedding import look_up

TOKENS, VOCABULARY, WIDTH = 40, 70, 9


def make_pools(dtype, *, int8, plain=None, depth=3):
    """Pools of an embedding, and the same with no rows in 8 bits and as much room in all slots."""
    case = make_case(
        1, n_tokens=TOKENS, d_in=VOCABULARY, d_out=(20,), ranks=(1, WIDTH), depth=depth,
        dtype=dtype, int8=int8, strided=True,
    )  # fmt: skip
    whole, parts = (case, case) if plain is None else split(case, plain)
    return parts.pools, decoded(whole).pools, case.token_slots


def expected(pools, ids, slots):
    """z `[tokens, depth · WIDTH]`, one number at a time."""
    z = torch.zeros(len(ids), pools.rows.shape[2] * WIDTH, dtype=pools.dtype)
    for t, token in enumerate(ids.tolist()):
        slot = int(slots[t])
        for k in range(pools.rows.shape[2]) if slot >= 0 and 0 <= token < VOCABULARY else ():
            row = pools.rows[slot, 0, k].tolist()
            for j in range(row[RANK]):
                z[t, k * WIDTH + j] = pools.v[row[V_START] + j, token]
    return z


def check(run, dtype, *, int8, plain):
    pools, whole, slots = make_pools(dtype, int8=int8, plain=plain)
    assert (pools.v_int8 is not None) == int8 and (pools.long_rows is not None) == bool(plain)
    for seed, ids_dtype in enumerate((torch.int32, torch.int64)):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator).to(ids_dtype)
        ids[3], ids[5] = -1, VOCABULARY  # of no token
        z = torch.full((TOKENS, pools.depth * WIDTH), float("nan"), dtype=dtype)
        run(z, ids, pools, slots)
        wanted = expected(whole, ids, slots)
        assert torch.equal(z, wanted)
        assert 0.1 < float((wanted != 0).float().mean()) < 0.8
        run(z[:0], ids[:0], pools, slots)


CASES = pytest.mark.parametrize(
    ("int8", "plain"), [(False, None), (True, None), (False, 3), (True, 3)]
)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
def test_it_is_the_tokens_column_of_v(dtype, int8, plain):
    check(look_up, dtype, int8=int8, plain=plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(TOKENS)}, r"ids must be int \[n_tokens\], got torch.float32"),
        ({"ids": torch.zeros(2, 3, dtype=torch.long)}, r"ids must be int \[n_tokens\]"),
        ({"z": torch.zeros(TOKENS, 3 * WIDTH + 1)}, rf"z must be \[{TOKENS}, 3 · W\]"),
        ({"z": torch.zeros(TOKENS - 1, 3 * WIDTH)}, rf"z must be \[{TOKENS}, 3 · W\]"),
        ({"z": torch.zeros(TOKENS, 3 * WIDTH).half()}, "z is torch.float16, but the pools are"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "token_slots must be int32"),
        ({"slots": torch.zeros(TOKENS)}, "token_slots must be int32"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    pools, _, slots = make_pools(torch.float32, int8=False)
    call = {"z": torch.zeros(TOKENS, 3 * WIDTH), "ids": torch.zeros(TOKENS, dtype=torch.long)}
    call |= {"slots": slots} | change
    with pytest.raises(ValueError, match=message):
        look_up(call["z"], call["ids"], pools, call["slots"])


def test_an_embedding_has_one_slice():
    case = make_case(d_in=VOCABULARY)
    with pytest.raises(ValueError, match="one slice, got pools of 2"):
        look_up(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long), case.pools, case.token_slots)
