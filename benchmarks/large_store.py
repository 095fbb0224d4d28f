"""A store of very many adapters, made from a small one without compressing any."""

from pathlib import Path

import torch

from vllm_jd.store import CoreShard, GenerationWriter, Store, writing

_SHARD_BYTES = 256 << 20


def write_large_store(small: Store, out: Path, n: int, *, seed: int = 0) -> Store:
    """Write a store of `n` adapters with the bases and clusters of `small`, and random cores.

    Cores are normal numbers of the spread that `small`'s have, and differ for every adapter. What
    the table says of norms and errors is `small`'s, and means nothing.

    Args:
        small: any store that is not quantised and has cores.
        out: where to; must not be there.
        n: adapters, called `random-00000` and so on.
        seed: of the cores.

    Raises:
        ValueError: `small` is quantised, or has no cores.
    """
    manifest = small.manifest
    if manifest.quantised or not manifest.core_row:
        raise ValueError(f"{small.path}: quantised or without cores; choose another store")
    spread = small.cores(0, min(64, len(small))).float().std()
    row = torch.arange(n) % len(small)
    generator = torch.Generator().manual_seed(seed)
    shards: list[CoreShard] = []
    with writing(out):
        writer = GenerationWriter(out)
        for shard in manifest.basis_shards:
            (writer.folder / shard).write_bytes((small.folder / shard).read_bytes())
        rows = max(1, _SHARD_BYTES // (manifest.core_row * small.dtype.itemsize))
        for first in range(0, n, rows):
            count = min(rows, n - first)
            cores = torch.randn(count, manifest.core_row, generator=generator) * spread
            shards.append(
                CoreShard(file=f"cores-{len(shards):05d}.safetensors", first=first, adapters=count)
            )
            writer.write_tensors(shards[-1].file, {"cores": cores.to(small.dtype)})
        writer.write_table(
            [f"random-{i:05d}" for i in range(n)],
            chosen=small.chosen[row],
            rank=small.rank[row],
            norm=small.norm[row],
            error=small.error[row],
            source_sha256=[small.source_sha256[i].numpy().tobytes().hex() for i in row.tolist()],
            source_bytes=small.source_bytes[row].tolist(),
        )
        return writer.publish(
            base_model=manifest.base_model,
            dtype=manifest.dtype,
            method=manifest.method,
            settings=manifest.settings,
            adapters=n,
            modules=manifest.modules,
            rows=manifest.rows,
            core_row=manifest.core_row,
            core_shards=shards,
            basis_shards=manifest.basis_shards,
        )
