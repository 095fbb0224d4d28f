"""An exported adapter is an ordinary PEFT adapter that does what the store does."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.several_rows import compress
from vllm_jd.compressor import Settings, export_adapter, read_adapters
from vllm_jd.compressor.change import export as export_module
from vllm_jd.compressor.change.export import export_adapters, folder_name
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
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if ".lora_" in key} == {dtype}
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
        layer = model.get_submodule(module)
        layer.weight.data += delta.T if isinstance(layer, torch.nn.Embedding) else delta
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
    "the embedding": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "use_rslora": True,
        "rank_pattern": {"embed_tokens": 6},
        "alpha_pattern": {"embed_tokens": 5},
    },
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
        {"store_dtype": "float32", "rank": 3, "clusters": 2},
        {"store_dtype": "bfloat16", "rank": 3, "clusters": 2},
        {"store_dtype": "float16", "rank": 3, "clusters": 2},
        {"store_dtype": "int8", "rank": 3, "clusters": 2},
        {"store_dtype": "int4", "rank": 3, "clusters": 2, "own": 1, "mean": 2},
        {"max_adapter_error": 0.5, "rank": 3, "clusters": 2},
        {"method": "svd", "rank": 3},
        {"method": "none"},
    ],
)
def test_an_exported_adapter_gives_the_logits_of_the_stores_deltas(tmp_path, base, tokens, options):
    folders = [
        save_peft(base, tmp_path / "in" / str(i), seed=i, **config)
        for i, config in enumerate(CONFIGS.values())
    ]
    rows = {name: options[name] for name in ("own", "mean") if name in options}
    settings = Settings(**{name: options[name] for name in options.keys() - rows})
    store = compress(read_adapters(folders), tmp_path / "store", settings, **rows)
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


# --- several at once ---


@pytest.fixture
def four(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "in", 4, kind="real", ranks=(2, 4))
    return compress(read_adapters(folders), tmp_path / "store", Settings(rank=3, clusters=2))


def test_several_are_written_as_each_alone_would_be(tmp_path, four, tree):
    seen = []
    found = export_adapters(
        four, [*four.names, four.names[0]], tmp_path / "all", on_progress=lambda *n: seen.append(n)
    )
    assert [each.name for each in found] == four.names
    assert all(each.written for each in found)
    for name in four.names:
        export_adapter(four, name, tmp_path / "each" / name)
    assert tree(tmp_path / "all") == tree(tmp_path / "each")
    assert seen == [(n, 4) for n in range(5)]


def test_a_stopped_export_goes_on_and_keeps_what_is_complete(tmp_path, four, tree, monkeypatch):
    real = export_module._write
    calls = []

    def stopping(store, name, folder, digest):
        calls.append(name)
        real(store, name, folder, digest)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_write", stopping)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_adapters(four, four.names, out)
    assert sorted(path.name for path in out.iterdir()) == four.names[:2]
    before = tree(out)
    # What a killed process leaves.
    (out / ".partial-x" / "adapter").mkdir(parents=True)
    (out / ".partial-x" / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    found = export_adapters(four, four.names, out)
    assert [each.written for each in found] == [False, False, True, True]
    assert calls[3:] == four.names[2:]
    assert sorted(path.name for path in out.iterdir()) == four.names
    after = tree(out)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("what", ["mine", "file", "empty", "damaged", "generation", "other name"])
def test_several_write_nothing_where_something_else_is(tmp_path, four, tree, write_adapters, what):
    out = tmp_path / "out"
    target = out / "adapter-002"
    if what == "file":
        out.mkdir()
        target.write_text("mine")
    elif what in ("mine", "empty"):
        target.mkdir(parents=True)
        if what == "mine":
            (target / "notes").write_text("mine")
    elif what == "other name":
        export_adapter(four, "adapter-001", target)
    else:
        export_adapter(four, "adapter-002", target)
        if what == "damaged":
            file = target / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        else:
            again = read_adapters([tmp_path / "in"])
            four = compress(again, tmp_path / "store", Settings(rank=2))
    before = tree(out)
    with pytest.raises(FileExistsError, match=r"adapter-002: already there, .*nothing was written"):
        export_adapters(four, four.names, out)
    assert tree(out) == before


def test_unknown_names_write_nothing(tmp_path, four):
    with pytest.raises(KeyError):
        export_adapters(four, ["adapter-000", "none"], tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        export_adapters(four, ["adapter-000"], tmp_path / "file")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "mine"


ODD = [
    "..",
    ".",
    "",
    "../../x",
    "/etc/x",
    "a/b",
    "a%2Fb",
    "a%b",
    ".partial-x",
    "a\\b",
    "a\nb",
    "-x",
]
ODD += ["ü" * 127, "ü" * 128, "ü" * 129, "/" * 90, "/" * 91, "n" * 255, "n" * 256, "n" * 257]


def test_no_two_names_share_a_folder_and_none_leaves_its_place(tmp_path):
    names = list(dict.fromkeys([*ODD, *map(folder_name, ODD)]))
    assert len(names) > 30
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        (tmp_path / folder).mkdir()  # the system takes it as one new folder of this one
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folders)
    assert not any(folder.startswith(".") for folder in folders)
    assert folder_name("a b [v2]") == "a b [v2]"
    assert folder_name("org/name") == "org%2Fname"


def test_adapters_of_odd_names_are_exported(tmp_path, write_adapters, peft_deltas, monkeypatch):
    folders = write_adapters(tmp_path / "in", 3, kind="real")
    collection = read_adapters(folders)
    collection.names = ["../../escaped", "org/name", "ü" * 200]  # as adapters of the Hub may be
    store = compress(collection, tmp_path / "store", Settings(rank=3, store_dtype="float32"))
    found = export_adapters(store, store.names, tmp_path / "deep" / "deeper" / "out")
    for each in found:
        assert each.folder.parent == tmp_path / "deep" / "deeper" / "out"
        deltas = peft_deltas(each.folder)
        for module, (b, a) in store.factors(each.name).items():
            torch.testing.assert_close(
                deltas[module].double(), b.double() @ a.double(), atol=1e-5, rtol=1e-5
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in", "store"]
