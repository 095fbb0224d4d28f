"""Publish a generation that differs from the live one by a few adapters.

What does not change is shared with the live generation, file by file. Added adapters get files of
their own: `cores-*` for core rows, `bases-*` for private basis vectors, and the lines of these in
every module's cluster table go into one small file, `clusters.safetensors`. That file is written
anew each time, so that no other has to be when rows before its own go.
"""

import re
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from vllm_jd.row import SCALE_ROW, U_START, V_START
from vllm_jd.store.manifest import CoreShard, ModuleInfo
from vllm_jd.store.reader import Store
from vllm_jd.store.shards import BasisShards
from vllm_jd.store.writer import GenerationWriter

LINES = "clusters.safetensors"
SHARD_BYTES = 256 << 20
_POOLS = ("U", "V", "scales")
_PER_MODULE = ("rank", "norm", "error", "exact_error", "input_error")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Additions:
    """Adapters to append to a store.

    `parts` has for each module of the store, in its order:

    - `U`, `V`, `scales` (and their `.steps`): private rows, as they are written
    - `clusters` int32 `[shared + own, 5]`: the module's shared lines, then those of these
      adapters, whose starts count from the first private row above
    - `cluster` `[n, rows]`: lines of that table, −1: none
    - `cores` (and `cores.steps`): core rows of this module, as they are written
    - `rank`, `norm`, `error` `[n]`, and `exact_error`, `input_error` if the store has them
    """

    names: list[str]
    source_sha256: list[str]
    source_bytes: list[int]
    sources: list[str | None]
    parts: list[Tensors]


@dataclass(frozen=True)
class _Kept:
    """Which lines (bool `[clusters]`) and rows (bool, by pool) of a module stay."""

    lines: torch.Tensor
    rows: dict[str, torch.Tensor]

    def lines_of(self, lines: torch.Tensor) -> torch.Tensor:
        """Where lines (int32, −1: none) that stay are in the new table."""
        places = (self.lines.cumsum(0) - 1).to(torch.int32)
        return torch.where(lines >= 0, places[lines.clamp_min(0).long()], -1)

    def table(self, lines: torch.Tensor, first: int) -> torch.Tensor:
        """Lines `first …` of the old table as they are in the new one, int32."""
        kept = lines[self.lines[first : first + len(lines)]].clone()
        for column, pool in ((V_START, "V"), (U_START, "U"), (SCALE_ROW, "scales")):
            # Rows of a line that stays all stay: its first is a row that does.
            places = (self.rows[pool].cumsum(0) - 1).to(torch.int32)
            used = kept[:, column] >= 0
            kept[used, column] = places[kept[used, column].long()]
        return kept


def publish_changed(store: Store, dropped: torch.Tensor, added: Additions | None) -> Store:
    """Make a generation without some adapters and with others, and make it the live one.

    Adapters that stay keep their order, and every byte of their basis vectors and cores; added
    ones come after them. No row that only dropped adapters have is in a file of the new
    generation. Call it inside of `writing(store.path)`.

    Args:
        store: the live generation.
        dropped: bool `[n]`, the adapters that go.
        added: adapters to append.

    Returns:
        The new generation, checked.
    """
    writer = GenerationWriter(store.path)
    kept = [_kept(store, column, dropped, added) for column in range(len(store.manifest.modules))]
    infos = [_info(store, i, kept[i], added) for i in range(len(kept))]
    basis_shards = _write_bases(writer, store, kept, added)
    _write_table(writer, store, kept, dropped, added)
    manifest = store.manifest
    return writer.publish(
        base_model=manifest.base_model,
        dtype=manifest.dtype,
        quantised=manifest.quantised,
        method=manifest.method,
        settings=manifest.settings,
        adapters=int((~dropped).sum()) + (len(added.names) if added else 0),
        modules=infos,
        rows=_rows(store, added),
        core_row=manifest.core_row,
        core_shards=_write_cores(writer, store, dropped, added),
        basis_shards=basis_shards,
    )


def _kept(
    store: Store, column: int, dropped: torch.Tensor, added: Additions | None
) -> _Kept | None:
    """What stays of one module; None if all of it does.

    Private lines that nobody uses go too: whose they were cannot be told. So do shared ones with a
    scale that nobody uses: a VeRA adapter that is kept as it is has its vector there.
    """
    if not bool(dropped.any()):
        return None
    info = store.manifest.modules[column]
    table = store.clusters(info.name)
    used = [store.cluster[~dropped, column].flatten()]
    if added is not None:
        own = added.parts[column]["cluster"].flatten()
        used.append(own[own < info.shared])
    lines = (torch.arange(info.clusters) < info.shared) & (table[:, SCALE_ROW] < 0)
    lines[torch.cat([which[which >= 0].long() for which in used])] = True
    if bool(lines.all()):
        return None
    v_start, u_start, rank, _, scale_row = table[lines].long().unbind(1)
    scaled = (scale_row >= 0).long()
    rows = {
        "V": _covered(v_start, rank, info.v_rows),
        "U": _covered(u_start, rank, info.u_rows),
        "scales": _covered(scale_row.clamp_min(0), scaled, info.scale_rows),
    }
    return _Kept(lines, rows)


def _covered(start: torch.Tensor, length: torch.Tensor, count: int) -> torch.Tensor:
    """Which of `count` rows lie in one of the stretches: bool `[count]`."""
    edges = torch.zeros(count + 1, dtype=torch.int64)
    edges.index_add_(0, start, torch.ones_like(start))
    edges.index_add_(0, start + length, -torch.ones_like(start))
    return edges.cumsum(0)[:count] > 0


def _counts(info: ModuleInfo, kept: _Kept | None) -> dict[str, int]:
    """Rows of each pool and lines of the table, of those that stay."""
    if kept is None:
        whole = {"U": info.u_rows, "V": info.v_rows, "scales": info.scale_rows}
        return whole | {"clusters": info.clusters}
    rows = {pool: int(mask.sum()) for pool, mask in kept.rows.items()}
    return rows | {"clusters": int(kept.lines.sum())}


def _info(store: Store, column: int, kept: _Kept | None, added: Additions | None) -> ModuleInfo:
    info = store.manifest.modules[column]
    counts = _counts(info, kept)
    if added is not None:
        part = added.parts[column]
        for pool in _POOLS:
            counts[pool] += len(part[pool])
        counts["clusters"] += len(part["clusters"]) - info.shared
    shared = info.shared if kept is None else int(kept.lines[: info.shared].sum())
    return info.model_copy(
        update={
            "shared": shared,
            "rank": info.rank if shared else 0,
            "clusters": counts["clusters"],
            "u_rows": counts["U"],
            "v_rows": counts["V"],
            "scale_rows": counts["scales"],
        }
    )


def _rows(store: Store, added: Additions | None) -> int:
    own = [part["cluster"].shape[1] for part in added.parts] if added else []
    return max([store.manifest.rows, *own])


# --- basis files ---


def _write_bases(
    writer: GenerationWriter,
    store: Store,
    kept: list[_Kept | None],
    added: Additions | None,
) -> list[str]:
    """Link, rewrite and add basis files. Returns their names in order."""
    shards = store.manifest.basis_shards
    rewritten = _rewritten(store, kept)
    lines = _lines(store, rewritten, kept, added)
    files: list[tuple[str, Tensors | None]] = [
        (name, rewritten.get(name)) for name in shards if name != LINES
    ]
    # A file that is left without a row goes.
    files = [(name, t) for name, t in files if t is None or any(len(x) for x in t.values())]
    new = _split(_private_rows(store, added)) if added else []
    if len(new) == 1:
        while files and (tail := _mergeable(store, *files[-1], _bytes(new[0]))) is not None:
            new[0] = _joined(tail, new[0])
            files.pop()
    first = _next_number("bases", shards)
    files += [(f"bases-{first + i:05d}.safetensors", tensors) for i, tensors in enumerate(new)]
    if lines is None:
        files.append((LINES, None))
    elif lines:
        files.append((LINES, lines))
    for name, tensors in files:
        if tensors is None:
            writer.link_file(store, name)
        else:
            writer.write_tensors(name, tensors)
    return [name for name, _ in files]


def _rewritten(store: Store, kept: list[_Kept | None]) -> dict[str, Tensors]:
    """The basis files that lose something, or whose tables point into rows that moved."""
    shards = store.manifest.basis_shards
    changes: dict[int, dict[str, tuple[_Kept, int]]] = {}
    if any(kept):
        files = BasisShards(store)
    for info, found in zip(store.manifest.modules, kept, strict=True):
        if found is None:
            continue
        for pool in _POOLS:
            for i, first, last in files.spans(f"{info.name}.{pool}"):
                if not bool(found.rows[pool][first:last].all()):
                    changes.setdefault(i, {})[f"{info.name}.{pool}"] = (found, first)
        old = store.clusters(info.name)
        for i, first, last in files.spans(f"{info.name}.clusters"):
            part = old[first:last]
            if shards[i] == LINES or not torch.equal(found.table(part, first), part):
                changes.setdefault(i, {})[f"{info.name}.clusters"] = (found, first)
    rewritten = {}
    for i, changed in changes.items():
        tensors = load_file(store.folder / shards[i])
        for key, (found, first) in changed.items():
            if key.endswith(".clusters"):
                tensors[key] = found.table(tensors[key], first)
                continue
            rows = found.rows[key.rpartition(".")[2]][first : first + len(tensors[key])]
            for name in (key, f"{key}.steps"):
                if name in tensors:
                    tensors[name] = tensors[name][rows]
        rewritten[shards[i]] = tensors
    return rewritten


def _lines(
    store: Store,
    rewritten: dict[str, Tensors],
    kept: list[_Kept | None],
    added: Additions | None,
) -> Tensors | None:
    """The lines of adapters that were added, of now and before: the tables' last part. None if
    they are those of the live generation."""
    new = {}
    for i, info in enumerate(store.manifest.modules) if added else ():
        new[i] = added.parts[i]["clusters"][info.shared :].clone()
    lines: Tensors = {}
    if LINES in rewritten:
        lines = rewritten[LINES]
    elif LINES in store.manifest.basis_shards:
        if not any(len(own) for own in new.values()):
            return None
        lines = load_file(store.folder / LINES)
    for i, own in new.items():
        info = store.manifest.modules[i]
        counts = _counts(info, kept[i])
        for column, pool in ((V_START, "V"), (U_START, "U"), (SCALE_ROW, "scales")):
            own[own[:, column] >= 0, column] += counts[pool]
        key = f"{info.name}.clusters"
        lines[key] = torch.cat([lines[key], own]) if key in lines else own
    return {key: table for key, table in lines.items() if len(table)}


def _private_rows(store: Store, added: Additions) -> Tensors:
    return {
        f"{info.name}.{key}": rows
        for info, part in zip(store.manifest.modules, added.parts, strict=True)
        for key, rows in part.items()
        if key.split(".")[0] in _POOLS and len(rows)
    }


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
    the number of adds, and each row is copied so often at most.
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
        stay = ~dropped[shard.first : shard.first + shard.rows]
        if bool(stay.all()):
            files.append((shard.file, shard.rows, None))
        elif bool(stay.any()):
            tensors = load_file(store.folder / shard.file)
            rewritten = {key: rows[stay] for key, rows in tensors.items()}
            files.append((shard.file, int(stay.sum()), rewritten))
    if added is not None:
        cores, rows = _core_rows(store, added), len(added.names)
        while files and files[-1][1] <= rows:  # see `_mergeable`
            name, count, tensors = files[-1]
            tensors = tensors or load_file(store.folder / name)
            if _bytes(tensors) + _bytes(cores) > SHARD_BYTES:
                break
            cores, rows = _joined(tensors, cores), rows + count
            files.pop()
        number = _next_number("cores", [shard.file for shard in shards])
        files.append((f"cores-{number:05d}.safetensors", rows, cores))
    result = []
    first = 0
    for name, rows, tensors in files:
        if tensors is None:
            writer.link_file(store, name)
        else:
            writer.write_tensors(name, tensors)
        result.append(CoreShard(file=name, first=first, rows=rows))
        first += rows
    return result


def _core_rows(store: Store, added: Additions) -> Tensors:
    modules = store.manifest.modules
    order = sorted(range(len(modules)), key=lambda i: modules[i].core_offset)
    parts = [added.parts[i] for i in order if modules[i].core_size]
    keys = [key for key in parts[0] if key.split(".")[0] == "cores"]
    return {key: torch.cat([part[key] for part in parts], dim=1) for key in keys}


# --- the adapter table ---


def _write_table(
    writer: GenerationWriter,
    store: Store,
    kept: list[_Kept | None],
    dropped: torch.Tensor,
    added: Additions | None,
) -> None:
    stay = ~dropped
    rows = _rows(store, added)
    cluster = _padded(store.cluster[stay], rows)
    for column, found in enumerate(kept):
        if found is not None:
            cluster[:, column] = found.lines_of(cluster[:, column])
    names = [name for name, stays in zip(store.names, stay.tolist(), strict=True) if stays]
    digests = [bytes(row).hex() for row in store.source_sha256[stay].numpy()]
    sizes = store.source_bytes[stay].tolist()
    sources = [text for text, stays in zip(store.sources, stay.tolist(), strict=True) if stays]
    columns = {key: getattr(store, key) for key in _PER_MODULE}
    columns = {key: values[stay] for key, values in columns.items() if values is not None}
    if added is not None:
        names, digests = names + added.names, digests + added.source_sha256
        sizes, sources = sizes + added.source_bytes, sources + added.sources
        for key in columns:
            new = torch.stack([part[key] for part in added.parts], dim=1)
            columns[key] = torch.cat([columns[key], new.to(columns[key].dtype)])
        new = [_new_cluster(store, i, found, added, rows) for i, found in enumerate(kept)]
        cluster = torch.cat([cluster, torch.stack(new, dim=1)])
    writer.write_table(
        names,
        cluster=cluster,
        **columns,
        source_sha256=digests,
        source_bytes=sizes,
        sources=sources,
    )


def _new_cluster(
    store: Store, column: int, kept: _Kept | None, added: Additions, rows: int
) -> torch.Tensor:
    """The added adapters' lines in one module's new table: int32 `[n, rows]`."""
    info = store.manifest.modules[column]
    own = added.parts[column]["cluster"].to(torch.int32)
    before = _counts(info, kept)["clusters"]
    shared = own if kept is None else kept.lines_of(own.clamp_max(info.shared - 1))
    return _padded(torch.where(own >= info.shared, own - info.shared + before, shared), rows)


def _padded(cluster: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(cluster, (0, rows - cluster.shape[-1]), value=-1)
