"""One name a layer, however adapters of one base model spell it.

A wrapper (a vision-language model) is saved with other names by each release of transformers, and
its language model alone with others again: `model.language_model.layers.0`,
`language_model.model.layers.0`, `model.layers.0`. PEFT's own prefix may stand there twice. vLLM
maps such spellings to one layer when it serves, so here they must be one module.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

_PEFT = "base_model.model."

# What only says in which wrapper a layer is: where names begin with these, in any order.
_NESTING = {"base_model", "model", "language_model", "text_model", "thinker"}

# Which of the prefixes that occur is taken: first the one of today's transformers, which vLLM
# maps for every wrapper that has it, then vLLM's own.
_PREFERRED = ("model.language_model.", "language_model.model.", "model.")

# Words of layers that are not those of the language model, whatever follows them.
_TOWERS = (
    *("vision", "visual", "image", "audio", "speech", "tower", "encoder", "decoder"),
    *("talker", "mtp", "draft", "depth", "qformer"),
)

# Experts of a layer: Mixtral's names, which today's transformers has no more, and everybody's.
_EXPERTS = re.compile(
    r"(?P<layer>.+)\.(?:mlp|block_sparse_moe)\.experts(?P<expert>\.\d+)?\.(?P<projection>[^.]+)"
)
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_NUMBERED = re.compile(r"(?P<head>.*?)(?P<tail>[^.]*\.\d+\..+)")

Modules = Collection[str]
Shapes = Mapping[str, Collection[tuple[int, ...]]]
"""Module → the shapes that its layer has in one adapter or another."""


def without_peft_prefix(module: str) -> str:
    """The name without `base_model.model.`, as often and wherever it stands, as vLLM reads it."""
    return module.replace(_PEFT, "") or module


def layer_key(module: str) -> str:
    """What all spellings of one layer have in common: the name from inside of the wrappers on.

    Equal keys mean one layer, in the models of one base; other keys need not mean two.
    """
    key = _inside(module)
    if ".experts." in key and (match := _EXPERTS.fullmatch(key)):
        projection = _PROJECTIONS.get(match["projection"], match["projection"])
        return f"{match['layer']}.mlp.experts{match['expert'] or ''}.{projection}"
    return key


def _inside(module: str) -> str:
    """A module's name from inside of the wrappers on."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part not in _NESTING), len(parts) - 1)
    return ".".join(parts[first:])


def one_name_a_layer(
    adapters: Sequence[tuple[str, Modules]], shapes: Shapes, known: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Find which names of modules mean one layer, and the name that each is to have.

    Args:
        adapters: label and modules of each, all of one base model.
        shapes: of all their modules.
        known: names that a store already has for its layers; they stay.

    Returns:
        The name of each spelling that is to have another, and what is wrong: two names of one
        layer in one adapter, and names that look like one layer but cannot be told to be.
    """
    spellings: dict[str, list[str]] = {}
    for module in shapes:
        spellings.setdefault(layer_key(module), []).append(module)
    taken = {layer_key(module): module for module in reversed(list(known))}
    names = {
        module: taken.get(key) or min(map(without_peft_prefix, same), key=_preference)
        for key, same in spellings.items()
        for module in same
    }
    faults = []
    if any(len(same) > 1 for same in spellings.values()):
        for label, modules in adapters:
            faults += _twice(label, modules)
    if not faults:
        keys = {key: {*shapes[same[0]]} for key, same in spellings.items()}
        faults += _alike(adapters, keys, {layer_key(name): name for name in shapes})
    return {module: name for module, name in names.items() if name != module}, faults


def _preference(module: str) -> tuple[int, int, str, str]:
    inside = _inside(module)
    prefix = module.removesuffix(inside)
    place = _PREFERRED.index(prefix) if prefix in _PREFERRED else len(_PREFERRED)
    return place, len(prefix), prefix, inside


def _twice(label: str, modules: Modules) -> list[str]:
    """Faults of one adapter that has a layer under two names."""
    first: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for module in modules:
        other = first.setdefault(layer_key(module), module)
        if other != module:
            twice.append((other, module))
    if not twice:
        return []
    more = f" (and {len(twice) - 1} more such pairs)" if len(twice) > 1 else ""
    return [
        f"{label}: found {twice[0][0]} and {twice[0][1]}{more}, which name one layer of the base "
        "model; expected one of the two: remove the tensors of the other"
    ]


def _alike(
    adapters: Sequence[tuple[str, Modules]],
    keys: Mapping[str, set[tuple[int, ...]]],
    spelled: Mapping[str, str],
) -> list[str]:
    """Faults of names that go on alike (`layers.0.q_proj`) after beginnings that differ.

    They are two layers where one adapter has both beginnings, or where one begins with the word
    of a tower that the other has not; otherwise nobody here can tell.
    """
    heads: dict[str, list[str]] = {}  # tail → what stands before it
    for key in keys:
        if match := _NUMBERED.fullmatch(key):
            heads.setdefault(match["tail"], []).append(match["head"])
    doubtful: dict[tuple[str, str], str] = {}  # two beginnings → a tail that both have
    for tail, same in heads.items():
        for one, other in combinations(sorted(same), 2):
            if _towers(one) == _towers(other) and keys[one + tail] & keys[other + tail]:
                doubtful.setdefault((one, other), tail)
    if not doubtful:
        return []
    together: set[tuple[str, str]] = set()
    for _, modules in adapters:
        matches = (_NUMBERED.fullmatch(layer_key(module)) for module in modules)
        own = sorted({match["head"] for match in matches if match})
        together.update(combinations(own, 2))
    return [
        f"some adapters have {spelled[one + tail]}, others {spelled[other + tail]}, of equal "
        "shape: two names that may mean one layer; expected one name a layer. If they are one "
        "layer, rename the tensors of the ones or the others; if they are two, compress these "
        "adapters into stores of their own"
        for (one, other), tail in doubtful.items()
        if (one, other) not in together
    ]


def _towers(head: str) -> frozenset[str]:
    return frozenset(word for word in _TOWERS if word in head)
