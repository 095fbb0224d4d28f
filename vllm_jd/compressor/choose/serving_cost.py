"""What a decode step reads and computes for adapters, before there is a store."""

from dataclasses import dataclass, replace

import torch

from vllm_jd.compressor.methods.registry import METHODS
from vllm_jd.compressor.read.adapters import Collection, embeddings_in, experts_of
from vllm_jd.compressor.settings import Settings
from vllm_jd.row import BLOCK
from vllm_jd.store.quantise import code_width, scale_width

STEPS = (1, 32, 256)
"""Requests of the decode steps that `plan` tells of."""


@dataclass(frozen=True)
class StepCost:
    """Of one decode step.

    Args:
        requests: so many, each of an adapter drawn evenly from all.
        bytes: of bases and cores, each read once however many requests share it: in the mean.
        flops: of the products with bases and cores; a multiplication and an addition are two.
    """

    requests: int
    bytes: int
    flops: int


def step_cost(collection: Collection, settings: Settings, requests: int) -> StepCost:
    """What a step of so many requests costs with a store of these settings; not of merges.

    Where experts are adapted a token is taken to visit all of them: at most this. Of V of an
    embedding a request reads one number of each vector.
    """
    n, rank = len(collection.names), settings.rank
    method = METHODS[settings.method]
    served = settings if settings.store_dtype != "int4" else replace(settings, store_dtype="int8")
    adapters = _distinct(n, requests)
    clusters = _distinct(settings.clusters if method.clustered else 1, requests)
    core = {"jd-full": rank * rank, "jd-diag": rank}.get(settings.method, 0)
    lora_numbers = collection.factor_bytes // 4
    embeddings = embeddings_in(collection)
    size = flops = 0.0
    for module, (d_in, d_out) in collection.shapes.items():
        each = max(1, experts_of(collection, module))
        shared = 1 if settings.experts == "joint" else each  # bases of one cluster
        if settings.method == "none":
            of_one = lora_numbers / all_widths(collection) / n
            read_in = read_out = adapters * each * of_one
        elif settings.method == "svd":
            of_one = min(rank, d_in, d_out)
            read_in = read_out = adapters * each * of_one
        elif settings.method == "hydraopt":
            of_one = rank
            read_in, read_out = rank, rank * _distinct(settings.matrices, requests)
        else:
            of_one = rank
            read_in = read_out = clusters * shared * rank
        if module in embeddings:
            size += requests * of_one * vector_bytes(BLOCK, served) / BLOCK
            d_in = 0
        size += read_in * vector_bytes(d_in, served) + read_out * vector_bytes(d_out, served)
        padded = -(-core // BLOCK) * BLOCK if settings.quantised else core
        size += adapters * each * vector_bytes(padded, settings)
        flops += 2 * requests * each * (of_one * (d_in + d_out) + core)
    return StepCost(requests, round(size), round(flops))


def _distinct(count: int, draws: int) -> float:
    """How many of `count` are drawn in the mean, when drawn evenly `draws` times."""
    return count * (1 - (1 - 1 / count) ** draws)


def all_widths(collection: Collection) -> int:
    """d_in + d_out of all linear layers together, of experts of each."""
    shapes = collection.shapes.items()
    return sum(max(1, experts_of(collection, module)) * sum(shape) for module, shape in shapes)


def vector_bytes(width: int, settings: Settings) -> int:
    """Of so many numbers in the dtype of a store."""
    if settings.quantised:
        return code_width(width, settings.quantised) + 2 * scale_width(width)
    return width * getattr(torch, settings.store_dtype).itemsize
