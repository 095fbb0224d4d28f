"""An exported adapter is an ordinary PEFT adapter that does what the store does."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_FULL, CORE_NONE

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    """A tiny random Llama, float64 so that equal means equal; k and v are narrower than q."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def save_peft(base, folder, *, seed, dtype=torch.float32, **config):
    """Let PEFT itself make and save a random adapter."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | config)
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/tiny-llama"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert load_file(folder / "adapter_model.safetensors").popitem()[1].dtype == dtype
    return folder


def peft_logits(base, folder, tokens):
    model = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), folder, autocast_adapter_dtype=False
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    with torch.no_grad():
        return model.eval()(tokens).logits


def dense_logits(base, deltas, tokens):
    model = copy.deepcopy(base)
    for module, delta in deltas.items():
        model.get_submodule(module).weight.data += delta
    with torch.no_grad():
        return model(tokens).logits


def store_deltas(store, name):
    """U·Σ·Vᵀ of every module from the store's own arrays, in float64."""
    row = store.index(name)
    cores = store.cores(row, row + 1)[0].double()
    deltas = {}
    for column, module in enumerate(store.manifest.modules):
        for cluster in store.chosen[row, column].tolist():
            if cluster < 0:
                continue
            bases = store.bases(module.name)
            v_start, u_start, rank, kind, scale_row = bases.rows[cluster].tolist()
            assert scale_row == -1
            u = bases.u[u_start : u_start + rank].double()
            v = bases.v[v_start : v_start + rank].double()
            core = torch.eye(rank, dtype=torch.float64)
            if kind == CORE_FULL:
                core = cores[module.core_offset :][: rank**2].view(rank, rank)
            assert kind in (CORE_NONE, CORE_FULL)
            deltas[module.name] = deltas.get(module.name, 0) + u.T @ core @ v
    return deltas


CONFIGS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all modules": {"target_modules": TARGETS},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.1\..*(q|down)_proj"},
    "one layer": {"target_modules": TARGETS, "layers_to_transform": [1]},
    "rsLoRA": {"target_modules": TARGETS, "use_rslora": True},
    "rank pattern": {
        "target_modules": TARGETS,
        "rank_pattern": {
            "q_proj": 2,
            r"layers\.1\.mlp\.down_proj": 6,
            "model.layers.0.mlp.up_proj": 1,
        },
    },
    "alpha pattern": {
        "target_modules": TARGETS,
        "alpha_pattern": {"k_proj": 3, r".*\.1\.self_attn\.(q|o)_proj": 7.5},
    },
    "everything": {
        "target_modules": TARGETS,
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "gate_proj": 5},
        "alpha_pattern": {"up_proj": 1, "self_attn.q_proj": 2},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_lossless_store_gives_the_logits_of_the_original_adapter(tmp_path, base, tokens, case):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    folders = [
        save_peft(base, tmp_path / "in" / str(i), seed=i, dtype=dtype, **CONFIGS[case])
        for i, dtype in enumerate(dtypes)
    ]
    settings = Settings(rank=20, store_dtype="float32")
    store = compress(read_adapters(folders), tmp_path / "store", settings)
    plain = dense_logits(base, {}, tokens)
    for folder in folders:
        original = peft_logits(base, folder, tokens)
        assert float((original - plain).abs().max()) > 0.1
        exported = export_adapter(store, folder.name, tmp_path / "out" / folder.name)
        torch.testing.assert_close(peft_logits(base, exported, tokens), original, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"store_dtype": "float32"},
        {"store_dtype": "bfloat16"},
        {"store_dtype": "float16"},
        {"store_dtype": "int8"},
        {"store_dtype": "int4", "residual_rank": 1, "mean_rank": 2},
        {"max_adapter_error": 0.5},
        {"method": "svd"},
        {"method": "none"},
    ],
)
def test_an_exported_adapter_gives_the_logits_of_the_stores_deltas(tmp_path, base, tokens, options):
    folders = [
        save_peft(base, tmp_path / "in" / str(i), seed=i, **config)
        for i, config in enumerate(CONFIGS.values())
    ]
    settings = Settings(**{"rank": 3, "clusters": 2} | options)
    store = compress(read_adapters(folders), tmp_path / "store", settings)
    for folder in folders:
        exported = export_adapter(store, folder.name, tmp_path / "out" / folder.name)
        expected = dense_logits(base, store_deltas(store, folder.name), tokens)
        torch.testing.assert_close(peft_logits(base, exported, tokens), expected, atol=1e-4, rtol=0)
        original = peft_logits(base, folder, tokens)
        assert float((expected - original).abs().max()) > 1e-3


def test_an_exported_adapter_can_be_compressed_again_without_loss(
    tmp_path, write_adapters, peft_deltas
):
    folders = write_adapters(tmp_path / "in", 4, kind="real", ranks=(2, 4))
    settings = Settings(rank=3, store_dtype="float32")
    store = compress(read_adapters(folders), tmp_path / "one", settings)
    exported = [export_adapter(store, name, tmp_path / "out" / name) for name in store.names]
    again = compress(read_adapters(exported), tmp_path / "two", settings)
    assert float(again.error.max()) < 1e-9
    for folder in exported:
        second = export_adapter(again, folder.name, tmp_path / "out2" / folder.name)
        for module, delta in peft_deltas(folder).items():
            torch.testing.assert_close(peft_deltas(second)[module], delta, rtol=1e-4, atol=1e-4)


def test_export_keeps_what_is_there_already(tmp_path, write_adapters, tree):
    folders = write_adapters(tmp_path / "in", 2)
    store = compress(read_adapters(folders), tmp_path / "store", Settings(rank=2))
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for out in (tmp_path / "in", tmp_path / "file", folders[0]):
        with pytest.raises(FileExistsError, match="choose another --out"):
            export_adapter(store, "adapter-000", out)
    with pytest.raises(KeyError):
        export_adapter(store, "none", tmp_path / "new")
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert export_adapter(store, "adapter-000", tmp_path / "empty") == tmp_path / "empty"
