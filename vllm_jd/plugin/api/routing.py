"""What routers read at `/metrics` to find the replica that has an adapter.

| series | who reads it, and what for |
|---|---|
| `vllm:lora_requests_info` | llm-d's `lora-affinity-scorer` and the gateway API inference |
| | extension, whose protocol wants in `running_lora_adapters` what is loaded and ready |
| `vllm:lora_adapter_loaded` | llm-d's `lora-load-state-scorer`: a series for each adapter that is |
| | loaded, `level` `gpu` (in slots) or `cpu` (an upload in a worker's memory), as vLLM's own |
| | proposal has it |
| `vllm:num_gpu_loaded_lora_adapters`, | the same, for adapters that are not listed: how many are |
| `vllm:max_gpu_lora_adapters` | loaded, and how many could be |

Routers read this up to twenty times a second, so that it is short whatever the number of adapters
(each takes 0.01 ms to write, and 100 bytes): up to `LISTED` names. A server with more of them, all
resident, lists none: every replica is as good as any other, and without names that is what routers
make of it (each has room, so each has the same score). Where not all are resident, those that were
asked for last are listed.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.measures import Measures
from vllm_jd.plugin.api.requests import is_store_request
from vllm_jd.plugin.api.residents import ask_residents
from vllm_jd.plugin.on_objects import replace_lora_gauge

LISTED = 256
"""How many adapters are listed at most."""

_SEPARATOR = ","  # of names in vllm:lora_requests_info: one that has it is not listed there


class Loaded(NamedTuple):
    """An adapter that a router may take for loaded: `level` is `gpu` or `cpu`."""

    name: str
    level: str
    pinned: bool


class Residency:
    """What one API process tells routers.

    Args:
        engine_client: vLLM's client of the engine.

    Attributes:
        named: whether it may tell names: whoever can read `/metrics` sees them.
    """

    def __init__(self, engine_client: EngineClient):
        self.named = True
        self._engine = engine_client
        self._gauges = _bound_adapter_lists(engine_client)
        self._model = engine_client.model_config.served_model_name

    async def look(
        self, names: Mapping[str, LoRARequest], measures: Measures, pinned: Iterable[str]
    ) -> None:
        """Find out what is loaded of the adapters that have names, and tell."""
        if not self.named or (len(names) > LISTED and measures.whole):
            asked = {}
        elif len(names) <= LISTED:
            asked = dict(names)
        else:
            asked = {name: names[name] for name in measures.recent if name in names}
        told = await ask_residents(self._engine, list(asked.values()))
        pins, loaded = set(pinned), []
        for (name, request), its in zip(asked.items(), told, strict=True):
            upload = not (is_store_request(request) or is_blend_request(request))
            if its.resident or (its.known and upload):
                loaded.append(Loaded(name, "gpu" if its.resident else "cpu", name in pins))
        core = measures.slots["core"]
        _collector().told[self._model] = loaded, core.held + core.idle, sum(core)
        ready = [each.name for each in loaded if each.level == "gpu"]
        for gauge in self._gauges:
            gauge.named &= self.named
            gauge.loaded([name for name in ready if _SEPARATOR not in name])


class _Collector(Collector):
    """The series of what is loaded, made anew for each scrape: nothing of what is gone is left."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[Sequence[Loaded], int, int]] = {}
        """By the base model's name: what is loaded, how many that are, how many could be."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As prometheus_client asks for it."""
        each = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter that is loaded.",
            labels=["model_name", "adapter_name", "level", "pinned"],
        )
        count = GaugeMetricFamily(
            "vllm:num_gpu_loaded_lora_adapters",
            "Number of adapters that are loaded.",
            labels=["model_name"],
        )
        most = GaugeMetricFamily(
            "vllm:max_gpu_lora_adapters",
            "Number of adapters that could be loaded at once.",
            labels=["model_name"],
        )
        for model, (loaded, its_count, its_most) in self.told.items():
            for name, level, pinned in loaded:
                each.add_metric([model, name, level, str(pinned).lower()], 1)
            count.add_metric([model], its_count)
            most.add_metric([model], its_most)
        yield from (each, count, most)


@functools.cache
def _collector() -> _Collector:
    collector = _Collector()
    # Processes of one server cannot take back what each has told; and vLLM may come to have these.
    if not _several_processes():
        with suppress(ValueError):
            REGISTRY.register(collector)
    return collector


def _several_processes() -> bool:
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _bound_adapter_lists(engine_client: EngineClient) -> list["_Latest"]:
    """Have one series of vLLM's `vllm:lora_requests_info`, the latest. Harmless when repeated.

    Its labels are the names of the running and the waiting adapters, and vLLM never drops a
    combination that was there once. With thousands of adapters nearly every step has another one:
    the process and the answer to each scrape would grow without end.
    """
    found = []
    manager = getattr(engine_client, "logger_manager", None)  # None with --disable-log-stats
    for stat_logger in getattr(manager, "stat_loggers", ()):
        if not isinstance(stat_logger, PrometheusStatLogger):
            continue
        if isinstance(getattr(stat_logger, "gauge_lora_info", None), Gauge):
            most = getattr(stat_logger, "max_lora", "")
            replace_lora_gauge(stat_logger, functools.partial(_Latest, most=most))
        if isinstance(gauge := getattr(stat_logger, "gauge_lora_info", None), _Latest):
            found.append(gauge)
        else:
            logging.getLogger("vllm.vllm_jd").warning(
                "vllm:lora_requests_info is not where it was known to be; its series may pile up"
            )
    return found


class _Latest:
    """A gauge of which only the label values that were asked for last are kept, with what is loaded
    among the running adapters. Without names where these are nobody's business, and in one of
    several processes, where nothing can be dropped."""

    def __init__(self, gauge: Gauge, most: Any) -> None:
        self._gauge = gauge
        self._asked = {"max_lora": most, "running_lora_adapters": "", "waiting_lora_adapters": ""}
        self._labels: dict[str, Any] | None = None
        self._ready: list[str] = []
        self.named = not _several_processes()

    def labels(self, **labels: Any) -> Gauge:
        self._asked = labels
        return self._latest()

    def loaded(self, names: list[str]) -> None:
        """Have these adapters among the running ones from now on: they are ready."""
        if names != self._ready:
            self._ready = names
            self._latest().set_to_current_time()

    def _latest(self) -> Gauge:
        labels = dict(self._asked)
        if not self.named:
            labels |= {"running_lora_adapters": "", "waiting_lora_adapters": ""}
        elif self._ready:
            running = filter(None, labels["running_lora_adapters"].split(_SEPARATOR))
            labels["running_lora_adapters"] = _SEPARATOR.join(
                dict.fromkeys([*running, *self._ready])
            )
        if labels != self._labels:
            if self._labels is not None:
                self._gauge.clear()
            self._labels = labels
        return self._gauge.labels(**labels)
