"""Synthetic PEFT adapters, an independent float64 reading of them, and how `make test` deals the
tests out to processes.

The fixtures give out plain functions, so that property tests may use them.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from benchmarks.gpu_steps.interpreter import hasten

torch.set_num_threads(1)
hasten()  # where a test's own process interprets Triton's kernels

settings.register_profile("suite", deadline=None)  # a busy machine is no fault
settings.load_profile("suite")

ENGINES = "tests/serving/"
SMALL_ENGINES = "tests/serving/test_small_model.py"
INTERPRETER = "tests/kernels/triton/test_interpreter.py"
COMPILED = "tests/kernels/triton/test_compiled.py"


def pytest_collection_modifyitems(config, items):
    """In several processes (`make test`): first what takes longest, last what fills gaps."""
    if not hasattr(config, "workerinput"):
        return

    def place(item):
        order = (SMALL_ENGINES, 3), (ENGINES, 0), (INTERPRETER, 1), (COMPILED, 4)
        return next((place for path, place in order if item.nodeid.startswith(path)), 2)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deal out whole files, whose tests share fixtures; all that serve the demo's model to one
    process, since each such server takes gigabytes; and tests that share nothing one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if nodeid.startswith((INTERPRETER, COMPILED)):
                return nodeid
            file = nodeid.split("::")[0]
            return ENGINES if file.startswith(ENGINES) and file != SMALL_ENGINES else file

    config.option.loadscopereorder = False  # as they were sorted, not by the number of tests
    return Scheduling(config, log)


# module → (d_in, d_out): a square layer, a narrow one (grouped-query k), a wide input, layer 10
TINY_SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.self_attn.k_proj": (24, 8),
    "model.layers.2.mlp.down_proj": (40, 24),
    "model.layers.10.self_attn.q_proj": (24, 24),
}


def _write_adapter(folder, factors, *, alpha=8, base="org/tiny-llama", r=None, **config):
    """Write `factors` (module → (B, A)) as PEFT would; `config` overrides fields of the config."""
    ranks = {module: a.shape[0] for module, (_, a) in factors.items()}
    r = r or max(ranks.values(), default=1)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {},
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in factors}),
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    } | config
    tensors = {}
    for module, (b, a) in factors.items():
        key = "lora_embedding_{}" if module.endswith("embed_tokens") else "lora_{}.weight"
        tensors[f"base_model.model.{module}.{key.format('A')}"] = a.contiguous()
        tensors[f"base_model.model.{module}.{key.format('B')}"] = b.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def _make_factors(n, *, kind="random", ranks=(4,), shapes=TINY_SHAPES, seed=0, shared=6):
    """Factors of `n` adapters: a list of module → (B, A), float32.

    `random` adapters share nothing. `real` ones are sums of a few components out of a common set,
    with a decaying spectrum and some noise of their own: they compress, but not perfectly.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    common = {
        module: (randn(d_out, shared), randn(shared, d_in))
        for module, (d_in, d_out) in shapes.items()
    }
    adapters = []
    for i in range(n):
        rank = ranks[i % len(ranks)]
        factors = {}
        for module, (d_in, d_out) in shapes.items():
            b, a = randn(d_out, rank), randn(rank, d_in)
            if kind == "real":
                left, right = common[module]
                decay = 0.5 ** torch.arange(rank)
                b = (left @ randn(shared, rank) + 0.5 * b) * decay
                a = randn(rank, shared) @ right + 0.5 * a
            factors[module] = (b, a)
        adapters.append(factors)
    return adapters


def _write_adapters(folder, n, *, dtype=torch.float32, config=None, prefix="adapter-", **kind):
    """Write `n` adapters of `_make_factors` below `folder`; return their folders."""
    return [
        _write_adapter(
            folder / f"{prefix}{i:03d}",
            {module: (b.to(dtype), a.to(dtype)) for module, (b, a) in factors.items()},
            **(config or {}),
        )
        for i, factors in enumerate(_make_factors(n, **kind))
    ]


def _peft_deltas(folder):
    """What a PEFT adapter adds to each module: module → float64 `[d_out, d_in]`."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(Path(folder) / "adapter_model.safetensors")

    def looked_up(field, module, default):
        for key, value in (config.get(field) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        return default

    deltas = {}
    for key in tensors:
        match = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_embedding_A)", key)
        if match is None:
            continue
        name = match[1]
        module = name.removeprefix("base_model.model.")
        rank = looked_up("rank_pattern", module, config["r"])
        alpha = looked_up("alpha_pattern", module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = tensors[f"{name}.{match[2].replace('A', 'B')}"].double()
        deltas[module] = scale * b @ tensors[key].double()
    return deltas


def _tree(folder):
    """Every file below `folder`: relative name → bytes."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def tiny_shapes():
    return TINY_SHAPES


@pytest.fixture(scope="session")
def write_adapter():
    return _write_adapter


@pytest.fixture(scope="session")
def write_adapters():
    return _write_adapters


@pytest.fixture(scope="session")
def make_factors():
    return _make_factors


@pytest.fixture(scope="session")
def peft_deltas():
    return _peft_deltas


@pytest.fixture(scope="session")
def tree():
    return _tree
