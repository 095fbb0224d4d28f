"""What the Triton kernels of a plan move, by hand and by proportion. (That the kernels do load and
store these bytes: tests/kernels/triton/interpreted/check_traffic.py.)"""

from dataclasses import replace

import pytest

from benchmarks.kernel_traffic import traffic, uniform_content
from vllm_jd.kernels.triton.plan import CONFIGS, LayerShape, plan

MISTRAL_QKV = LayerShape(4096, (4096, 1024, 1024), max_rank=16)


def test_traffic_of_one_token_by_hand():
    shape = LayerShape(4096, (4096, 1024, 1024), max_rank=16)
    shrink, expand = traffic(plan(shape, 1), uniform_content(shape, 1, 1, 1))
    assert shrink.distinct == {"x": 2 * 4096, "v": 3 * 16 * 4096 * 2, "cores": 0}
    assert shrink.loaded["v"] == shrink.distinct["v"]
    assert shrink.flops == 2 * 3 * 16 * 4096
    assert expand.distinct["u"] == 16 * 6144 * 2
    assert expand.distinct["cores"] == 3 * 16 * 16 * 2
    assert expand.stored == {"y": 2 * 6144}


@pytest.mark.parametrize("n_tokens", [16, 64, 256, 1024])
def test_a_basis_comes_from_memory_once(n_tokens):
    """Distinct bytes of the bases grow with clusters, those of cores with adapters."""
    few, many, all_alone = (
        traffic(plan(MISTRAL_QKV, n_tokens), uniform_content(MISTRAL_QKV, n_tokens, a, c))
        for a, c in ((8, 4), (16, 4), (16, 16))
    )
    bases = [sum(t.distinct.get("v", 0) + t.distinct.get("u", 0) for t in m) for m in
             (few, many, all_alone)]  # fmt: skip
    cores = [sum(t.distinct.get("cores", 0) for t in m) for m in (few, many, all_alone)]
    assert bases[0] == bases[1] and bases[2] == 4 * bases[1]
    assert cores[1] == 2 * cores[0] == cores[2]


def test_int8_bases_are_half():
    plain = traffic(plan(MISTRAL_QKV, 64), uniform_content(MISTRAL_QKV, 64, 16, 4))
    shape = replace(MISTRAL_QKV, int8=True)
    coded = traffic(plan(shape, 64), uniform_content(shape, 64, 16, 4))
    assert coded[0].distinct["v"] / plain[0].distinct["v"] == (1 + 2 / 32) / 2


@pytest.mark.parametrize(("bits", "part"), [(8, (8 + 16 / 32) / 16), (4, (4 + 16 / 32) / 16)])
@pytest.mark.parametrize("n_tokens", [8, 64, 200, 1024])
def test_codes_of_cores_are_fewer_bytes(bits, part, n_tokens):
    """Of int8, a half and the steps; of 4 bits, a quarter and the steps. Else nothing is moved."""
    coded = replace(MISTRAL_QKV, core_bits=bits)
    config = replace(CONFIGS[0], fuse_bytes=0)  # the same launches of both
    found = [
        traffic(plan(shape, n_tokens, config), uniform_content(shape, n_tokens, 16, 4))
        for shape in (MISTRAL_QKV, coded)
    ]
    for plain, mine in zip(*found, strict=True):
        for numbers, codes in ((plain.loaded, mine.loaded), (plain.distinct, mine.distinct)):
            assert codes == numbers | {"cores": numbers.get("cores", 0) * part}
        assert (mine.stored, mine.flops) == (plain.stored, plain.flops)
    assert any(one.loaded["cores"] for one in found[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: traffic(plan(MISTRAL_QKV, 2), []), "2 tokens, got 0"),
        (lambda: traffic(plan(MISTRAL_QKV, 1), [((),)]), "3 slices"),
        (lambda: uniform_content(MISTRAL_QKV, 1, 1, 1, core="half"), "core must be"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
