"""What the spans of requests say of their adapters: vLLM's own spans, kept in memory."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.lora.request import LoRARequest
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_jd.plugin.api.blend_requests import blend_request
from vllm_jd.plugin.api.requests import store_path, upload_path
from vllm_jd.plugin.api.spans import trace_adapters
from vllm_jd.store.blend import of_mapping

STORE = store_path("/store", 7)
TIMES = {
    **{"arrival_time": 1.0, "queued_ts": 1.0, "scheduled_ts": 1.0, "first_token_ts": 2.0},
    **{"last_token_ts": 3.0, "first_token_latency": 1.0, "num_generation_tokens": 4},
}


@pytest.fixture
def spans():
    """An exporter that keeps the process's spans in memory."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    exporter = InMemorySpanExporter()
    trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    exporter.shutdown()


def engine(*, tracing=True):
    return SimpleNamespace(
        output_processor=OutputProcessor(None, log_stats=True, tracing_enabled=tracing)
    )


def clusters(name, generation):
    """Only generation 7 is served."""
    return [2, 5] if generation == 7 else None


def told(engine, exporter, request):
    """What vLLM's span of a request with an adapter says: its own attributes, and ours."""
    state = SimpleNamespace(
        lora_request=request,
        stats=SimpleNamespace(**TIMES),
        prompt_token_ids=[1, 2, 3],
        prompt_embeds=None,
        external_req_id="id",
        top_p=None,
        max_tokens_param=5,
        temperature=None,
        n=None,
    )
    output = SimpleNamespace(trace_headers=None)
    engine.output_processor.do_tracing(output, state, SimpleNamespace(iteration_timestamp=4.0))
    (span,) = exporter.get_finished_spans()
    exporter.clear()
    assert span.name == "llm_request" and span.attributes["gen_ai.request.id"] == "id"
    return {k: v for k, v in span.attributes.items() if k.startswith("vllm_jd.")}


def test_a_span_says_which_adapter_its_request_had(spans):
    traced = engine()
    for _ in range(2):  # harmless when repeated
        trace_adapters(traced, clusters)
    assert told(traced, spans, LoRARequest("a", 1, STORE)) == {
        "vllm_jd.kind": "store",
        "vllm_jd.adapter": "a",
        "vllm_jd.generation": 7,
        "vllm_jd.clusters": (2, 5),
    }
    old = told(traced, spans, LoRARequest("a", 1, store_path("/store", 6)))
    assert old["vllm_jd.generation"] == 6 and "vllm_jd.clusters" not in old
    stock = vars(OutputProcessor(None, log_stats=True)).keys()
    assert vars(traced.output_processor).keys() - stock == {"do_tracing"}
    upload = LoRARequest("up", 1, upload_path("0" * 64, "/up"))
    named = {"vllm_jd.kind": "uncompressed", "vllm_jd.adapter": "up"}
    assert told(traced, spans, upload) == named
    blend = blend_request("ab", of_mapping({"a": 0.5, "b": 0.25}), {"a": STORE, "b": STORE})
    assert told(traced, spans, blend) == {
        "vllm_jd.kind": "blend",
        "vllm_jd.adapter": "ab",
        "vllm_jd.parts": ("a", "b"),
        "vllm_jd.weights": (0.5, 0.25),
    }
    assert told(traced, spans, None) == {"vllm_jd.kind": "base"}


def test_other_spans_say_nothing_of_adapters(spans):
    trace_adapters(engine(), clusters)
    with trace.get_tracer("other").start_as_current_span("llm_request"):
        pass
    (span,) = spans.get_finished_spans()
    assert not [key for key in span.attributes or {} if key.startswith("vllm_jd.")]


def test_without_tracing_nothing_is_replaced():
    quiet = engine(tracing=False)
    trace_adapters(quiet, clusters)
    assert "do_tracing" not in vars(quiet.output_processor)
