"""Reading PEFT adapters: what is accepted means what PEFT means, the rest is refused by name."""

import json
import os
import random
import shutil
import struct
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_jd.compressor import AdapterError, read_adapters
from vllm_jd.compressor.read import hub

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q}"

fuzz = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_header(folder, change):
    """Rewrite the safetensors header, leaving the numbers."""
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def faults_of(*paths, **options):
    with pytest.raises(AdapterError) as caught:
        read_adapters(paths, **options)
    for fault in caught.value.faults:
        assert f"  - {fault}" in str(caught.value)
    return caught.value.faults


@pytest.fixture
def adapter(tmp_path, write_adapters):
    """One good adapter's folder."""
    return write_adapters(tmp_path / "in", 1)[0]


# --- what is accepted ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rslora", [False, True])
def test_deltas_are_those_of_peft(tmp_path, write_adapters, peft_deltas, dtype, rslora):
    config = {
        "use_rslora": rslora,
        "alpha": 12,
        "r": 4,
        "rank_pattern": {"down_proj": 4, "layers.0.self_attn.k_proj": 4, "proj": 9},
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 3.5, "_proj": 7, "down_proj": 5},
    }
    folders = write_adapters(tmp_path, 3, dtype=dtype, config=config)
    collection = read_adapters([tmp_path])
    for module in collection.shapes:
        factors = collection.factors(module)
        for i, folder in enumerate(folders):
            found = factors.subset(torch.tensor([i]))
            torch.testing.assert_close(
                found.b.double().T @ found.a.double(),
                peft_deltas(folder)[module],
                rtol=1e-5,
                atol=1e-5,
            )


def test_rank_patterns_mixed_ranks_and_missing_modules(
    tmp_path, write_adapter, make_factors, peft_deltas, tiny_shapes
):
    adapters = make_factors(3, ranks=(2, 5, 3))
    modules = list(tiny_shapes)
    del adapters[0][modules[0]]
    adapters[1] = {modules[1]: adapters[1][modules[1]]}
    b, a = adapters[2][modules[2]]
    adapters[2][modules[2]] = (b[:, :1], a[:1])
    folders = [write_adapter(tmp_path / str(i), f, r=7) for i, f in enumerate(adapters)]
    collection = read_adapters([tmp_path])
    assert list(collection.shapes) == [modules[1], modules[0], *modules[2:]]
    assert collection.shapes == tiny_shapes
    for module in modules:
        factors = collection.factors(module)
        for i, folder in enumerate(folders):
            delta = peft_deltas(folder).get(module)
            found = factors.subset(torch.tensor([i]))
            if delta is None:
                assert int(factors.ranks[i]) == 0
            else:
                product = found.b.double().T @ found.a.double()
                torch.testing.assert_close(product, delta, rtol=1e-5, atol=1e-5)


def test_adapters_are_found_at_any_depth_in_hidden_folders_and_once(
    tmp_path, write_adapters, monkeypatch
):
    write_adapters(tmp_path / "a", 1, prefix="x")
    write_adapters(tmp_path / "a" / "deep" / "er", 1, prefix="y", seed=1)
    write_adapters(tmp_path / "a", 1, prefix=".hidden", seed=2)
    paths = [tmp_path / "a", tmp_path / "a" / "x000", tmp_path / "a" / "deep", tmp_path]
    assert read_adapters(paths).names == [".hidden000", "x000", "y000"]
    monkeypatch.chdir(tmp_path / "a" / "x000")
    assert read_adapters([tmp_path.__class__(".")]).names == ["x000"]


def test_linked_adapters_are_found_and_loops_end(tmp_path, write_adapters):
    (real,) = write_adapters(tmp_path / "elsewhere", 1, prefix="real")
    write_adapters(tmp_path / "in", 1, prefix="plain", seed=1)
    (tmp_path / "in" / "linked").symlink_to(real)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert read_adapters([tmp_path / "in"]).names == ["linked", "plain000"]


@pytest.mark.parametrize(
    "name",
    [
        *("a b", "ü", "-x", "con", ".hidden", "n" * 255, "a'b\"c", "[bold]x[b]", "日本", "%s"),
        *("...", "..a", "~", "~root", "$HOME", "`id`", "a;b", "a|b", "a&b", "a>b", "*", "?", "{x}"),
        *("a\\b", "#a", "a@b", "a:b", "a=b", "=", " a ", "a%2Fb", "e\u0301", "🙂", "--out", "hf:x"),
    ],
)
def test_odd_names_are_only_names(tmp_path, write_adapters, name, monkeypatch):
    (folder,) = write_adapters(tmp_path, 1)
    folder.rename(tmp_path / name)
    assert read_adapters([tmp_path]).names == [name]
    monkeypatch.chdir(tmp_path)
    assert read_adapters([str(tmp_path / name)]).names == read_adapters([name]).names == [name]


def test_the_order_of_arguments_and_the_parents_do_not_matter(tmp_path, write_adapters):
    folders = write_adapters(tmp_path / "one", 6, ranks=(2, 3))
    first = read_adapters(folders)
    random.Random(0).shuffle(folders)
    (tmp_path / "one").rename(tmp_path / "two")
    second = read_adapters([tmp_path / "two" / folder.name for folder in folders])
    assert first.names == second.names == sorted(first.names)
    assert first.source_sha256 == second.source_sha256


@pytest.mark.parametrize(
    "fields",
    [
        {"fan_in_fan_out": True, "target_modules": ["c_attn"]},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"modules_to_save": []},
        {"rank_pattern": None, "alpha_pattern": None},
        {"lora_dropout": 0.1, "some_future_field": {"x": 1}},
    ],
)
def test_harmless_settings_are_accepted(adapter, fields):
    edit_config(adapter, **fields)
    assert read_adapters([adapter]).names == [adapter.name]


def test_the_base_model_is_that_of_an_adapter_that_names_one(tmp_path, write_adapters):
    first, second = write_adapters(tmp_path, 2)
    edit_config(first, base_model_name_or_path=None)
    edit_config(second, base_model_name_or_path="org/tiny")
    assert read_adapters([tmp_path]).base_model == "org/tiny"
    assert read_adapters([tmp_path], base_model="other-org/TINY").base_model == "other-org/TINY"
    edit_config(second, base_model_name_or_path=None)
    assert read_adapters([tmp_path]).base_model == "unknown"


# --- what is refused ---

BAD_CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora is true"),
    "bias": ({"bias": "all"}, "bias is 'all', expected 'none'"),
    "lora bias": ({"lora_bias": True}, "lora_bias is true"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "no lora": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is set"),
    "kasa": ({"kasa_config": {"beta": 0.1}}, "kasa_config is set"),
    "rank": ({"r": 5, "rank_pattern": {}}, "found rank 4, adapter_config.json says 5"),
    "rank pattern": ({"rank_pattern": {"q_proj": 3}}, "found rank 4, adapter_config.json says 3"),
    "rank of zero": ({"r": 0}, "r: Input should be greater than 0"),
    "rank as text": ({"r": "4"}, "r: Input should be a valid integer"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha: Input should be a finite number"),
    "alpha inf": ({"lora_alpha": float("inf")}, "lora_alpha: Input should be a finite number"),
    "alpha huge": ({"lora_alpha": 1e300}, "too large"),
    "alpha pattern NaN": (
        {"alpha_pattern": {"q_proj": float("nan")}},
        "alpha_pattern.q_proj: Input should be a finite number",
    ),
    "rank pattern no regex": ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern: 'q_proj('"),
    "alpha pattern no regex": ({"alpha_pattern": {"*": 4}}, "alpha_pattern: '*'"),
    "token indices": ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    "surrogate": ({"base_model_name_or_path": "\ud800"}, "base_model_name_or_path"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_field(adapter, case):
    fields, message = BAD_CONFIGS[case]
    edit_config(adapter, **fields)
    faults = faults_of(adapter)
    assert all(str(adapter) in fault for fault in faults)
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"peft_type": "LORA"}',
        b'{"r": 1e999}',
        b'{"r": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_malformed_config_is_refused(adapter, text):
    (adapter / CONFIG).write_bytes(text)
    faults = faults_of(adapter)
    assert all(CONFIG in fault for fault in faults)


def set_number(value):
    def change(tensors):
        tensors[f"{PREFIX}.lora_A.weight"].view(-1)[5] = value

    return change


def add(key, *shape):
    def change(tensors):
        tensors[key] = torch.ones(shape)

    return change


def replace_factor(side, *shape):
    return add(f"{PREFIX}.lora_{side}.weight", *shape)


BAD_WEIGHTS = {
    "NaN": (set_number(torch.nan), "found NaN or infinity in 1 of 96 numbers"),
    "inf": (set_number(torch.inf), "found NaN or infinity in 1 of 96 numbers"),
    "A and B of two ranks": (replace_factor("A", 3, 24), "lora_A is [3, 24] and lora_B [24, 4]"),
    "a vector": (replace_factor("A", 24), "found shape [24], expected a matrix"),
    "a convolution": (replace_factor("A", 4, 24, 1, 1), "expected a matrix"),
    "empty": (replace_factor("A", 0, 24), "expected a matrix"),
    "no B": (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), f"{Q}: lora_B is missing"),
    "no A": (lambda t: t.pop(f"{PREFIX}.lora_A.weight"), f"{Q}: lora_A is missing"),
    "nothing": (lambda t: t.clear(), "holds no LoRA factors"),
    "a saved module": (add("base_model.model.lm_head.weight", 2, 2), "is no LoRA factor"),
    "a bias": (add(f"{PREFIX}.bias", 24), "is no LoRA factor"),
    "half an embedding": (
        add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 9),
        "model.embed_tokens: lora_B is missing",
    ),
    "an embedding's vector": (
        add("base_model.model.model.embed_tokens.lora_embedding_B", 9),
        "found shape [9], expected a matrix",
    ),
    "magnitudes": (add(f"{PREFIX}.lora_magnitude_vector.weight", 24), "is no LoRA factor"),
    "integers": (
        lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)}),
        "found dtype I8",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_by_tensor(adapter, case):
    change, message = BAD_WEIGHTS[case]
    edit_weights(adapter, change)
    faults = faults_of(adapter)
    assert len(faults) == 1
    assert str(adapter) in faults[0]
    assert message in faults[0]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", ["first", "last"])
def test_one_bad_number_is_found_in_every_type(tmp_path, write_adapters, dtype, value, at):
    (folder,) = write_adapters(tmp_path, 1)
    edit_weights(
        folder,
        lambda tensors: tensors.update({key: (-x.abs()).to(dtype) for key, x in tensors.items()}),
    )
    read_adapters([folder])

    def change(tensors):
        key = (min if at == "first" else max)(tensors)
        numbers = tensors[key].float()
        numbers.view(-1)[0 if at == "first" else -1] = value
        tensors[key] = numbers.to(dtype)

    edit_weights(folder, change)
    (fault,) = faults_of(folder)
    assert "found NaN or infinity in 1 of" in fault


def test_large_numbers_are_refused_only_where_the_scale_makes_them_infinite(adapter):
    edit_weights(adapter, set_number(3e38))  # of A, which is not scaled
    edit_config(adapter, lora_alpha=64.0)
    assert float(read_adapters([adapter]).factors(Q).a.max()) == pytest.approx(3e38)
    edit_weights(
        adapter, lambda tensors: tensors[f"{PREFIX}.lora_B.weight"].view(-1)[3].fill_(-1e38)
    )
    (fault,) = faults_of(adapter)
    assert "too large once scaled by α/r = 16" in fault


def test_adapters_of_several_types_and_ranks_keep_their_places(
    tmp_path, write_adapter, make_factors, peft_deltas
):
    types = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
    ranks = (3, 5, 2, 5, 3)
    folders = []
    for i, (factors, dtype) in enumerate(zip(make_factors(5, ranks=ranks), types, strict=True)):
        folders.append(write_adapter(tmp_path / str(i), factors, r=ranks[i], lora_alpha=7 + i))

        def change(tensors, dtype=dtype):
            tensors.update({key: value.to(dtype) for key, value in tensors.items()})

        edit_weights(folders[-1], change)
    # One file of two types.
    edit_weights(
        folders[0],
        lambda t: t.update({f"{PREFIX}.lora_A.weight": t[f"{PREFIX}.lora_A.weight"].double()}),
    )
    collection = read_adapters([tmp_path])
    for module in collection.shapes:
        factors = collection.factors(module)
        assert factors.ranks.tolist() == list(ranks)
        for i, folder in enumerate(folders):
            found = factors.subset(torch.tensor([i]))
            delta = found.b.double().T @ found.a.double()
            torch.testing.assert_close(delta, peft_deltas(folder)[module], rtol=1e-5, atol=1e-5)


def test_weights_cut_short_are_refused_at_every_length(adapter):
    whole = (adapter / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    for length in [0, 1, 7, 8, 9, 8 + size // 2, 8 + size - 1, 8 + size, 9 + size, len(whole) - 1]:
        (adapter / WEIGHTS).write_bytes(whole[:length])
        (fault,) = faults_of(adapter)
        assert f"{WEIGHTS} cannot be read: " in fault


def first_entry(change):
    return lambda header: change(header[f"{PREFIX}.lora_A.weight"])


LYING_HEADERS = {
    "negative": first_entry(lambda e: e.update(data_offsets=[-384, 0])),
    "reversed": first_entry(lambda e: e.update(data_offsets=e["data_offsets"][::-1])),
    "beyond the end": first_entry(lambda e: e.update(data_offsets=[10**6, 10**6 + 384])),
    "far beyond the end": first_entry(lambda e: e.update(data_offsets=[2**63, 2**63 + 384])),
    "too few bytes": first_entry(lambda e: e.update(data_offsets=[0, 380])),
    "offsets as text": first_entry(lambda e: e.update(data_offsets=["0", "384"])),
    "offsets as fractions": first_entry(lambda e: e.update(data_offsets=[0.0, 384.0])),
    "offsets as booleans": first_entry(lambda e: e.update(data_offsets=[False, 384])),
    "three offsets": first_entry(lambda e: e.update(data_offsets=[0, 384, 768])),
    "no offsets": first_entry(lambda e: e.pop("data_offsets")),
    "offsets null": first_entry(lambda e: e.update(data_offsets=None)),
    "negative shape": first_entry(lambda e: e.update(shape=[-4, -24])),
    "infinite shape": first_entry(lambda e: e.update(shape=[float("inf"), 24])),
    "shape as text": first_entry(lambda e: e.update(shape=["4", "24"])),
    "shape as fractions": first_entry(lambda e: e.update(shape=[4.0, 24.7])),
    "huge shape": first_entry(lambda e: e.update(shape=[2**62, 2**62])),
    "shape null": first_entry(lambda e: e.update(shape=None)),
    "dtype a list": first_entry(lambda e: e.update(dtype=["F32"])),
    "dtype unknown": first_entry(lambda e: e.update(dtype="Q4")),
    "wider dtype": first_entry(lambda e: e.update(dtype="F64")),
    "overlapping": lambda header: header[f"{PREFIX}.lora_A.weight"].update(
        data_offsets=header[f"{PREFIX}.lora_B.weight"]["data_offsets"]
    ),
    "entry a number": lambda header: header.update({f"{PREFIX}.lora_A.weight": 5}),
    "surrogate in a name": lambda header: header.update(
        {
            f"{PREFIX}\ud800.lora_{side}.weight": header.pop(f"{PREFIX}.lora_{side}.weight")
            for side in "AB"
        }
    ),
}


@pytest.mark.parametrize("case", LYING_HEADERS)
def test_a_lying_header_is_refused(adapter, case):
    edit_header(adapter, LYING_HEADERS[case])
    faults = faults_of(adapter)
    assert all(str(adapter) in fault for fault in faults)


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 2**64 - 1, 10**6])
def test_a_huge_header_length_is_refused_without_reading_so_much(adapter, size):
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
    (fault,) = faults_of(adapter)
    assert "truncated" in fault


@pytest.mark.parametrize("header", [b"[]", b"{", b"null", b"[" * 100_000, b'{"a": ' * 50_000])
def test_a_header_that_is_no_object_is_refused(adapter, header):
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    (fault,) = faults_of(adapter)
    assert f"{WEIGHTS} cannot be read: " in fault


def test_numbers_that_follow_an_odd_header_length_are_read(adapter, peft_deltas):
    expected = peft_deltas(adapter)[Q]
    for pad in range(4):
        edit_header(adapter, lambda h, pad=pad: h.update(__metadata__={"p": "x" * pad}))
        factors = read_adapters([adapter]).factors(Q)
        torch.testing.assert_close(factors.b.double().T @ factors.a.double(), expected)


def test_missing_files_and_pickles(tmp_path, write_adapters):
    a, b, c, d = write_adapters(tmp_path, 4)
    (a / CONFIG).unlink()
    (b / WEIGHTS).unlink()
    (c / WEIGHTS).rename(c / "adapter_model.bin")
    (d / WEIGHTS).unlink()
    (d / WEIGHTS).mkdir()
    faults = faults_of(tmp_path)
    assert len(faults) == 4
    assert f"{a}: {CONFIG} is missing" in faults
    assert f"{b}: {WEIGHTS} is missing" in faults
    assert "a pickle, which is never loaded" in next(f for f in faults if str(c) in f)
    assert any(str(d) in fault for fault in faults)


def test_paths_without_adapters_are_all_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    faults = faults_of(tmp_path / "empty", tmp_path / "file", tmp_path / "none")
    assert "found no adapter_config.json" in faults[0]
    assert "not a folder" in faults[1]
    assert "no such folder" in faults[2]


def test_another_base_model_is_refused_for_each_adapter(tmp_path, write_adapters):
    folders = write_adapters(tmp_path, 5)
    edit_config(folders[1], base_model_name_or_path="org/other")
    edit_config(folders[3], base_model_name_or_path="org/third")
    edit_config(folders[4], base_model_name_or_path="/models/Tiny-Llama/")
    faults = faults_of(tmp_path)
    assert len(faults) == 2
    assert "'org/other', expected 'tiny-llama' (as most of the others)" in faults[0]
    assert "'org/third', expected 'tiny-llama' (as most of the others)" in faults[1]
    assert all("--base-model org/tiny-llama --same-base" in fault for fault in faults)
    faults = faults_of(tmp_path, base_model="org/other")
    assert len(faults) == 4
    assert all("(of --base-model)" in fault for fault in faults)


def test_layers_of_two_widths_are_refused(tmp_path, write_adapters, tiny_shapes):
    write_adapters(tmp_path, 2)
    wide = {module: (d_in + 8, d_out) for module, (d_in, d_out) in tiny_shapes.items()}
    (odd,) = write_adapters(tmp_path, 1, prefix="odd", shapes=wide)
    (fault,) = faults_of(tmp_path)
    assert fault.startswith(f"{odd}: k_proj, q_proj, down_proj of 3 layers (4 in all): ")
    assert "[8, 32] (d_out, d_in), [8, 24] in most of the others" in fault
    assert fault.endswith("(the first; the others alike)")
    assert len(tiny_shapes) == 4


def test_two_adapters_of_one_name_are_refused(tmp_path, write_adapters):
    """Folders of one name are told apart by more of their paths; a name that was given stays."""
    write_adapters(tmp_path / "x", 2)
    write_adapters(tmp_path / "y", 1)
    names = ["adapter-001", "x/adapter-000", "y/adapter-000"]
    assert read_adapters([tmp_path]).names == names
    one, other = tmp_path / "x" / "adapter-000", tmp_path / "y" / "adapter-000"
    (fault,) = faults_of(f"a={one}", f"a={other}")
    assert "'a' is used by 2 adapters" in fault
    assert str(one) in fault
    assert str(other) in fault
    assert "give one another name (NAME=PATH)" in fault


@pytest.mark.parametrize("name", [b"bad\xff", b"a\nb", b"esc\x1b[31m"])
def test_undecodable_and_control_characters_in_a_name_are_refused(adapter, name):
    renamed = os.path.join(os.fsencode(adapter.parent), name)  # noqa: PTH118
    os.rename(adapter, renamed)  # noqa: PTH104
    (fault,) = faults_of(adapter.parent)
    assert "control or undecodable characters" in fault


LAYERS = {f"model.layers.{i}.self_attn.{p}_proj": (24, 24) for i in range(30) for p in "qkv"}
EVERY = "k_proj, q_proj, v_proj of 30 layers"


def in_every_tensor(change):
    def changed(tensors):
        for key in list(tensors):
            change(tensors, key)

    return changed


def add_magnitude(tensors, key):
    if key.endswith("lora_A.weight"):
        tensors[key.replace("lora_A", "lora_magnitude_vector")] = torch.ones(24)


def spoil(tensors, key):
    layer = int(key.split(".layers.")[1].split(".")[0])
    if ".q_proj.lora_B" in key:
        tensors[key].view(-1)[: layer + 1] = torch.nan


FOLDED = {
    "ranks": (
        {"r": 8},
        lambda t: None,
        [f"{EVERY}: found rank 4, {CONFIG} says 8"],
    ),
    "missing sides": (
        {},
        in_every_tensor(lambda t, key: "lora_B" in key and t.pop(key)),
        [f"{EVERY}: lora_B is missing"],
    ),
    "magnitudes": (
        {},
        in_every_tensor(add_magnitude),
        [
            f"{WEIGHTS}: k_proj.lora_magnitude_vector.weight, q_proj.lora_magnitude_vector.weight, "
            "v_proj.lora_magnitude_vector.weight of 30 layers: found a tensor that is no LoRA "
            "factor of a linear layer or an embedding"
        ],
    ),
    "numbers that differ": (
        {},
        in_every_tensor(spoil),
        [
            "q_proj.lora_B.weight of 30 layers: found NaN or infinity in 1 of 96 numbers (the "
            "first; the others alike)"
        ],
    ),
    "two faults, one in a config": (
        {"bias": "all"},
        lambda t: (t.pop(f"{PREFIX}.lora_B.weight"), add_magnitude(t, f"{PREFIX}.lora_A.weight")),
        [
            "bias is 'all', expected 'none': trained biases are not kept; merge it into a model of "
            "its own (PEFT's merge_and_unload), or train again without them",
            f"{WEIGHTS}: {PREFIX}.lora_magnitude_vector.weight: found a tensor that is no LoRA "
            "factor of a linear layer or an embedding",
            f"{Q}: lora_B is missing",
        ],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_like_faults_of_many_tensors_are_one_line_an_adapter(tmp_path, write_adapters, case):
    config, change, expected = FOLDED[case]
    _good, *bad = write_adapters(tmp_path, 4, shapes=LAYERS, ranks=(4,))
    for folder in bad:
        edit_config(folder, **config)
        edit_weights(folder, change)
    faults = faults_of(tmp_path)
    found = {f: [x.removeprefix(f"{f}: ") for x in faults if x.startswith(str(f))] for f in bad}
    assert all(sorted(lines) == sorted(expected) for lines in found.values()), faults
    assert len(faults) == 3 * len(expected)


def test_all_faults_of_all_adapters_come_in_one_error(tmp_path, write_adapters):
    folders = write_adapters(tmp_path, 5)
    edit_config(folders[0], use_dora=True, bias="all", modules_to_save=["lm_head"])
    edit_weights(folders[1], set_number(torch.nan))
    (folders[2] / WEIGHTS).write_bytes(b"1234")
    (folders[3] / CONFIG).write_text("{")
    edit_config(folders[4], base_model_name_or_path="org/other")
    edit_weights(folders[4], lambda t: t.pop(f"{PREFIX}.lora_B.weight"))
    faults = faults_of(tmp_path)
    per_adapter = [sum(str(folder) in fault for fault in faults) for folder in folders]
    assert per_adapter == [3, 1, 1, 1, 2]
    assert len(faults) == 8


def test_a_file_that_changes_after_the_check_is_refused(adapter, write_adapters):
    for new in ("shorter", "other", "gone"):
        write_adapters(adapter.parent, 1)
        collection = read_adapters([adapter])
        if new == "shorter":
            (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-200])
        elif new == "other":
            write_adapters(adapter.parent, 1, seed=5)
        else:
            (adapter / WEIGHTS).unlink()
        with pytest.raises(AdapterError) as caught:
            for module in collection.shapes:
                collection.factors(module)
        assert str(adapter / WEIGHTS) in str(caught.value)


# --- sources ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fetched(monkeypatch):
    """Stands for the Hub: sources → what `fetch` gives for them; `asked` are its calls."""

    class Fetched(dict):
        asked: ClassVar[list] = []

    known = Fetched()

    def fetch(sources, *, on_progress, on_skip):
        known.asked.append(list(sources))
        on_skip("acme/data of acme/all: a dataset, not a LoRA adapter")
        on_progress(len(sources), len(sources))
        return [known[source] for source in sources]

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(Fetched, "asked", [])
    return known


def test_sources_of_the_hub_and_folders_together(
    tmp_path, write_adapters, fetched, peft_deltas, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    local = write_adapters(tmp_path / "in", 1)[0]
    for name, below in (("acme/sql", ""), ("acme/many", "deep/er")):
        folder = tmp_path / "cache" / name.replace("/", "--") / "snapshots" / COMMIT / below
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_adapters(tmp_path / "made", 1, seed=len(fetched) + 1)[0].rename(folder)
        called = "/".join(filter(None, (name.split("/")[1], below)))
        fetched[name] = hub.Source(folder, name, COMMIT, called)
    steps, skipped, checked = [], [], []
    collection = read_adapters(
        ["acme/sql", local, "acme/many", str(local)],
        on_fetch=lambda *step: steps.append(step),
        on_skip=skipped.append,
        on_progress=lambda *step: checked.append(step),
    )
    assert collection.names == ["adapter-000", "many/deep/er", "sql"]
    assert collection.sources == [None, f"acme/many@{COMMIT}/deep/er", f"acme/sql@{COMMIT}"]
    assert fetched.asked == [["acme/sql", "acme/many"]]
    assert (steps, len(skipped), checked) == ([(2, 2)], 1, [(1, 3), (2, 3), (3, 3)])
    factors = collection.factors(Q).subset(torch.tensor([2]))
    delta = peft_deltas(fetched["acme/sql"].folder)[Q]
    torch.testing.assert_close(factors.b.double().T @ factors.a.double(), delta)
    for path in (local, str(local), "in"):
        assert read_adapters([path]).sources == [None]


def test_a_folder_that_looks_like_a_repository_is_a_folder(
    tmp_path, write_adapters, fetched, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_adapters(tmp_path / "acme", 1, prefix="sql")
    assert read_adapters(["acme/sql000"]).sources == [None]
    assert fetched.asked == []
    (fault,) = faults_of(tmp_path.__class__("acme/other"))
    assert "no such folder" in fault


def test_faults_of_the_hubs_adapters_name_their_repository(tmp_path, write_adapters, fetched):
    (folder,) = write_adapters(tmp_path / "cache", 1)
    fetched["acme/sql"] = hub.Source(folder, "acme/sql", COMMIT, "sql")
    edit_config(folder, bias="all")
    edit_weights(folder, set_number(torch.nan))
    faults = faults_of("acme/sql")
    assert len(faults) == 2
    assert all(fault.startswith(f"acme/sql@{COMMIT} ({folder}): ") for fault in faults)
    edit_config(folder, bias="none", base_model_name_or_path="org/other")
    edit_weights(folder, set_number(1.0))
    (fault,) = faults_of("acme/sql", base_model="org/tiny-llama")
    assert fault.startswith(f"acme/sql@{COMMIT} ({folder}): trained on base model 'org/other'")


def test_a_folder_with_the_name_of_a_hub_adapter_is_called_by_more_of_its_path(
    tmp_path, write_adapters, fetched
):
    (folder,) = write_adapters(tmp_path / "cache", 1)
    (local,) = write_adapters(tmp_path / "in", 1, prefix="sql")
    local = local.rename(local.parent / "sql")
    fetched["acme/sql"] = hub.Source(folder, "acme/sql", COMMIT, "sql")
    collection = read_adapters(["acme/sql", local])
    assert collection.names == ["in/sql", "sql"]
    assert collection.sources == [None, f"acme/sql@{COMMIT}"]
    (fault,) = faults_of("acme/sql", f"sql={local}")
    assert f"'sql' is used by 2 adapters: {local}, acme/sql@{COMMIT}" in fault
    renamed = local.rename(local.parent / "other")
    assert read_adapters(["acme/sql", renamed]).names == ["other", "sql"]


def test_no_source_at_all_is_refused():
    (fault,) = faults_of()
    assert "no adapters were given" in fault


# --- fuzz ---


def read_and_use(folder):
    """Accepted adapters must also be usable; refused ones say so."""
    try:
        collection = read_adapters([folder])
        for module in collection.shapes:
            factors = collection.factors(module)
            assert bool(factors.a.isfinite().all() and factors.b.isfinite().all())
        collection.base_model.encode()
    except AdapterError as error:
        str(error).encode(errors="backslashreplace")


@pytest.fixture(scope="module")
def good(tmp_path_factory, write_adapters):
    (folder,) = write_adapters(
        tmp_path_factory.mktemp("fuzz"), 1, config={"alpha_pattern": {"q_proj": 3}}
    )
    return folder


@fuzz
@given(data=st.data())
def test_mutated_files_never_raise_anything_but_an_adapter_error(good, tmp_path, data):
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((good / file).read_bytes())
    content = bytearray((good / name).read_bytes())
    # Mostly the head of the weights: that is where the header is.
    limit = len(content) - 1 if name == CONFIG or data.draw(st.booleans()) else 900
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, limit))
        kind = data.draw(st.sampled_from(["flip", "insert", "delete", "cut"]))
        if kind == "flip" and at < len(content):
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            del content[at:]
    (tmp_path / name).write_bytes(content)
    read_and_use(tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "F16", "LORA", "q_proj", "(", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz
@given(data=st.data())
def test_any_json_in_a_field_never_raises_anything_but_an_adapter_error(good, tmp_path, data):
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).write_bytes((good / file).read_bytes())
    value = data.draw(json_values)
    if data.draw(st.booleans()):
        fields = sorted(json.loads((good / CONFIG).read_text()))
        edit_config(tmp_path, **{data.draw(st.sampled_from(fields)): value})
    else:
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        edit_header(tmp_path, first_entry(lambda entry: entry.update({field: value})))
    read_and_use(tmp_path)


def test_a_trainers_checkpoints_are_not_adapters_of_their_own(tmp_path, write_adapters):
    first, second = write_adapters(tmp_path / "in", 2)
    for adapter in (first, second):
        shutil.copytree(adapter, tmp_path / "checkpoint")
        (tmp_path / "checkpoint").rename(adapter / "checkpoint-100")
    assert read_adapters([tmp_path / "in"]).names == [first.name, second.name]
    assert read_adapters([first / "checkpoint-100"]).names == ["checkpoint-100"]
