"""What is different about VeRA adapters: projections that all share, and vectors of their own."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_jd.compressor.algebra.factors import ModuleFactors, VeraFactors
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.faults import TensorFault
from vllm_jd.compressor.read.peft_config import WEIGHTS_FILE, VeraConfig
from vllm_jd.compressor.read.weights import (
    NEVER_TRAINED,
    Adapter,
    Tensor,
    finite_values,
    read_tensor,
)

_VERA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.vera_lambda_(?P<side>[bd])")
_PROJECTIONS = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
# Which layers read the hidden state, in the models that vLLM names so; the others do not.
_READ_HIDDEN = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")} | {
    f"mlp.{name}_proj" for name in ("gate", "up", "gate_up")
}


def index_vera(
    adapter: Adapter, config: VeraConfig, header: dict[str, Tensor], data: bytearray
) -> list[str | TensorFault]:
    """Fill in the adapter's tensors and projections; return what is wrong with its weights.

    `header` is that of the file's bytes `data`; the projections are taken out of it.
    """
    missing = [key for key in _PROJECTIONS if key not in header]
    if missing:
        # PEFT draws them again from projection_prng_key, in the size of the widest layers, which
        # only the base model knows, and warns that another machine may draw other numbers.
        return [
            f"{WEIGHTS_FILE} holds no {' and no '.join(missing)}: it was saved with "
            "save_projection=False; load it with PEFT where it was trained, set "
            "save_projection=True in its config, and save it again"
        ]
    faults: list[str | TensorFault] = []
    largest: dict[str, float] = {}  # tensor → its largest magnitude

    def check(key: str, tensor: Tensor) -> torch.Tensor:
        values, bad = finite_values(key, tensor, data)
        faults.extend(bad)
        largest[key] = 0.0 if bad else float(values.abs().max())
        return values

    digest = hashlib.sha256()
    for key, side in _PROJECTIONS.items():
        tensor = header.pop(key)
        rank = tensor.shape["AB".index(side)] if len(tensor.shape) == 2 else None
        if rank != config.r or 0 in tensor.shape:
            expected = f"[{config.r}, d_in]" if side == "A" else f"[d_out, {config.r}]"
            what = f"found shape {list(tensor.shape)}, expected {expected}"
            faults.append(TensorFault(key, what))
            continue
        adapter.projections[side] = tensor
        digest.update(repr(tensor.shape).encode() + check(key, tensor).numpy().tobytes())
    if faults:
        return faults
    adapter.projections_sha256 = digest.hexdigest()
    widest = adapter.projections["B"].shape[0]
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in header.items():
        match = _VERA_KEY.fullmatch(key)
        if not match:
            what = "found a tensor that is no VeRA vector of a linear layer"
            faults.append(TensorFault(key, what, WEIGHTS_FILE))
            continue
        found.setdefault(match["module"], {})[match["side"]] = tensor
        length = tensor.shape[0] if len(tensor.shape) == 1 else 0
        if length == config.r if match["side"] == "d" else 0 < length <= widest:
            check(key, tensor)
            continue
        expected = f"[{config.r}]" if match["side"] == "d" else f"[d_out] of at most {widest}"
        what = f"found shape {list(tensor.shape)}, expected {expected}"
        faults.append(TensorFault(key, what))
    if not found and not faults:
        faults.append(f"{WEIGHTS_FILE} holds no VeRA vectors")
    for module, pair in found.items():
        for side in sorted({"b", "d"} - pair.keys()):
            faults.append(TensorFault(module, f"vera_lambda_{side} is missing"))
        keys = [f"base_model.model.{module}.vera_lambda_{side}" for side in "bd"]
        if not largest.keys() >= set(keys):
            continue
        # What becomes one side's factor must be a float32 number too.
        size = largest["base_model.vera_B"] * largest[keys[0]] * largest[keys[1]]
        if size > torch.finfo(torch.float32).max:
            what = "vera_lambda_b · vera_B · vera_lambda_d is too large"
            faults.append(TensorFault(module, what))
            continue
        adapter.tensors[module] = pair
    sizes = [largest.get(f"base_model.model.{module}.vera_lambda_b") for module in found]
    if not faults and not any(sizes):
        adapter.notes.append(NEVER_TRAINED)
    return faults


def vera_factors(adapters: list[Adapter], module: str, d_in: int, d_out: int) -> ModuleFactors:
    """All adapters' factors for one module, in their order, over the projections of all.

    Raises:
        AdapterError: a file changed since it was checked.
    """
    first = adapters[0]
    a, b = (read_tensor(first, first.projections[side]) for side in "AB")
    lambda_d = torch.zeros(len(adapters), a.shape[0])
    lambda_b = torch.zeros(len(adapters), d_out)
    present = torch.zeros(len(adapters), dtype=torch.bool)
    for i, adapter in enumerate(adapters):
        pair = adapter.tensors.get(module)
        if pair is not None:
            lambda_d[i], lambda_b[i] = (read_tensor(adapter, pair[side]) for side in "db")
            present[i] = True
    # As PEFT cuts them: every layer takes the first rows and columns that it needs.
    vera = VeraFactors(lambda_d, lambda_b, a[:, :d_in].contiguous(), b[:d_out].contiguous())
    return ModuleFactors.of_vera(vera, present)


def check_projections(adapters: list[Adapter]) -> list[str]:
    """Faults where VeRA adapters do not have the same A and B."""
    vera = [adapter for adapter in adapters if adapter.projections_sha256]
    if not vera:
        return []
    digests = Counter(adapter.projections_sha256 for adapter in vera)
    usual = digests.most_common(1)[0][0]
    like = next(adapter for adapter in vera if adapter.projections_sha256 == usual)

    def described(adapter: Adapter) -> str:
        a, b = (list(adapter.projections[side].shape) for side in "AB")
        assert isinstance(adapter.config, VeraConfig)
        return f"vera_A {a}, vera_B {b} of projection_prng_key {adapter.config.projection_prng_key}"

    return [
        f"{adapter.label}: found {described(adapter)}; most of the others have "
        f"{described(like)}"
        + (", of other numbers" if described(adapter) == described(like) else "")
        + "; compress adapters over other projections into a store of their own"
        for adapter in vera
        if adapter.projections_sha256 != usual
    ]


def input_widths(modules: Sequence[str], widest: int, config: Mapping[str, Any]) -> dict[str, int]:
    """d_in of VeRA's modules, of which the widest has as many columns as vera_A.

    Raises:
        AdapterError: they cannot be told.
    """
    kinds = {module: ".".join(module.split(".")[-2:]) for module in modules}
    if len(set(kinds.values())) == 1 or _READ_HIDDEN.issuperset(kinds.values()):
        return dict.fromkeys(modules, widest)
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    known = dict.fromkeys(_READ_HIDDEN, hidden)
    known["mlp.down_proj"] = config.get("intermediate_size")
    if hidden and heads:
        known["self_attn.o_proj"] = (config.get("head_dim") or hidden // heads) * heads
    widths = {module: known.get(kind) for module, kind in kinds.items()}
    unknown = sorted({kinds[module] for module, width in widths.items() if not width})
    if unknown and not config:
        raise AdapterError(
            [
                "VeRA adapters do not say how wide the inputs of their layers are, and these "
                f"adapt several kinds ({', '.join(sorted(set(kinds.values())))}); give "
                "--base-model the folder of the base model, whose config.json says it"
            ]
        )
    if unknown:
        raise AdapterError(
            [
                "VeRA adapters do not say how wide the inputs of their layers are, and the base "
                f"model's config.json does not say it of {', '.join(unknown)}; only adapters of "
                f"{', '.join(sorted(known))} can be read together, or of one kind of layer"
            ]
        )
    if max(widths.values()) != widest:
        raise AdapterError(
            [
                f"vera_A has {widest} columns, but the widest of the adapted layers takes "
                f"{max(widths.values())} by the base model's config.json; expected the config of "
                "the model that the adapters were trained on"
            ]
        )
    return widths
