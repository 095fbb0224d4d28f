"""What a decode step would read and compute, against steps that are drawn on a real store."""

import math

import pytest
import torch

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.choose.serving_cost import step_cost
from vllm_jd.compressor.run.compress import compress
from vllm_jd.row import CORE_FULL, CORE_NONE


def stored(width, dtype):
    """Bytes of a vector: of codes, with a step of two bytes for each 32."""
    codes = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5}[dtype] * width
    return codes if dtype == "bfloat16" else codes + 2 * math.ceil(width / 32)


@pytest.mark.parametrize("requests", [1, 6])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "clusters": 3},
        {"method": "jd-diag", "rank": 6},
        {"method": "hydraopt", "rank": 3, "matrices": 1, "steps": 1},
        {"method": "svd", "rank": 2},
        {"method": "none"},
        {"rank": 8, "store_dtype": "int8"},
        {"rank": 8, "store_dtype": "int4"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_it_is_what_steps_on_the_store_read(
    settings, requests, tmp_path, write_adapters, tiny_shapes
):
    """The basis vectors that the rows of a step's adapters name, each once, and their cores; of an
    embedding one number of each vector of V, for each request."""
    shapes = tiny_shapes | {"model.embed_tokens": (320, 24)}
    folders = write_adapters(tmp_path / "in", 9, kind="real", ranks=(3,), shapes=shapes)
    collection = read_adapters(folders)
    settings = Settings(**settings)
    store = compress(collection, tmp_path / "s", settings)
    cost = step_cost(collection, settings, requests)
    dtype = settings.store_dtype
    served = "int8" if dtype == "int4" else dtype  # 4-bit bases are served as codes of 8 bits
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(len(store), (200, requests), generator=generator).tolist()
    read = flops = 0.0
    for m, (module, (d_in, d_out)) in enumerate(collection.shapes.items()):
        rows = store.rows(module).tolist()
        embedding = module.endswith("embed_tokens")
        number = stored(32, served) / 32
        for step in steps:
            seen, cores = {"v": set(), "u": set()}, {}
            for adapter in step:
                for v, u, rank, kind, _ in (rows[i] for i in store.chosen[adapter, m].tolist()):
                    numbers = 0
                    if kind != CORE_NONE:
                        numbers = rank * rank if kind == CORE_FULL else rank
                        cores[adapter] = numbers
                    seen["v"] |= {*range(v, v + rank)}
                    seen["u"] |= {*range(u, u + rank)}
                    flops += 2 * (rank * (d_out if embedding else d_in + d_out) + numbers)
                    read += rank * number if embedding else 0
            read += 0 if embedding else len(seen["v"]) * stored(d_in, served)
            read += len(seen["u"]) * stored(d_out, served)
            read += sum(stored(numbers, dtype) for numbers in cores.values())
    assert cost.bytes == pytest.approx(read / len(steps), rel=0.04)
    assert cost.flops == pytest.approx(flops / len(steps), rel=0.04)
