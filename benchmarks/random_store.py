"""Stores of random bases and cores, written without compressing any adapters: for speed alone."""

from pathlib import Path

import torch
from synthetic import RandomCollection

from vllm_jd.row import CORE_FULL
from vllm_jd.store import CoreShard, GenerationWriter, ModuleInfo, Store, read_base_model, writing
from vllm_jd.store.part import Matrix
from vllm_jd.store.quantise import quantise

_LAYERS_A_SHARD = 3  # bounds the memory that writing takes


def write_random_store(
    model: Path,
    out: Path,
    adapters: int,
    clusters: int,
    *,
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    rank: int = 16,
    seed: int = 0,
    quantised: str | None = None,
) -> Store:
    """Write a store of random bases and cores for some layers of a Llama-like model.

    Adapter i is of cluster i · `clusters` // `adapters`, the same for all modules.

    Args:
        model: folder of the base model.
        out: where to; must not be there.
        adapters: how many.
        clusters: how many.
        targets: which linear layers.
        rank: of the bases.
        seed: of all numbers.
        quantised: `int8` or `int4`; default: bfloat16.
    """
    shapes = RandomCollection(model, 1, targets=targets).shapes
    n, m = adapters, len(shapes)
    generator = torch.Generator().manual_seed(seed)

    def numbers(name: str, *shape: int, scale: float) -> dict[str, torch.Tensor]:
        found = (torch.randn(*shape, generator=generator) * scale).bfloat16()
        matrix = Matrix(found) if quantised is None else Matrix(*quantise(found, quantised))
        return matrix.tensors(name)

    start = torch.arange(clusters, dtype=torch.int32) * rank
    fields = start, start, *torch.tensor([rank, CORE_FULL, -1])  # STORED_FIELDS
    table = torch.stack([field.expand(clusters) for field in fields], dim=1).int()
    modules = [
        ModuleInfo(
            name=name,
            d_in=d_in,
            d_out=d_out,
            rank=rank,
            rows=clusters,
            shared=clusters,
            u_vectors=clusters * rank,
            v_vectors=clusters * rank,
            scale_rows=0,
            core_offset=i * rank**2,
            core_size=rank**2,
        )
        for i, (name, (d_in, d_out)) in enumerate(shapes.items())
    ]
    with writing(out):
        writer = GenerationWriter(out)
        shards = []
        step = _LAYERS_A_SHARD * len(targets)
        for first in range(0, m, step):
            tensors = {}
            for info in modules[first : first + step]:
                vectors = clusters * rank
                # Orthonormal but for chance, as a compressed store's are.
                tensors |= numbers(f"{info.name}.U", vectors, info.d_out, scale=info.d_out**-0.5)
                tensors |= numbers(f"{info.name}.V", vectors, info.d_in, scale=info.d_in**-0.5)
                tensors |= numbers(f"{info.name}.scales", 0, info.d_out, scale=1)
                tensors[f"{info.name}.clusters"] = table.clone()
            shards.append(f"bases-{len(shards):05d}.safetensors")
            writer.write_tensors(shards[-1], tensors)
        core_row = m * rank**2
        writer.write_tensors("cores-00000.safetensors", numbers("cores", n, core_row, scale=0.02))
        writer.write_table(
            [f"random-{i:05d}" for i in range(n)],
            chosen=(torch.arange(n) * clusters // n)[:, None, None].expand(n, m, 1),
            rank=torch.full((n, m), rank),
            norm=torch.ones(n, m),
            error=torch.zeros(n, m),
            source_sha256=["0" * 64] * n,
            source_bytes=[0] * n,
        )
        return writer.publish(
            base_model=read_base_model(model),
            dtype="bfloat16",
            quantised=quantised,
            method="jd-full",
            settings={"random": True, "seed": seed},
            adapters=n,
            modules=modules,
            rows=1,
            core_row=core_row,
            core_shards=[CoreShard(file="cores-00000.safetensors", first=0, adapters=n)],
            basis_shards=shards,
        )
