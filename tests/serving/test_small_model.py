"""Engines of a small Llama on CPU: several workers, every kernel (Triton's in its interpreter), a
thousand adapters at once."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.conftest import NEW_TOKENS, PeftReference, write_wide_adapter
from tests.serving.engine import exported, run_engine
from tests.tiny_llama import write_tiny_llama
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.store import read_base_model

pytestmark = pytest.mark.slow

PROMPTS = [[5, 17, 200, 31], [300, 2, 2, 9, 41, 77, 8], [11]]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A Llama of four layers with random weights: 4 heads, 2 for keys and values."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    write_tiny_llama(folder, layers=4)
    return folder


@pytest.fixture(scope="module")
def tiny_sources(tmp_path_factory, tiny_model):
    """Adapter name → folder: adapters on q, k, v, o, gate, up and down of two of the layers, all
    but one on the embedding, too."""
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(4):
        write_wide_adapter(folder / f"wide-{i}", tiny_model, seed=i)
        louder(folder / f"wide-{i}")
        if i:
            on_embedding(folder / f"wide-{i}", seed=i)
    return {f"wide-{i}": folder / f"wide-{i}" for i in range(4)}


def louder(folder):
    """Scale an adapter up until a greedy decoder says something else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= 20
    config["alpha_pattern"] = {name: 20 * alpha for name, alpha in config["alpha_pattern"].items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def on_embedding(folder, seed):
    """Have an adapter adapt the embedding as well."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    generator = torch.Generator().manual_seed(100 + seed)
    tensors[f"{key}A"] = torch.randn(config["r"], 320, generator=generator)
    tensors[f"{key}B"] = torch.randn(128, config["r"], generator=generator) * 0.002
    save_file(tensors, folder / "adapter_model.safetensors")
    # PEFT asks of every module that is named whether its layer is to be transformed.
    config |= {"target_modules": sorted([*modules, "model.embed_tokens"])}
    del config["layers_to_transform"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory, tiny_model, tiny_sources):
    """A lossy store of three of them; the fourth is served uncompressed."""
    store = compress(
        read_adapters(list(tiny_sources.values())[:3]),
        tmp_path_factory.mktemp("stores") / "tiny",
        Settings(rank=3, clusters=2, store_dtype="float32"),
        base_model=read_base_model(tiny_model),
    )
    assert float(store.error.mean()) > 0.05
    return store


INTERPRETED = """
import triton.backends


class Driver:
    @staticmethod
    def is_active():
        return True


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)
"""
"""A sitecustomize.py: vLLM's second model runner asks for Triton on CPU, and does with its
interpreter, but the interpreter is no backend that it finds."""

TRITON = {"VLLM_JD_KERNEL": "triton", "TRITON_INTERPRET": "1"}
V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "TORCH_COMPILE_DISABLE": "1",  # helpers of vLLM's, which ask the backend for its compiler
}

# Without torch.compile vLLM's CPU runner makes no room for what the stages of a pipeline hand on.
ENGINES = {
    "one worker": ({}, True, {}),
    "torch reference": ({}, True, {"VLLM_JD_KERNEL": "reference"}),
    "tensor parallel": ({"tensor_parallel_size": 2}, True, {}),
    "tensor parallel, fully sharded, compiled": (
        {"tensor_parallel_size": 2, "fully_sharded_loras": True},
        False,
        {},
    ),
    "pipeline parallel": ({"pipeline_parallel_size": 2}, False, {}),
    "Triton": ({}, True, TRITON),
    "second runner, Triton, tensor parallel": ({"tensor_parallel_size": 2}, True, V2 | TRITON),
    "second runner, pipeline parallel": ({"pipeline_parallel_size": 2}, True, V2),
}


@pytest.mark.parametrize(("args", "eager", "environment"), ENGINES.values(), ids=ENGINES)
def test_every_engine_says_what_the_export_says(
    args, eager, environment, tiny_store, tiny_model, tiny_sources, tmp_path, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "VLLM_USE_V2_MODEL_RUNNER" in environment:
        (tmp_path / "sitecustomize.py").write_text(INTERPRETED)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    upload = "wide-3"
    names = [*tiny_store.names, upload, None]
    batch = [(name, prompt) for prompt in PROMPTS for name in names]
    tokens = 3 if environment.items() >= TRITON.items() else NEW_TOKENS  # interpreted: slow
    ((found,), _) = run_engine(
        tiny_store,
        tiny_model,
        [batch],
        max_tokens=tokens,
        one_process=not args,
        fresh="TRITON_INTERPRET" in environment,
        uploads={upload: str(tiny_sources[upload])},
        eager=eager,
        args=args | {"skip_tokenizer_init": True},
    )
    folders = exported(tiny_store, tiny_store.names, tmp_path / "export")
    folders |= {upload: tiny_sources[upload], None: None}
    reference = PeftReference(tiny_model)
    expected = [reference.greedy(folders[name], prompt, tokens) for name, prompt in batch]
    for first in range(0, len(batch), len(names)):
        said = {tuple(tokens) for tokens in expected[first : first + len(names)]}
        assert len(said) == len(names), "the adapters say the same: this shows nothing"
    assert [output["tokens"] for output in found] == expected


@pytest.fixture(scope="module")
def overflowing(tiny_sources, tmp_path_factory):
    """A folder that may be loaded: its numbers are finite. What a step makes of them is not."""
    folder = tmp_path_factory.mktemp("overflowing") / "huge"
    shutil.copytree(tiny_sources["wide-3"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: tensor * 1e30 if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_overflow_reach_no_other_request(
    dtype, tiny_store, tiny_model, tiny_sources, overflowing, tmp_path, monkeypatch
):
    """Neither who is in one step with them, nor who gets their KV blocks: there are few of these,
    and the others' prompts leave most of a block as it was. Where nobody empties these blocks, the
    others answer 0, 0, 0, 0 here, in both dtypes."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    long = [(7 * i) % 320 for i in range(70)]  # three blocks
    others = [*tiny_store.names, "good", None]
    together = [("huge", long), *((name, PROMPTS[0]) for name in others), ("huge", PROMPTS[1])]
    alone = [("huge", long), ("huge", long), ("huge", long)]
    after = [(name, prompt) for prompt in PROMPTS for name in others]
    batches = [together, after, alone, after, alone, together]

    def said(huge):
        results, _ = run_engine(
            tiny_store,
            tiny_model,
            batches,
            one_process=True,
            dtype=dtype,
            max_tokens=4,
            uploads={"good": str(tiny_sources["wide-3"]), "huge": str(huge)},
            # Of 13 blocks one is nobody's; those that were given up first are given out first.
            args={"skip_tokenizer_init": True, "num_gpu_blocks_override": 13},
        )
        return [[output["tokens"] for output in outputs] for outputs in results]

    found, expected = said(overflowing), said(tiny_sources["wide-3"])
    assert found[2] != expected[2], "nothing has overflowed: this shows nothing"
    for batch, got, wanted in zip(batches, found, expected, strict=True):
        for (name, prompt), tokens, right in zip(batch, got, wanted, strict=True):
            assert name == "huge" or tokens == right, (name, prompt)
    if dtype == "float32":
        reference = PeftReference(tiny_model)
        folders = exported(tiny_store, tiny_store.names, tmp_path / "export")
        folders |= {"good": tiny_sources["wide-3"], None: None}
        right = [reference.greedy(folders[name], prompt, 4) for name, prompt in after]
        assert found[1] == found[3] == right


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_paged_bases_say_what_resident_ones_say(kind, tiny_model, tmp_path, monkeypatch):
    """Token for token, in bfloat16: request by request, so that both compute the same batches."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folders = [tmp_path / f"adapter-{i}" for i in range(6)]
    for i, folder in enumerate(folders):
        write_wide_adapter(folder, tiny_model, seed=10 + i)
        louder(folder)
    settings = Settings(rank=3, clusters=3, store_dtype=kind)
    base = read_base_model(tiny_model)
    store = compress(read_adapters(folders), tmp_path / "store", settings, base_model=base)
    one = 3 * sum(module.d_in + module.d_out for module in store.manifest.modules)
    memory = int(2.4 * one * (1.0625 if kind == "int8" else 2))
    capacity = capacity_of(
        store,
        Tables(store),
        PluginConfig(store=str(store.path), adapter_memory=memory),
        max_num_seqs=1,
        max_lora_rank=16,
        in_codes=kind == "int8",
    )
    assert [each.count for each in capacity.bases["v"]] == [2], "of three clusters"
    # A long one first: on a processor with AMX vLLM's attention takes it for granted that some
    # large product has asked the system for it before.
    prompts = [[(7 * i) % 320 for i in range(70)], *PROMPTS[:2]]
    batch = [(name, prompt) for prompt in prompts for name in [*store.names, None]]

    def said(adapter_memory):
        ((found,), _) = run_engine(
            store,
            tiny_model,
            [batch],
            one_process=True,
            dtype="bfloat16",
            max_tokens=4,
            max_num_seqs=1,
            adapter_memory=adapter_memory,
            args={"skip_tokenizer_init": True},
        )
        return [output["tokens"] for output in found]

    expected = said(None)
    assert len({tuple(tokens) for tokens in expected}) > 2 * len(prompts), "they say the same"
    assert said(memory) == expected


def test_a_thousand_adapters_are_in_flight_at_once(tiny_model, tmp_path, monkeypatch):
    from benchmarks.synthetic import RandomCollection

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    targets = ("q_proj", "v_proj")
    collection = RandomCollection(tiny_model, 1024, rank=16, scale=0.5, targets=targets)
    settings = Settings(rank=8, iterations=1)
    base_model = read_base_model(tiny_model)
    store = compress(collection, tmp_path / "store", settings, base_model=base_model)
    everyone = [(name, PROMPTS[0]) for name in store.names]
    some = everyone[:: len(everyone) // 8]
    (at_once, few), most = run_engine(
        store,
        tiny_model,
        [everyone, some],
        max_num_seqs=1024,
        max_model_len=32,
        max_tokens=4,
        one_process=True,
        args={"skip_tokenizer_init": True},
    )
    assert most[0] == len(everyone), "not all of them were in one step"
    said = {name: output["tokens"] for (name, _), output in zip(everyone, at_once, strict=True)}
    assert len({tuple(tokens) for tokens in said.values()}) > 100, "adapters should differ"
    for (name, _), output in zip(some, few, strict=True):
        assert output["tokens"] == said[name], "the batch changed what an adapter says"
    reference = PeftReference(tiny_model)
    folders = exported(store, [name for name, _ in some], tmp_path / "export")
    for name, folder in folders.items():
        assert reference.greedy(folder, PROMPTS[0], 4, guess=said[name]) == said[name]
