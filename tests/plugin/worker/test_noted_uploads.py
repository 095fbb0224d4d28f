"""Which layers the uploads in slots adapt: those that the store lacks cost a step more."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from tests.plugin.conftest import HIDDEN, SHAPES, TinyModel
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api.requests import adapter_request

N, VOCABULARY = 7, 16
DOWN = {name: shape for name, shape in SHAPES.items() if name.endswith("down_proj")}
QUERY = {name: shape for name, shape in SHAPES.items() if name.endswith("q_proj")}
HEAD = {"lm_head": (HIDDEN, VOCABULARY)}


class WithHead(TinyModel):
    """The tiny model, part of which may be compiled, and an output layer."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=HIDDEN))

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Module()
        self.logits_processor = LogitsProcessor(VOCABULARY)
        self.model.do_not_compile = False

    def compute_logits(self, hidden_states):
        raise NotImplementedError


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("down")
    folders = write_adapters(folder / "in", N, shapes=DOWN)
    settings = Settings(rank=3, clusters=2, store_dtype="float32")
    return compress(read_adapters(folders), folder / "store", settings)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory, write_adapters):
    """What they adapt → a request for one."""
    folder = tmp_path_factory.mktemp("uploads")
    shapes = {"head": HEAD, "down": DOWN | HEAD, "query": QUERY | HEAD}
    return {
        kind: LoRARequest(kind, 50 + i, str(*write_adapters(folder / kind, 1, shapes=its)))
        for i, (kind, its) in enumerate(shapes.items())
    }


@pytest.fixture
def runner(store, make_runner):
    return make_runner(store, WithHead(), uploads=1, core_slots=4, max_blend=2).load()


def in_use(runner):
    """The layers that the store has nothing for, and that are looked at all the same."""
    layers = runner.lora_manager.layers
    return {name.rpartition(".")[2] for name, its in layers.items() if its.in_use} - {"down_proj"}


def test_only_uploads_on_compiled_layers_that_know_no_adapters_make_a_step_eager(runner, uploads):
    """The output layer is none of the compiled ones."""
    found = {}
    for kind, request in uploads.items():
        runner.begin([None, request])
        found[kind] = runner.model.model.do_not_compile
        assert "lm_head" in in_use(runner)
        runner.begin([None])
        assert not runner.model.model.do_not_compile
    assert found == {"head": False, "down": False, "query": True}


@pytest.mark.parametrize("kind", ["head", "query"])
def test_layers_that_only_a_gone_upload_adapted_are_not_in_use(runner, store, uploads, kind):
    runner.begin([uploads[kind]])
    assert in_use(runner) == {"head": {"lm_head"}, "query": {"lm_head", "qkv_proj"}}[kind]
    for names in (store.names[:4], store.names[4:]):  # its core slot is somebody else's then
        runner.begin([adapter_request(store, name) for name in names])
    assert in_use(runner) == set()
    assert not runner.lora_manager._slots.eager.any()


def test_a_blend_takes_the_long_slot_of_one_with_an_upload(runner, store, uploads):
    cluster = store.chosen[:, 0, 0].tolist()
    names = store.names[cluster.index(0)], store.names[cluster.index(1)]
    weights = (0.25, 0.5, 0.75, 1.0)  # as many as there are long slots
    upload = Path(uploads["query"].lora_path)
    runner.add_lora(uploads["query"])  # else it goes with its blend, whose slot is free then
    for request in [adapter_request(store, {names[0]: w, upload: 0.5}) for w in weights]:
        runner.begin([request])
        assert in_use(runner) == {"lm_head", "qkv_proj"}
    for request in [adapter_request(store, dict.fromkeys(names, w)) for w in weights]:
        assert in_use(runner) == {"lm_head", "qkv_proj"}
        runner.begin([request])
    assert in_use(runner) == set()
