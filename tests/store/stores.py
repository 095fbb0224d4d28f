"""Stores to read, to damage and to check, and how they are damaged."""

import json
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_jd.row import CORE_DIAGONAL, CORE_FULL, CORE_NONE
from vllm_jd.store import (
    BaseModelInfo,
    CoreShard,
    GenerationWriter,
    ModuleInfo,
    Store,
    StoreError,
    writing,
)
from vllm_jd.store.quantise import quantise


def live(store):
    return store / "generations" / (store / "CURRENT").read_text().split()[0]


def live_files(store):
    return [store / "CURRENT", *sorted(live(store).iterdir())]


def refused(store, match):
    with pytest.raises(StoreError, match=match):
        Store.open(store)


def rewrite_manifest(store, change):
    """Change the manifest and make CURRENT agree with it, as an attacker or a bug would."""
    file = live(store) / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    name = live(store).name
    (store / "CURRENT").write_text(f"{name} {sha256(file.read_bytes()).hexdigest()}\n")


def rewrite_file(store, name, content):
    """Replace a file and make the manifest agree with it."""
    (live(store) / name).write_bytes(content)
    info = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    rewrite_manifest(store, lambda manifest: manifest["files"].update({name: info}))


def rewrite_tensors(store, name, change):
    tensors = load_file(live(store) / name)
    change(tensors)
    temporary = store / "temporary"
    save_file(tensors, temporary)
    content = temporary.read_bytes()
    temporary.unlink()
    rewrite_file(store, name, content)


def write_synthetic(path, n, *, modules=2, rank=2, shard=None, names=None):
    """A store of `n` made-up adapters, straight by the writer. Returns all core rows."""
    infos = [
        ModuleInfo(
            name=f"m{i}",
            d_in=4,
            d_out=6,
            rank=rank,
            rows=1,
            shared=1,
            u_vectors=rank,
            v_vectors=rank,
            scale_rows=0,
            core_offset=i * rank**2,
            core_size=rank**2,
        )
        for i in range(modules)
    ]
    width = modules * rank**2
    cores = torch.arange(n * width, dtype=torch.float32).view(n, width)
    with writing(path):
        writer = GenerationWriter(path)
        clusters = torch.tensor([[0, 0, rank, CORE_FULL, -1]], dtype=torch.int32)
        bases = {f"m{i}.U": torch.ones(rank, 6) for i in range(modules)}
        bases |= {f"m{i}.V": torch.ones(rank, 4) for i in range(modules)}
        bases |= {f"m{i}.clusters": clusters.clone() for i in range(modules)}
        writer.write_tensors("bases-00000.safetensors", bases)
        writer.write_table(
            names or [f"customer-{i}" for i in range(n)],
            chosen=torch.zeros(n, modules, 1),
            rank=torch.full((n, modules), 8),
            norm=torch.ones(n, modules),
            error=torch.zeros(n, modules),
            source_sha256=["00" * 32] * n,
            source_bytes=[1] * n,
        )
        shards = []
        for first in range(0, n, shard or n):
            rows = min(shard or n, n - first)
            file = f"cores-{len(shards):05d}.safetensors"
            writer.write_tensors(file, {"cores": cores[first : first + rows]})
            shards.append(CoreShard(file=file, first=first, adapters=rows))
        writer.publish(
            base_model=BaseModelInfo(name="org/tiny"),
            dtype="float32",
            method="jd-full",
            settings={},
            adapters=n,
            modules=infos,
            rows=1,
            core_row=width,
            core_shards=shards,
            basis_shards=["bases-00000.safetensors"],
        )
    return cores


# module → (d_in, d_out, rows of U, of V, of scales, core size, clusters, how many are shared)
RICH = {
    "m0": (
        5,
        70,
        12,
        15,
        0,
        9,
        [
            [0, 0, 3, CORE_FULL, -1],
            [3, 0, 3, CORE_FULL, -1],  # another V, the same U
            [6, 3, 2, CORE_NONE, -1],  # a mean
            [8, 5, 1, CORE_NONE, -1],
            [9, 6, 6, CORE_NONE, -1],
        ],
        3,
    ),
    "m1": (
        33,
        7,
        6,
        4,
        2,
        4,
        [[0, 0, 4, CORE_DIAGONAL, 0], [0, 0, 4, CORE_DIAGONAL, 1], [0, 2, 4, CORE_DIAGONAL, -1]],
        3,
    ),
    "m2": (64, 32, 5, 6, 1, 0, [[0, 0, 2, CORE_NONE, 0], [2, 2, 3, CORE_NONE, -1]], 0),
}
RICH_ROWS = [  # adapter → module → its rows
    [[0, 2, 3], [1, -1, -1], [-1, -1, -1]],
    [[1, 2, -1], [0, -1, -1], [-1, 1, -1]],
    [[-1, -1, 4], [2, -1, -1], [-1, -1, 0]],
    [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1]],
]


def encoded(key, matrix, quantised, dtype):
    if quantised is None:
        return {key: matrix.to(dtype)}
    codes, steps = quantise(matrix, quantised)
    return {key: codes, f"{key}.steps": steps}


def write_rich(path, *, quantised=None, dtype="bfloat16"):
    """A store with all that the format knows, straight by the writer, in two basis shards."""
    generator = torch.Generator().manual_seed(5)

    def random_matrix(*shape):
        return encoded_as(torch.randn(*shape, generator=generator))

    def encoded_as(matrix):
        return lambda key: encoded(key, matrix, quantised, getattr(torch, dtype))

    n = len(RICH_ROWS)
    infos, offset = [], 0
    shards = [{}, {}]
    for name, (d_in, d_out, u_rows, v_rows, scale_rows, core, clusters, shared) in RICH.items():
        table = torch.tensor(clusters, dtype=torch.int32)
        for i, shard in enumerate(shards):
            for key, count, width in (("U", u_rows, d_out), ("V", v_rows, d_in)):
                rows = (2, count - 2)[i]
                shard |= random_matrix(rows, width)(f"{name}.{key}")
            shard[f"{name}.clusters"] = (table[:1], table[1:])[i].clone()
        if scale_rows:  # in the second shard alone
            shards[1] |= random_matrix(scale_rows, d_out)(f"{name}.scales")
        size = 32 * (core > 0) if quantised else core
        infos.append(
            ModuleInfo(
                name=name,
                d_in=d_in,
                d_out=d_out,
                rank=clusters[0][2] if shared else 0,
                rows=len(clusters),
                shared=shared,
                u_vectors=u_rows,
                v_vectors=v_rows,
                scale_rows=scale_rows,
                core_offset=offset,
                core_size=size,
            )
        )
        offset += size
    with writing(path):
        writer = GenerationWriter(path)
        for i, shard in enumerate(shards):
            writer.write_tensors(f"bases-{i:05d}.safetensors", shard)
        writer.write_tensors("cores-00000.safetensors", random_matrix(3, offset)("cores"))
        writer.write_tensors("cores-00001.safetensors", random_matrix(n - 3, offset)("cores"))
        writer.write_table(
            [f"a{i}" for i in range(n)],
            chosen=torch.tensor(RICH_ROWS),
            rank=torch.full((n, 3), 8),
            norm=torch.ones(n, 3),
            error=torch.zeros(n, 3),
            exact_error=torch.full((n, 3), 0.25) if quantised else None,
            source_sha256=["00" * 32] * n,
            source_bytes=[1] * n,
        )
        return writer.publish(
            base_model=BaseModelInfo(name="org/tiny"),
            dtype=dtype,
            quantised=quantised,
            method="jd-full",
            settings={},
            adapters=n,
            modules=infos,
            rows=3,
            core_row=offset,
            core_shards=[
                CoreShard(file="cores-00000.safetensors", first=0, adapters=3),
                CoreShard(file="cores-00001.safetensors", first=3, adapters=n - 3),
            ],
            basis_shards=["bases-00000.safetensors", "bases-00001.safetensors"],
        )


RICH_KINDS = [(None, "float32"), (None, "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")]
