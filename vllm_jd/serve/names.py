"""The names of a server's models, as its flags give them: no adapter of a store may have one."""

import json
from collections.abc import Collection, Iterator


def flag_values(args: list[str], flag: str) -> list[str]:
    """What follows a flag among vLLM's: one value after `=`, or all up to the next flag. Of a flag
    that is given twice, the last counts, as it does for vLLM."""
    found: list[str] = []
    for place, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if name.replace("_", "-") != flag:
            continue
        found = [value] if given else []
        for following in args[place + 1 :] if not given else []:
            if following.startswith("-"):
                break
            found.append(following)
    return found


def lora_modules(args: list[str]) -> Iterator[tuple[str, str]]:
    """Name and path of each of `--lora-modules`; what vLLM will refuse is left out."""
    for item in flag_values(args, "--lora-modules"):
        if "=" in item and "," not in item:
            name, _, path = item.partition("=")
            yield name, path
            continue
        try:
            entry = json.loads(item)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            yield entry["name"], str(entry.get("path"))


def name_clash(names: Collection[str], model: str, args: list[str]) -> str | None:
    """What to tell of the first names that are used twice, or None.

    Args:
        names: of the store's adapters.
        model: `--model`, by which the base is called unless `--served-model-name` says otherwise.
        args: vLLM's flags.
    """
    served = flag_values(args, "--served-model-name")
    both = [name for name in served or [model] if name in names]
    if both:
        flag = "--served-model-name" if served else "--model"
        return (
            f"{both[0]!r} is the base model's name (of {flag}) and that of an adapter of the "
            "store; give the base another with --served-model-name"
        )
    both = [name for name, _ in lora_modules(args) if name in names]
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        return (
            f"--lora-modules {both[0]}{more}: the store has an adapter of that name; give it "
            "another, or leave it out"
        )
    return None
