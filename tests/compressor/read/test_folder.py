"""What people's adapter folders look like: read as PEFT reads them, or refused in one line."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.compressor.read.peft_folders import (
    BASE,
    CONFIG,
    TOKENS,
    WEIGHTS,
    Q,
    as_mlx,
    base_model,
    drop_config,
    edit_config,
    loaded,
    logits,
    read_like_peft,
    rename_keys,
    same,
    save,
    trained,
    with_deltas,
)
from vllm_jd.compressor import AdapterError, Settings, read_adapters
from vllm_jd.compressor.read.keys import factor_of, is_base_embedding
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import Store

PREFIX = "base_model.model."


def refused(*folders, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(folders, **options)
    return caught.value.faults


@pytest.fixture
def folder(tmp_path):
    """A trained adapter as PEFT saves it; α/r is 1.5."""
    return save(trained(), tmp_path / "a")


# --- what PEFT's config can say ---

TARGETS = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*layers\.[02]\.(self_attn\.v|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": 1},
    "exclude_modules": {
        "target_modules": "all-linear",
        "exclude_modules": r".*\.(k_proj|gate_proj)",
    },
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {
            "q_proj": 7,
            r"layers\.1\..*down_proj": 2,
            "model.layers.2.mlp.up_proj": 1,
        },
        "alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.self_attn\.o_proj": 11},
    },
    "patterns and rsLoRA": {
        "target_modules": ["q_proj", "k_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    },
    "the embedding": {"target_modules": ["embed_tokens"]},
    "the embedding among others": {
        "target_modules": ["embed_tokens", "q_proj", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"embed_tokens": 7, "lm_head": 2},
        "alpha_pattern": {"model.embed_tokens": 3},
    },
    "rsLoRA": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no start": {"init_lora_weights": False},
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_patterns_and_scales_mean_what_they_mean_to_peft(tmp_path, case):
    read_like_peft(save(trained(**TARGETS[case]), tmp_path / "a"))


def test_tied_weights_that_peft_adapts_as_one_are_two_modules(tmp_path):
    """`ensure_weight_tying`: the output layer gets the embedding's factors, turned; without it
    the embedding is adapted alone, though the output layer has its weights."""

    def tied():
        return base_model(tie_word_embeddings=True)

    for both in (False, True):
        fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": both}
        folder = save(trained(model=tied(), **fields), tmp_path / str(both))
        collection = read_adapters([folder])
        assert collection.embeddings == {"model.embed_tokens"}
        assert [*collection.shapes] == ["lm_head", "model.embed_tokens"][not both :]
        untied = tied()
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
        same(with_deltas(collection, 0, untied), loaded(folder, tied()), base=tied())


@pytest.mark.parametrize("wrapped", ["_orig_mod.", ""])
def test_an_embedding_in_a_whole_state_dict(tmp_path, wrapped):
    folder = save(trained(target_modules=["embed_tokens", "q_proj"]), tmp_path / "a")
    plain = read_adapters([folder]).factors("model.embed_tokens")

    def change(key):
        if ".lora_embedding_" in key:
            key = f"{key}.default"
        return key.replace("model.embed_tokens", f"model.{wrapped}embed_tokens")

    rename_keys(folder, change)
    collection = read_adapters([folder])
    assert collection.embeddings == {"model.embed_tokens"}
    assert torch.equal(collection.factors("model.embed_tokens").a, plain.a)


def test_an_embedding_of_two_kinds_is_refused(tmp_path):
    folder = save(trained(target_modules=["embed_tokens", "q_proj"]), tmp_path / "a")
    rename_keys(folder, lambda key: key.replace("lora_embedding_B", "lora_B.weight"))
    (fault,) = refused(folder)
    assert "a linear layer beside one of an embedding" in fault and "embed_tokens" in fault


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 33, 64, 100])
def test_every_rank(tmp_path, rank):
    folder = save(trained(r=rank, lora_alpha=7, size=0.1), tmp_path / "a")
    assert read_like_peft(folder).factors(Q).ranks.tolist() == [rank]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_every_type_of_numbers(folder, tmp_path, dtype):
    """Against PEFT on the same numbers in float32: it loads no 8-bit ones."""
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    save_file({key: tensor.float() for key, tensor in tensors.items()}, plain / WEIGHTS)
    read_like_peft(folder, reference=plain)


def test_a_cache_of_links_and_a_read_only_folder(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for i, name in enumerate((CONFIG, WEIGHTS)):
        (folder / name).rename(blobs / str(i))
        (blobs / str(i)).chmod(0o400)
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    snapshot.chmod(0o500)
    try:
        assert read_like_peft(snapshot).names == ["0123"]
    finally:
        snapshot.chmod(0o700)


def test_a_store_is_read_from_a_read_only_folder(folder, tmp_path):
    store = compress(read_adapters([folder]), tmp_path / "store", Settings(method="none"))
    store.close()
    parts = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    modes = {part: part.stat().st_mode for part in parts}
    for part in parts:
        part.chmod(0o500 if part.is_dir() else 0o400)
    try:
        with Store.open(tmp_path / "store") as opened:
            assert opened.names == ["a"]
    finally:
        for part, mode in modes.items():
            part.chmod(mode)


# --- what other tools leave out, or leave in ---

NULLS = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "bias", "rank_pattern")


def test_nulls_are_what_is_so_by_default(folder):
    expected = loaded(folder)
    edit_config(folder, **dict.fromkeys((*NULLS, "alpha_pattern", "init_lora_weights")))
    same(with_deltas(read_adapters([folder]), 0), expected)


@pytest.mark.parametrize("kind", [None, "missing", "lora"])
def test_a_config_without_a_type_is_loras(folder, kind):
    expected = loaded(folder)
    drop_config(folder, "peft_type")
    if kind != "missing":
        edit_config(folder, peft_type=kind)
    same(with_deltas(read_adapters([folder]), 0), expected)


def test_a_config_of_three_fields_is_enough(folder):
    """What vLLM needs, but for the target modules, which the weights say."""
    expected = loaded(folder)
    (folder / CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 6}))
    collection = read_adapters([folder])
    same(with_deltas(collection, 0), expected)
    assert collection.base_model == "unknown"


KEYS = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter's name": lambda key: key.replace(".weight", ".sql-v2.weight"),
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled whole": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "fsdp": lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
    "data parallel": lambda key: f"module.{key}",
    "all of it": lambda key: f"module._orig_mod.{key}".replace(
        ".weight", ".default.weight"
    ).replace(".self_attn", "._checkpoint_wrapped_module._fsdp_wrapped_module.self_attn"),
}


@pytest.mark.parametrize("case", KEYS)
def test_what_trainers_leave_in_keys_is_not_of_the_layers_name(tmp_path, case):
    """With patterns, which go by the layers' names."""
    patterns = {"rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2}}
    folder = save(trained(**patterns), tmp_path / "a")
    expected = loaded(folder)
    rename_keys(folder, KEYS[case])
    collection = read_adapters([folder])
    assert set(collection.shapes) == {
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qv"
    }
    same(with_deltas(collection, 0), expected)


def test_a_whole_state_dict_keeps_the_adapters_name(folder):
    """As `torch.save(model.state_dict())` has it, the base model's weights left out."""
    expected = loaded(folder)
    state = {k: v.contiguous() for k, v in trained().state_dict().items() if ".lora_" in k}
    assert any(".lora_A.default.weight" in key for key in state)
    save_file(state, folder / WEIGHTS)
    same(with_deltas(read_adapters([folder]), 0), expected)


def test_two_keys_of_one_factor_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    key = f"{PREFIX}{Q}.lora_A.weight"
    save_file(tensors | {f"{Q}.lora_A.weight": tensors[key].clone()}, folder / WEIGHTS)
    (fault,) = refused(folder)
    one, other = f"{Q}.lora_A.weight", key
    assert f"{one}: means the same factor as {other}" in fault or (
        f"{other}: means the same factor as {one}" in fault
    )


def test_one_file_with_two_adapters_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    both = {
        key.replace(".weight", f".{name}.weight"): tensor.clone()
        for key, tensor in tensors.items()
        for name in ("chat", "sql")
    }
    save_file(both, folder / WEIGHTS)
    (fault,) = refused(folder)
    assert "holds the tensors of 2 adapters (chat, sql)" in fault
    assert "selected_adapters" in fault


def test_the_base_models_own_output_layer_is_left_out(tmp_path):
    """PEFT saves it beside an adapter of it, and vLLM leaves it out."""
    folder = save(trained(target_modules=["q_proj", "lm_head"]), tmp_path / "a")
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(folder / WEIGHTS)
    notes = []
    collection = read_like_peft(folder, on_note=notes.append)
    assert "lm_head" in collection.shapes
    (note,) = notes
    assert note.startswith("a: brings along base_layer weights")


# --- mlx-lm ---


def test_mlx_adapters_are_lora_adapters_the_other_way_round(folder, tmp_path):
    mlx = as_mlx(folder, tmp_path / "mlx")
    collection = read_like_peft(mlx, reference=folder)
    assert collection.base_model == BASE
    # The formula itself, in numpy's own order, on one layer.
    tensors = load_file(mlx / "adapters.safetensors")
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).numpy()
    expected = 1.5 * (x @ tensors[f"{Q}.lora_a"].numpy()) @ tensors[f"{Q}.lora_b"].numpy()
    factors = collection.factors(Q)
    torch.testing.assert_close(
        torch.from_numpy(x) @ factors.a.T @ factors.b, torch.from_numpy(expected)
    )


@pytest.mark.parametrize("kind", ["missing", None])
def test_early_mlx_configs_have_no_fine_tune_type(folder, tmp_path, kind):
    mlx = as_mlx(folder, tmp_path / "mlx", fine_tune_type=kind)
    if kind == "missing":
        drop_config(mlx, "fine_tune_type")
    read_like_peft(mlx, reference=folder)


def parameters(**fields):
    return {"lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.0} | fields}


def test_an_alpha_that_mlx_does_not_use_does_not_count(folder, tmp_path):
    """Releases from 2024 to 2025 write one of their defaults beside the scale."""
    mlx = as_mlx(folder, tmp_path / "mlx", **parameters(alpha=16))
    read_like_peft(mlx, reference=folder)
    drop_config(mlx, "fine_tune_type")
    (fault,) = refused(mlx)
    assert "alpha 16 and scale 1.5" in fault and "leave alpha out" in fault
    edit_config(mlx, **parameters(alpha=4))  # α/r is 1 either way
    read_like_peft(mlx, reference=folder)


MLX_REFUSED = {
    "dora": ({"fine_tune_type": "dora"}, "fine_tune_type 'dora' of mlx-lm"),
    "full": ({"fine_tune_type": "full"}, "fine_tune_type 'full' of mlx-lm"),
    "no scale": ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale: Field required"),
    "no rank": ({"lora_parameters": {"scale": 4.0}}, "lora_parameters.rank: Field required"),
    "rank": (parameters(rank=5), f"found rank 4, {CONFIG} says 5"),
    "NaN": (parameters(scale=float("nan")), "lora_parameters.scale: Input should be a finite"),
    "a huge scale": (parameters(scale=1e308), "lora_alpha: Input should be a finite number"),
    "no parameters": ({"lora_parameters": None}, "lora_parameters: "),
}


@pytest.mark.parametrize("case", MLX_REFUSED)
def test_other_mlx_adapters_are_refused_by_name(folder, tmp_path, case):
    fields, message = MLX_REFUSED[case]
    faults = refused(as_mlx(folder, tmp_path / "mlx", **fields))
    assert len(faults) == 1 and message in faults[0], faults


def test_mlx_adapters_of_embeddings_and_experts_are_refused(folder, tmp_path):
    mlx = as_mlx(folder, tmp_path / "mlx")
    file = mlx / "adapters.safetensors"
    tensors = load_file(file)
    table = {"model.embed_tokens.lora_a": torch.ones(48, 4)}
    save_file(tensors | table, file)
    (fault,) = refused(mlx)
    assert "model.embed_tokens.lora_a: adapts a table of embeddings" in fault
    experts = {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(3, 4, 24)}
    save_file(tensors | experts, file)
    assert "found shape [3, 4, 24], expected a matrix" in refused(mlx)[0]
    save_file(tensors | {f"{Q}.m": torch.ones(24)}, file)
    (fault,) = refused(mlx)
    assert "is no LoRA factor" in fault


def test_mlx_weights_that_are_missing_or_of_an_old_form(folder, tmp_path):
    mlx = as_mlx(folder, tmp_path / "mlx")
    (mlx / "adapters.safetensors").unlink()
    assert refused(mlx) == [f"{mlx}: adapters.safetensors is missing"]
    (mlx / "adapters.npz").write_bytes(b"")
    (fault,) = refused(mlx)
    assert "found only adapters.npz" in fault and "save_safetensors" in fault
    (mlx / CONFIG).unlink()
    assert refused(mlx) == [f"{mlx}: found no {CONFIG} in it or below"]


# --- what never arrived in the file ---


@pytest.mark.parametrize("which", ["all", "some"])
def test_empty_tensors_of_zero_3_are_one_line(folder, which):
    """What `save_pretrained` writes of partitioned parameters: DeepSpeed leaves [0] in their
    place."""
    tensors = load_file(folder / WEIGHTS)
    for key in tensors:
        if which == "all" or ".lora_B." in key:
            tensors[key] = torch.empty(0)
    save_file(tensors, folder / WEIGHTS)
    (fault,) = refused(folder)
    assert fault.startswith(f"{folder}: {which} of its LoRA tensors are empty (such as ")
    assert "ZeRO-3" in fault and "GatheredParameters" in fault


def test_an_adapter_that_was_never_trained_is_taken_with_a_warning(tmp_path):
    """Its B is all zeros, as PEFT begins; beside others, by every method, and served as nothing."""
    untrained = save(trained(size=0.0), tmp_path / "fresh")
    assert not load_file(untrained / WEIGHTS)[f"{PREFIX}{Q}.lora_B.weight"].any()
    others = [save(trained(i), tmp_path / f"a{i}") for i in (1, 2)]
    notes = []
    collection = read_adapters([untrained, *others], on_note=notes.append)
    assert notes == [
        "fresh: changes nothing: one factor of each layer is all zeros, as before training"
    ]
    for method in ("jd-full", "jd-diag", "svd", "hydraopt", "ties", "none"):
        store = compress(collection, tmp_path / method, Settings(method, store_dtype="float32"))
        i = store.names.index("fresh")
        assert bool(store.error[i].isfinite().all()), method
        if method in ("jd-full", "jd-diag", "svd", "none"):
            for b, a in store.factors("fresh").values():
                assert float((b @ a).abs().max()) < 1e-6, method
    # One layer that does nothing is nothing to speak of.
    tensors = load_file(others[0] / WEIGHTS)
    tensors[f"{PREFIX}{Q}.lora_B.weight"].zero_()
    save_file(tensors, others[0] / WEIGHTS)
    notes.clear()
    read_adapters(others, on_note=notes.append)
    assert notes == []


# --- what two factors a layer cannot say: one line each, with what to do ---


def test_what_cannot_be_expressed_is_refused_in_one_line(tmp_path):
    biased = base_model()
    for layer in biased.model.layers:
        old = layer.self_attn.q_proj
        layer.self_attn.q_proj = torch.nn.Linear(old.in_features, old.out_features, bias=True)
    cases = {
        "use_dora is true": trained(use_dora=True),
        "lora_bias is true": trained(lora_bias=True),
        "modules_to_save is ['lm_head']": trained(modules_to_save=["lm_head"]),
        "bias is 'all'": trained(model=biased, bias="all"),
        "trainable_token_indices is set": trained(trainable_token_indices=[3, 4]),
    }
    for i, (message, model) in enumerate(cases.items()):
        folder = save(model, tmp_path / str(i))
        assert any(
            "lora_A" not in k and "lora_B.weight" not in k for k in load_file(folder / WEIGHTS)
        ), "PEFT saves more than factors"
        faults = refused(folder)
        assert len(faults) == 1, faults
        assert message in faults[0]
        assert "merge_and_unload" in faults[0] or "train again without it" in faults[0]


def test_methods_that_are_not_lora_are_refused_by_name(folder):
    for kind in ("IA3", "ADALORA", "LOHA", "PROMPT_TUNING"):
        edit_config(folder, peft_type=kind)
        assert refused(folder) == [
            f"{folder}: {CONFIG}: peft_type is '{kind}', expected 'LORA' or 'VERA'"
        ]


def test_the_reference_is_one(folder):
    """PEFT's forward pass in the model and from the folder agree, and are not the base's."""
    assert TOKENS.shape[1] > 1
    torch.testing.assert_close(loaded(folder), logits(trained()), rtol=0, atol=1e-6)


# --- fuzz ---

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["lora", "LORA", 10**400, -(10**400), "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("model", "fine_tune_type", "lora_parameters", "peft_type", "rank", "scale", "alpha")


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_json_in_an_mlx_config_never_raises_anything_but_an_adapter_error(
    tmp_path, field, value
):
    folder = tmp_path / "a"
    if not folder.exists():
        as_mlx(save(trained(), tmp_path / "peft"), folder)
        (folder / "good.json").write_bytes((folder / CONFIG).read_bytes())
    config = json.loads((folder / "good.json").read_text())
    (config["lora_parameters"] if field in ("rank", "scale", "alpha") else config)[field] = value
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        collection = read_adapters([folder])
        assert bool(collection.factors(Q).b.isfinite().all())
    except AdapterError as error:
        str(error).encode(errors="backslashreplace")


odd_keys = st.lists(
    st.sampled_from(
        ["base_model", "model", "module", "_orig_mod", "lora_A", "lora_B", "default", "weight", ""]
    )
    | st.text(max_size=3),
    max_size=9,
).map(".".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=odd_keys)
def test_any_key_is_a_factor_or_none(key):
    factor = factor_of(key)
    is_base_embedding(key)
    if factor is not None:
        assert factor.side in "AB" and factor.module
        # What is found in it is found again in the plain form.
        last = "embedding_{}" if factor.embedding else "{}.weight"
        again = factor_of(f"{PREFIX}{factor.module}.lora_{last.format(factor.side)}")
        assert again == factor._replace(adapter=None)
