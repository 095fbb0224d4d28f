"""Assemble compressed modules into a generation of a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open

from vllm_jd.compressor.read.adapters import Collection, method_of, sources_of
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import U_START, V_START
from vllm_jd.store import BaseModelInfo, CoreShard, GenerationWriter, ModuleInfo, Store

SHARD_BYTES = 256 << 20
_COLUMNS = ("cluster", "rank", "norm", "error", "exact_error", "input_error")


@dataclass(frozen=True)
class Kept:
    """Adapters (int64, their rows) that are stored as they are, and each module's part of them."""

    rows: torch.Tensor
    parts: list[Path]


def publish(
    out: Path,
    collection: Collection,
    settings: Settings,
    base_model: BaseModelInfo,
    parts: list[Path],
    kept: Kept | None,
) -> Store:
    """Make a generation of the modules' parts (see `compress_module`) and make it the live one.

    At most one shard of bases or cores is in memory. Call it inside of `writing(out)`.
    """
    writer = GenerationWriter(out)
    infos, table, basis_shards = _write_bases(writer, collection, parts, kept)
    writer.write_table(
        collection.names,
        **table,
        source_sha256=collection.source_sha256,
        source_bytes=collection.source_bytes,
        sources=sources_of(collection),
    )
    return writer.publish(
        base_model=base_model,
        dtype=settings.float_dtype,
        quantised=settings.quantised,
        method=settings.method,
        settings=settings.recorded() | _origin(collection),
        adapters=len(collection.names),
        modules=infos,
        rows=table["cluster"].shape[2],
        core_row=sum(info.core_size for info in infos),
        core_shards=_write_cores(writer, infos, parts, kept, len(collection.names)),
        basis_shards=basis_shards,
    )


def _origin(collection: Collection) -> dict[str, Any]:
    """What the adapters were, where that is not LoRA."""
    method = method_of(collection)
    return {} if method == "LORA" else {"peft_type": method}


def with_kept(
    tensors: dict[str, torch.Tensor], extra: dict[str, torch.Tensor], rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A module in which the adapters `rows` are those of `extra`, a part of method `none`."""
    result = dict(tensors)
    lines = extra["clusters"].clone()
    lines[:, V_START] += tensors["V"].shape[0]
    lines[:, U_START] += tensors["U"].shape[0]
    for key in extra:
        if key.split(".")[0] in ("U", "V"):
            result[key] = torch.cat([tensors[key], extra[key]])
    own = extra["cluster"][:, 0]
    cluster = tensors["cluster"].clone()
    cluster[rows] = -1
    cluster[rows, 0] = torch.where(own >= 0, own + len(tensors["clusters"]), -1).to(torch.int32)
    result |= {"clusters": torch.cat([tensors["clusters"], lines]), "cluster": cluster}
    for key in ("error", "exact_error", "input_error"):
        if key in tensors:
            result[key] = tensors[key].clone()
            result[key][rows] = extra["error"] if key == "error" else extra.get(key, torch.zeros(1))
    return result


def _without_residuals(
    tensors: dict[str, torch.Tensor], rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A module without the private lines of the adapters `rows`, nor what these point to."""
    lines, cluster = tensors["clusters"].long(), tensors["cluster"].long()
    shared = int(tensors["shape"][0])
    gone = torch.zeros(len(lines), dtype=torch.bool)
    own = cluster[rows]
    gone[own[own >= shared]] = True
    result = dict(tensors)
    for column, side in ((V_START, "V"), (U_START, "U")):
        kept = torch.ones(len(tensors[side]), dtype=torch.bool)
        for start, rank in lines[gone][:, [column, 2]].tolist():
            kept[start : start + rank] = False
        for key in tensors:
            if key.split(".")[0] == side:
                result[key] = tensors[key][kept]
        lines[~gone, column] = (kept.cumsum(0) - 1)[lines[~gone, column]]
    places = torch.where(gone, -1, (~gone).cumsum(0) - 1)
    chosen = torch.where(cluster >= 0, places[cluster.clamp_min(0)], -1)
    return result | {"clusters": lines[~gone].int(), "cluster": chosen.int()}


def _write_bases(
    writer: GenerationWriter, collection: Collection, parts: list[Path], kept: Kept | None
) -> tuple[list[ModuleInfo], dict[str, torch.Tensor], list[str]]:
    """Write the basis shards. Returns the modules, the adapter table and the shards' names."""
    columns: dict[str, list[torch.Tensor]] = {}
    infos: list[ModuleInfo] = []
    shards: list[str] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        shards.append(f"bases-{len(shards):05d}.safetensors")
        writer.write_tensors(shards[-1], pending)
        pending.clear()

    offset = 0
    for i, (module, (d_in, d_out)) in enumerate(collection.shapes.items()):
        tensors = _without_cores(parts[i])
        if kept is not None:
            tensors = _without_residuals(tensors, kept.rows)
            tensors = with_kept(tensors, load_file(kept.parts[i]), kept.rows)
        shared, rank, core_size = tensors["shape"].tolist()
        info = ModuleInfo(
            name=module,
            d_in=d_in,
            d_out=d_out,
            rank=rank,
            clusters=len(tensors["clusters"]),
            shared=shared,
            u_rows=len(tensors["U"]),
            v_rows=len(tensors["V"]),
            scale_rows=len(tensors["scales"]),
            core_offset=offset,
            core_size=core_size,
        )
        infos.append(info)
        offset += core_size
        for key in _COLUMNS:
            if key in tensors:
                columns.setdefault(key, []).append(tensors[key])
        bases = ("U", "V", "scales", "clusters")
        pending |= {f"{module}.{k}": x for k, x in tensors.items() if k.split(".")[0] in bases}
        if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    # A module in which all adapters are 0 has no mean, and so fewer rows an adapter.
    rows = max(column.shape[1] for column in columns["cluster"])
    columns["cluster"] = [
        torch.nn.functional.pad(column, (0, rows - column.shape[1]), value=-1)
        for column in columns["cluster"]
    ]
    # Only all modules together say something of an adapter.
    table = {
        key: torch.stack(column, dim=1)
        for key, column in columns.items()
        if len(column) == len(infos)
    }
    return infos, table, shards


def _without_cores(part: Path) -> dict[str, torch.Tensor]:
    with safe_open(part, framework="pt") as file:
        keys = [key for key in file.keys() if key.split(".")[0] != "cores"]  # noqa: SIM118
        return {key: file.get_tensor(key) for key in keys}


def _write_cores(
    writer: GenerationWriter,
    infos: list[ModuleInfo],
    parts: list[Path],
    kept: Kept | None,
    n: int,
) -> list[CoreShard]:
    """Write the cores, an adapter's of all modules in one row."""
    with_cores = [part for info, part in zip(infos, parts, strict=True) if info.core_size]
    if not with_cores:
        return []
    bytes_each = 0
    for part in with_cores:
        with safe_open(part, framework="pt") as tensors:
            bytes_each += tensors.get_tensor("cores")[:1].nbytes
    rows = max(1, min(n, SHARD_BYTES // bytes_each))
    shards = []
    for first in range(0, n, rows):
        last = min(first + rows, n)
        columns: dict[str, list[torch.Tensor]] = {}
        for part in with_cores:
            with safe_open(part, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if key.split(".")[0] == "cores":
                        columns.setdefault(key, []).append(tensors.get_slice(key)[first:last])
        block = {key: torch.cat(column, dim=1) for key, column in columns.items()}
        if kept is not None:
            inside = kept.rows[(kept.rows >= first) & (kept.rows < last)] - first
            for tensor in block.values():
                tensor[inside] = 0
        file = f"cores-{len(shards):05d}.safetensors"
        writer.write_tensors(file, block)
        shards.append(CoreShard(file=file, first=first, rows=last - first))
    return shards
