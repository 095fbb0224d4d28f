"""Adapters of the embedding on one worker: each token's row gets its column of B·A."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer

from tests.plugin.conftest import HIDDEN, SHAPES, TinyModel
from tests.plugin.worker.layer_pools import layer_pools
from tests.several_rows import compress
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.worker.layer import Slice
from vllm_jd.plugin.worker.output import WholeLayer
from vllm_jd.plugin.worker.step import Step

VOCABULARY, N = 50, 5
TABLE = "model.embed_tokens"
WITH_TABLE = SHAPES | {TABLE: (VOCABULARY, HIDDEN)}
METHODS = {
    "clusters": Settings(rank=3, clusters=3, store_dtype="float32"),
    "several rows": Settings(rank=2, clusters=2, store_dtype="float32"),
    "svd": Settings(method="svd", rank=2, store_dtype="float32"),
    "int8": Settings(rank=3, clusters=3, store_dtype="int8"),
}
ROWS = {"several rows": {"own": 1, "mean": 1}}


class Embedded(TinyModel):
    """Blocks behind an embedding."""

    def __init__(self):
        super().__init__()
        table = VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=torch.float32)
        weight = torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(2))
        table.weight.data.copy_(weight)
        self.model.embed_tokens = table
        self.weights[TABLE] = weight.double()

    def forward(self, ids):
        return super().forward(self.model.embed_tokens(ids))

    def expected(self, token, deltas):
        x = self.weights[TABLE][token]
        if TABLE in deltas:
            x = x + deltas[TABLE][:, token]
        return super().expected(x, deltas)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("adapters")
    return write_adapters(folder, N, shapes=WITH_TABLE, ranks=(2, 3), kind="real")


@pytest.fixture(scope="module")
def upload(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("upload")
    return write_adapters(folder, 1, shapes=WITH_TABLE, ranks=(8,), seed=9, kind="real")[0]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, adapters):
    known = {}

    def store_of(method):
        if method not in known:
            path = tmp_path_factory.mktemp("store") / "s"
            rows = ROWS.get(method, {})
            known[method] = compress(read_adapters(adapters), path, METHODS[method], **rows)
        return known[method]

    return store_of


def deltas_of(store, name):
    return {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}


def added(known, blend):
    modules = {module for name in blend for module in known[name]}
    return {
        module: sum(w * known[name][module] for name, w in blend.items() if module in known[name])
        for module in modules
    }


def check(runner, requests, wanted, bound=1e-4):
    """A step of one token for each request against the deltas that each should have."""
    ids = torch.randint(0, VOCABULARY, (len(requests),), generator=torch.Generator().manual_seed(1))
    runner.begin(requests)
    found = runner.model(ids)
    for i, deltas in enumerate(wanted):
        expected = Embedded().expected(int(ids[i]), deltas)
        error = float((found[i].double() - expected).norm() / expected.norm())
        assert error < bound, f"request {i} is off by {error:.3g}"
    return ids, found


@pytest.mark.parametrize("method", METHODS)
def test_each_token_gets_its_adapters_column(method, stores, upload, make_runner, peft_deltas):
    """Compressed adapters, blends within and across clusters and with an upload, the upload, and
    the base model, in one batch."""
    store = stores(method)
    runner = make_runner(store, Embedded(), max_blend=4).load()
    known = {name: deltas_of(store, name) for name in store.names} | {upload: peft_deltas(upload)}
    a, b, c, d, e = store.names
    blends = [{a: 0.7, b: 0.3}, {a: 0.5, b: -0.5, c: 1.0, upload: 0.5}, {d: 2.0}]
    # What is summed of int8 cores is rounded to 8 bits once more.
    bound = 0.02 if store.manifest.quantised else 1e-4
    for blend in blends:
        requests = [None, adapter_request(store, blend), adapter_request(store, e)]
        requests.append(LoRARequest("upload", 50, str(upload)))
        check(runner, requests, [{}, added(known, blend), known[e], known[upload]], bound)


def test_fully_sharded_it_is_whole_on_each_worker(stores, upload, make_runner, peft_deltas):
    store = stores("several rows")
    runner = make_runner(store, Embedded(), max_blend=4)
    runner.lora_config.fully_sharded_loras = True
    runner.load()
    assert not runner.adapters.capacity.long
    requests = [adapter_request(store, name) for name in store.names[:2]]
    requests += [LoRARequest("upload", 50, str(upload)), None]
    wanted = [deltas_of(store, name) for name in store.names[:2]]
    check(runner, requests, [*wanted, peft_deltas(upload), {}])


def test_bases_are_read_when_they_are_needed(stores, make_runner):
    store = stores("svd")
    runner = make_runner(store, Embedded(), adapter_memory=24_000).load()
    assert not runner.adapters.capacity.whole
    for name in (*store.names, *store.names[::-1]):
        requests = [adapter_request(store, name), None]
        check(runner, requests, [deltas_of(store, name), {}])
    assert runner.adapters.residency.fills["basis"] > N


def test_without_an_adapter_a_token_keeps_its_row_bit_by_bit(stores, make_runner):
    store = stores("clusters")
    model = Embedded()
    table = model.model.embed_tokens
    ids = torch.tensor([3, 3, 49, 0])
    before = table(ids)
    runner = make_runner(store, model).load()
    name = store.names[0]
    runner.begin([None, adapter_request(store, name), None, None])
    found = table(ids)
    assert torch.equal(found[[0, 2, 3]], before[[0, 2, 3]])
    delta = deltas_of(store, name)[TABLE][:, 3]
    torch.testing.assert_close(found[1].double(), before[1].double() + delta, rtol=0, atol=1e-5)
    runner.begin([None] * 4)
    assert torch.equal(table(ids), before)


def test_bases_in_8_bits_stay_so(stores):
    """In the store's own dtype, beside an upload in 16 bits."""
    store = stores("int8")
    info = store.manifest.modules[store.module_index(TABLE)]
    step = Step.make(16, torch.device("cpu"))
    pools, slots = layer_pools(
        store, WholeLayer(VOCABULARY, (HIDDEN,)), [Slice(TABLE, info)], step,
        max_loras=1, max_rank=4, dtype=store.dtype, embedding=True,
    )  # fmt: skip
    assert pools._products[0].pools.v_int8 is not None and pools.pools.u_int8 is not None
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(4, VOCABULARY, generator=generator),
        torch.randn(HIDDEN, 4, generator=generator),
    )
    pools.set_adapter(0, [(a, b)])
    taken = slots.take(range(N))
    of_token = [taken[i] for i in range(N)] + [slots.count_of_store, -1]
    step.begin(np.array(of_token, dtype=np.int32), active=True)
    ids = torch.tensor([7, 7, 49, 0, 31, 7, 7])
    before = torch.randn(len(ids), HIDDEN, generator=generator).to(store.dtype)
    found = pools.add_embedding(before.clone(), ids)
    deltas = [deltas_of(store, name)[TABLE] for name in store.names]
    deltas += [b.to(store.dtype).double() @ a.to(store.dtype).double(), torch.zeros_like(deltas[0])]
    added = torch.stack([delta[:, token] for delta, token in zip(deltas, ids, strict=True)])
    error = (found.double() - before.double() - added).norm(dim=1) / (1 + added.norm(dim=1))
    assert float(error.max()) < 0.02
    assert torch.equal(found[-1], before[-1])


def test_an_upload_is_served_beside_a_store_without(
    tmp_path, write_adapters, upload, make_runner, peft_deltas
):
    folders = write_adapters(tmp_path / "adapters", 2, shapes=SHAPES)
    store = compress(read_adapters(folders), tmp_path / "s", Settings(rank=2))
    runner = make_runner(store, Embedded()).load()
    table = runner.lora_manager.layers[TABLE]
    name = store.names[0]
    check(runner, [adapter_request(store, name), None], [deltas_of(store, name), {}], 1e-2)
    assert not table.in_use
    requests = [LoRARequest("upload", 50, str(upload)), None]
    check(runner, requests, [peft_deltas(upload), {}])
    assert table.in_use


def test_where_it_cannot_be_adapted_that_is_said(stores, upload, make_runner):
    """In a pipeline's later stages others have it; with prompts that are embeddings nobody."""
    store = stores("clusters")
    later = Embedded()
    later.model.embed_tokens = PPMissingLayer()
    assert TABLE not in make_runner(store, later).load().lora_manager.layers
    runner = make_runner(store, Embedded())
    runner.vllm_config.model_config.enable_prompt_embeds = True
    with pytest.raises(ValueError, match=r"--enable-prompt-embeds, .* adapts model\.embed_tokens"):
        runner.load()
    runner = make_runner(store, Embedded())
    runner.lora_config.target_modules = ["q_proj"]
    with pytest.raises(ValueError, match=r"modules that the served model does not have"):
        runner.load()
    headed = Embedded()
    headed.model.embed_tokens = ParallelLMHead(VOCABULARY, HIDDEN, params_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"1 modules .*\(such as model\.embed_tokens\)"):
        make_runner(store, headed).load()


def test_another_vocabulary_is_named(tmp_path, write_adapters, make_runner, stores):
    shapes = SHAPES | {TABLE: (VOCABULARY + 2, HIDDEN)}
    folders = write_adapters(tmp_path / "adapters", 2, shapes=shapes)
    store = compress(read_adapters(folders), tmp_path / "s", Settings(rank=2))
    with pytest.raises(ValueError, match=rf"embed_tokens is {HIDDEN} × {VOCABULARY + 2}"):
        make_runner(store, Embedded()).load()
    runner = make_runner(stores("clusters"), Embedded()).load()
    with pytest.raises(ValueError, match=rf"embed_tokens: found B .* and A \[4, {VOCABULARY + 2}"):
        runner.add_lora(LoRARequest("wide", 1, str(folders[0])))
