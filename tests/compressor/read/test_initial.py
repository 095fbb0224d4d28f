"""Adapters whose training began by changing the base model: PEFT's forward pass, and its own
conversion, are the reference."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file

from tests.compressor.read.peft_folders import (
    TOKENS,
    WEIGHTS,
    Q,
    base_model,
    edit_config,
    loaded,
    logits,
    read_like_peft,
    same,
    save,
    train,
    trained,
    with_deltas,
)
from vllm_jd.compressor import AdapterError, Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.store import short_name

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The base model's folder, by the adapters' name."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    base_model().save_pretrained(folder)
    return folder


def refused(*folders, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(folders, **options)
    return caught.value.faults


def converted(folder, base, **options):
    return read_adapters([folder], base_folder=base, convert=True, **options)


SETTINGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2, "down_proj": 9}, "alpha_pattern": {"q_proj": 11}},
}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("case", SETTINGS)
def test_converted_with_the_base_models_folder_they_say_what_peft_says(tmp_path, base, init, case):
    """PEFT takes the same out of the base model when it loads such an adapter."""
    model = trained(init_lora_weights=init, target_modules=TARGETS, **SETTINGS[case])
    trained_logits = logits(model)
    folder = save(model, tmp_path / "a")
    assert abs(float((loaded(folder) - trained_logits).abs().max())) < 1e-4
    steps = []
    collection = converted(folder, base, on_convert=lambda *step: steps.append(step))
    same(with_deltas(collection, 0), trained_logits, 1e-4)
    assert steps[-1] == (9, 9)
    ranks = {m.rsplit(".", 1)[-1]: int(collection.factors(m).ranks[0]) for m in collection.shapes}
    expected = {"v_proj": 2, "q_proj": 4, "down_proj": 9} if case == "patterns" else {}
    assert ranks == {name: 2 * expected.get(name, 4) for name in TARGETS}
    sizes = {"q_proj": 48, "v_proj": 32, "down_proj": 64}
    assert collection.factor_bytes == 4 * 3 * sum(ranks[name] * sizes[name] for name in TARGETS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_embedding_beside_converted_layers_stays_as_it_is(tmp_path, base, init):
    """PEFT changes no weights of an embedding, whatever the starting values."""
    model = trained(init_lora_weights=init, target_modules=["q_proj", "embed_tokens"])
    folder = save(model, tmp_path / "a")
    collection = converted(folder, base)
    same(with_deltas(collection, 0), logits(model), 1e-4)
    assert collection.factors("model.embed_tokens").ranks.tolist() == [4]
    assert collection.factors(Q).ranks.tolist() == [8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_model_of_16_bits(tmp_path, dtype):
    """Within what rounding the changed weights to 16 bits costs PEFT itself."""
    base = tmp_path / "tiny-llama"
    base_model(dtype).save_pretrained(base)
    model = base_model(dtype)
    folder = save(trained(model=model, init_lora_weights="pissa"), tmp_path / "a")
    collection = converted(folder, base)
    expected = trained(model=base_model(dtype), init_lora_weights="pissa")
    module = expected.get_submodule(f"base_model.model.{Q}")
    with torch.no_grad():
        changed = module.base_layer.weight.float() + module.get_delta_weight("default").float()
    found = collection.factors(Q)
    whole = base_model(dtype).get_submodule(Q).weight.float() + found.b.T @ found.a
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert float((whole - changed).abs().max()) <= step * float(changed.abs().max())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_what_peft_converted_is_a_plain_adapter(tmp_path, init):
    """With the adapter as it was before training, PEFT makes a LoRA adapter of twice the rank."""
    model = base_model()
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init}
    if init == "corda":
        fields["corda_config"] = CordaConfig(corda_method="kpm")
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    if init == "corda":
        data = torch.randint(0, 48, (24, 16), generator=torch.Generator().manual_seed(0))
        preprocess_corda(model, config, run_model=lambda: [model(row[None]) for row in data])
    model = get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    save(model, tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    train(model, 1)
    expected = logits(model)
    unconverted = save(model, tmp_path / "unconverted")
    initial = str(tmp_path / "initial")
    save(model, tmp_path / "a", path_initial_model_for_weight_conversion=initial)
    collection = read_adapters([tmp_path / "a"])
    same(with_deltas(collection, 0), expected, 1e-4)
    same(loaded(tmp_path / "a"), expected, 1e-4)
    assert collection.factors(Q).ranks.tolist() == [8]
    # As it was saved first, it is for another base.
    (fault,) = refused(unconverted)
    assert f"init_lora_weights is '{init}'" in fault
    assert "path_initial_model_for_weight_conversion" in fault


def test_converted_and_exported_it_is_an_adapter_for_everybody(tmp_path, base):
    model = trained(init_lora_weights="pissa", target_modules=TARGETS)
    folder = save(model, tmp_path / "a")
    settings = Settings(method="none", store_dtype="float32")
    store = compress(converted(folder, base), tmp_path / "store", settings)
    export_adapter(store, "a", tmp_path / "out")
    same(loaded(tmp_path / "out"), logits(model), 1e-4)
    read_like_peft(tmp_path / "out")


def test_beside_plain_adapters_and_others_of_their_kind(tmp_path, base):
    """Of several ranks, each with the first columns of one decomposition."""
    models = {
        "a-plain": trained(1),
        "b-pissa": trained(2, init_lora_weights="pissa"),
        "c-pissa": trained(3, r=7, init_lora_weights="pissa", use_rslora=True),
        "d-olora": trained(4, init_lora_weights="olora", r=2),
        "e-olora": trained(5, init_lora_weights="OLoRA", lora_alpha=1),
    }
    for name, model in models.items():
        save(model, tmp_path / "in" / name)
    collection = converted(tmp_path / "in", base)
    assert collection.names == list(models)
    for i, model in enumerate(models.values()):
        same(with_deltas(collection, i), logits(model), 1e-4)
    plain = read_adapters([tmp_path / "in" / "a-plain"])
    assert collection.source_sha256[0] == plain.source_sha256[0]


def test_a_decomposition_is_made_once_for_all_runs(tmp_path, base, monkeypatch):
    folder = save(trained(init_lora_weights="pissa"), tmp_path / "a")
    cache = tmp_path / "cache"
    expected = with_deltas(converted(folder, base, convert_cache=cache), 0)
    kept = sorted(cache.iterdir())
    assert len(kept) == 6  # q and v of three layers
    kept[0].write_bytes(b"damaged: made again")
    made = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: made.append(a) or svd(*a, **k))
    again = converted(folder, base, convert_cache=cache)
    assert len(made) == 1
    torch.testing.assert_close(with_deltas(again, 0), expected)
    assert again.source_sha256 == converted(folder, base).source_sha256


def test_the_hash_says_from_which_weights_it_was_converted(tmp_path, base):
    folder = save(trained(init_lora_weights="pissa"), tmp_path / "a")
    (first,) = converted(folder, base).source_sha256
    assert converted(folder, base).source_sha256 == [first]
    other = shutil.copytree(base, tmp_path / "other" / "tiny-llama")
    tensors = load_file(other / "model.safetensors")
    tensors[f"{Q}.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    assert converted(folder, other).source_sha256 != [first]


def test_the_hash_does_not_depend_on_who_is_converted_beside_it(tmp_path, base):
    """With other layers, another rank and another start; only the layers of its own count."""
    folder = save(trained(init_lora_weights="pissa"), tmp_path / "a")
    (alone,) = converted(folder, base).source_sha256
    other = trained(2, init_lora_weights="olora", r=7, target_modules=["v_proj", "down_proj"])
    folders = [folder, save(other, tmp_path / "b")]
    both = read_adapters(folders, base_folder=base, convert=True)
    assert both.source_sha256[0] == alone != both.source_sha256[1]
    changed = shutil.copytree(base, tmp_path / "other" / "tiny-llama")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors")
    again = read_adapters(folders, base_folder=changed, convert=True)
    assert again.source_sha256[0] == alone, "a layer that it does not adapt"
    assert again.source_sha256[1] != both.source_sha256[1]


def test_weights_in_several_files_and_of_a_wrapper(tmp_path, base):
    """Sharded as transformers does it, and spelled as a vision-language model's."""
    folder = save(trained(init_lora_weights="olora"), tmp_path / "a")
    expected = with_deltas(converted(folder, base), 0)
    sharded = tmp_path / "sharded" / "tiny-llama"
    base_model().save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    torch.testing.assert_close(with_deltas(converted(folder, sharded), 0), expected)
    wrapped = shutil.copytree(base, tmp_path / "wrapped" / "tiny-llama")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {
            key.replace("model.layers", "model.language_model.layers"): t
            for key, t in tensors.items()
        },
        wrapped / "model.safetensors",
    )
    torch.testing.assert_close(with_deltas(converted(folder, wrapped), 0), expected)


def break_base(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BROKEN = {
    "none": (lambda f: (f / "model.safetensors").unlink(), "found no weights as safetensors"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"xxxxxxxxx"), "cannot be read"),
    "no layer": (
        lambda f: break_base(f, lambda t: t.pop(f"{Q}.weight")),
        f"has no weights of {Q}",
    ),
    "quantised": (
        lambda f: break_base(
            f, lambda t: t.update({f"{Q}.weight": torch.ones(24, 24, dtype=torch.int8)})
        ),
        "torch.int8 [24, 24], expected numbers of 16 or 32 bits",
    ),
    "other shapes": (
        lambda f: break_base(f, lambda t: t.update({f"{Q}.weight": torch.ones(32, 24)})),
        "[32, 24], expected numbers of 16 or 32 bits, [24, 24]",
    ),
    "an index of nonsense": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json: cannot be read",
    ),
    "an index of files that are not there": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x.weight": "model-00001.safetensors"}}'
        ),
        "model-00001.safetensors: cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_base_model_that_cannot_be_used_is_told(tmp_path, base, case):
    change, message = BROKEN[case]
    folder = save(trained(init_lora_weights="pissa"), tmp_path / "a")
    copy = shutil.copytree(base, tmp_path / "copy" / "tiny-llama")
    change(copy)
    with pytest.raises(AdapterError) as caught:
        converted(folder, copy)
    (fault,) = caught.value.faults
    assert message in fault and str(copy) in fault


@pytest.mark.parametrize(
    ("init", "to_do"),
    [
        ("pissa", "vllm-jd compress --convert --base-model FOLDER"),
        ("olora", "vllm-jd compress --convert --base-model FOLDER"),
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("corda", "path_initial_model_for_weight_conversion"),
        ("loftq", "serve the quantised model that it was trained on"),
    ],
)
def test_without_conversion_they_are_refused_in_one_line_with_what_to_do(tmp_path, init, to_do):
    folder = save(trained(), tmp_path / "a")
    edit_config(folder, init_lora_weights=init)
    (fault,) = refused(folder)
    assert f"init_lora_weights is '{init}'" in fault and to_do in fault
    assert "set init_lora_weights to true" in fault


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq"])
def test_what_does_not_follow_from_the_base_model_is_not_converted(tmp_path, base, init):
    folder = save(trained(), tmp_path / "a")
    edit_config(folder, init_lora_weights=init)
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{init}'"):
        converted(folder, base)


def test_eva_begins_without_changing_the_base_model(tmp_path):
    """It does change ranks, layer by layer, which PEFT writes into patterns."""
    model = base_model()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    model = get_peft_model(model, config)
    data = torch.randint(0, 4, (8, 16), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in data
    ]
    initialize_lora_eva_weights(model, batches * 4, show_progress_bar=False)
    train(model, 1)
    expected = logits(model)
    folder = save(model, tmp_path / "a")
    collection = read_like_peft(folder)
    same(with_deltas(collection, 0), expected)
    ranks = {int(collection.factors(module).ranks[0]) for module in collection.shapes}
    assert len(ranks) > 1, "EVA gave all layers one rank: the patterns are not tested"


def test_lora_ga_is_put_on_the_unchanged_base_as_peft_does_and_said_so(tmp_path):
    model = base_model()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def step():
        model(TOKENS, labels=TOKENS).loss.backward()

    preprocess_loraga(model, config, step)
    folder = save(train(get_peft_model(model, config), 1), tmp_path / "a")
    notes = []
    read_like_peft(folder, on_note=notes.append)
    (note,) = notes
    assert note.startswith("a: was trained with LoRA-GA")
    assert "path_initial_model_for_weight_conversion" in note


def test_mica_begins_without_changing_the_base_model(tmp_path):
    read_like_peft(save(trained(init_lora_weights="mica"), tmp_path / "a"))


def test_other_ways_of_asking_are_refused(tmp_path, base):
    folder = save(trained(init_lora_weights="pissa"), tmp_path / "a")
    with pytest.raises(ValueError, match="expected base_folder"):
        read_adapters([folder], convert=True)
    edit_config(folder, fan_in_fan_out=True, target_modules=["c_attn"])
    (fault,) = refused(folder, base_folder=base, convert=True)
    assert "init_lora_weights is 'pissa'" in fault
    assert short_name(str(base)) == "tiny-llama" and (folder / WEIGHTS).is_file()
