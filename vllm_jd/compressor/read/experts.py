"""LoRA of experts (MoE): the forms that adapters have it in, read as one.

A module of experts is one projection of all experts of a layer, `….mlp.experts.up_proj`, with
factors A `[r, d_in]` and B `[d_out, r]` for each of them. Adapters have these

- in layers of their own: `….experts.5.up_proj.lora_A.weight`;
- stacked by PEFT, where `target_parameters` named the weights that a model has of all experts in
  one: `….experts.base_layer.lora_A.weight` and `….experts.lora_A.weight`, of `gate_up_proj` and
  of `down_proj`; A `[E · r, d_in]` expert after expert, B `[d_out, r · E]` with the experts side by
  side for each rank;
- in three dimensions, as vLLM takes them: `….experts.w1.lora_A.weight`, A `[E, r, d_in]` and B
  `[E, d_out, r]`, where E may be 1 of one side: all experts share it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vllm_jd.compressor.read.faults import TensorFault
from vllm_jd.compressor.read.names import layer_key
from vllm_jd.compressor.read.peft_config import LoraConfig
from vllm_jd.compressor.read.weights import Adapter, Experts, Tensor, read_alike

_OWN_LAYER = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<projection>[^.]+)")
_THREE_DIMENSIONS = re.compile(r".+\.experts\.[^.\d][^.]*")
_WRAPPED = re.compile(r"(?P<experts>.+\.experts)(?P<inside>(\.base_layer)*)")
_INSIDE = ".base_layer"

# In the order in which models have them: PEFT wraps one around the other.
_PARAMETERS = ("gate_up_proj", "down_proj")

_IN_DOUBT = (
    "was saved by PEFT 0.18, which has A and B of stacked experts the other way round where the "
    "weights are [experts, d_out, d_in] (not of gpt-oss); that shows where gate_up_proj and "
    "down_proj are both there, which they are not: it is taken as newer ones are"
)

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts."""


def parameter_names(modules: Iterable[str], config: LoraConfig) -> dict[str, str | None]:
    """Which weights of experts the wrappers of PEFT adapt, `….experts.base_layer` and
    `….experts`: the names that these modules are to have, None where it cannot be told."""
    found: dict[str, list[str]] = {}  # experts of a layer → their wrappers
    for module in modules:
        if match := _WRAPPED.fullmatch(module):
            found.setdefault(match["experts"], []).append(module)
    names: dict[str, str | None] = {}
    for experts, wrappers in found.items():
        wanted = [p for p in _PARAMETERS if _targeted(f"{experts}.{p}", config)]
        if not config.target_parameters and len(set(wrappers)) == len(_PARAMETERS):
            wanted = list(_PARAMETERS)  # as vLLM takes it
        inmost_first = sorted(set(wrappers), key=len, reverse=True)
        known = len(wanted) == len(inmost_first)
        for i, wrapper in enumerate(inmost_first):
            names[wrapper] = f"{experts}.{wanted[i]}" if known else None
    return names


def _targeted(parameter: str, config: LoraConfig) -> bool:
    targets = config.target_parameters or ()
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def may_have_three_dimensions(module: str) -> bool:
    """Whether a module's factors may have one more dimension, the experts."""
    return bool(_THREE_DIMENSIONS.fullmatch(module))


def gather_experts(
    adapter: Adapter, config: LoraConfig, stacked: Iterable[str]
) -> list[str | TensorFault]:
    """Make modules of experts of an adapter's tensors; return what is wrong with them.

    Args:
        adapter: its tensors, checked but for the shapes of those of experts in one.
        config: its config.
        stacked: modules that PEFT stacked.
    """
    faults: list[str | TensorFault] = []
    own_layers: dict[str, dict[int, str]] = {}
    stacked = set(stacked)
    for module, pair in list(adapter.tensors.items()):
        if len(pair) < 2:
            continue
        three = len(pair["A"].shape) == 3 or len(pair["B"].shape) == 3
        if module in stacked or three:
            made = _of_stack(pair["A"], pair["B"], module, config)
            del adapter.tensors[module]
            if isinstance(made, str):
                faults.append(TensorFault(module, made))
            else:
                adapter.experts[module] = made
        elif match := _OWN_LAYER.fullmatch(module):
            whole = f"{match['experts']}.{match['projection']}"
            own_layers.setdefault(whole, {})[int(match["expert"])] = module
    for whole, members in own_layers.items():
        if whole in adapter.experts:
            what = "the experts' factors are there twice: in one, and for each; expected one form"
            faults.append(TensorFault(whole, what))
            continue
        pairs = {expert: adapter.tensors.pop(module) for expert, module in members.items()}
        shapes = {(pair["B"].shape[0], pair["A"].shape[1]) for pair in pairs.values()}
        if len(shapes) > 1:
            what = f"the experts' layers are of different shapes: {sorted(shapes)} (d_out, d_in)"
            faults.append(TensorFault(whole, what))
            continue
        everyone = range(max(pairs) + 1)
        adapter.experts[whole] = Experts(
            a=tuple(pairs[e]["A"] if e in pairs else None for e in everyone),
            b=tuple(pairs[e]["B"] if e in pairs else None for e in everyone),
            shape=next(iter(shapes)),
            ranks=tuple(pairs[e]["A"].shape[0] if e in pairs else 0 for e in everyone),
            scales=tuple(config.scale_of(members[e]) if e in members else 1.0 for e in everyone),
        )
    if not faults:
        faults += _turn(adapter, config.old_stacks)
    return faults


def _of_stack(a: Tensor, b: Tensor, module: str, config: LoraConfig) -> Experts | str:
    """The experts of one tensor a side, or what is wrong with these."""
    rank = config.rank_of(module)
    if len(a.shape) == len(b.shape) == 2:
        count, left = divmod(a.shape[0], rank)
        if left or a.shape[0] != b.shape[1]:
            return (
                f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [experts · r, "
                f"d_in] and [d_out, r · experts] with r = {rank}"
            )
        d_out, d_in = b.shape[0], a.shape[1]
    elif len(a.shape) == len(b.shape) == 3:
        count = max(a.shape[0], b.shape[0])
        if {a.shape[0], b.shape[0]} - {1, count} or a.shape[1] != rank or b.shape[2] != rank:
            return (
                f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [experts, r, "
                f"d_in] and [experts, d_out, r] with r = {rank}, or 1 for the experts of a side "
                "that all share"
            )
        d_out, d_in = b.shape[1], a.shape[2]
    else:
        return (
            f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected both with the "
            "experts as a dimension, or both without"
        )
    scales = (config.scale_of(module),) * count
    return Experts((a,), (b,), (d_out, d_in), (rank,) * count, scales, in_one=True)


def _turn(adapter: Adapter, old: bool) -> list[TensorFault]:
    """Find the stacks of PEFT before 0.19, which took models' weights `[E, d_out, d_in]` the other
    way round, so that its lora_A has d_out columns and its lora_B d_in rows.

    Only both projections of a layer together show it: the second reads what the first one wrote.
    """
    faults = []
    for module in list(adapter.experts):
        layer, _, projection = module.rpartition(".")
        down = adapter.experts.get(f"{layer}.down_proj")
        up = adapter.experts[module]
        if up.in_one and old and not (down and f"{layer}.gate_up_proj" in adapter.experts):
            adapter.notes.append(_IN_DOUBT)
        if projection != "gate_up_proj" or down is None:
            continue
        if up.shape == (2 * down.shape[1], down.shape[0]):
            continue
        turned = [replace(own, shape=own.shape[::-1], turned=True) for own in (up, down)]
        stacked = all(own.in_one and len(own.a[0].shape) == 2 for own in (up, down))
        if stacked and turned[0].shape == (2 * turned[1].shape[1], turned[1].shape[0]):
            adapter.experts[module], adapter.experts[f"{layer}.down_proj"] = turned
            continue
        what = (
            f"adapts layers of {list(up.shape)}, and down_proj beside it such of "
            f"{list(down.shape)} (d_out, d_in); expected [2 · m, h] and [h, m]"
        )
        faults.append(TensorFault(module, what))
    return faults


def split_fused(adapters: Sequence[Adapter], known: Iterable[str]) -> None:
    """Make `gate_proj` and `up_proj` of `gate_up_proj`, in layers of which others have these two.

    Args:
        adapters: all of a collection.
        known: names that a store has for its modules.
    """
    modules = [module for adapter in adapters for module in adapter.experts]
    keys = {layer_key(module) for module in (*modules, *known)}
    for adapter in adapters:
        for module, own in list(adapter.experts.items()):
            layer, _, projection = module.rpartition(".")
            halves = [f"{layer}.{half}" for half in ("gate_proj", "up_proj")]
            apart = any(layer_key(half) in keys for half in halves)
            if projection != "gate_up_proj" or not apart or own.shape[0] % 2:
                continue
            del adapter.experts[module]
            d_out, d_in = own.shape
            for i, half in enumerate(halves):
                adapter.experts[half] = replace(own, shape=(d_out // 2, d_in), half=i)


def expert_counts(
    adapters: Sequence[Adapter], config: Mapping[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """How many experts each module has, and what is wrong.

    Args:
        adapters: all of a collection.
        config: the base model's, or what is known of it; where it does not say it, the adapters
            that have most experts do.
    """
    text = config.get("text_config")
    named = [
        part.get(key) for part in (config, text) if isinstance(part, Mapping) for key in _COUNTS
    ]
    expected = next((count for count in named if type(count) is int and count > 0), None)
    counts: dict[str, int] = {}
    for adapter in adapters:
        for module, own in adapter.experts.items():
            counts[module] = max(counts.get(module, 0), len(own.ranks))
    if expected is not None and all(count <= expected for count in counts.values()):
        counts = dict.fromkeys(counts, expected)
    faults = []
    for adapter in adapters:
        for module, own in adapter.experts.items():
            found = len(own.ranks)
            # Layers of their own may lack some; of a stack, all are there.
            right = found == counts[module] or not own.in_one
            if not right or (expected is not None and found > expected):
                faults.append(
                    f"{adapter.label}: {module}: found {found} experts, expected "
                    f"{expected or counts[module]}, "
                    + ("as the base model's config says" if expected else "as the others have")
                )
                break
    return counts, faults


def read_experts(adapter: Adapter, module: str) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(A `[r, d_in]`, B `[d_out, r]`) float32 of each expert, PEFT's scale in B; None: it has none.

    Raises:
        AdapterError: the file changed since it was checked.
        KeyError: the adapter has no such module of experts.
    """
    own = adapter.experts[module]
    wanted = [tensor for tensor in (*own.a, *own.b) if tensor is not None]
    found = iter([numbers[0] for numbers in read_alike([(adapter, wanted)])])
    count = len(own.ranks)
    sides: list[list[torch.Tensor | None]] = []
    for side, tensors in (("A", own.a), ("B", own.b)):
        numbers = [None if tensor is None else next(found) for tensor in tensors]
        if own.in_one:
            numbers = list(_apart(numbers[0], side, count))
        sides.append(numbers)
    factors: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for a, b, scale in zip(*sides, own.scales, strict=True):
        if a is None or b is None:
            factors.append(None)
            continue
        if own.turned:
            a, b = b.T, a.T
        if own.half is not None:
            b = b.chunk(2)[own.half]
        factors.append((a, b * scale))
    return factors


def _apart(numbers: torch.Tensor, side: str, count: int) -> Iterable[torch.Tensor]:
    """Each expert's part of one tensor for all of them."""
    if numbers.ndim == 3:
        return numbers.expand(count, -1, -1)
    if side == "A":
        return numbers.unflatten(0, (count, -1))
    return numbers.unflatten(1, (-1, count)).permute(2, 0, 1)
