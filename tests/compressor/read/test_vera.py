"""VeRA adapters as PEFT writes them: read, compressed and exported, against PEFT's own layers."""

import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import AdapterError, Settings, export_adapter, read_adapters
from vllm_jd.compressor.methods.hydraopt import hydraopt_vera
from vllm_jd.compressor.report.summary import adapter_summary, store_summary
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_DIAGONAL, CORE_NONE

HIDDEN, INNER, KEYS, RANK = 24, 40, 8, 6
BASE_CONFIG = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 3}
WIDTHS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q}"


def base_model():
    """Linear layers by the names of Llama's, two layers of them."""

    def block():
        def part(*names):
            return torch.nn.ModuleDict(
                {name: torch.nn.Linear(*WIDTHS[name], bias=False) for name in names}
            )

        attention, mlp = part("q_proj", "k_proj", "o_proj"), part("up_proj", "down_proj")
        return torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp})

    layers = torch.nn.ModuleList([block() for _ in range(2)])
    return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})


def deltas_of(model):
    """module → float64 `[d_out, d_in]`: what each adapted layer adds, by its forward."""
    model = model.double()
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            eye = torch.eye(layer.base_layer.in_features, dtype=torch.float64)
            with torch.no_grad():
                found[name.removeprefix("base_model.model.")] = (
                    layer(eye) - layer.base_layer(eye)
                ).T
    return found


def save_vera(folder, seed, *, targets=("q_proj", "k_proj"), vectors=None, size=0.3, **config):
    """Save a VeRA adapter by PEFT; returns its deltas. `vectors`: take these λ."""
    generator = torch.Generator().manual_seed(seed)
    config = VeraConfig(
        r=config.pop("r", RANK), target_modules=list(targets), init_weights=False, **config
    )
    model = get_peft_model(base_model(), config)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            drawn = size * torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn if vectors is None else vectors[name].clone()
    model.save_pretrained(folder)
    edit_config(folder, base_model_name_or_path="org/tiny")
    return deltas_of(model)


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def faults_of(*paths, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(paths, **options)
    return caught.value.faults


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five adapters on q and k; the third has no k, the fourth no layer 1."""
    folder = tmp_path_factory.mktemp("vera")
    deltas = {}
    for i in range(5):
        targets = ("q_proj",) if i == 2 else ("q_proj", "k_proj")
        only = {"layers_to_transform": [0], "layers_pattern": "layers"} if i == 3 else {}
        deltas[f"a{i}"] = save_vera(folder / f"a{i}", i, targets=targets, **only)
    return SimpleNamespace(folder=folder, deltas=deltas)


@pytest.fixture
def adapter(tmp_path, made):
    """A copy of one good adapter."""
    return shutil.copytree(made.folder / "a0", tmp_path / "in" / "a0")


def check_deltas(store, deltas, **tolerance):
    """The deltas that the store serves are those of PEFT."""
    assert store.names == sorted(deltas)
    for name in store.names:
        found = store.factors(name)
        assert found.keys() == deltas[name].keys()
        for module, (b, a) in found.items():
            torch.testing.assert_close(b.double() @ a.double(), deltas[name][module], **tolerance)


def mean_error(store, deltas):
    """Relative squared error, mean over adapters and modules, in float64 from whole products."""
    errors = []
    for name, own in deltas.items():
        found = store.factors(name)
        for module, delta in own.items():
            b, a = found[module]
            lost = b.double() @ a.double() - delta
            errors.append(float(lost.square().sum() / delta.square().sum()))
    return sum(errors) / len(errors)


# --- reading ---


def test_factors_are_those_of_peft(made):
    collection = read_adapters([made.folder])
    assert collection.method == "VERA"
    assert set(collection.shapes) == {name for own in made.deltas.values() for name in own}
    numbers = 0
    for module, (d_in, d_out) in collection.shapes.items():
        factors = collection.factors(module)
        assert factors.vera.lambda_d.shape == (5, RANK)
        assert factors.vera.lambda_b.shape == (5, d_out)
        assert (factors.d_in, factors.d_out) == (d_in, d_out)
        norms = factors.squared_norms()
        assert "_whole" not in vars(factors)  # n·r·d numbers, which nobody has asked for yet
        numbers += factors.a.numel() + factors.b.numel()
        for i, name in enumerate(collection.names):
            own = factors.subset(torch.tensor([i]))
            assert own.vera is None
            delta = made.deltas[name].get(module)
            assert int(factors.ranks[i]) == (0 if delta is None else RANK)
            if delta is None:
                assert norms[i] == 0
                continue
            torch.testing.assert_close(own.b.double().T @ own.a.double(), delta)
            torch.testing.assert_close(norms[i], delta.square().sum())
        whole = factors.subset(torch.arange(5))
        assert torch.equal(whole.a, factors.a)
        torch.testing.assert_close(whole.squared_norms(), norms, rtol=1e-5, atol=1e-9)
    assert collection.factor_bytes == 4 * numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_read_as_what_they_are(adapter, dtype):
    edit_weights(adapter, lambda t: t.update({key: x.to(dtype) for key, x in t.items()}))
    tensors = load_file(adapter / WEIGHTS)
    vera = read_adapters([adapter]).factors(Q).vera
    assert torch.equal(vera.lambda_b[0], tensors[f"{PREFIX}.vera_lambda_b"].float())
    assert torch.equal(vera.projection_b, tensors["base_model.vera_B"].float())


def test_widths_of_several_kinds_of_layers_come_from_the_base_models_config(tmp_path):
    targets = ("q_proj", "o_proj", "down_proj")
    deltas = save_vera(tmp_path / "in" / "a", 0, targets=targets)
    (fault,) = faults_of(tmp_path / "in")
    assert "mlp.down_proj, self_attn.o_proj, self_attn.q_proj" in fault
    assert "--base-model" in fault
    collection = read_adapters([tmp_path / "in"], base_config=BASE_CONFIG)
    assert collection.shapes == {name: tuple(delta.shape[::-1]) for name, delta in deltas.items()}
    for module, delta in deltas.items():
        factors = collection.factors(module)
        torch.testing.assert_close(factors.b.double().T @ factors.a.double(), delta)
    (fault,) = faults_of(tmp_path / "in", base_config=BASE_CONFIG | {"intermediate_size": 48})
    assert "vera_A has 40 columns" in fault
    assert "takes 48" in fault
    (fault,) = faults_of(tmp_path / "in", base_config={"hidden_size": HIDDEN})
    assert "does not say it of mlp.down_proj, self_attn.o_proj" in fault

    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(BASE_CONFIG))
    edit_config(tmp_path / "in" / "a", base_model_name_or_path=str(model))
    assert read_adapters([tmp_path / "in"]).shapes == collection.shapes


def test_one_kind_of_layer_needs_no_config(tmp_path):
    deltas = save_vera(tmp_path / "a", 0, targets=("down_proj",))
    assert set(read_adapters([tmp_path]).shapes.values()) == {(INNER, HIDDEN)}
    assert len(deltas) == 2


# --- what is refused ---


VERA_KEYS = {
    "no prefix": lambda key: key.removeprefix("base_model.model.").removeprefix("base_model."),
    "adapter's name": lambda key: f"{key}.default",
    "compiled": lambda key: key.replace(".layers", "._orig_mod.layers"),
    "data parallel": lambda key: f"module._orig_mod.{key}",
}


@pytest.mark.parametrize("case", VERA_KEYS)
def test_what_trainers_leave_in_keys_is_not_of_the_layers_name(adapter, made, case):
    def rename(tensors):
        renamed = {VERA_KEYS[case](key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_weights(adapter, rename)
    collection = read_adapters([adapter])
    for module, delta in made.deltas["a0"].items():
        factors = collection.factors(module)
        torch.testing.assert_close(factors.b.double().T @ factors.a.double(), delta)


def test_two_tensors_of_one_meaning_are_refused(adapter):
    edit_weights(adapter, lambda t: t.update({f"{Q}.vera_lambda_b": torch.ones(HIDDEN)}))
    (fault,) = faults_of(adapter)
    assert f"has two tensors that mean {PREFIX}.vera_lambda_b, expected one" in fault


def test_an_adapter_that_was_never_trained_is_said_to_change_nothing(tmp_path):
    notes = []
    model = get_peft_model(base_model(), VeraConfig(r=RANK, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "fresh")
    read_adapters([tmp_path / "fresh"], on_note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("fresh: changes nothing")
    save_vera(tmp_path / "trained", 1, targets=["q_proj"])
    notes.clear()
    read_adapters([tmp_path / "trained"], on_note=notes.append)
    assert notes == []


def test_projections_that_were_not_saved_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="PRNG"):
        save_vera(tmp_path / "a", 0, save_projection=False)
    (fault,) = faults_of(tmp_path)
    assert "save_projection=True" in fault
    assert str(tmp_path / "a") in fault


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"projection_prng_key": 7}, "projection_prng_key 7; most of the others have"),
        ({"r": 4}, "found vera_A [4, 24], vera_B [24, 4]"),
        ({"targets": ("q_proj", "up_proj")}, "vera_B [40, 6]"),
    ],
)
def test_adapters_over_other_projections_are_refused(tmp_path, made, config, message):
    save_vera(tmp_path / "odd", 9, **config)
    (fault,) = faults_of(made.folder, tmp_path / "odd")
    assert fault.startswith(str(tmp_path / "odd"))
    assert message in fault


def test_projections_of_one_seed_but_other_numbers_are_refused(made, adapter):
    edit_weights(adapter, lambda t: t["base_model.vera_A"].mul_(1.5))
    adapter.rename(adapter.parent / "odd")
    (fault,) = faults_of(made.folder, adapter.parent / "odd")
    assert "of other numbers" in fault


def test_lora_and_vera_adapters_together_are_refused(tmp_path, made, write_adapters):
    shapes = {Q: (HIDDEN, HIDDEN)}
    (lora,) = write_adapters(tmp_path, 1, shapes=shapes, config={"base": "org/tiny"})
    (fault,) = faults_of(made.folder, lora)
    assert fault.startswith(f"{lora}: a LoRA adapter, most of the others are VeRA adapters")


def put(key, *shape):
    return lambda tensors: tensors.update({key: torch.ones(shape)})


BAD_WEIGHTS = {
    "no d": (lambda t: t.pop(f"{PREFIX}.vera_lambda_d"), f"{Q}: vera_lambda_d is missing"),
    "no b": (lambda t: t.pop(f"{PREFIX}.vera_lambda_b"), f"{Q}: vera_lambda_b is missing"),
    "no A": (lambda t: t.pop("base_model.vera_A"), "holds no base_model.vera_A"),
    "short d": (put(f"{PREFIX}.vera_lambda_d", 5), "found shape [5], expected [6]"),
    "long b": (put(f"{PREFIX}.vera_lambda_b", 25), "expected [d_out] of at most 24"),
    "a matrix": (put(f"{PREFIX}.vera_lambda_b", 2, 2), "found shape [2, 2]"),
    "rank of A": (put("base_model.vera_A", 5, 24), "found shape [5, 24], expected [6, d_in]"),
    "rank of B": (put("base_model.vera_B", 24, 5), "found shape [24, 5], expected [d_out, 6]"),
    "NaN": (lambda t: t[f"{PREFIX}.vera_lambda_d"].fill_(torch.nan), "in 6 of 6 numbers"),
    "inf in B": (lambda t: t["base_model.vera_B"].fill_(torch.inf), "in 144 of 144 numbers"),
    "a bias": (put(f"{PREFIX}.bias", 24), "is no VeRA vector"),
    "a LoRA factor": (put(f"{PREFIX}.lora_A.weight", 4, 24), "is no VeRA vector"),
    "nothing": (
        lambda t: [t.pop(key) for key in list(t) if "lambda" in key],
        "holds no VeRA vectors",
    ),
    "too large": (
        lambda t: [t[f"{PREFIX}.vera_lambda_{side}"].fill_(1e30) for side in "bd"],
        "is too large",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_by_tensor(adapter, case):
    change, message = BAD_WEIGHTS[case]
    edit_weights(adapter, change)
    (fault,) = faults_of(adapter)
    assert str(adapter) in fault
    assert message in fault


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "vera_only"}, "bias is 'vera_only', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"r": 7}, "found shape [6, 24], expected [7, d_in]"),
    ],
)
def test_a_bad_config_is_refused_by_field(adapter, fields, message):
    edit_config(adapter, **fields)
    faults = faults_of(adapter)
    assert any(message in fault for fault in faults), faults


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_mutated_weights_never_raise_anything_but_an_adapter_error(adapter, made, data):
    content = bytearray((made.folder / "a0" / WEIGHTS).read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, size + 8))
        content[at] ^= data.draw(st.integers(1, 255))
    (adapter / WEIGHTS).write_bytes(content)
    try:
        collection = read_adapters([adapter])
    except AdapterError:
        return
    for module in collection.shapes:
        factors = collection.factors(module)
        assert bool(factors.a.isfinite().all() and factors.b.isfinite().all())


# --- through the store ---


def test_stored_as_they_are(tmp_path, made):
    collection = read_adapters([made.folder])
    settings = Settings(method="none", store_dtype="float32")
    store = compress(collection, tmp_path / "store", settings)
    check_deltas(store, made.deltas, rtol=1e-4, atol=1e-6)
    assert float(store.error.max()) < 1e-9
    cores = store.cores(0, 5)
    for column, module in enumerate(store.manifest.modules):
        bases, vera = store.bases(module.name), collection.factors(module.name).vera
        present = store.present[:, column]
        # One U and one V for all, and the vectors of each.
        assert torch.equal(bases.u, vera.projection_b.T)
        assert torch.equal(bases.v, vera.projection_a)
        assert torch.equal(bases.scales, vera.lambda_b[present])
        line = [[0, 0, RANK, CORE_DIAGONAL, row] for row in range(int(present.sum()))]
        assert bases.rows.tolist() == line
        own = cores[:, module.core_offset : module.core_offset + module.core_size]
        assert torch.equal(own, vera.lambda_d)
        assert (module.shared, module.rank) == (0, 0)
    summary = store_summary(store)
    assert summary["settings"]["peft_type"] == "VERA"
    vectors = sum(RANK + len(delta) for own in made.deltas.values() for delta in own.values())
    parameters = vectors + RANK * (HIDDEN + HIDDEN)
    assert summary["sizes"]["adapter_parameters"] == parameters
    assert summary["uncompressed"] == 5
    assert adapter_summary(store, "a2")["source_ranks"] == [RANK]


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 1e-4), ("int8", 1e-3), ("int4", 0.1)])
def test_rounded_numbers_lose_little(tmp_path, made, dtype, error):
    settings = Settings(method="none", store_dtype=dtype)
    store = compress(read_adapters([made.folder]), tmp_path / "store", settings)
    found = mean_error(store, made.deltas)
    assert found < error
    assert float(store.error[store.present].mean()) == pytest.approx(found, rel=1e-2)


def test_an_exported_adapter_is_a_lora_adapter_that_peft_loads(tmp_path, made):
    settings = Settings(method="none", store_dtype="float32")
    store = compress(read_adapters([made.folder]), tmp_path / "store", settings)
    for name in ("a0", "a2", "a3"):
        folder = export_adapter(store, name, tmp_path / name)
        edit_config(folder, task_type=None)  # the model here is no causal language model
        found = deltas_of(PeftModel.from_pretrained(base_model(), folder))
        assert found.keys() == made.deltas[name].keys()
        for module, delta in found.items():
            torch.testing.assert_close(delta, made.deltas[name][module], rtol=1e-4, atol=1e-6)


METHODS = {
    "jd-full": {"rank": 4, "clusters": 2},
    "jd-diag": {"rank": 8},
    "svd": {"rank": 3},
    "ties": {},
    "task-arithmetic": {},
}


@pytest.mark.parametrize("case", METHODS)
def test_other_methods_see_the_lora_adapters_that_they_are(tmp_path, made, case):
    """Compressed as VeRA, and as what PEFT would load of the same adapters as LoRA."""
    exact = Settings(method="none", store_dtype="float32")
    whole = compress(read_adapters([made.folder]), tmp_path / "whole", exact)
    for name in whole.names:
        export_adapter(whole, name, tmp_path / "lora" / name)
    settings = Settings(**{"method": case, "store_dtype": "float32"} | METHODS[case])
    one = compress(read_adapters([made.folder]), tmp_path / "one", settings)
    two = compress(read_adapters([tmp_path / "lora"]), tmp_path / "two", settings)
    torch.testing.assert_close(one.norm, two.norm, rtol=1e-4, atol=1e-6)
    error = float(one.error[one.present].mean())
    # JD-Diag's way to its bases hangs on the last digits.
    assert error == pytest.approx(float(two.error[two.present].mean()), rel=3e-2)
    assert error == pytest.approx(mean_error(one, made.deltas), rel=1e-2)


@pytest.mark.parametrize("method", ["jd-full", "hydraopt"])
def test_adapters_that_would_lose_too_much_stay_as_they_are(tmp_path, made, method):
    settings = Settings(method, rank=1, store_dtype="float32", max_adapter_error=0.5)
    settings = settings.adapted(steps=10)
    store = compress(read_adapters([made.folder]), tmp_path / "store", settings)
    kept = [line["uncompressed"] for line in store_summary(store)["adapters"]]
    assert any(kept)
    for name, whole in zip(store.names, kept, strict=True):
        if whole:
            for module, (b, a) in store.factors(name).items():
                delta = made.deltas[name][module]
                torch.testing.assert_close(b.double() @ a.double(), delta, rtol=1e-4, atol=1e-6)


# --- HydraOpt ---


def test_hydraopt_finds_adapters_that_are_alike(tmp_path, made):
    """Two kinds of λ_b on one λ_d, and small changes: two scales stand for six adapters."""
    deltas = {}
    tensors = [load_file(made.folder / f"a{i}" / WEIGHTS) for i in (0, 1)]
    for i in range(6):
        folder = shutil.copytree(made.folder / "a0", tmp_path / "in" / f"v{i}")
        generator = torch.Generator().manual_seed(i)
        own = {
            key: (tensors[i % 2] if key.endswith("_b") else tensors[0])[key] for key in tensors[0]
        }
        for key in own:
            if key.endswith("_b"):
                noise = torch.randn(own[key].shape, generator=generator)
                own[key] = own[key] + 0.01 * noise
        save_file(own, folder / WEIGHTS)
        # PEFT's own reading of the file
        deltas[f"v{i}"] = deltas_of(PeftModel.from_pretrained(base_model(), folder))
    collection = read_adapters([tmp_path / "in"])
    settings = Settings(method="hydraopt", matrices=2, steps=30, store_dtype="float32")
    store = compress(collection, tmp_path / "store", settings)
    assert store.manifest.core_row == 0
    for column, module in enumerate(store.manifest.modules):
        assert (module.u_vectors, module.v_vectors, module.scale_rows) == (RANK, RANK, 2)
        lines = [[0, 0, RANK, CORE_NONE, row] for row in range(2)]
        assert store.rows(module.name).tolist() == lines
        groups = store.chosen[:, column, 0]
        assert len(set(groups[0::2].tolist())) == len(set(groups[1::2].tolist())) == 1
        assert groups[0] != groups[1]
        vera = collection.factors(module.name).vera
        own = (vera.lambda_d, vera.lambda_b, vera.projection_a, vera.projection_b)
        fit = hydraopt_vera(*own, 2, seed=column, steps=30)
        torch.testing.assert_close(store.bases(module.name).scales, fit.b, rtol=1e-5, atol=1e-6)
    error = mean_error(store, deltas)
    assert error < 0.01
    assert float(store.error.mean()) == pytest.approx(error, rel=1e-2)


def test_hydraopt_with_a_scale_for_each_and_adapters_without_a_module(tmp_path, made):
    settings = Settings(method="hydraopt", matrices=5, steps=30, store_dtype="float32")
    store = compress(read_adapters([made.folder]), tmp_path / "store", settings)
    present = store.present
    assert present.tolist() == [
        [info.name in made.deltas[name] for info in store.manifest.modules] for name in store.names
    ]
    # Fewer adapters in a module than matrices: each has its own.
    assert [info.scale_rows for info in store.manifest.modules] == present.sum(0).tolist()
    error = float(store.error[present].mean())
    assert error == pytest.approx(mean_error(store, made.deltas), rel=1e-2)
    settings = Settings(method="hydraopt", matrices=1, steps=30, store_dtype="float32")
    fewer = compress(read_adapters([made.folder]), tmp_path / "fewer", settings)
    assert float(fewer.error[present].mean()) > error
