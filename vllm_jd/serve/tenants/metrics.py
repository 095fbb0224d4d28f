"""What `/metrics` tells of the door and the guard; without the names of keys and tenants.

| metric | kind | |
|---|---|---|
| `vllm_jd:door_waiting` | gauge | sequences that wait before the engine |
| `vllm_jd:requests_refused_total` | counter | requests that were refused, by `reason`: `key` |
| | | (401), `right` (403), `requests`, `tokens` or `queue` (429) |
"""

import functools

from prometheus_client import Counter, Gauge

REASONS = ("key", "right", "requests", "tokens", "queue")
"""Why requests are refused."""

# Made at first use: servers without keys have none of these.


@functools.cache
def waiting_gauge() -> Gauge:
    """Sequences that wait; of several API processes, the sum."""
    return Gauge(
        "vllm_jd:door_waiting",
        "Number of sequences that wait before the engine for a place in it.",
        multiprocess_mode="livesum",
    )


@functools.cache
def refused_counter() -> Counter:
    """Requests that were refused."""
    counter = Counter(
        "vllm_jd:requests_refused",
        "Number of requests that were refused for their key, its rights or its limits.",
        labelnames=["reason"],
    )
    for reason in REASONS:  # there from the beginning: a rate has to see the first one
        counter.labels(reason)
    return counter
