"""Memory in large pages: zeros, nobody else's, at addresses that the kernels may rely on."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jd.kernels.cpu.memory import large_pages


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 63, 64, 65, 4097, 3 << 20, 65 << 20]), max_size=6))
def test_each_piece_is_its_owners_alone(sizes):
    pieces = [large_pages(size) for size in sizes]
    for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,)
        assert size == 0 or piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece[:] = i + 1
    for i, piece in enumerate(pieces):
        assert (piece == i + 1).all()
