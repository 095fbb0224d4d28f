"""One adapter's folder, read and checked: for compressing it, and for serving it as it is.

What is taken beside what PEFT writes, and what is refused, is in docs/adapters.md.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.experts import (
    gather_experts,
    may_have_three_dimensions,
    parameter_names,
)
from vllm_jd.compressor.read.faults import TensorFault, folded
from vllm_jd.compressor.read.keys import Factor, factor_of, is_base_embedding, vera_key
from vllm_jd.compressor.read.mlx import (
    MLX_WEIGHTS_FILE,
    OLD_WEIGHTS_FILE,
    is_mlx,
    mlx_factor_of,
    parse_mlx_config,
)
from vllm_jd.compressor.read.peft_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraConfig,
    VeraConfig,
    parse_config,
)
from vllm_jd.compressor.read.vera import index_vera
from vllm_jd.compressor.read.weights import (
    NEVER_TRAINED,
    Adapter,
    Tensor,
    finite_values,
    largest_magnitude,
    parse_header,
)

WEIGHTS_FILES = (WEIGHTS_FILE, MLX_WEIGHTS_FILE)
"""The files that are read, the first one first."""

PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

LEFT_BY_TRAINERS = re.compile(r"checkpoint-\d+|pissa_init|pissa_backup")
"""Folders inside of an adapter's that are the same adapter at another time: checkpoints, and
LLaMA-Factory's PiSSA adapters, which are for a base model of other weights."""

CONVERTED = "pissa_converted"
"""LLaMA-Factory's, too: the adapter of the folder above as a plain LoRA adapter."""

_SMALL = 1e38  # well within float32

_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings")

_GRADIENT_INIT = (
    "was trained with LoRA-GA, which changed the base model's weights meanwhile; it is put on the "
    "unchanged ones, as PEFT and vLLM do. Exact is what PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…) saves"
)
_CONVERTED_EXPERTS = (
    "adapts experts, and its training began by changing the base model's weights: --convert does "
    "not do experts; save it again where it was trained, with PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…)"
)
_MLX_EMBEDDING = (
    "adapts a table of embeddings, and with it the output layer where the two share their weights: "
    "that is not taken of mlx-lm's adapters; train without it"
)
_TWO_KINDS = (
    "found a factor of a linear layer beside one of an embedding (lora_embedding_A or _B); "
    "expected both of one kind"
)
_BASE_EMBEDDINGS = (
    "brings along base_layer weights of embed_tokens or lm_head, the base model's own: they are "
    "left out, as by vLLM"
)


def read_folder(
    folder: Path, name: str, source: str | None = None, *, convert: bool = False
) -> tuple[Adapter | None, list[str]]:
    """Read an adapter's config and check its weights: header, shapes, every number.

    Args:
        folder: of PEFT or mlx-lm.
        name: the adapter's.
        source: see `Adapter`.
        convert: whether what `peft_config.CONVERTIBLE` did to the base model will be undone.

    Returns:
        The adapter, None if its config cannot be read; and what is wrong with it, a line for each
        fault. With one, it is not to be used.
    """
    file = folder / CONFIG_FILE
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
        config = parse_mlx_config(content) if is_mlx(content) else parse_config(content)
    except AdapterError as error:
        return None, error.faults
    except FileNotFoundError:
        return None, [f"{CONFIG_FILE} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{CONFIG_FILE} cannot be read as JSON: {error}"]
    faults: list[str | TensorFault] = [*config.faults(convert=convert)]
    adapter = Adapter(name, folder, config, source)
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in adapter.name):
        faults.append(f"the name {adapter.name!r} has control or undecodable characters")
    adapter.file = MLX_WEIGHTS_FILE if is_mlx(content) else WEIGHTS_FILE
    if not (folder / adapter.file).is_file():
        return adapter, folded([*faults, _without_weights(folder, adapter.file)])
    try:
        faults += _index_weights(adapter, hashlib.sha256(raw), content)
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{adapter.file} cannot be read: {error}")
    return adapter, folded(faults)


def _without_weights(folder: Path, expected: str) -> str:
    pickled = [name for name in PICKLED if (folder / name).exists()]
    if pickled:
        return (
            f"found only {pickled[0]}, a pickle, which is never loaded; expected {expected}: save "
            "it again with PEFT's save_pretrained(…, safe_serialization=True)"
        )
    if (folder / OLD_WEIGHTS_FILE).exists():
        return (
            f"found only {OLD_WEIGHTS_FILE}, of an early mlx-lm; expected {expected}: save it "
            "again with safetensors (mlx.core.save_safetensors(…, dict(mlx.core.load(…))))"
        )
    return f"{expected} is missing"


def _index_weights(
    adapter: Adapter, digest: "hashlib._Hash", content: Any
) -> list[str | TensorFault]:
    """Fill in the adapter's tensors, hash and size; return what is wrong with its weights."""
    with (adapter.folder / adapter.file).open("rb") as file:
        found = os.fstat(file.fileno())
        adapter.modified_ns = found.st_mtime_ns
        data = bytearray(found.st_size)
        del data[file.readinto(data) :]
    digest.update(data)
    adapter.sha256, adapter.bytes = digest.hexdigest(), len(data)
    header = parse_header(data)
    if isinstance(adapter.config, VeraConfig):
        named: dict[str, Tensor] = {}
        for key, tensor in header.items():
            if named.setdefault(vera_key(key), tensor) is not tensor:
                return [f"{adapter.file} has two tensors that mean {vera_key(key)}, expected one"]
        return index_vera(adapter, adapter.config, named, data)
    assert isinstance(adapter.config, LoraConfig)
    if not is_mlx(content):
        factors = {key: factor_of(key) for key in header}
    else:
        factors = {key: mlx_factor_of(key) for key in header}
        header = {
            key: tensor.turned if len(tensor.shape) == 2 else tensor
            for key, tensor in header.items()
        }
    return _index_lora(adapter, adapter.config, header, factors, data)


def _index_lora(
    adapter: Adapter,
    config: LoraConfig,
    header: dict[str, Tensor],
    factors: dict[str, Factor | None],
    data: bytearray,
) -> list[str | TensorFault]:
    adapters = sorted({factor.adapter for factor in factors.values() if factor and factor.adapter})
    if len(adapters) > 1:
        return [
            f"{adapter.file} holds the tensors of {len(adapters)} adapters ({', '.join(adapters)})"
            ", expected those of one: save each with PEFT's save_pretrained(…, "
            "selected_adapters=[…])"
        ]
    faults: list[str | TensorFault] = []
    stacked = parameter_names((factor.module for factor in factors.values() if factor), config)
    largest = largest_magnitude(header, data)
    keys: dict[tuple[str, str], str] = {}  # module and side → its first key
    unsaved: list[str] = []
    idle = True  # no layer was found yet of which both factors have a number that is not zero
    at_work: dict[str, int] = {}  # module → how many of its factors have one
    for key, tensor in header.items():
        factor = factors[key]
        if factor is not None and factor.module in stacked:
            if (parameter := stacked[factor.module]) is None:
                what = (
                    "adapts weights of experts, but which ones cannot be told: expected "
                    f"target_parameters with gate_up_proj, down_proj or both in {CONFIG_FILE}"
                )
                faults.append(TensorFault(key, what, adapter.file))
                continue
            factor = factor._replace(module=parameter)
        if factor is None:
            if is_base_embedding(key):
                adapter.notes.append(_BASE_EMBEDDINGS)
            elif not config.explains(key):
                what = "found a tensor that is no LoRA factor of a linear layer or an embedding"
                faults.append(TensorFault(key, what, adapter.file))
            continue
        module, side = factor.module, factor.side
        first = keys.setdefault((module, side), key)
        if first != key:
            what = f"means the same factor as {first}; expected one of the two"
            faults.append(TensorFault(key, what))
            continue
        if tensor.transposed and module.rsplit(".", 1)[-1] in _EMBEDDINGS:
            faults.append(TensorFault(key, _MLX_EMBEDDING))
            continue
        if module in adapter.tensors and factor.embedding != (module in adapter.embeddings):
            faults.append(TensorFault(key, _TWO_KINDS))
            continue
        if factor.embedding:
            adapter.embeddings.add(module)
        if tensor.shape == (0,):
            unsaved.append(key)
            continue
        dimensions = (2, 3) if may_have_three_dimensions(module) else (2,)
        if len(tensor.shape) not in dimensions or 0 in tensor.shape:
            what = f"found shape {list(tensor.shape)}, expected a matrix"
            faults.append(TensorFault(key, what))
            continue
        scale = config.scale_of(module) if side == "B" else 1.0
        # Where all numbers of the file are small enough, none needs a look of its own.
        looked_at = idle or not largest * max(abs(scale), 1.0) < _SMALL
        values, bad = finite_values(key, tensor, data) if looked_at else (None, [])
        faults += bad
        if looked_at and not bad and not bool((values * scale).isfinite().all()):
            what = f"too large once scaled by α/r = {scale:g} (of {CONFIG_FILE})"
            faults.append(TensorFault(key, what))
        if idle and bool(values.any()):
            at_work[module] = at_work.get(module, 0) + 1
            idle = at_work[module] < 2
        adapter.tensors.setdefault(module, {})[side] = tensor
    if unsaved:
        faults.append(_empty(unsaved, len(keys)))
    if not adapter.tensors and not faults:
        faults.append(f"{adapter.file} holds no LoRA factors")
    in_one = {name for name in stacked.values() if name}
    faults += _unfit_pairs(adapter, config, keys, in_one)
    faults += gather_experts(adapter, config, in_one)
    if adapter.experts and adapter.init:
        faults.append(_CONVERTED_EXPERTS)
    if idle and not faults:
        adapter.notes.append(NEVER_TRAINED)
    if config.init_lora_weights == "lora_ga":
        adapter.notes.append(_GRADIENT_INIT)
    adapter.notes = list(dict.fromkeys(adapter.notes))
    return faults


def _unfit_pairs(
    adapter: Adapter, config: LoraConfig, keys: dict[tuple[str, str], str], in_one: set[str]
) -> list[TensorFault]:
    """Drop the modules whose A and B do not fit together; return why. Those of experts in one
    tensor, `in_one` or of three dimensions, are looked at later."""
    faults = []
    for module, pair in list(adapter.tensors.items()):
        missing = [side for side in "AB" if (module, side) not in keys]
        if missing:
            faults.append(TensorFault(module, f"lora_{missing[0]} is missing"))
        elif len(pair) < 2:
            pass  # the other one's shape was refused before
        elif module in in_one or 3 in (len(pair["A"].shape), len(pair["B"].shape)):
            continue
        elif pair["A"].shape[0] != pair["B"].shape[1]:
            what = (
                f"lora_A is {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)}; expected "
                "[r, d_in] and [d_out, r] of one rank"
            )
            faults.append(TensorFault(module, what))
        elif pair["A"].shape[0] != config.rank_of(module):
            rank = config.rank_of(module)
            what = f"found rank {pair['A'].shape[0]}, {CONFIG_FILE} says {rank}"
            faults.append(TensorFault(module, what))
        else:
            continue
        del adapter.tensors[module]
    return faults


def _empty(keys: list[str], count: int) -> str:
    which = "all" if len(keys) == count else "some"
    return (
        f"{which} of its LoRA tensors are empty (such as {keys[0]}, of shape [0]): DeepSpeed "
        "ZeRO-3 or FSDP saved them without gathering their shards. Save it again inside of "
        "deepspeed.zero.GatheredParameters (FSDP: summon_full_params), or with "
        "stage3_gather_16bit_weights_on_model_save true in the DeepSpeed config"
    )
