"""What an interpreter run loads and stores equals what is counted from its plan, byte by byte."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.kernel_traffic import Row, traffic, uniform_content
from tests.kernels.test_kernels import CORE_KIND, KINDS, make_case
from tests.kernels.triton.interpreted.cases import (
    ROWS,
    TILES_16,
    TILES_64,
    VARIANTS,
    run,
    shuffled,
)
from vllm_jd.kernels.triton import backend
from vllm_jd.kernels.triton.plan import LayerShape, plan
from vllm_jd.row import CORE_DIAGONAL, CORE_NONE, CORE_SLOT, RANK

INDEX_BYTES = 200  # of a program and each of its tokens: slots, order, rows, the table


class Recorder:
    """Bytes that each launch loads and stores, by the tensor that they belong to."""

    def __init__(self, monkeypatch):
        self.launches = []
        self.places = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        start = backend._Handle._launch

        def recorded_load(builder, pointers, mask, *rest):
            loaded = load(builder, pointers, mask, *rest)
            self.add("loaded", pointers.data, mask.data, loaded.data.itemsize)
            return loaded

        def recorded_store(builder, pointers, value, mask, *rest):
            self.add("stored", pointers.data, mask.data, value.data.itemsize)
            return store(builder, pointers, value, mask, *rest)

        def recorded_launch(handle, one, arguments):
            self.launches.append({"loaded": Counter(), "stored": Counter()})
            self.places = self.known | {"y": [arguments["y"]]} if "y" in arguments else self.known
            if "x" in arguments:
                self.places = self.places | {"x": [arguments["x"]]}
            self.places = self.places | {"scratch": [arguments[n] for n in "zh" if n in arguments]}
            return start(handle, one, arguments)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", recorded_store)
        monkeypatch.setattr(backend._Handle, "_launch", recorded_launch)

    def watch(self, pools):
        int8 = [pools.v_int8, *(pools.u_int8 or [])]
        parts = [[] if one is None else [one.codes, one.steps] for one in int8]
        self.known = {
            "v": [pools.v, *parts[0]],
            "u": [*pools.u, *(tensor for part in parts[1:] for tensor in part)],
            "cores": [pools.cores] if pools.core_steps is None else [],
            "scales": pools.scales or [],
            "codes": [pools.cores] if pools.core_steps is not None else [],
            "steps": [pools.core_steps] if pools.core_steps is not None else [],
        }

    def add(self, what, pointers, mask, size):
        addresses = np.asarray(pointers)[np.asarray(mask).astype(bool)]
        left = len(addresses)
        for name, tensors in self.places.items():
            for tensor in tensors:
                begin = tensor.data_ptr()
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                end = begin + (last + 1) * tensor.element_size()
                found = int(((addresses >= begin) & (addresses < end)).sum())
                self.launches[-1][what][name] += found * size
                left -= found
        self.launches[-1][what]["indices"] += left * size


def content(case, order):
    """The case's tokens, in the order in which tiles take them, as the plan's `traffic` wants."""
    pools = case.pools
    tokens = []
    for t in range(len(case.x)) if order is None else order.tolist():
        slot = int(case.token_slots[t]) if t >= 0 else -1
        slices = []
        for s, lines in enumerate(pools.rows[slot].tolist() if slot >= 0 else []):
            n = len(pools.u_int8[s]) if pools.u_int8 else 0
            slices.append(
                tuple(
                    Row(
                        rank,
                        v,
                        u,
                        None if kind == CORE_NONE else 10**6 * core + offset,
                        kind == CORE_DIAGONAL,
                        None if scale < 0 else scale,
                        v < len(pools.v_int8 or ()),
                        u < n,
                    )
                    for v, u, rank, kind, scale, core, offset in lines
                )
            )
        tokens.append(tuple(slices))
    return tokens


def assert_counts(monkeypatch, case, config, order=None):
    recorder = Recorder(monkeypatch)
    recorder.watch(case.pools)
    run(case, config, order)
    made = backend.plan_of(case.pools, len(case.x), places=None if order is None else len(order))
    model = traffic(made, content(case, order if made.variant == "tiles" else None))
    assert len(recorder.launches) == len(made.launches)
    for one, found, said in zip(made.launches, recorder.launches, model, strict=True):
        loaded = Counter(said.loaded)
        loaded["scratch"] = loaded.pop("z", 0) + loaded.pop("h", 0)
        stored = Counter({"y": said.stored.get("y", 0)})
        stored["scratch"] = said.stored.get("z", 0) + said.stored.get("h", 0)
        programs = int(np.prod(one.grid)) * made.block_m
        assert found["loaded"].pop("indices") <= INDEX_BYTES * programs * made.shape.depth
        found["stored"].pop("indices", None)
        assert_codes(case.pools, found["loaded"], loaded)
        assert found["loaded"] == loaded, one.kernel  # a Counter takes absent for 0
        assert found["stored"] == stored, one.kernel
        assert loaded.total() > 0 and stored.total() > 0
        assert said.distinct_bytes <= said.loaded_bytes


def assert_codes(pools, found, said):
    """Each code is loaded once, with its step; the plan counts its part of what neighbours share.

    Both are then left out of `found` and `said`.
    """
    numbers, steps = found.pop("codes", 0), found.pop("steps", 0)
    if pools.core_steps is not None:
        assert steps == 2 * numbers
        bits = numbers * (8 if pools.cores.dtype == torch.int8 else 4) + numbers * 16 / 32
        assert said.pop("cores", 0) == -(-bits // 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(monkeypatch, variant):
    case = make_case(
        n_tokens=18,
        d_in=97,
        d_out=(75, 17),
        ranks=(3, 20),
        depth=2,
        dtype=torch.bfloat16,
        int8=True,
        layout="runs",
    )
    assert_counts(monkeypatch, case, VARIANTS[variant][0], shuffled(18))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [ROWS, TILES_16, TILES_64], ids=["rows", "16", "64"])
def test_chunks_of_ranks(monkeypatch, config, kind):
    case = make_case(
        n_tokens=4,
        d_in=70,
        d_out=(40,),
        ranks=(40, 150),
        slots=3,
        clusters=2,
        kinds=(KINDS[kind],),
        dtype=torch.float16,
        layout="distinct",
    )
    assert_counts(monkeypatch, case, replace(config, programs=(4, 4)))


def test_uniform_content(monkeypatch):
    """The content that the roofline is computed from, against pools that are just that."""
    shape = LayerShape(64, (32, 16), max_rank=8)
    case = make_case(
        n_tokens=12, d_in=64, d_out=(32, 16), ranks=(8, 8), dtype=torch.bfloat16, scaled=(False,)
    )
    tokens = uniform_content(shape, 12, 6, 2)
    rows = case.pools.rows
    rows[..., RANK] = 8
    rows[..., CORE_KIND] = KINDS["full"]
    for slot in range(6):
        for s in range(2):
            cluster = slot % 2
            rows[slot, s, 0, :2] = torch.tensor([(cluster * 2 + s) * 8, cluster * 8])
            rows[slot, s, 0, CORE_SLOT:] = torch.tensor([slot, s * 64])
    picks = sorted((t % 6 % 2, t % 6) for t in range(12))
    case.token_slots[:12] = torch.tensor([slot for _, slot in picks])
    recorder = Recorder(monkeypatch)
    recorder.watch(case.pools)
    for config in (ROWS, TILES_16):
        recorder.launches.clear()
        run(case, config)
        made = plan(shape, 12, config)
        for found, said in zip(recorder.launches, traffic(made, tokens), strict=True):
            for part in ("x", "v", "u", "cores", "y"):
                assert found["loaded"][part] == said.loaded.get(part, 0)
