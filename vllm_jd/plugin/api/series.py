"""Every metric of ours at `/metrics`, beside vLLM's own; docs/operations.md says what to do with
them.

All have the label `model_name`, as vLLM's have. None has an adapter's name: a series for each of
100,000 adapters would be more than Prometheus is made for (see `vllm_jd.plugin.api.routing` for the
few names that routers get).
"""

import functools
from typing import Literal, NamedTuple

from prometheus_client import Counter, Gauge, Histogram

Metric = Counter | Gauge | Histogram

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Series(NamedTuple):
    """One metric: what it is, and its labels beside `model_name`."""

    kind: Literal["gauge", "counter", "histogram"]
    documentation: str
    labels: tuple[str, ...] = ()


SERIES = {
    # --- the store ---
    "store_adapters": Series("gauge", "Number of adapters in the store's served generation."),
    "store_generation": Series("gauge", "Number of the store's served generation."),
    "store_bytes": Series("gauge", "Size of the files of the store's served generation, in bytes."),
    "store_error": Series(
        "gauge",
        "Relative squared error of the served generation's adapters (the mean of their modules): "
        "mean and max of all adapters.",
        ("of",),
    ),
    "adapters": Series("gauge", "Number of adapters that have a name, by state.", ("state",)),
    # --- requests ---
    "adapter_requests": Series(
        "counter",
        "Number of requests handed to the engine, by the kind of adapter they ask for.",
        ("kind",),
    ),
    "requests_waiting_for_slots": Series(
        "gauge", "Number of requests that wait for slots which other adapters hold."
    ),
    # --- what is on the device ---
    "slots": Series("gauge", "Number of slots, by kind and state.", ("slots", "state")),
    "slot_hits": Series(
        "counter", "How often what a request needed lay in a slot already.", ("slots",)
    ),
    "slot_misses": Series("counter", "How often it had to be read into one.", ("slots",)),
    "slot_evictions": Series(
        "counter", "How often something else was given up for that.", ("slots",)
    ),
    "bases": Series(
        "gauge", "Number of bases of the served generation, resident or paged.", ("state",)
    ),
    "cores": Series(
        "gauge", "Number of cores of the served generation, resident or paged.", ("state",)
    ),
    "page_in_seconds": Series(
        "histogram", "Time that a step has waited for its slots to be filled, in seconds."
    ),
    # --- generations ---
    "generation_swaps": Series("counter", "How often another generation came to be served."),
    "generation_unserved": Series(
        "gauge", "1 if the store's live generation cannot be served, and another one is."
    ),
    "draining": Series(
        "gauge",
        "Number of generations, and of versions of uploads, that are served no more but still have "
        "requests.",
        ("what",),
    ),
    "draining_requests": Series("gauge", "Number of these requests.", ("what",)),
    # --- recompression ---
    "uploads_waiting": Series("gauge", "Number of uploads that wait to be compressed."),
    "oldest_waiting_seconds": Series(
        "gauge", "For how long the oldest of these has waited, in seconds."
    ),
    "recompression_running": Series("gauge", "1 while the store is recompressed."),
    "recompression_progress": Series(
        "gauge", "How much of its present step the recompression has done, from 0 to 1."
    ),
    "recompression_failed": Series("gauge", "1 if the last recompression has failed."),
    "recompressions": Series("counter", "Number of recompressions that ended.", ("result",)),
}


@functools.cache
def series(name: str) -> Metric:
    """The metric `vllm_jd:{name}`, made at first use: the plugin is imported by servers without a
    store too."""
    kind, documentation, labels = SERIES[name]
    given = {"name": f"vllm_jd:{name}", "documentation": documentation}
    given["labelnames"] = ["model_name", *labels]
    if kind == "counter":
        return Counter(**given)
    if kind == "histogram":
        return Histogram(**given, buckets=_SECONDS)
    # Several API processes of one server say the same: one of them is enough, not their sum.
    return Gauge(**given, multiprocess_mode="mostrecent")
