"""What only shows when adapters are compared with each other: names, base models, shapes."""

import shlex
from collections import Counter
from collections.abc import Iterable

from vllm_jd.compressor.read.faults import TensorFault, folded
from vllm_jd.compressor.read.names import one_name_a_layer
from vllm_jd.compressor.read.vera import check_projections
from vllm_jd.compressor.read.weights import Adapter
from vllm_jd.store import short_name


def name_alike(adapters: list[Adapter], known: Iterable[str]) -> list[str]:
    """Give each layer one name in all adapters; return what stands against it."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            shapes.setdefault(module, set()).add(adapter.shape(module))
    modules = [(adapter.label, adapter.modules) for adapter in adapters]
    names, faults = one_name_a_layer(modules, shapes, known)
    if names and not faults:
        for adapter in adapters:
            adapter.rename(names)
    return faults


def check_names(adapters: list[Adapter]) -> list[str]:
    """Faults of adapters that have one name."""
    by_name: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_name.setdefault(adapter.name, []).append(adapter)
    faults = []
    for name, same in by_name.items():
        if len(same) > 1:
            where = ", ".join(sorted(adapter.source or str(adapter.folder) for adapter in same))
            faults.append(
                f"the name {name!r} is used by {len(same)} adapters: {where}; give one another "
                "name (NAME=PATH), or leave out all but one"
            )
    return faults


def check_bases(
    adapters: list[Adapter], base_model: str | None, also: Iterable[str] = ()
) -> list[str]:
    """Faults of adapters that name another base model than expected.

    Args:
        adapters: all.
        base_model: the expected name; None: that of most of them.
        also: other names of it.
    """
    named = [(adapter, adapter.config.base_model_name_or_path) for adapter in adapters]
    bases = Counter(short_name(name) for _, name in named if name)
    if not bases:
        return []
    expected = short_name(base_model) if base_model else bases.most_common(1)[0][0]
    known = {expected.lower(), *(short_name(name).lower() for name in also)}
    whose = "of --base-model" if base_model else "as most of the others"
    whole = base_model or next(name for _, name in named if name and short_name(name) == expected)
    say_so = f"--base-model {shlex.quote(whole)} --same-base"
    return [
        f"{adapter.label}: trained on base model {name!r}, expected {expected!r} ({whose}); if "
        f"these are names of one model, say so with {say_so}"
        for adapter, name in named
        if name and short_name(name).lower() not in known
    ]


def other_names(adapters: list[Adapter], base_model: str) -> list[str]:
    """What adapters call their base model, where that is not what `base_model` says."""
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    expected = short_name(base_model).lower()
    return sorted({name for name in named if name and short_name(name).lower() != expected})


def check_layers(adapters: list[Adapter]) -> list[str]:
    """Faults of adapters of another method, over other projections, or of layers of other shapes
    than most."""
    methods = Counter(adapter.config.METHOD for adapter in adapters)
    if len(methods) > 1:
        usual = methods.most_common(1)[0][0]
        return [
            f"{adapter.label}: a {adapter.config.METHOD} adapter, most of the others are {usual} "
            "adapters; compress the two into stores of their own"
            for adapter in adapters
            if usual != adapter.config.METHOD
        ]
    faults = check_projections(adapters)
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            shapes.setdefault(module, Counter())[adapter.shape(module)] += 1
    for adapter in adapters:
        odd = []
        for module in adapter.modules:
            shape = adapter.shape(module)
            usual_shape = shapes[module].most_common(1)[0][0]
            if shape != usual_shape:
                what = (
                    f"adapts a layer of {list(shape)} "
                    f"({'d_out, d_in' if len(shape) == 2 else 'd_out'}), "
                    f"{list(usual_shape)} in most of the others"
                )
                odd.append(TensorFault(module, what))
        faults += [f"{adapter.label}: {fault}" for fault in folded(odd)]
    return faults
