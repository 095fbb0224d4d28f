"""Publish a generation that differs from the live one by a few adapters.

What does not change is shared with the live generation, file by file. Added adapters get files of
their own: `cores-*` for cores, `bases-*` for private vectors, and the rows of these in
every module's table go into one small file, `clusters.safetensors`. That file is written anew each
time, so that no other has to be when vectors before theirs go.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from vllm_jd.row import SCALE_ROW
from vllm_jd.store.manifest import CoreShard, ModuleInfo
from vllm_jd.store.part import Matrix, ModulePart
from vllm_jd.store.reader import Store
from vllm_jd.store.renumber import POOLS, Kept, moved
from vllm_jd.store.writer import Accept, GenerationWriter

ROWS = "clusters.safetensors"
SHARD_BYTES = 256 << 20
_PER_MODULE = ("rank", "norm", "error", "exact_error")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Additions:
    """Adapters to append to a store.

    Args:
        names: theirs.
        source_sha256: of each source, hex.
        source_bytes: of each source's weights.
        sources: where each was fetched from, or None.
        parts: for each module of the store, in its order, what they have in it. `u`, `v` and
            `scales` are private vectors; `rows` are the module's shared rows, then the adapters'
            own, whose starts count from the first private vector. `exact_error`
            is there if the store has it.
        base_names: what they call the base model, where that is not what the store calls it.
    """

    names: list[str]
    source_sha256: list[str]
    source_bytes: list[int]
    sources: list[str | None]
    parts: list[ModulePart]
    base_names: list[str] = field(default_factory=list)


def publish_changed(
    store: Store,
    dropped: torch.Tensor,
    added: Additions | None,
    *,
    into: Path | None = None,
    accept: Accept | None = None,
) -> Store:
    """Make a generation without some adapters and with others, and make it the live one.

    Adapters that stay keep their order, and every byte of their basis vectors and cores; added
    ones come after them. No row that only dropped adapters have is in a file of the new
    generation. Call it inside of `writing(into)`.

    Args:
        store: the live generation, or one of another store.
        dropped: bool `[n]`, the adapters that go.
        added: adapters to append.
        into: the store that gets the generation; default: `store`'s.
        accept: called with the generation before it is the live one; what it raises keeps it from
            becoming that.

    Returns:
        The new generation, checked.
    """
    writer = GenerationWriter(into or store.path)
    kept = [_kept(store, column, dropped, added) for column in range(len(store.manifest.modules))]
    infos = [_info(store, i, kept[i], added) for i in range(len(kept))]
    basis_shards = _write_bases(writer, store, kept, added)
    _write_table(writer, store, kept, dropped, added)
    manifest = store.manifest
    return writer.publish(
        base_model=manifest.base_model.called(added.base_names if added else ()),
        dtype=manifest.dtype,
        quantised=manifest.quantised,
        method=manifest.method,
        settings=manifest.settings,
        adapters=int((~dropped).sum()) + (len(added.names) if added else 0),
        modules=infos,
        rows=_most_rows(store, added),
        core_row=manifest.core_row,
        core_shards=_write_cores(writer, store, dropped, added),
        basis_shards=basis_shards,
        accept=accept,
    )


def _kept(store: Store, column: int, dropped: torch.Tensor, added: Additions | None) -> Kept | None:
    """What stays of one module; None if all of it does.

    Private rows that nobody uses go too: whose they were cannot be told. So do shared ones with a
    scale that nobody uses: a VeRA adapter that is kept as it is has its vector there.
    """
    if not bool(dropped.any()):
        return None
    info = store.manifest.modules[column]
    table = store.rows(info.name)
    used = [store.chosen[~dropped, column].flatten()]
    if added is not None:
        own = added.parts[column].chosen.flatten()
        used.append(own[own < info.shared])
    scaled = (table[..., SCALE_ROW].view(info.rows, info.each) >= 0).any(dim=1)
    rows = (torch.arange(info.rows) < info.shared) & ~scaled
    rows[torch.cat([which[which >= 0].long() for which in used])] = True
    return None if bool(rows.all()) else Kept.of(table, rows, _counts(info, None))


def _counts(info: ModuleInfo, kept: Kept | None) -> dict[str, int]:
    """Vectors of each pool, of those that stay."""
    if kept is None:
        return {"U": info.u_vectors, "V": info.v_vectors, "scales": info.scale_rows}
    return {pool: int(mask.sum()) for pool, mask in kept.vectors.items()}


def _row_count(info: ModuleInfo, kept: Kept | None) -> int:
    """Rows of the table, of those that stay."""
    return info.rows if kept is None else int(kept.rows.sum())


def _info(store: Store, column: int, kept: Kept | None, added: Additions | None) -> ModuleInfo:
    info = store.manifest.modules[column]
    counts, rows = _counts(info, kept), _row_count(info, kept)
    if added is not None:
        part = added.parts[column]
        counts = {pool: count + part.counts[pool] for pool, count in counts.items()}
        rows += len(part.rows) - info.shared
    shared = info.shared if kept is None else int(kept.rows[: info.shared].sum())
    return info.model_copy(
        update={
            "shared": shared,
            "rank": info.rank if shared else 0,
            "rows": rows,
            "u_vectors": counts["U"],
            "v_vectors": counts["V"],
            "scale_rows": counts["scales"],
        }
    )


def _most_rows(store: Store, added: Additions | None) -> int:
    """Most rows that an adapter has in one module."""
    own = [part.chosen.shape[1] for part in added.parts] if added else []
    return max([store.manifest.rows, *own])


# --- basis files ---


def _write_bases(
    writer: GenerationWriter,
    store: Store,
    kept: list[Kept | None],
    added: Additions | None,
) -> list[str]:
    """Link, rewrite and add basis files. Returns their names in order."""
    shards = store.manifest.basis_shards
    rewritten = _rewritten(store, kept)
    rows = _rows_file(store, rewritten, kept, added)
    files: list[tuple[str, Tensors | None]] = [
        (name, rewritten.get(name)) for name in shards if name != ROWS
    ]
    # A file that is left without an entry goes.
    files = [(name, t) for name, t in files if t is None or any(len(x) for x in t.values())]
    new = _split(_private_vectors(store, added)) if added else []
    if len(new) == 1:
        while files and (tail := _mergeable(store, *files[-1], _bytes(new[0]))) is not None:
            new[0] = _joined(tail, new[0])
            files.pop()
    first = _next_number("bases", shards)
    files += [(f"bases-{first + i:05d}.safetensors", tensors) for i, tensors in enumerate(new)]
    if rows is None:
        files.append((ROWS, None))
    elif rows:
        files.append((ROWS, rows))
    for name, tensors in files:
        if tensors is None:
            writer.link_file(store, name)
        else:
            writer.write_tensors(name, tensors)
    return [name for name, _ in files]


def _rewritten(store: Store, kept: list[Kept | None]) -> dict[str, Tensors]:
    """The basis files that lose something, or whose tables name vectors that moved."""
    changes: dict[str, dict[str, tuple[Kept, int]]] = {}
    for info, found in zip(store.manifest.modules, kept, strict=True):
        if found is None:
            continue
        for pool in POOLS:
            for file, first, last in store.spans(f"{info.name}.{pool}"):
                if not bool(found.vectors[pool][first:last].all()):
                    changed = changes.setdefault(file.path.name, {})
                    changed[f"{info.name}.{pool}"] = (found, first)
        old = store.rows(info.name)
        for file, first, last in store.spans(f"{info.name}.clusters"):
            part = old[first:last]
            if file.path.name == ROWS or not torch.equal(found.table(part, first), part):
                changed = changes.setdefault(file.path.name, {})
                changed[f"{info.name}.clusters"] = (found, first)
    rewritten = {}
    for name, changed in changes.items():
        tensors = load_file(store.folder / name)
        for key, (found, first) in changed.items():
            if key.endswith(".clusters"):
                tensors[key] = found.table(tensors[key], first)
                continue
            vectors = found.vectors[key.rpartition(".")[2]][first : first + len(tensors[key])]
            for each in (key, f"{key}.steps"):
                if each in tensors:
                    tensors[each] = tensors[each][vectors]
        rewritten[name] = tensors
    return rewritten


def _rows_file(
    store: Store,
    rewritten: dict[str, Tensors],
    kept: list[Kept | None],
    added: Additions | None,
) -> Tensors | None:
    """The rows of adapters that were added, of now and before: the tables' last part. None if
    they are those of the live generation."""
    new = {}
    for i, info in enumerate(store.manifest.modules) if added else ():
        new[i] = moved(added.parts[i].rows[info.shared :], _counts(info, kept[i]))
    rows: Tensors = {}
    if ROWS in rewritten:
        rows = rewritten[ROWS]
    elif ROWS in store.manifest.basis_shards:
        if not any(len(own) for own in new.values()):
            return None
        rows = load_file(store.folder / ROWS)
    for i, own in new.items():
        key = f"{store.manifest.modules[i].name}.clusters"
        rows[key] = torch.cat([rows[key], own]) if key in rows else own
    return {key: table for key, table in rows.items() if len(table)}


def _private_vectors(store: Store, added: Additions) -> Tensors:
    tensors: Tensors = {}
    for info, part in zip(store.manifest.modules, added.parts, strict=True):
        for pool, vectors in part.pools.items():
            if len(vectors):
                tensors |= vectors.tensors(f"{info.name}.{pool}")
    return tensors


def _split(tensors: Tensors) -> list[Tensors]:
    """In files of about SHARD_BYTES, codes with their steps."""
    files: list[Tensors] = []
    for key, tensor in tensors.items():
        if not files or (_bytes(files[-1]) >= SHARD_BYTES and not key.endswith(".steps")):
            files.append({})
        files[-1][key] = tensor
    return files


def _mergeable(store: Store, name: str, tensors: Tensors | None, size: int) -> Tensors | None:
    """The last basis file, if it was added and is not larger than what comes after it.

    Joining files of like size, as a binary counter does, keeps their number to the logarithm of
    the number of adds, and each vector is copied so often at most.
    """
    if tensors is None:
        if store.manifest.files[name].bytes > SHARD_BYTES:
            return None
        tensors = load_file(store.folder / name)
    if _bytes(tensors) > size or _bytes(tensors) + size > SHARD_BYTES:
        return None
    return None if any(key.endswith(".clusters") for key in tensors) else tensors


def _joined(first: Tensors, second: Tensors) -> Tensors:
    both = first | second
    for key in first.keys() & second.keys():
        both[key] = torch.cat([first[key], second[key]])
    return both


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _next_number(kind: str, names: list[str]) -> int:
    found = (re.fullmatch(rf"{kind}-(\d+)\.safetensors", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


# --- cores ---


def _write_cores(
    writer: GenerationWriter, store: Store, dropped: torch.Tensor, added: Additions | None
) -> list[CoreShard]:
    if store.manifest.core_row == 0:
        return []
    shards = store.manifest.core_shards
    files: list[tuple[str, int, Tensors | None]] = []
    for shard in shards:
        stay = ~dropped[shard.first : shard.first + shard.adapters]
        if bool(stay.all()):
            files.append((shard.file, shard.adapters, None))
        elif bool(stay.any()):
            tensors = load_file(store.folder / shard.file)
            rewritten = {key: cores[stay] for key, cores in tensors.items()}
            files.append((shard.file, int(stay.sum()), rewritten))
    if added is not None:
        cores, count = _cores(store, added), len(added.names)
        while files and files[-1][1] <= count:  # see `_mergeable`
            name, before, tensors = files[-1]
            tensors = tensors or load_file(store.folder / name)
            if _bytes(tensors) + _bytes(cores) > SHARD_BYTES:
                break
            cores, count = _joined(tensors, cores), count + before
            files.pop()
        number = _next_number("cores", [shard.file for shard in shards])
        files.append((f"cores-{number:05d}.safetensors", count, cores))
    result = []
    first = 0
    for name, count, tensors in files:
        if tensors is None:
            writer.link_file(store, name)
        else:
            writer.write_tensors(name, tensors)
        result.append(CoreShard(file=name, first=first, adapters=count))
        first += count
    return result


def _cores(store: Store, added: Additions) -> Tensors:
    modules = store.manifest.modules
    order = sorted(range(len(modules)), key=lambda i: modules[i].core_offset)
    parts = [added.parts[i].cores for i in order if modules[i].core_size]
    return Matrix.cat(parts, dim=1).tensors("cores")


# --- the adapter table ---


def _write_table(
    writer: GenerationWriter,
    store: Store,
    kept: list[Kept | None],
    dropped: torch.Tensor,
    added: Additions | None,
) -> None:
    stay = ~dropped
    most = _most_rows(store, added)
    chosen = _padded(store.chosen[stay], most)
    for column, found in enumerate(kept):
        if found is not None:
            chosen[:, column] = found.chosen(chosen[:, column])
    names = [name for name, stays in zip(store.names, stay.tolist(), strict=True) if stays]
    digests = [bytes(digest).hex() for digest in store.source_sha256[stay].numpy()]
    sizes = store.source_bytes[stay].tolist()
    sources = [text for text, stays in zip(store.sources, stay.tolist(), strict=True) if stays]
    columns = {key: getattr(store, key) for key in _PER_MODULE}
    columns = {key: values[stay] for key, values in columns.items() if values is not None}
    if added is not None:
        names, digests = names + added.names, digests + added.source_sha256
        sizes, sources = sizes + added.source_bytes, sources + added.sources
        for key in columns:
            new = torch.stack([getattr(part, key) for part in added.parts], dim=1)
            columns[key] = torch.cat([columns[key], new.to(columns[key].dtype)])
        new = [_new_chosen(store, i, found, added, most) for i, found in enumerate(kept)]
        chosen = torch.cat([chosen, torch.stack(new, dim=1)])
    writer.write_table(
        names,
        chosen=chosen,
        **columns,
        source_sha256=digests,
        source_bytes=sizes,
        sources=sources,
    )


def _new_chosen(
    store: Store, column: int, kept: Kept | None, added: Additions, most: int
) -> torch.Tensor:
    """The added adapters' rows in one module's new table: int32 `[n, most]`."""
    info = store.manifest.modules[column]
    own = added.parts[column].chosen
    before = _row_count(info, kept)
    shared = own if kept is None else kept.chosen(own.clamp_max(info.shared - 1))
    return _padded(torch.where(own >= info.shared, own - info.shared + before, shared), most)


def _padded(chosen: torch.Tensor, most: int) -> torch.Tensor:
    return torch.nn.functional.pad(chosen, (0, most - chosen.shape[-1]), value=-1)
