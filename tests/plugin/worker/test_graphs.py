"""The plugin between the runner's recording of CUDA graphs and their replay, without a GPU.

vLLM's own code asks for the cases, sets the stand-ins before each recording and maps a step to its
case. Only the graph is ours: a list of what was called with which tensors, and replaying calls the
same again with the same tensors, whatever they hold by then. As with a CUDA graph, no Python of
the model or the plugin runs then.
"""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import CUDAGraphMode
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.lora_utils import (
    LoraState,
    create_lora_capture_hook,
    get_lora_capture_cases,
    get_num_active_loras_for_dispatch,
)

from tests.plugin.conftest import HIDDEN, LAYERS, SHAPES, TinyModel
from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.kernels import reference, tiles
from vllm_jd.plugin.api.requests import adapter_request
from vllm_jd.plugin.worker import layer as layers
from vllm_jd.plugin.worker import step

N = 7
STORED = {name: shape for name, shape in SHAPES.items() if "self_attn" in name}
SIZES = (4, 8)
LINEAR = 4 * LAYERS


class Graph(TorchDispatchMode):
    """What was called while it was entered, to be called again. Kernels count as one call."""

    def __init__(self):
        super().__init__()
        self.calls, self.kernels = [], []
        self._in_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self._in_kernel:
            self.calls.append((function, args, kwargs or {}, result))
        return result

    def __enter__(self):
        # An earlier test's model that is collected now would have its release recorded: replaying
        # that frees it again, and the process ends.
        gc.collect()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error):
        gc.enable()
        return super().__exit__(*error)

    def launch(self, kernel, *args, **kwargs):
        self._in_kernel = True
        kernel(*args, **kwargs)
        self._in_kernel = False
        self.calls.append((kernel, args, kwargs, None))
        self.kernels.append((args, kwargs))

    def replay(self):
        for function, args, kwargs, recorded in self.calls:
            result = function(*args, **kwargs)
            if torch.is_tensor(recorded) and recorded.data_ptr() != result.data_ptr():
                recorded.copy_(result)


@pytest.fixture
def recording(monkeypatch):
    """The Graph that kernels are recorded into; None: they run."""
    state = SimpleNamespace(graph=None, moved=False)

    def kernel(y, x, pools, token_slots, order=None):
        if order is not None:
            adapted = [t for t, slot in enumerate(token_slots[: len(x)].tolist()) if slot >= 0]
            assert len(order) == tiles.places(len(x))
            assert sorted(order[order >= 0].tolist()) == adapted, "those without have no place"
            for tile in order.view(-1, tiles.tile_of(len(x))):
                its = token_slots[tile[tile >= 0].long()].tolist()
                assert len({*state.cluster_of(its)}) <= 1, "a cluster has tiles of its own"
            arranged = order[order >= 0].tolist()
            state.moved |= arranged != sorted(arranged)
        reference.add_adapters(y, x, pools, token_slots)

    def run(*args, **kwargs):
        graph = state.graph
        graph.launch(kernel, *args, **kwargs) if graph else kernel(*args, **kwargs)

    monkeypatch.setattr(layers, "backend", lambda device: run)
    return state


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_adapters):
    folder = tmp_path_factory.mktemp("graphs")
    write_adapters(folder / "adapters", N, shapes=STORED)
    settings = Settings(rank=3, clusters=2, store_dtype="float32")
    return compress(read_adapters([folder / "adapters"]), folder / "store", settings)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory, write_adapters):
    """Two uncompressed adapters on all linear layers."""
    folder = tmp_path_factory.mktemp("uploads")
    folders = write_adapters(folder, 2, shapes=SHAPES, prefix="upload-", seed=5)
    return {folder.name: folder for folder in folders}


def record(runner, cases):
    """(case, tokens) → (graph, its input, its output), as `ModelCudaGraphManager.capture` goes."""
    hook = create_lora_capture_hook(runner.lora_config, runner)
    graphs = {}
    x = torch.zeros(max(SIZES), HIDDEN)
    with runner.maybe_setup_dummy_loras(runner.lora_config):
        for case in cases:
            for n in SIZES:
                hook(case, min(n, 4), n)
                runner.model(x[:n])  # warm-up
                hook(case, min(n, 4), n)
                graph = runner.recording.graph = Graph()
                with graph:
                    y = runner.model(x[:n])
                runner.recording.graph = None
                graphs[case, n] = graph, x, y
    return graphs


def play(runner, graphs, cases, batch):
    """Replay one step of (LoRARequest or None, tokens `[n, d]`) as the V2 runner does: the case
    that was replayed, and the output of the tokens."""
    state = LoraState(4)
    ids = [f"request-{i}" for i in range(len(batch))]
    lengths = np.array([len(tokens) for _, tokens in batch])
    for i, request in enumerate(runner.hold([request for request, _ in batch])):
        state.add_request(ids[i], i, request)
    dispatcher = SimpleNamespace(lora_capture_cases=cases)
    dispatcher._lora_dispatch_map, dispatcher._max_lora_case = (
        CudaGraphManager._build_lora_dispatch_map(dispatcher)
    )
    active = get_num_active_loras_for_dispatch(runner.lora_config, state, ids, dummy_run=False)
    case = CudaGraphManager._resolve_effective_loras(dispatcher, active)
    runner._set_active_loras(*state.make_lora_inputs(ids, np.arange(len(batch)), lengths))
    n = lengths.sum()
    graph, x, y = graphs[case, next(size for size in SIZES if size >= n)]
    x.fill_(float("nan"))  # padding: nobody may look at it
    x[:n] = torch.cat([tokens for _, tokens in batch])
    graph.replay()
    return case, y[:n]


@pytest.mark.parametrize("slots", [N, 4], ids=["resident", "paged"])
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("specialised", [False, True], ids=["one graph", "specialised"])
def test_replays_add_the_adapters_of_their_own_step(
    specialised, ordered, slots, store, uploads, recording, make_runner, monkeypatch
):
    if ordered:
        monkeypatch.setattr(step, "backend_name", lambda device: "triton")
    model = TinyModel()
    runner = make_runner(store, model, graphs=CUDAGraphMode.FULL, core_slots=slots, max_loras=5)
    runner.lora_config.specialize_active_lora = specialised
    runner.recording = recording
    runner.load()
    manager = runner.lora_manager
    recording.cluster_of = lambda slots: [cluster_of(runner, store, i) for i in slots]
    cases = get_lora_capture_cases(runner.lora_config, runner.vllm_config.compilation_config)
    assert cases == ([0, 1, 2, 4, 6] if specialised else [0, 6])
    graphs = record(runner, cases)
    shared = manager._step
    for (case, n), (graph, _, _) in graphs.items():
        assert len(graph.kernels) == (LINEAR if case else 0), "also where the store has nothing"
        for (y, x, _, token_slots), kwargs in graph.kernels:
            assert len(y) == len(x) == n
            assert token_slots.data_ptr() == shared.token_slots.data_ptr()
            assert not ordered or kwargs["order"].data_ptr() == shared.order.data_ptr()

    generator = torch.Generator().manual_seed(1)
    deltas = {
        name: {module: b.double() @ a.double() for module, (b, a) in store.factors(name).items()}
        for name in store.names
    }
    peft = {name: _peft(folder) for name, folder in uploads.items()}
    everything = deltas | peft | {None: {}}
    steps = [
        [store.names[0]],
        [store.names[1], None, store.names[0]],
        [None, None],
        ["upload-000", store.names[5]],
        [store.names[2], store.names[3], store.names[5], store.names[6]],
        ["upload-001", "upload-000", None, store.names[3]],
        [None],
    ]
    seen = set()
    for now, names in enumerate(steps):
        batch = []
        for i, name in enumerate(names):
            if name in uploads:
                request = LoRARequest(name, 100 + int(name[-1]), str(uploads[name]))
            else:
                request = name and adapter_request(store, name)
            tokens = torch.randn(1 + (now + i) % 2, HIDDEN, generator=generator)
            batch.append((request, tokens))
        case, found = play(runner, graphs, cases, batch)
        seen.add(case)
        wanted = torch.stack(
            [
                model.expected(token, everything[name])
                for name, (_, tokens) in zip(names, batch, strict=True)
                for token in tokens
            ]
        )
        distance = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        # Two float32 blocks amplify rounding, by how much depends on the processor; another
        # adapter's numbers would be off by more than a tenth.
        assert float(distance.max()) < 1e-3
    assert seen == ({0, 1, 2, 4} if specialised else {0, 6})
    assert recording.moved == ordered


def cluster_of(runner, store, slot):
    """What one slot's tokens share with others: the adapter's cluster of the first module."""
    lying = {
        runner.adapters.residency.core_slot(a): a for a in runner.adapters.residency.adapters()
    }
    adapter = lying.get(slot)
    if adapter is None or adapter.source != 1:
        return f"slot {slot}"
    return int(store.chosen[adapter.number, 0, 0])


def _peft(folder):
    from tests.conftest import _peft_deltas

    return _peft_deltas(folder)


def test_without_graphs_a_layer_that_nothing_adapts_is_not_called(
    store, uploads, recording, make_runner
):
    runner = make_runner(store, TinyModel()).load()
    recording.graph = Graph()
    request = adapter_request(store, store.names[0])
    runner._set_active_loras((request.lora_int_id,), (request.lora_int_id,) * 2, {request})
    with recording.graph:
        runner.model(torch.randn(2, HIDDEN))
    assert len(recording.graph.kernels) == 2 * LAYERS
