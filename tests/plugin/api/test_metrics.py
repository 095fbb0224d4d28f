"""Our metrics, in one API process and in several, and vLLM's list of adapter names kept short."""

import asyncio
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, values
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import ParallelConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_jd.compressor import Settings, read_adapters
from vllm_jd.compressor.run.compress import compress
from vllm_jd.plugin.api import series as series_module
from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.plugin.api.callers import admit, show_names_to_callers
from vllm_jd.plugin.api.endpoints import StoreEndpoints
from vllm_jd.plugin.api.measures import ask_measures
from vllm_jd.plugin.api.metrics import KINDS, publish_measures
from vllm_jd.plugin.api.requests import store_path, upload_path
from vllm_jd.plugin.api.routing import LISTED, Residency
from vllm_jd.plugin.api.series import SERIES
from vllm_jd.plugin.patches import REPLACEMENTS
from vllm_jd.store.blend import of_mapping

NAMES = "vllm:lora_requests_info"


class Engine:
    """As much of vLLM's EngineClient as the plugin sees."""

    def __init__(self, name, *stat_loggers):
        self.model_config = SimpleNamespace(served_model_name=name, max_model_len=512)
        self.vllm_config = SimpleNamespace(parallel_config=ParallelConfig())
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


def test_no_two_api_processes_of_an_engine_give_the_same_id(config):
    """As with `--api-server-count 3`: what one has pinned is not taken for another's."""
    given = []
    for rank in range(3):
        engine = Engine(f"process-{rank}")
        engine.vllm_config.parallel_config = ParallelConfig(
            _api_process_count=3, _api_process_rank=rank
        )
        models = start(engine, config).openai_serving_models
        given += [request.lora_int_id for request in models.lora_requests.values()]
        given += [models.lora_id_counter.inc(1) for _ in range(100)]
    assert len(given) > 300 and len(set(given)) == len(given)
    assert max(given) < 1 << 63  # it is sent to the engine as 64 bits


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
    errors = [float(store.error[i].double().mean()) for i in range(5)]  # all have all modules
    assert value("store_error", model_name="gauges", of="max") == pytest.approx(max(errors))
    assert value("store_error", model_name="gauges", of="mean") == pytest.approx(sum(errors) / 5)


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
    assert {m.name for m in ours} <= {f"vllm_jd:{name}" for name in SERIES}
    labels = {key for m in ours for sample in m.samples for key in sample.labels}
    assert labels <= {"model_name", "kind", "of", "state", "slots", "what", "result", "le"}
    values = {v for m in ours for s in m.samples for k, v in s.labels.items() if k != "le"}
    assert not values & {*store.names}


MEASURES = {
    "slots": {"basis": (1, 2, 3), "core": (4, 5, 6)},
    "hits": {"basis": 7, "core": 8},
    "misses": {"basis": 2, "core": 1},
    "evictions": {"basis": 1, "core": 0},
    "bases": (3, 6),
    "cores": (9, 10),
    "whole": False,
    "page_in_seconds": [0.002, 0.2],
    "swaps": 1,
    "draining": [(3, 4), (None, 1), (None, 2)],
    "recent": ["b", "a"],
    "waiting": 5,
}


def asked(*told):
    """What the API process makes of what engines say."""

    async def everyone(call, names):
        assert (call, names) == ("vllm_jd_measure", 9)
        return list(told)

    core = SimpleNamespace(call_utility_all_async=everyone)
    return asyncio.run(ask_measures(SimpleNamespace(engine_core=core), 9))


def test_what_the_engine_says_is_published_and_counted_once():
    engine = Engine("measured")
    publish_measures(asked(MEASURES), engine)
    quiet = {what: dict.fromkeys(MEASURES[what], 0) for what in ("hits", "misses", "evictions")}
    later = MEASURES | quiet | {"page_in_seconds": [], "swaps": 0, "bases": (6, 6)}
    publish_measures(asked(later), engine)

    def ours(name, **labels):
        return value(name, model_name="measured", **labels)

    states = [ours("slots", slots="core", state=state) for state in ("held", "idle", "free")]
    assert states == [4, 5, 6]
    assert [ours(f"slot_{what}_total", slots="basis") for what in quiet] == [7, 2, 1]
    assert (ours("bases", state="resident"), ours("bases", state="paged")) == (6, 0)
    assert (ours("cores", state="resident"), ours("cores", state="paged")) == (9, 1)
    assert ours("page_in_seconds_count") == 2
    assert ours("page_in_seconds_sum") == pytest.approx(0.202)
    assert ours("page_in_seconds_bucket", le="0.003") == 1
    assert ours("generation_swaps_total") == 1 and ours("requests_waiting_for_slots") == 5
    assert ours("draining", what="generation") == 1 and ours("draining", what="upload") == 2
    assert ours("draining_requests", what="generation") == 4
    assert ours("draining_requests", what="upload") == 3


def test_several_engines_are_taken_together():
    told = asked(MEASURES, MEASURES | {"whole": True, "draining": [(3, 1)], "recent": ["c", "a"]})
    assert told.slots["basis"] == (2, 4, 6) and told.hits == {"basis": 14, "core": 16}
    assert (told.bases, told.cores, told.whole, told.waiting) == ((6, 12), (18, 20), False, 10)
    assert told.draining == [(3, 5), (None, 1), (None, 2)] and told.swaps == 1
    assert told.recent == ["b", "a", "c"] and len(told.page_in_seconds) == 4


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

    def forget():
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith("vllm_jd:"):
                REGISTRY.unregister(collector)
        series_module.series.cache_clear()

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


# ---------------------------------------------------------------- what routers read


class Resident(Engine):
    """An engine that says of each adapter what `told` has: whether it is known, and resident."""

    def __init__(self, name, *stat_loggers, told=()):
        super().__init__(name, *stat_loggers)
        self.told, self.calls = dict(told), []
        self.engine_core = SimpleNamespace(call_utility_async=self.call)

    async def call(self, call, adapters):
        assert call == "vllm_jd_tell"
        self.calls.append(len(adapters))
        return [(*self.told.get(name, (True, True)), 0, None) for name, _ in adapters]


def look(engine, names, *, whole=True, recent=(), pinned=(), residency=None):
    told = asked(MEASURES | {"whole": whole, "recent": list(recent)})
    path = store_path("/store", 1)
    requests = {name: LoRARequest(name, 1, path) for name in names}
    requests |= {name: LoRARequest(name, 1, upload_path("0" * 64, "/u")) for name in names & {"up"}}
    residency = residency or Residency(engine)
    asyncio.run(residency.look(requests, told, pinned))
    return residency


def loaded(model):
    """Name → (level, pinned) of the adapters that are told to be loaded."""
    (family,) = [m for m in REGISTRY.collect() if m.name == "vllm:lora_adapter_loaded"]
    its = [s.labels for s in family.samples if s.labels["model_name"] == model and s.value == 1]
    return {each["adapter_name"]: (each["level"], each["pinned"]) for each in its}


def test_routers_see_what_is_loaded():
    stat_logger = StatLogger()
    told = {"up": (True, False), "disk": (True, False), "gone": (False, False)}
    engine = Resident("routed", stat_logger, told=told)
    names = {"a", "b", "with,comma", "up", "disk", "gone"}
    residency = look(engine, names, pinned=["b"])
    gpu = ("gpu", "false")
    assert loaded("routed") == {
        **{"a": gpu, "b": ("gpu", "true"), "with,comma": gpu},
        **{"up": ("cpu", "false")},
    }
    model = {"model_name": "routed"}
    assert REGISTRY.get_sample_value("vllm:num_gpu_loaded_lora_adapters", model) == 9
    assert REGISTRY.get_sample_value("vllm:max_gpu_lora_adapters", model) == 15
    (running,) = stat_logger.series()  # before the first request
    assert set(running.split(",")) == {"a", "b"}
    stat_logger.record(SchedulerStats(running_lora_adapters={"x": 1, "a": 2}), None)
    (running,) = stat_logger.series()
    assert running.split(",")[:2] == ["x", "a"] and set(running.split(",")) == {"x", "a", "b"}
    look(engine, {"b"}, residency=residency)
    assert loaded("routed") == {"b": gpu}, "nothing is left of what is gone"
    assert stat_logger.series() == ["x,a,b"]


def test_ten_thousand_adapters_are_told_in_a_few_series():
    stat_logger = StatLogger()
    engine = Resident("many", stat_logger)
    names = {f"adapter-{i}" for i in range(10_000)}
    residency = look(engine, names)
    assert loaded("many") == {} and engine.calls == [], "all are resident: they are all the same"
    model = {"model_name": "many"}
    assert REGISTRY.get_sample_value("vllm:num_gpu_loaded_lora_adapters", model) == 9
    assert stat_logger.series() == []
    recent = [f"adapter-{i}" for i in range(LISTED - 1)] + ["deleted meanwhile"]
    look(engine, names, whole=False, recent=recent, residency=residency)
    assert loaded("many").keys() == {*recent[:-1]} and engine.calls == [LISTED - 1]
    (running,) = stat_logger.series()
    assert running.split(",") == recent[:-1]


def test_names_can_be_kept_from_who_reads_metrics():
    stat_logger = StatLogger()
    residency = Residency(Resident("nameless", stat_logger))
    residency.named = False
    look(None, {"a"}, residency=residency)
    assert loaded("nameless") == {}
    stat_logger.steps(3)
    assert stat_logger.series() == [""]
    model = {"model_name": "nameless"}
    assert REGISTRY.get_sample_value("vllm:num_gpu_loaded_lora_adapters", model) == 9


def test_several_api_processes_list_no_names(monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    stat_logger = StatLogger()
    Residency(Resident("processes", stat_logger))
    stat_logger.steps(50)
    assert stat_logger.series() == [""], "what was told once could not be taken back"


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
        engine.inner.output_processor = OutputProcessor(None, log_stats=False)
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
        "vllm.v1.engine.output_processor:",
    )  # the engine's and the workers'; of spans: test_spans
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
