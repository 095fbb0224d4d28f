"""Blocks of 32 int8 or 4-bit numbers: how far they may be off, and that they are small."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store.quantise import code_width, dequantise, quantise, scale_width

LEVELS = {"int8": 127, "int4": 7}

property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
kinds = st.sampled_from(["int8", "int4"])


def reference_codes(codes, width):
    """The codes as int64 `[n, width]`, unpacked byte by byte."""
    packed = codes.dtype is torch.uint8
    codes = codes.numpy().astype(np.int64)
    if not packed:
        return codes
    unpacked = [[half - 8 for byte in row for half in (byte & 15, byte >> 4)] for row in codes]
    return np.array(unpacked).reshape(len(codes), 2 * codes.shape[1])[:, :width]


def random_matrix(n, width, spread, seed):
    """Numbers whose sizes differ by up to `spread` powers of ten, some blocks of them zero."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, width)) * 10 ** generator.uniform(-spread, spread, (n, width))
    for row in range(n):
        for first in range(0, width, 32):
            if generator.random() < 0.2:
                x[row, first : first + 32] = 0
    return torch.from_numpy(x).float()


@property_test
@given(
    n=st.integers(0, 5),
    width=st.integers(1, 140),
    spread=st.sampled_from([0, 1, 6, 15]),
    seed=st.integers(0, 10_000),
    kind=kinds,
)
def test_every_number_is_within_half_a_scale(n, width, spread, seed, kind):
    x = random_matrix(n, width, spread, seed)
    codes, scales = quantise(x, kind)
    assert codes.dtype is {"int8": torch.int8, "int4": torch.uint8}[kind]
    assert codes.shape == (n, code_width(width, kind))
    assert scales.dtype is torch.bfloat16
    assert scales.shape == (n, scale_width(width)) == (n, (width + 31) // 32)
    found = dequantise(codes, scales, width)
    assert found.dtype is torch.float32
    assert found.shape == x.shape

    level = reference_codes(codes, width)
    assert np.abs(level).max(initial=0) <= LEVELS[kind]
    steps = np.repeat(scales.double().numpy(), 32, axis=1)[:, :width]
    np.testing.assert_allclose(found.double().numpy(), level * steps, rtol=1e-6)
    error = np.abs(found.double().numpy() - x.double().numpy())
    assert (error <= 0.5 * steps * (1 + 1e-6)).all()
    for row in range(n):
        for block in range(scales.shape[1]):
            largest = float(x[row, 32 * block : 32 * block + 32].abs().max())
            assert float(scales[row, block]) == pytest.approx(largest / LEVELS[kind], rel=2**-8)


@property_test
@given(width=st.integers(1, 80), seed=st.integers(0, 10_000), kind=kinds)
def test_numbers_on_the_grid_come_back_as_they_were(width, seed, kind):
    """Packing loses nothing: every code, at every place of a byte, is found again."""
    generator = np.random.default_rng(seed)
    levels = LEVELS[kind]
    codes = generator.integers(-levels, levels + 1, (3, width))
    codes[:, ::32] = levels  # so that the scale of each block is its power of two
    steps = 2.0 ** generator.integers(-20, 20, (3, scale_width(width)))
    x = torch.from_numpy(codes * np.repeat(steps, 32, axis=1)[:, :width]).float()
    found, scales = quantise(x, kind)
    assert np.array_equal(reference_codes(found, width), codes)
    assert np.array_equal(scales.double().numpy(), steps)
    assert torch.equal(dequantise(found, scales, width), x)
    again, scales_again = quantise(dequantise(found, scales, width), kind)
    assert torch.equal(again, found)
    assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 77])
def test_zeros_stay_zero_beside_anything(kind, width):
    x = torch.zeros(3, width)
    x[1] = 1e30
    x[2, -1] = -1e-30
    found = dequantise(*quantise(x, kind), width)
    assert not found[0].any()
    assert not found[2, :-1].any()
    torch.testing.assert_close(found, x, rtol=0.01, atol=0)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_block_looks_at_another(kind):
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    x[:, :32] *= 1e6
    apart = [dequantise(*quantise(part, kind), part.shape[1]) for part in x.split(32, dim=1)]
    assert torch.equal(dequantise(*quantise(x, kind), 100), torch.cat(apart, dim=1))
    rows = [dequantise(*quantise(row[None], kind), 100) for row in x]
    assert torch.equal(dequantise(*quantise(x, kind), 100), torch.cat(rows))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_a_file_of_codes_is_as_small_as_promised(tmp_path, kind, bits):
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(x, kind)
    save_file({"codes": codes, "scales": scales}, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert size == pytest.approx(x.numel() * bits / 8, rel=0.01)


def test_a_quantised_store_is_smaller_and_no_worse_than_its_grid(tmp_path, write_adapters):
    shapes = {"m.q_proj": (256, 192), "m.k_proj": (256, 64)}
    folders = write_adapters(tmp_path / "in", 12, kind="real", ranks=(8,), shapes=shapes)
    collection = read_adapters(folders)
    stores = {
        dtype: compress(collection, tmp_path / dtype, Settings(rank=16, store_dtype=dtype))
        for dtype in ("float32", "bfloat16", "int8", "int4")
    }

    def payload(store):
        """Bytes of numbers, without the files' headers and the cluster tables."""
        files = [file for kind in ("bases", "cores") for file in store.folder.glob(f"{kind}-*")]
        tensors = [(key, x) for file in files for key, x in load_file(file).items()]
        return sum(x.nbytes for key, x in tensors if not key.endswith(".clusters"))

    whole = payload(stores["float32"])
    assert payload(stores["bfloat16"]) == pytest.approx(whole * 16 / 32)
    assert payload(stores["int8"]) == pytest.approx(whole * 8.5 / 32)
    assert payload(stores["int4"]) == pytest.approx(whole * 4.5 / 32)
    errors = {dtype: float(store.error.double().mean()) for dtype, store in stores.items()}
    exact = errors["float32"]
    # Uniform rounding in a block: a mean square of (largest / levels)² / 12 a number.
    assert exact <= errors["int8"] < exact + 1e-3
    assert errors["int8"] < errors["int4"] < exact + 0.1
    for dtype in ("int8", "int4"):
        assert float(stores[dtype].exact_error.double().mean()) == pytest.approx(exact, rel=1e-4)
    assert stores["float32"].exact_error is None
