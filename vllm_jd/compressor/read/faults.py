"""Faults of an adapter's tensors, told to people: a line for each fault, not for each tensor."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"(?P<above>.*?)\.(?P<layer>\d+)\.(?P<below>.+)")
_MOST_KINDS = 3


class TensorFault(NamedTuple):
    """What is wrong with one tensor, or one module's pair of them."""

    where: str
    """The tensor's key, or the module's name."""
    what: str
    file: str = ""
    """The file's name, where `where` alone would not say what it is."""


def folded(faults: Iterable[str | TensorFault]) -> list[str]:
    """One line for each fault; tensors whose faults differ in numbers only share one.

    `…layers.0.self_attn.q_proj: found rank 4, …` and 29 more like it become `q_proj of 30 layers:
    found rank 4, …`. The lines are in the order in which their first faults are.
    """
    lines: dict[object, str | list[TensorFault]] = {}
    for i, fault in enumerate(faults):
        if isinstance(fault, str):
            lines[i] = fault
            continue
        same = lines.setdefault((fault.file, re.sub(r"\d[\d,.]*", "0", fault.what)), [])
        assert isinstance(same, list)
        same.append(fault)
    return [line if isinstance(line, str) else _line(line) for line in lines.values()]


def _line(faults: list[TensorFault]) -> str:
    first = faults[0]
    file = f"{first.file}: " if first.file else ""
    if len(faults) == 1:
        return f"{file}{_shown(first.where)}: {first.what}"
    alike = any(fault.what != first.what for fault in faults)
    what = f"{first.what} (the first; the others alike)" if alike else first.what
    return f"{file}{_places([fault.where for fault in faults])}: {what}"


def _places(names: list[str]) -> str:
    """Several tensors or modules in a few words: `q_proj, k_proj of 30 layers`."""
    found = [_LAYER.fullmatch(name) for name in names]
    layers = [None if match is None else (match["above"], int(match["layer"])) for match in found]
    kinds = [
        name if match is None else match["below"] for name, match in zip(names, found, strict=True)
    ]
    # Without "self_attn." or "mlp.", where the rest says enough.
    short = {kind: kind.split(".", 1)[-1] for kind in kinds}
    if len(set(short.values())) == len(short):
        kinds = [short[kind] for kind in kinds]
    distinct = list(dict.fromkeys(kinds))
    text = ", ".join(map(_shown, distinct[:_MOST_KINDS]))
    if len(distinct) > _MOST_KINDS:
        text += f" and {len(distinct) - _MOST_KINDS:,} more"
    in_layers = {layer for layer in layers if layer is not None}
    if len(in_layers) == 1 and None not in layers:
        text += f" of layer {next(iter(in_layers))[1]}"
    elif in_layers:
        text += f" of {len(in_layers):,} layers"
    whole = len(distinct) * max(1, len(in_layers)) == len(names)
    return text if whole else f"{text} ({len(names):,} in all)"


def _shown(name: str) -> str:
    """A name of a file, which may hold anything, for a terminal."""
    return name if name.isprintable() else repr(name)
