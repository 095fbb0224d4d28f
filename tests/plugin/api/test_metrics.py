"""Our metrics, in one API process and in several, and vLLM's list of adapter names kept short."""

import asyncio
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, values
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api import metrics
from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.plugin.api.callers import admit, show_names_to_callers
from vllm_jd.plugin.api.endpoints import StoreEndpoints
from vllm_jd.plugin.api.metrics import KINDS
from vllm_jd.plugin.api.requests import store_path
from vllm_jd.plugin.patches import REPLACEMENTS
from vllm_jd.store.blend import of_mapping

NAMES = "vllm:lora_requests_info"


class Engine:
    """As much of vLLM's EngineClient as the plugin sees."""

    def __init__(self, name, *stat_loggers):
        self.model_config = SimpleNamespace(served_model_name=name, max_model_len=512)
        self.logger_manager = SimpleNamespace(stat_loggers=list(stat_loggers))
        self.asked = []

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None, priority=0):
        """An asynchronous generator, as vLLM's."""
        self.asked.append((prompt, sampling_params, request_id, lora_request, priority))
        yield "one"
        yield "two"

    def shutdown(self, timeout=None):
        """As vLLM's."""


def state_of(engine):
    base = [BaseModelPath(engine.model_config.served_model_name, "/models/base")]
    registry = OpenAIModelRegistry(engine.model_config, base)

    async def check(request):
        """Stands in for vLLM's."""

    models = SimpleNamespace(
        is_base_model=registry.is_base_model,
        lora_requests={},
        lora_id_counter=AtomicCounter(0),
        lora_resolvers=[],
        load_lora_adapter=check,
        unload_lora_adapter=check,
        _check_load_lora_adapter_request=check,
    )
    return SimpleNamespace(openai_serving_models=models)


def start(engine, config):
    """What vLLM does with the endpoint plugin when a server starts; returns the models' state."""
    state = state_of(engine)
    args = SimpleNamespace(additional_config=config)
    asyncio.run(StoreEndpoints().init_state(engine, state, args))
    return state


def value(name, **labels):
    return REGISTRY.get_sample_value(f"vllm_jd:{name}", labels)


async def drain(generator):
    return [output async for output in generator]


@pytest.fixture(scope="module")
def store(write_adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    adapters = read_adapters(write_adapters(folder / "adapters", 5))
    return compress(adapters, folder / "store", Settings(rank=4, clusters=1))


@pytest.fixture
def config(store):
    return {"vllm_jd": {"store": str(store.path)}}


def test_the_gauges_say_what_the_store_is(store, config):
    engine = Engine("gauges")
    start(engine, config)
    start(engine, config)  # a second time: no complaint, the same numbers
    files = [f for f in (store.path / "generations" / "1").iterdir() if f.name != "manifest.json"]
    assert value("store_adapters", model_name="gauges") == 5
    assert value("store_generation", model_name="gauges") == 1
    assert value("store_bytes", model_name="gauges") == sum(f.stat().st_size for f in files)


def test_requests_are_counted_by_the_kind_of_their_adapter(store, config):
    engine = Engine("counted")
    models = start(engine, config).openai_serving_models
    start(engine, config)  # wrapped once all the same
    compressed = models.lora_requests[store.names[0]]
    assert compressed.lora_path == store_path(store.path, 1)
    uncompressed = LoRARequest("plain", 99, "/adapters/plain")
    path = store_path(store.path, 1)
    blend = blend_request("blend", of_mapping({"a": 0.5}), {"a": path})

    async def ask():
        for lora in (None, compressed, blend, uncompressed, compressed, None):
            outputs = engine.generate("p", "s", "r", lora_request=lora, priority=3)
            assert await drain(outputs) == ["one", "two"]
        assert await drain(engine.generate("p", "s", "r")) == ["one", "two"]

    assert [counted("counted", kind) for kind in KINDS] == [0, 0, 0, 0]
    asyncio.run(ask())
    assert {kind: counted("counted", kind) for kind in KINDS} == {
        "store": 2,
        "uncompressed": 1,
        "blend": 1,
        "base": 3,
    }
    assert engine.asked[1] == ("p", "s", "r", compressed, 3)
    assert engine.asked[2] == ("p", "s", "r", blend, 3)
    assert engine.asked[-1] == ("p", "s", "r", None, 0)


def counted(model, kind):
    return value("adapter_requests_total", model_name=model, kind=kind)


def test_no_series_has_an_adapters_name(store, config):
    start(Engine("names"), config)
    with_keys = ("vllm_jd:door_waiting", "vllm_jd:requests_refused")  # if another test had some
    ours = [m for m in REGISTRY.collect() if m.name.startswith("vllm_jd:")]
    ours = [metric for metric in ours if metric.name not in with_keys]
    assert {m.name for m in ours} == {
        "vllm_jd:store_adapters",
        "vllm_jd:store_generation",
        "vllm_jd:store_bytes",
        "vllm_jd:adapter_requests",
    }
    labels = {key for m in ours for sample in m.samples for key in sample.labels}
    assert labels == {"model_name", "kind"}


def test_a_new_engine_of_vllm_does_not_take_ours_away(config):
    start(Engine("kept"), config)
    unregister_vllm_metrics()  # what every new engine does
    assert value("store_adapters", model_name="kept") == 5


def test_without_a_store_nothing_is_counted_or_replaced():
    engine = Engine("inert")
    stock = engine.generate
    start(engine, None)
    assert engine.generate == stock
    assert value("store_adapters", model_name="inert") is None


@pytest.fixture
def as_process(monkeypatch, tmp_path):
    """`as_process(i)`: from here on metrics are made as in API process i of several."""
    made = (metrics._gauges, metrics._requests)

    def forget():
        for maker in made:
            found = maker()
            for metric in found if isinstance(found, tuple) else (found,):
                REGISTRY.unregister(metric)
            maker.cache_clear()

    def become(number):
        forget()
        monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue(lambda: number))

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    yield become
    forget()


def test_several_api_processes_are_not_added_up_where_they_say_the_same(
    config, as_process, tmp_path
):
    for number in (1, 2):
        as_process(number)
        engine = Engine("several")
        start(engine, config)
        asyncio.run(drain(engine.generate("p", "s", "r")))
    assert len(list(tmp_path.glob("gauge_mostrecent_*.db"))) == 2
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    model = {"model_name": "several"}
    assert registry.get_sample_value("vllm_jd:store_adapters", model) == 5
    assert registry.get_sample_value("vllm_jd:store_generation", model) == 1
    # Requests are each process's own: they are added up.
    base = model | {"kind": "base"}
    assert registry.get_sample_value("vllm_jd:adapter_requests_total", base) == 2


class StatLogger(PrometheusStatLogger):
    """vLLM's own `record`, with a real gauge for the names of adapters; the rest are stand-ins."""

    labelname_max_lora = "max_lora"
    labelname_waiting_lora_adapters = "waiting_lora_adapters"
    labelname_running_lora_adapters = "running_lora_adapters"
    max_lora = 1024
    kv_cache_metrics_enabled = False

    def __init__(self):
        self.registry = CollectorRegistry()
        names = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
        self.gauge_lora_info = Gauge(NAMES, "…", names, registry=self.registry)

    def __getattr__(self, name):
        return MagicMock()

    def steps(self, count):
        for i in range(count):
            running = {f"adapter-{i}": 1, f"adapter-{i + 1}": 1}
            self.record(SchedulerStats(running_lora_adapters=running), None)

    def series(self):
        (metric,) = self.registry.collect()
        return [sample.labels["running_lora_adapters"] for sample in metric.samples]


def test_of_vllms_lists_of_adapters_only_the_latest_is_kept(config):
    stock, bounded = StatLogger(), StatLogger()
    stock.steps(50)
    assert len(stock.series()) == 50  # what this is about; if vLLM mends it, ours can go
    for _ in range(2):
        start(Engine("bounded", bounded), config)
    bounded.steps(50)
    assert bounded.series() == ["adapter-49,adapter-50"]
    bounded.record(SchedulerStats(running_lora_adapters={}), None)
    assert bounded.series() == [""]


class Watched:
    """Notes which of an object's attributes are set from outside."""

    def __init__(self, inner):
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "written", [])

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        self.written.append(name)
        setattr(self.inner, name, value)


def test_what_is_replaced_in_the_api_process_is_in_the_table(config):
    bounded = StatLogger()
    engine = Watched(Engine("watched", bounded))
    state = state_of(engine)
    models = state.openai_serving_models = Watched(state.openai_serving_models)
    serving = Watched(SimpleNamespace(_check_model=start, _maybe_get_adapters=start))
    state.openai_serving_chat = serving
    gauge = bounded.gauge_lora_info
    args = SimpleNamespace(additional_config=config)

    async def begin():
        await StoreEndpoints().init_state(engine, state, args)
        for _ in range(2):  # as a server with API keys does, once
            show_names_to_callers(models)
            admit(engine, None)

    asyncio.run(begin())
    assert bounded.gauge_lora_info is not gauge
    assert engine.written == ["generate", "generate", "shutdown"], "harmless when repeated"
    found = sorted({*engine.written, *models.written, *serving.written, "gauge_lora_info"})
    elsewhere = (
        "vllm.v1.engine.core:",
        "vllm.compilation.",
        "vllm.model_executor.",
    )  # the engine's and the workers'
    listed = [
        each.where.rpartition(".")[2]
        for each in REPLACEMENTS
        if each.on == "object" and not each.where.startswith(elsewhere)
    ]
    assert found == sorted([*listed, "unload_lora_adapter"]), "listed with load_lora_adapter"


def test_a_server_without_statistics_starts(config):
    engine = Engine("quiet")
    engine.logger_manager = None  # --disable-log-stats
    start(engine, config)
    assert value("store_adapters", model_name="quiet") == 5
