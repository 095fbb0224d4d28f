"""Adapters of experts in the forms that people have: against PEFT's forward pass, and formulas."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.compressor.read import moe_folders as moe
from tests.compressor.read.moe_folders import EXPERTS, HIDDEN, INNER, MIXTRAL, QWEN
from tests.compressor.read.peft_folders import WEIGHTS, edit_config
from vllm_jd.compressor import AdapterError, read_adapters
from vllm_jd.compressor.read.base_layers import misfits
from vllm_jd.compressor.read.experts import read_experts
from vllm_jd.compressor.read.folder import read_folder
from vllm_jd.compressor.read.names import layer_key

E0 = "model.layers.0.mlp.experts"


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def faults_of(*folders, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(folders, **options)
    return caught.value.faults


@pytest.mark.parametrize("family", moe.FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
        {"target_parameters": ["gate_up_proj"], "use_rslora": True},
        {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"down_proj": 2}},
    ],
    ids=["both", "down_proj", "gate_up_proj", "patterns"],
)
def test_what_peft_stacks_is_what_peft_computes(tmp_path, family, config):
    said = moe.stacked(family, tmp_path / "a", **config)
    collection = read_adapters([tmp_path / "a"])
    assert set(collection.experts.values()) == {EXPERTS}
    assert (said - moe.logits(moe.base_model(family))).abs().max() > 1e-2
    torch.testing.assert_close(moe.with_deltas(family, collection, 0), said, rtol=0, atol=2e-6)


def test_target_modules_of_experts_are_taken_as_peft_converts_them(tmp_path):
    names = ["gate_proj", "up_proj", "down_proj"]
    said = moe.stacked("Qwen3Moe", tmp_path / "a", target_modules=names, target_parameters=None)
    collection = read_adapters([tmp_path / "a"])
    assert f"{E0}.gate_up_proj" in collection.experts
    torch.testing.assert_close(moe.with_deltas("Qwen3Moe", collection, 0), said, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "names"), [("Qwen3Moe", QWEN), ("Olmoe", QWEN), ("Mixtral", MIXTRAL)]
)
def test_layers_of_each_expert_are_what_peft_makes_of_them(tmp_path, family, names):
    folder = moe.own_layers(tmp_path / "a", names)
    said = moe.logits(PeftModel.from_pretrained(moe.base_model(family), folder).eval())
    collection = read_adapters([folder])
    module = f"{names[0].format(0)}.{names[1][2]}"
    assert collection.experts[module] == EXPERTS
    assert collection.shapes[module] == (INNER, HIDDEN)
    torch.testing.assert_close(moe.with_deltas(family, collection, 0), said, rtol=0, atol=2e-6)


def shared_outer(folder, generator, rank=3):
    """vLLM's: A of gate and up, and B of down, are those of all experts."""
    shapes = {
        "w1": ((1, rank, HIDDEN), (EXPERTS, INNER, rank)),
        "w3": ((1, rank, HIDDEN), (EXPERTS, INNER, rank)),
        "w2": ((EXPERTS, rank, INNER), (1, HIDDEN, rank)),
    }
    factors = {
        name: tuple(torch.randn(shape, generator=generator) for shape in pair)
        for name, pair in shapes.items()
    }
    tensors = {
        f"base_model.model.{E0}.{name}.lora_{side}.weight": factor
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    moe.write(folder, tensors, rank, 6)
    return factors


def test_three_dimensions_with_a_side_that_experts_share(tmp_path):
    factors = shared_outer(tmp_path / "a", torch.Generator().manual_seed(0))
    collection = read_adapters([tmp_path / "a"])
    found = moe.deltas(collection, 0)
    for projection, names in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
        expected = torch.cat(
            [
                2
                * torch.einsum("eor,eri->eoi", b.expand(EXPERTS, -1, -1), a.expand(EXPERTS, -1, -1))
                for a, b in (factors[name] for name in names)
            ],
            dim=1,
        ).double()
        torch.testing.assert_close(found[0, projection], expected, rtol=1e-5, atol=1e-5)


def test_stacks_of_old_peft_are_the_other_way_round(tmp_path):
    """Before 0.19 PEFT took the weights `[E, d_out, d_in]` for `[E, d_in, d_out]`: A has d_out
    columns, and a delta is einsum("ore,eri->eio") in the weights' own order."""
    r, generator = 3, torch.Generator().manual_seed(0)
    expected, tensors = {}, {}
    for inside, projection, d_out, d_in in (
        (".base_layer", "gate_up_proj", 2 * INNER, HIDDEN),
        ("", "down_proj", HIDDEN, INNER),
    ):
        a = torch.randn(r * EXPERTS, d_out, generator=generator)
        b = torch.randn(d_in, r * EXPERTS, generator=generator)
        tensors[f"base_model.model.{E0}{inside}.lora_A.weight"] = a
        tensors[f"base_model.model.{E0}{inside}.lora_B.weight"] = b
        delta = torch.einsum("ore,eri->eio", b.view(d_in, r, EXPERTS), a.view(EXPERTS, r, d_out))
        expected[projection] = 2 * delta.double()
    moe.write(tmp_path / "a", tensors, r, 6, target_parameters=moe.STACKED, peft_version="0.18.0")
    collection = read_adapters([tmp_path / "a"])
    assert collection.shapes[f"{E0}.gate_up_proj"] == (HIDDEN, 2 * INNER)
    for projection, delta in expected.items():
        found = moe.deltas(collection, 0)[0, projection]
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)


def test_one_old_stack_alone_is_in_doubt(tmp_path):
    alone = {"target_parameters": ["down_proj"], "target_modules": []}
    for name, version, config in (
        ("a", "0.18.1", alone),
        ("b", "0.18.1", {}),
        ("c", "0.19.0", alone),
    ):
        moe.stacked("Qwen3Moe", tmp_path / name, **config)
        edit_config(tmp_path / name, peft_version=version)
        notes = read_folder(tmp_path / name, name)[0].notes
        assert [note.startswith("was saved by PEFT 0.18") for note in notes] == [True] * (
            name == "a"
        )


def test_an_upload_gives_each_experts_factors(tmp_path):
    moe.own_layers(tmp_path / "a", QWEN, experts=(0, 2))
    adapter, faults = read_folder(tmp_path / "a", "a")
    assert faults == []
    found = read_experts(adapter, f"{E0}.up_proj")
    assert [pair is None for pair in found] == [False, True, False]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    key = f"base_model.model.{E0}.2.up_proj.lora_"
    assert torch.equal(found[2][0], tensors[f"{key}A.weight"])
    assert torch.equal(found[2][1], 2 * tensors[f"{key}B.weight"])


def test_experts_that_an_adapter_lacks_have_rank_0(tmp_path):
    moe.own_layers(tmp_path / "a", QWEN, experts=(0, 2), seed=1)
    moe.own_layers(tmp_path / "b", QWEN, experts=(1,), seed=2)
    ranks = read_adapters([tmp_path]).factors(f"{E0}.up_proj").ranks
    assert ranks.tolist() == [3, 0, 3, 0, 3, 0]
    config = {"num_experts": 4}
    ranks = read_adapters([tmp_path], base_config=config).factors(f"{E0}.up_proj").ranks
    assert ranks.tolist() == [3, 0, 3, 0, 0, 3, 0, 0]


def test_fused_projections_are_split_where_others_have_them_apart(tmp_path):
    said = moe.stacked("Qwen3Moe", tmp_path / "fused", target_modules=[])
    moe.own_layers(tmp_path / "own", QWEN)
    collection = read_adapters([tmp_path])
    kinds = {module.rsplit(".", 1)[-1] for module in collection.experts}
    assert kinds == {"gate_proj", "up_proj", "down_proj"}
    at = collection.names.index("fused")
    torch.testing.assert_close(moe.with_deltas("Qwen3Moe", collection, at), said, rtol=0, atol=2e-6)
    known = [f"{E0}.gate_proj", "model.layers.1.mlp.experts.gate_proj"]
    alone = read_adapters([tmp_path / "fused"], modules=known)
    assert alone.experts.keys() == collection.experts.keys()


def test_mixtrals_two_spellings_are_one_layer(tmp_path):
    said = moe.stacked("Mixtral", tmp_path / "fused", target_modules=[])
    moe.own_layers(tmp_path / "own", MIXTRAL)
    collection = read_adapters([tmp_path])
    assert len(collection.experts) == 3 * moe.LAYERS
    assert "model.layers.0.block_sparse_moe.experts.w3" in collection.experts
    at = collection.names.index("fused")
    torch.testing.assert_close(moe.with_deltas("Mixtral", collection, at), said, rtol=0, atol=2e-6)
    assert layer_key("model.layers.0.block_sparse_moe.experts.7.w2") == (
        "layers.0.mlp.experts.7.down_proj"
    )


def test_which_weights_a_stack_is_of_must_be_told(tmp_path):
    moe.stacked("Qwen3Moe", tmp_path / "a", target_parameters=["down_proj"], target_modules=[])
    edit_config(tmp_path / "a", target_parameters=None)
    (fault,) = faults_of(tmp_path / "a")
    assert "which ones cannot be told" in fault and "target_parameters" in fault
    # Both at once are as vLLM takes them: gate_up_proj is inside.
    said = moe.stacked("Qwen3Moe", tmp_path / "b", target_modules=[])
    edit_config(tmp_path / "b", target_parameters=None)
    found = moe.with_deltas("Qwen3Moe", read_adapters([tmp_path / "b"]), 0)
    torch.testing.assert_close(found, said, rtol=0, atol=2e-6)


def test_shapes_that_are_no_stack_are_refused(tmp_path):
    def cut(tensors):
        return {key: x[1:].clone() if "lora_A" in key else x for key, x in tensors.items()}

    moe.stacked("Qwen3Moe", tmp_path / "a", target_modules=[])
    edit_tensors(tmp_path / "a", cut)
    assert any("expected [experts · r, d_in]" in fault for fault in faults_of(tmp_path / "a"))
    shared_outer(tmp_path / "b", torch.Generator().manual_seed(0))
    edit_config(tmp_path / "b", r=4)
    assert any("expected [experts, r, d_in]" in fault for fault in faults_of(tmp_path / "b"))
    key = f"base_model.model.{E0}.w1.lora_A.weight"
    edit_config(tmp_path / "b", r=3)
    edit_tensors(tmp_path / "b", lambda tensors: tensors | {key: tensors[key][0].clone()})
    assert any("both with the experts" in fault for fault in faults_of(tmp_path / "b"))


def test_another_number_of_experts_is_refused(tmp_path):
    moe.stacked("Qwen3Moe", tmp_path / "a", target_modules=[])
    (fault,) = faults_of(tmp_path / "a", base_config={"num_experts": 8})
    assert "found 4 experts, expected 8, as the base model's config says" in fault
    moe.own_layers(tmp_path / "b", QWEN)
    (fault,) = faults_of(tmp_path / "b", base_config={"text_config": {"num_experts": 2}})
    assert "found 4 experts, expected 2" in fault


def test_nan_in_one_expert_is_found(tmp_path):
    def spoilt(tensors):
        key = f"base_model.model.{E0}.lora_B.weight"
        tensors[key][3, 5] = float("nan")
        return tensors

    moe.stacked("Qwen3Moe", tmp_path / "a", target_modules=[])
    edit_tensors(tmp_path / "a", spoilt)
    assert any("NaN" in fault for fault in faults_of(tmp_path / "a"))


def test_experts_of_a_changed_base_model_are_refused(tmp_path):
    moe.stacked("Qwen3Moe", tmp_path / "a", target_modules=[])
    edit_config(tmp_path / "a", init_lora_weights="pissa")
    options = {"base_folder": tmp_path, "convert": True}
    (fault,) = faults_of(tmp_path / "a", **options)
    assert "--convert does not do experts" in fault


@pytest.mark.parametrize("family", moe.FAMILIES)
def test_the_layers_of_experts_are_those_of_the_model(family):
    model = moe.base_model(family)
    config = model.config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}
    good = [
        (f"{E0}.gate_up_proj", HIDDEN, 2 * INNER),
        (f"{E0}.up_proj", HIDDEN, INNER),
        (f"{E0}.down_proj", INNER, HIDDEN),
    ]
    assert misfits(good, config) == []
    if family == "Mixtral":
        w1 = ("model.layers.1.block_sparse_moe.experts.w1", HIDDEN, INNER)
        assert misfits([w1], config) == []
    (misfit,) = misfits([(f"{E0}.down_proj", HIDDEN, INNER)], config)
    assert f"{INNER} → {HIDDEN}" in misfit.reason
    (misfit,) = misfits([("model.layers.7.mlp.experts.down_proj", INNER, HIDDEN)], config)
    assert "has 2 layers" in misfit.reason
