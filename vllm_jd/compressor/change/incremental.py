"""Change a store without fitting its bases anew: add adapters, remove some; or start over from it.

Each call publishes one new generation, under the writer lock, or leaves the store as it was. What
stays of the live generation is linked, not copied. Older generations stay on disk until
`vllm_jd.store.generations.prune` deletes them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vllm_jd.compressor.change.projection import project
from vllm_jd.compressor.errors import AdapterError, SettingsError
from vllm_jd.compressor.read.adapters import (
    UNKNOWN_BASE,
    Collection,
    base_names_of,
    experts_of,
    method_of,
    sources_of,
)
from vllm_jd.compressor.run.compress import ModuleMap, Progress, compress
from vllm_jd.compressor.run.parallel import parallel_map
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import BaseModelInfo, Store, StoreError, read_current, short_name, writing
from vllm_jd.store.fleet import give_way, read_fleet
from vllm_jd.store.rewrite import Additions, publish_changed

_CLOSE = 3


def _silent(what: str, done: int, total: int) -> None:
    pass


def add(
    path: Path,
    collection: Collection,
    *,
    max_adapter_error: float | None = None,
    replace: bool = False,
    on_progress: Progress = _silent,
) -> Store:
    """Add adapters to a store, compressed with the bases that it has.

    See `vllm_jd.compressor.change.projection` for what becomes of them. They come after the store's
    other adapters, of which not a byte changes. What is written (cores, private vectors) is held in
    memory; adding very many uncompressed adapters is better done in several calls.

    Args:
        path: the store.
        collection: the adapters.
        max_adapter_error: an adapter whose mean relative squared error over its modules would be
            higher is stored uncompressed; default: the limit that the store was made with, if any.
        replace: adapters of these names that are there go; without it they are an error.
        on_progress: see `Progress`.

    Returns:
        The new generation.

    Raises:
        StoreError: there is no store, it is damaged, or another process writes it.
        AdapterError: adapters of another base model; modules or shapes that the store does not
            have; names that it has; numbers that exceed its dtype.
    """
    read_current(path)  # writing() would make a folder of what is none
    with writing(path), Store.open(path, verify=False) as store:
        fleet = read_fleet(path)
        stand = [name for name in collection.names if fleet.meaning(name, store) is not None]
        taken = [] if replace else stand
        check_addable(store, collection, taken=taken)
        if max_adapter_error is None:
            max_adapter_error = store.manifest.settings.get("max_adapter_error")
        parts = project(
            store,
            collection,
            max_adapter_error=max_adapter_error,
            on_progress=on_progress,
        )
        on_progress("writing the store", 0, 1)
        added = Additions(
            collection.names,
            collection.source_sha256,
            collection.source_bytes,
            sources_of(collection),
            parts,
            base_names_of(collection),
        )
        result = publish_changed(store, _named(store, collection.names), added)
        give_way(path, collection.names)
        on_progress("writing the store", 1, 1)
    return result


def remove(path: Path, names: Iterable[str], *, on_progress: Progress = _silent) -> Store:
    """Remove adapters from a store.

    Their cores, private vectors, names and hashes are in no file of the new generation.
    Two things stay: bases that adapters share were fitted to them too, and keep that shape until
    `recompress`; and the generations before still have all of it until they are deleted
    (`vllm_jd.store.generations.prune` with keep=0).

    Args:
        path: the store.
        names: the adapters.
        on_progress: see `Progress`.

    Returns:
        The new generation.

    Raises:
        StoreError: no such adapter; no adapter would be left; there is no store, it is damaged,
            or another process writes it.
    """
    names = list(dict.fromkeys(names))
    read_current(path)
    with writing(path), Store.open(path, verify=False) as store:
        unknown = [f"  - {store.unknown(name)}" for name in names if name not in store]
        if unknown:
            raise StoreError(f"{path}: nothing was removed:\n" + "\n".join(unknown))
        if len(names) == len(store):
            raise StoreError(
                f"{path}: asked to remove all {len(store):,} adapters, but a store has at least "
                "one; delete the folder instead"
            )
        on_progress("writing the store", 0, 1)
        result = publish_changed(store, _named(store, names), None)
        give_way(path, names)
        on_progress("writing the store", 1, 1)
    return result


def recompress(
    path: Path,
    collection: Collection,
    settings: Settings | None = None,
    *,
    base_model: BaseModelInfo | None = None,
    device: str = "cpu",
    module_map: ModuleMap = parallel_map,
    on_progress: Progress = _silent,
) -> Store:
    """Compress a collection anew, with the store's clusters and bases to start from.

    The new generation has the adapters of the collection and no others. A stopped call goes on
    where it was, as `compress` does, unless the store has changed meanwhile.

    Args:
        path: the store.
        collection: all adapters of the new generation.
        settings: default: those that the store was made with.
        base_model: default: what the store knows of it.
        device, module_map, on_progress: see `compress`.

    Returns:
        The new generation.

    Raises:
        StoreError: there is no store, it is damaged, or another process writes it.
        AdapterError: adapters of another base model, or whose numbers exceed the dtype.
    """
    with Store.open(path, verify=False) as store:
        faults = _base_model_faults(store, collection)
        if faults:
            raise AdapterError(faults)
        manifest = store.manifest
        result = compress(
            collection,
            path,
            settings or Settings.from_recorded(manifest.method, manifest.settings),
            base_model=(base_model or manifest.base_model).called(manifest.base_model.other_names),
            warm=store,
            device=device,
            module_map=module_map,
            on_progress=on_progress,
        )
    give_way(path, collection.names)
    return result


def check_addable(
    store: Store,
    collection: Collection,
    *,
    taken: Sequence[str] = (),
) -> None:
    """Raise where adapters cannot go into a store.

    Args:
        store: it.
        collection: they.
        taken: names of theirs that stand for an adapter, an upload or a blend.

    Raises:
        AdapterError: what stands against it.
    """
    faults = _base_model_faults(store, collection)
    found, expected = method_of(collection), store.manifest.settings.get("peft_type", "LORA")
    if found != expected:
        faults.append(f"found {found} adapters, expected {expected} ones, as the store's are")
    elif expected != "LORA" and store.manifest.method == "none":
        faults.append(
            f"the store keeps {expected} adapters as they are (method none), to which none can be "
            "added; compress all of them together again (`vllm-jd recompress STORE ADAPTERS`)"
        )
    try:
        Settings.from_recorded(store.manifest.method, store.manifest.settings)
    except SettingsError as error:
        faults.append(str(error))
    known = {info.name: (info.d_in, info.d_out) for info in store.manifest.modules}
    missing = [module for module in collection.shapes if module not in known]
    if missing:
        faults.append(
            f"found {len(missing)} modules that the store has no bases for ({_few(missing)}), "
            f"expected some of its {len(known)} ({_few(list(known))}); compress all adapters "
            "together again (`vllm-jd recompress STORE ADAPTERS`)"
        )
    for module, (d_in, d_out) in collection.shapes.items():
        expected = known.get(module, (d_in, d_out))
        if (d_in, d_out) != expected:
            faults.append(
                f"{module}: found a layer of {[d_out, d_in]} (d_out, d_in), the store's has "
                f"{list(reversed(expected))}"
            )
    counts = {info.name: info.experts for info in store.manifest.modules}
    for module in collection.shapes:
        experts = experts_of(collection, module)
        if module in counts and (experts > counts[module] or bool(experts) != bool(counts[module])):
            faults.append(
                f"{module}: found {experts} experts, expected {counts[module]}, as the store has"
            )
    if taken:
        faults.append(
            f"the store has adapters of these names already: {_few(taken)} ({len(taken)} in all); "
            "give the new ones other names (NAME=PATH), or replace the old ones (--replace)"
        )
    if faults:
        raise AdapterError(faults)


def _base_model_faults(store: Store, collection: Collection) -> list[str]:
    found, known = collection.base_model, store.manifest.base_model
    names = {short_name(name).lower() for name in known.names}
    if short_name(found).lower() in {*names, UNKNOWN_BASE} or UNKNOWN_BASE in names:
        return []
    return [f"trained on base model {found!r}, expected {known.name!r}, that of the store"]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_CLOSE]) + (", …" if len(names) > _CLOSE else "")


def _named(store: Store, names: Iterable[str]) -> torch.Tensor:
    """Which adapters of the store have one of these names: bool `[n]`."""
    named = torch.zeros(len(store), dtype=torch.bool)
    named[[store.index(name) for name in names if name in store]] = True
    return named
