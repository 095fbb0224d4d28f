"""What the API process knows of the store and of who is asked for, and what the engine says, at
`/metrics`: see `vllm_jd.plugin.api.series`."""

from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.failures import raise_failure
from vllm_jd.plugin.api.measures import Measures
from vllm_jd.plugin.api.request_ids import tell_adapter
from vllm_jd.plugin.api.requests import is_store_request
from vllm_jd.plugin.api.series import series
from vllm_jd.plugin.api.unfinished import raise_unfinished
from vllm_jd.plugin.on_objects import replace_generate
from vllm_jd.store import Store

KINDS = ("store", "uncompressed", "blend", "base")


def publish_store(store: Store, engine_client: EngineClient) -> None:
    """Set the gauges to what `store` is. Harmless when repeated."""
    model = engine_client.model_config.served_model_name
    series("store_adapters").labels(model).set(len(store))
    series("store_generation").labels(model).set(store.generation)
    series("store_bytes").labels(model).set(store.stored_bytes)
    present = (store.chosen >= 0).any(dim=2)
    error = (store.error.double() * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)
    series("store_error").labels(model, "mean").set(float(error.mean()) if len(store) else 0.0)
    series("store_error").labels(model, "max").set(float(error.max()) if len(store) else 0.0)


def publish_measures(measures: Measures, engine_client: EngineClient) -> None:
    """Set the gauges to what an engine says, and add to the counters what has happened in it since
    it was asked before."""
    model = engine_client.model_config.served_model_name
    for kind, slots in measures.slots.items():
        for state, count in slots._asdict().items():
            series("slots").labels(model, kind, state).set(count)
    for name, counts in (
        ("slot_hits", measures.hits),
        ("slot_misses", measures.misses),
        ("slot_evictions", measures.evictions),
    ):
        for kind, count in counts.items():
            series(name).labels(model, kind).inc(count)
    for name, (resident, whole) in (("bases", measures.bases), ("cores", measures.cores)):
        series(name).labels(model, "resident").set(resident)
        series(name).labels(model, "paged").set(whole - resident)
    seconds = series("page_in_seconds").labels(model)
    for each in measures.page_in_seconds:
        seconds.observe(each)
    series("generation_swaps").labels(model).inc(measures.swaps)
    series("requests_waiting_for_slots").labels(model).set(measures.waiting)
    for what, some in (
        ("generation", [each for each in measures.draining if each.generation is not None]),
        ("upload", [each for each in measures.draining if each.generation is None]),
    ):
        series("draining").labels(model, what).set(len(some))
        series("draining_requests").labels(model, what).set(sum(each.requests for each in some))


def count_requests(engine_client: EngineClient) -> None:
    """Count every request by the kind of its adapter, and have those that fail for its sake say
    so. Harmless when repeated.

    A request of several prompts counts once for each, and one that vLLM refuses before the engine
    not at all.
    """
    model = engine_client.model_config.served_model_name
    counters = {kind: series("adapter_requests").labels(model, kind) for kind in KINDS}

    def count(request: LoRARequest | None) -> None:
        counters[kind_of(request)].inc()
        tell_adapter(None if request is None else request.lora_name)

    def check(output: Any) -> None:
        raise_failure(output)
        raise_unfinished(engine_client, output)

    replace_generate(engine_client, count, check)


def kind_of(request: LoRARequest | None) -> str:
    """Which of `KINDS` a request asks for."""
    if request is None:
        return "base"
    if is_blend_request(request):
        return "blend"
    return "store" if is_store_request(request) else "uncompressed"
