"""Assemble compressed modules into a generation of a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_jd.compressor.read.adapters import (
    Collection,
    embeddings_in,
    experts_in,
    experts_of,
    method_of,
    sources_of,
)
from vllm_jd.compressor.settings import Settings
from vllm_jd.store import BaseModelInfo, CoreShard, GenerationWriter, ModuleInfo, Store
from vllm_jd.store.part import Matrix, ModulePart, load_cores

SHARD_BYTES = 256 << 20
_PER_MODULE = ("chosen", "rank", "norm", "error", "exact_error")


@dataclass(frozen=True)
class Kept:
    """Adapters (int64, their indices) that are stored as they are, and each module's part of them,
    saved."""

    adapters: torch.Tensor
    parts: list[Path]


def publish(
    out: Path,
    collection: Collection,
    settings: Settings,
    base_model: BaseModelInfo,
    parts: list[Path],
    kept: Kept | None,
) -> Store:
    """Make a generation of the modules' saved parts and make it the live one.

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
        settings=settings.recorded(experts=bool(experts_in(collection))) | _origin(collection),
        adapters=len(collection.names),
        modules=infos,
        rows=table["chosen"].shape[2],
        core_row=sum(info.core_size for info in infos),
        core_shards=_write_cores(writer, infos, parts, kept, len(collection.names)),
        basis_shards=basis_shards,
    )


def _origin(collection: Collection) -> dict[str, Any]:
    """What the adapters were, where that is not LoRA."""
    method = method_of(collection)
    return {} if method == "LORA" else {"peft_type": method}


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
        part = ModulePart.load(parts[i], cores=slice(0, 0))
        if kept is not None:
            part = part.without_private(kept.adapters)
            part = part.with_kept(ModulePart.load(kept.parts[i]), kept.adapters)
        info = ModuleInfo(
            name=module,
            experts=experts_of(collection, module),
            embedding=module in embeddings_in(collection),
            d_in=d_in,
            d_out=d_out,
            rank=part.shared_rank,
            rows=len(part.rows),
            shared=part.shared,
            u_vectors=len(part.u),
            v_vectors=len(part.v),
            scale_rows=len(part.scales),
            core_offset=offset,
            core_size=part.core_size,
        )
        infos.append(info)
        offset += part.core_size
        for key in _PER_MODULE:
            if (values := getattr(part, key)) is not None:
                columns.setdefault(key, []).append(values)
        for pool, vectors in part.pools.items():
            pending |= vectors.tensors(f"{module}.{pool}")
        pending[f"{module}.clusters"] = part.rows
        if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    # Only all modules together say something of an adapter.
    table = {
        key: torch.stack(column, dim=1)
        for key, column in columns.items()
        if len(column) == len(infos)
    }
    return infos, table, shards


def _write_cores(
    writer: GenerationWriter,
    infos: list[ModuleInfo],
    parts: list[Path],
    kept: Kept | None,
    n: int,
) -> list[CoreShard]:
    """Write the cores, an adapter's of all modules side by side."""
    with_cores = [part for info, part in zip(infos, parts, strict=True) if info.core_size]
    if not with_cores:
        return []
    bytes_each = sum(load_cores(part, 0, 1).data.nbytes for part in with_cores)
    count = max(1, min(n, SHARD_BYTES // bytes_each))
    shards = []
    for first in range(0, n, count):
        last = min(first + count, n)
        block = Matrix.cat([load_cores(part, first, last) for part in with_cores], dim=1)
        if kept is not None:
            inside = (kept.adapters >= first) & (kept.adapters < last)
            block = block.without(kept.adapters[inside] - first)
        file = f"cores-{len(shards):05d}.safetensors"
        writer.write_tensors(file, block.tensors("cores"))
        shards.append(CoreShard(file=file, first=first, adapters=last - first))
    return shards
