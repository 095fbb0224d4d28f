"""Modules of the vision and audio towers of a base model: served models have no adapters there."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.base_layers import misfits
from vllm_jd.compressor.read.weights import Adapter

Towers = Literal["keep", "leave-out", "refuse"]
"""What to do with them (`--towers`)."""


def settle_towers(
    adapters: list[Adapter],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    known: Collection[str],
    how: Towers,
) -> None:
    """Take modules of towers out of adapters, with a note, or refuse the adapters that have some.

    Args:
        adapters: checked.
        shapes: module → (d_in, d_out), of all their modules.
        config: the base model's `config.json`, or as much of it as is known.
        known: modules that stay whatever they are.
        how: what to do.

    Raises:
        AdapterError: they are to be refused, or an adapter would have nothing left.
    """
    asked = {module: shape for module, shape in shapes.items() if module not in known}
    if how == "keep" or not asked:
        return
    found = misfits(((module, *shape) for module, shape in asked.items()), config)
    towers = {misfit.module for misfit in found if misfit.of_a_tower}
    faults = []
    for adapter in adapters:
        here = sorted(towers & adapter.tensors.keys())
        if not here:
            continue
        those = f"{len(here):,} modules of a tower ({here[0]}{', …' if len(here) > 1 else ''})"
        if how == "refuse":
            faults.append(
                f"{adapter.label}: found {those}, expected modules of the language model only, "
                "which alone is served with adapters; leave these out (--towers leave-out), or "
                "keep them for other servers (--towers keep)"
            )
        elif len(here) == len(adapter.modules):
            faults.append(
                f"{adapter.label}: found {those} and no others: nothing is left of it without them"
            )
        else:
            adapter.notes.append(f"adapts {those}, which are left out (--towers)")
            adapter.tensors = {m: pair for m, pair in adapter.tensors.items() if m not in towers}
    if faults:
        raise AdapterError(faults)
