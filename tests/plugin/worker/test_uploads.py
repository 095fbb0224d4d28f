"""Folders that a running server is given: read as `vllm-jd compress` reads them, against PEFT."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.utils import WeightsMapper

from tests.compressor.read.peft_folders import (
    CONFIG,
    WEIGHTS,
    Q,
    as_mlx,
    base_model,
    drop_config,
    edit_config,
    loaded,
    logits,
    rename_keys,
    same,
    save,
    trained,
)
from tests.compressor.read.test_folder import KEYS, NULLS, TARGETS
from vllm_jd.compressor import AdapterError, read_adapters
from vllm_jd.plugin.api.requests import upload_digest
from vllm_jd.plugin.worker.expert_names import ExpertNames
from vllm_jd.plugin.worker.uploads import FolderLoader, Uploads


def stock(request):
    raise LookupError("vLLM's own loader")


@pytest.fixture
def load():
    """folder → what is served of it: module → (A, B with the scale in it)."""

    def made(folder, *, rank=128, dtype=torch.float32, model=None):
        config = LoRAConfig(max_lora_rank=rank, max_loras=1)
        config.lora_dtype = dtype
        loader = FolderLoader(model or SimpleNamespace(), config, stock, ExpertNames([]))
        upload = loader(LoRARequest("up", 1, str(folder)))
        return {
            module: (lora.optimize().lora_a, lora.lora_b) for module, lora in upload.loras.items()
        }

    return made


def served(loras):
    """What the base model says with these added."""
    model = base_model()
    for module, (a, b) in loras.items():
        layer, delta = model.get_submodule(module), (b.double() @ a.double()).float()
        layer.weight.data += delta.T if isinstance(layer, torch.nn.Embedding) else delta
    return logits(model)


@pytest.fixture
def folder(tmp_path):
    return save(trained(), tmp_path / "a")


@pytest.mark.parametrize("case", TARGETS)
def test_peft_folders_are_served_as_peft_says(tmp_path, load, case):
    folder = save(trained(**TARGETS[case]), tmp_path / "a")
    same(served(load(folder)), loaded(folder))


@pytest.mark.parametrize("case", KEYS)
def test_so_is_what_trainers_leave_in_keys(folder, load, case):
    expected = loaded(folder)
    rename_keys(folder, KEYS[case])
    same(served(load(folder)), expected)


def test_so_are_nulls_and_a_config_without_a_type(folder, load):
    expected = loaded(folder)
    edit_config(folder, **dict.fromkeys((*NULLS, "peft_type", "target_modules")))
    same(served(load(folder)), expected)
    drop_config(folder, "peft_type", "target_modules", "bias")
    same(served(load(folder)), expected)


def test_so_are_mlx_adapters_and_their_digest_is_of_their_weights(folder, tmp_path, load):
    mlx = as_mlx(folder, tmp_path / "mlx")
    same(served(load(mlx)), loaded(folder))
    digest = upload_digest(mlx)
    file = mlx / "adapters.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    assert upload_digest(mlx) != digest


def test_numbers_are_those_of_the_served_type(folder, load):
    found = load(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for pair in found.values() for tensor in pair} == {torch.bfloat16}
    a, b = found[Q]
    tensors = load_file(folder / WEIGHTS)
    key = f"base_model.model.{Q}.lora_A.weight"
    assert torch.equal(a, tensors[key].bfloat16())
    exact = 1.5 * tensors[key.replace("lora_A", "lora_B")]
    torch.testing.assert_close(b.float(), exact, rtol=2**-7, atol=0)


def test_names_are_mapped_as_vllm_maps_them_and_prefixes_left_out(folder, load):
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    model = SimpleNamespace(hf_to_vllm_mapper=mapper, lora_skip_prefixes=["layers.1."])
    found = load(folder, model=model)
    assert sorted(found) == [
        f"language_model.model.layers.{i}.self_attn.{name}_proj" for i in (0, 2) for name in "qv"
    ]
    torch.testing.assert_close(found[f"language_model.{Q}"][0], load(folder)[Q][0])


REFUSED = {
    "dora": lambda f: edit_config(f, use_dora=True),
    "biases": lambda f: edit_config(f, bias="all"),
    "modules_to_save": lambda f: edit_config(f, modules_to_save=["lm_head"]),
    "pissa": lambda f: edit_config(f, init_lora_weights="pissa"),
    "a type": lambda f: edit_config(f, peft_type="IA3"),
    "no config": lambda f: (f / CONFIG).unlink(),
    "a rank": lambda f: edit_config(f, r=5),
    "zero-3": lambda f: save_file(
        {key: torch.empty(0) for key in load_file(f / WEIGHTS)}, f / WEIGHTS
    ),
    "NaN": lambda f: save_file(
        {key: tensor * torch.nan for key, tensor in load_file(f / WEIGHTS).items()}, f / WEIGHTS
    ),
    "cut": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_compress_refuses_is_refused_in_the_same_words(folder, load, case):
    REFUSED[case](folder)
    with pytest.raises(AdapterError) as caught:
        read_adapters([folder])
    (fault,) = caught.value.faults
    with pytest.raises(ValueError, match="adapter 'up': ") as refused:
        load(folder)
    assert str(refused.value) == f"adapter 'up': {fault.removeprefix(f'{folder}: ')}"


def test_a_rank_that_the_server_has_no_room_for_is_refused(folder, load):
    with pytest.raises(ValueError, match="LoRA rank 4 is greater than max_lora_rank 1"):
        load(folder, rank=1)


def test_a_vera_adapter_is_refused_with_what_to_do(folder, tmp_path, load):
    from tests.compressor.read.test_vera import save_vera

    save_vera(tmp_path / "vera", 0)
    with pytest.raises(ValueError, match="a VeRA adapter, which is served from a store only"):
        load(tmp_path / "vera")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_and_folders_that_are_not_there_are_vllms_own_business(folder, load, name):
    (folder / WEIGHTS).rename(folder / name)
    for path in (folder, folder / "none"):
        with pytest.raises(LookupError):
            load(path)


def test_files_that_changed_since_they_were_named_are_refused(folder):
    config = LoRAConfig(max_lora_rank=8, max_loras=1)
    config.lora_dtype = torch.float32
    loader = FolderLoader(SimpleNamespace(), config, stock, ExpertNames([]))
    uploads = Uploads(loader, [], ("model.",), 8, 4)
    uploads.add(1, "up", upload_digest(folder), str(folder))
    assert Q in uploads.get(1).loras
    with pytest.raises(ValueError, match="not those that were loaded as 'up'"):
        uploads.add(2, "up", "0" * 64, str(folder))


def test_numbers_that_the_served_type_has_no_room_for_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = 1e6
    save_file(tensors, folder / WEIGHTS)
    config = LoRAConfig(max_lora_rank=8, max_loras=1)
    config.lora_dtype = torch.float16
    slices = [SimpleNamespace(name=Q)]
    names = {"name": Q, "names": [Q], "slices": slices}
    layers = [SimpleNamespace(**names, shapes=[(24, 24)], experts=None, each=1)]
    loader = FolderLoader(SimpleNamespace(), config, stock, ExpertNames([]))
    uploads = Uploads(loader, layers, ("model.layers.",), 8, 4)
    with pytest.raises(ValueError, match=f"{Q}: found numbers that are NaN or infinite"):
        uploads.add(1, "up", upload_digest(folder), str(folder))
