"""Merges against PEFT's own `add_weighted_adapter`, and the properties that they should have."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel

from vllm_jd.compressor.algebra.factors import ModuleFactors
from vllm_jd.compressor.methods.merges import merge

D_IN, D_OUT = 20, 12
PEFT_NAMES = {
    "task-arithmetic": "linear",
    "ties": "ties",
    "dare": "dare_linear",
    "dare-ties": "dare_ties",
}
METHODS = list(PEFT_NAMES)

property_test = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


class Tiny(torch.nn.Module):
    """Two layers of one shape: adapters may have the one, the other or both."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(D_IN, D_OUT)
        self.k_proj = torch.nn.Linear(D_IN, D_OUT)


def numbers(kind, *shape, generator):
    if kind == "coarse":  # many equal magnitudes, and sums over adapters that are exactly 0
        return torch.randint(-14, 15, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


def peft_merge(configs, kind, method, weights, density, majority_sign, seed, monkeypatch):
    """PEFT's merge: module → (its A, its B, (A, B, scale) or None of every adapter)."""
    reference = LoraModel._generalized_task_arithmetic_weighted_adapter

    def seeded(*args):
        torch.manual_seed(seed)  # new layers draw numbers before each merge
        return reference(*args)

    monkeypatch.setattr(LoraModel, "_generalized_task_arithmetic_weighted_adapter", seeded)
    generator = torch.Generator().manual_seed(seed + 1)
    names = [f"adapter{i}" for i in range(len(configs))]
    model = get_peft_model(Tiny(), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layers = {name: getattr(model.base_model.model, name) for name in ("q_proj", "k_proj")}
    inputs = {name: [] for name in layers}
    for module, layer in layers.items():
        for name in names:
            if name not in layer.lora_A:
                inputs[module].append(None)
                continue
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.data = numbers(kind, *a.shape, generator=generator)
            b.data = numbers(kind, *b.shape, generator=generator)
            inputs[module].append((a.data.clone(), b.data.clone(), layer.scaling[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of density 1, which prunes nothing
        model.base_model.add_weighted_adapter(
            names,
            weights,
            "merged",
            combination_type=PEFT_NAMES[method],
            density=density,
            majority_sign_method=majority_sign,
        )
    return {
        module: (
            layer.lora_A["merged"].weight.data,
            layer.lora_B["merged"].weight.data,
            inputs[module],
        )
        for module, layer in layers.items()
        if "merged" in layer.lora_A
    }


def folded(adapters):
    """`ModuleFactors` with the scale in B, as the compressor reads them, and the scales."""
    pairs = [None if x is None else (x[0], x[1] * x[2]) for x in adapters]
    scales = torch.tensor([1.0 if x is None else x[2] for x in adapters])
    return ModuleFactors.stack(pairs, D_IN, D_OUT), scales


def config(alpha, targets=("q_proj", "k_proj"), **more):
    return LoraConfig(r=6, lora_alpha=alpha, target_modules=list(targets), **more)


CONFIGS = {
    # scales 2, 0.5, 4/3, 24/√6 and, for k_proj alone, 1/6
    "different scales": [
        config(12),
        config(3),
        config(8),
        config(24, use_rslora=True, alpha_pattern={"k_proj": 1}),
    ],
    "negative scale": [config(12), config(-4), config(6), config(10)],
    "missing modules": [
        config(12),
        config(5, ["q_proj"]),
        config(8, ["k_proj"]),
        config(9, ["q_proj"]),
    ],
}
WEIGHTS = {
    "default": [0.25] * 4,
    "different": [1.0, 0.3, 2.0, 0.7],
    "negative": [1.0, -0.5, 0.8, -1.5],
}


# Sums of coarse numbers divided by 0.55 are 0 but for PEFT's rounding, which no one can match.
@pytest.mark.parametrize(
    ("kind", "density"),
    [
        *(("fine", density) for density in (0.2, 0.55, 1.0)),
        *(("coarse", density) for density in (0.25, 0.5, 1.0)),
    ],
)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("configs", CONFIGS)
@pytest.mark.parametrize(
    ("method", "majority_sign"),
    [(method, "total") for method in METHODS] + [("ties", "frequency"), ("dare-ties", "frequency")],
)
def test_equals_peft(method, majority_sign, configs, weights, kind, density, monkeypatch):
    merged = peft_merge(
        CONFIGS[configs], kind, method, WEIGHTS[weights], density, majority_sign, 7, monkeypatch
    )
    assert set(merged) == {"q_proj", "k_proj"}
    for a, b, adapters in merged.values():
        factors, scales = folded(adapters)
        given_weights = None if weights == "default" else torch.tensor(WEIGHTS[weights])
        ours = merge(
            factors,
            method,
            scales=scales,
            weights=given_weights,
            density=density,
            majority_sign=majority_sign,
            seed=7,
        )
        assert ours[0].dtype == ours[1].dtype == torch.float32
        assert ours[0].is_contiguous() and ours[1].is_contiguous()
        torch.testing.assert_close(ours[0], a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_not_pruned_as_in_peft(method, monkeypatch):
    merged = peft_merge([config(12)], "fine", method, [0.7], 0.3, "total", 1, monkeypatch)
    a, b, adapters = merged["q_proj"]
    factors, scales = folded(adapters)
    ours = merge(factors, method, scales=scales, weights=torch.tensor([0.7]), density=0.3)
    torch.testing.assert_close(ours[0], a)
    torch.testing.assert_close(ours[1], b.T)
    torch.testing.assert_close(ours[1].T @ ours[0], 0.7 * factors.b.T @ factors.a)


def random_adapters(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    adapters = []
    for rank in ranks:
        a, b = (torch.randn(size, generator=generator) for size in ((rank, D_IN), (D_OUT, rank)))
        scale = float(0.2 + 3 * torch.rand((), generator=generator))
        adapters.append((a, b, scale) if rank else None)
    return adapters


@property_test
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.sampled_from(["task-arithmetic", "ties"]),
    st.sampled_from(["total", "frequency"]),
    st.floats(0.05, 1),
    st.randoms(use_true_random=False),
)
def test_order_of_adapters_does_not_matter(seed, ranks, method, majority_sign, density, random):
    adapters = random_adapters(seed, ranks)
    weights = torch.linspace(-1, 2, len(ranks))
    order = random.sample(range(len(ranks)), len(ranks))
    results = []
    for indices in (range(len(ranks)), order):
        factors, scales = folded([adapters[i] for i in indices])
        results.append(
            merge(
                factors,
                method,
                scales=scales,
                weights=weights[list(indices)],
                density=density,
                majority_sign=majority_sign,
            )
        )
    for one, other in zip(*results, strict=True):
        assert one.shape[0] == max(ranks)
        torch.testing.assert_close(one, other)


@property_test
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(METHODS), st.integers(0, 3))
def test_one_adapter_with_density_1_gives_itself(seed, rank, method, without):
    """Also where it is the only one of several that has the module: its weight stays 1."""
    adapters = random_adapters(seed, [rank] + [0] * without)
    factors, scales = folded(adapters)
    a, b = merge(factors, method, scales=scales, weights=torch.ones(1 + without), density=1.0)
    torch.testing.assert_close(b.T @ a, factors.b.T @ factors.a)


@pytest.mark.parametrize("method", METHODS)
def test_size_of_the_merge_of_equal_adapters(method):
    """The default weights give n times the adapter for sums, 1/n of it for means."""
    factors, scales = folded(random_adapters(8, [3]) * 5)
    a, b = merge(factors, method, scales=scales, density=1.0)
    size = 1 / 5 if "ties" in method else 5
    torch.testing.assert_close(b.T @ a, size * factors.b[:3].T @ factors.a[:3])


@property_test
@given(st.integers(0, 2**31), st.sampled_from(METHODS), st.floats(0.1, 1))
def test_adapters_without_factors_change_nothing(seed, method, density):
    adapters = random_adapters(seed, [3, 3, 2])
    weights = torch.tensor([0.5, 1.0, 2.0])
    factors, scales = folded(adapters)
    expected = merge(factors, method, scales=scales, weights=weights, density=density)
    factors, scales = folded([None, adapters[0], adapters[1], None, adapters[2]])
    scales[0] = 0  # no factor, no matter
    more = torch.tensor([9.0, 0.5, 1.0, 9.0, 2.0])
    found = merge(factors, method, scales=scales, weights=more, density=density)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("method", METHODS)
def test_missing_rows_are_zeros(method):
    """Rows beyond an adapter's rank are as if it had rows of zeros there (density 1)."""
    adapters = random_adapters(3, [2, 4, 1])
    padded = [
        (
            torch.nn.functional.pad(a, (0, 0, 0, 4 - len(a))),
            torch.nn.functional.pad(b, (0, 4 - len(a))),
            scale,
        )
        for a, b, scale in adapters
    ]
    results = []
    for given_adapters in (adapters, padded):
        factors, scales = folded(given_adapters)
        results.append(merge(factors, method, scales=scales, density=1.0))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_trimming_keeps_a_share_of_each_adapters_own_numbers():
    adapters = random_adapters(5, [1, 4])
    factors, scales = folded(adapters)
    # A weight of 0 leaves the other one's kept numbers alone to be seen.
    for kept, rank in ((0, 1), (1, 4)):
        weights = torch.eye(2)[kept]
        a, b = merge(factors, "ties", scales=scales, weights=weights, density=0.25)
        # Where the other adapter wins the election, a kept number is not seen.
        assert 0 < int((a != 0).sum()) <= rank * D_IN // 4
        assert 0 < int((b != 0).sum()) <= rank * D_OUT // 4
        limit = adapters[kept][0].abs().flatten().sort(descending=True).values[rank * D_IN // 4 - 1]
        seen = adapters[kept][0][a[:rank] != 0].abs()
        assert bool((seen >= limit).all())


def test_frequency_and_total_elect_differently():
    values = (5.0, -1.0, -2.0)
    factors, scales = folded([(v * torch.ones(1, D_IN), torch.ones(D_OUT, 1), 1) for v in values])
    ones = torch.ones(3)
    for majority_sign, expected in (("total", 5.0), ("frequency", -1.5)):
        a, _ = merge(
            factors, "ties", scales=scales, weights=ones, density=1.0, majority_sign=majority_sign
        )
        torch.testing.assert_close(a, torch.full((1, D_IN), expected))


def test_dare_masks():
    """Reproducible, of the given density, different for every adapter and seed."""
    count = 40
    factors = ModuleFactors.stack([(torch.ones(8, D_IN), torch.ones(D_OUT, 8))] * count, 20, 12)
    density = 0.3

    def masks(seed):
        """A's mask of every adapter; weights that only one adapter has show it alone."""
        shown = []
        for i in range(count):
            weights = torch.eye(count)[i]
            a, _ = merge(
                factors,
                "dare",
                scales=torch.ones(count),
                weights=weights,
                density=density,
                seed=seed,
            )
            assert a.unique().tolist() == pytest.approx([0, 1 / density])
            shown.append(a != 0)
        return torch.stack(shown)

    first, again, other = masks(0), masks(0), masks(1)
    assert torch.equal(first, again)
    assert len({mask.numpy().tobytes() for mask in [*first, *other]}) == 2 * count
    kept = first.double().mean()
    assert abs(float(kept) - density) < 5 * math.sqrt(density * (1 - density) / first.numel())


def test_dare_expectation():
    """The mean over seeds of A, of B and of the delta is task arithmetic's."""
    factors, scales = folded(random_adapters(11, [4, 4, 4]))
    weights = torch.tensor([1.0, -0.5, 0.7])

    def merged(method, seed=0):
        a, b = merge(factors, method, scales=scales, weights=weights, density=0.6, seed=seed)
        return a.double(), b.double(), b.double().T @ a.double()

    draws = [merged("dare", seed) for seed in range(600)]
    for expected, found in zip(merged("task-arithmetic"), zip(*draws, strict=True), strict=True):
        found = torch.stack(found)
        error = (found.mean(0) - expected) / (found.std(0) / math.sqrt(len(found)))
        assert float(error.abs().max()) < 5
        assert 0.8 < float(error.square().mean().sqrt()) < 1.2


def test_inputs_are_not_changed():
    factors, scales = folded(random_adapters(2, [3, 0, 2, 3]))
    before = factors.a.clone(), factors.b.clone(), scales.clone()
    for method in METHODS:
        merge(factors, method, scales=scales)
    assert all(
        torch.equal(x, y) for x, y in zip(before, (factors.a, factors.b, scales), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_adapter_has_the_module(method):
    factors, scales = folded([None, None])
    a, b = merge(factors, method, scales=scales)
    assert a.shape == (0, D_IN) and b.shape == (0, D_OUT)


def test_a_scale_of_0():
    adapters = random_adapters(4, [2, 2])
    factors, scales = folded([adapters[0], (*adapters[1][:2], 0.0)])
    for method in ("ties", "dare-ties"):
        with pytest.raises(ValueError, match="scale of adapter 1 is 0"):
            merge(factors, method, scales=scales)
    a, b = merge(factors, "task-arithmetic", scales=scales, weights=torch.ones(2))
    torch.testing.assert_close(b.T @ a, factors.b[:2].T @ factors.a[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "linear"}, "method is 'linear', expected one of ties, task-arithmetic"),
        ({"majority_sign": "most"}, "majority_sign is 'most', expected one of total, frequency"),
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density": math.nan}, "density is nan"),
        ({"weights": torch.ones(3)}, r"weights has shape \[3\], expected \[2\]"),
        ({"scales": torch.ones(2, 1)}, r"scales has shape \[2, 1\], expected \[2\]"),
        ({"weights": torch.tensor([1.0, math.inf])}, "weights has NaN or infinity"),
    ],
)
def test_bad_arguments(change, message):
    factors, scales = folded(random_adapters(0, [2, 2]))
    arguments = {"method": "ties", "scales": scales} | change
    with pytest.raises(ValueError, match=message):
        merge(factors, **arguments)
