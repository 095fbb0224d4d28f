"""What the API process knows of the store and of who is asked for, at `/metrics` beside vLLM's own.

| metric | kind | |
|---|---|---|
| `vllm_jd:store_adapters` | gauge | adapters in the served generation |
| `vllm_jd:store_generation` | gauge | its number |
| `vllm_jd:store_bytes` | gauge | size of its files |
| `vllm_jd:adapter_requests_total` | counter | requests handed to the engine, by `kind`: `store`, |
| | | `uncompressed`, `blend` or `base` |

All have the label `model_name`, as vLLM's have. None has an adapter's name: a series for each of
100,000 adapters would be more than Prometheus is made for.
"""

import functools
import logging
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.failures import raise_failure
from vllm_jd.plugin.api.requests import is_store_request
from vllm_jd.plugin.on_objects import replace_generate, replace_lora_gauge
from vllm_jd.store import Store

KINDS = ("store", "uncompressed", "blend", "base")


def publish_store(store: Store, engine_client: EngineClient) -> None:
    """Set the gauges to what `store` is. Harmless when repeated."""
    model = engine_client.model_config.served_model_name
    adapters, generation, size = _gauges()
    adapters.labels(model).set(len(store))
    generation.labels(model).set(store.generation)
    size.labels(model).set(store.stored_bytes)


def count_requests(engine_client: EngineClient) -> None:
    """Count every request by the kind of its adapter, and have those that fail for its sake say
    so. Harmless when repeated.

    A request of several prompts counts once for each, and one that vLLM refuses before the engine
    not at all.
    """
    model = engine_client.model_config.served_model_name
    counters = {kind: _requests().labels(model, kind) for kind in KINDS}
    replace_generate(engine_client, lambda request: counters[_kind(request)].inc(), raise_failure)


def bound_adapter_lists(engine_client: EngineClient) -> None:
    """Keep one series of vLLM's `vllm:lora_requests_info`, the latest. Harmless when repeated.

    Its labels are the names of the running and the waiting adapters, and vLLM never drops a
    combination that was there once. With thousands of adapters nearly every step has another one:
    the process and the answer to each scrape would grow without end.
    """
    manager = getattr(engine_client, "logger_manager", None)  # None with --disable-log-stats
    for stat_logger in getattr(manager, "stat_loggers", ()):
        if not isinstance(stat_logger, PrometheusStatLogger):
            continue
        gauge = getattr(stat_logger, "gauge_lora_info", None)
        if isinstance(gauge, Gauge):
            replace_lora_gauge(stat_logger, _Latest)
        elif not isinstance(gauge, _Latest):
            logging.getLogger("vllm.vllm_jd").warning(
                "vllm:lora_requests_info is not where it was known to be; its series may pile up"
            )


class _Latest:
    """A gauge of which only the label values that were asked for last are kept."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._labels: dict[str, Any] | None = None

    def labels(self, **labels: Any) -> Gauge:
        if labels != self._labels:
            self._gauge.clear()
            self._labels = labels
        return self._gauge.labels(**labels)


def _kind(request: LoRARequest | None) -> str:
    if request is None:
        return "base"
    if is_blend_request(request):
        return "blend"
    return "store" if is_store_request(request) else "uncompressed"


# Made at first use: the plugin is imported by servers without a store too.


@functools.cache
def _gauges() -> tuple[Gauge, Gauge, Gauge]:
    # Several API processes of one server say the same: one of them is enough, not their sum.
    def gauge(name: str, documentation: str) -> Gauge:
        return Gauge(
            f"vllm_jd:{name}",
            documentation,
            labelnames=["model_name"],
            multiprocess_mode="mostrecent",
        )

    return (
        gauge("store_adapters", "Number of adapters in the store's served generation."),
        gauge("store_generation", "Number of the store's served generation."),
        gauge("store_bytes", "Size of the files of the store's served generation, in bytes."),
    )


@functools.cache
def _requests() -> Counter:
    return Counter(
        "vllm_jd:adapter_requests",
        "Number of requests handed to the engine, by the kind of adapter they ask for.",
        labelnames=["model_name", "kind"],
    )
