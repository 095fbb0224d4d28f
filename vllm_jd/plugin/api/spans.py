"""OpenTelemetry: what vLLM's span of a request (`--otlp-traces-endpoint`) says of its adapter.

| attribute | |
|---|---|
| `vllm_jd.kind` | `store`, `uncompressed`, `blend` or `base` |
| `vllm_jd.adapter` | its name |
| `vllm_jd.generation` | of the store, that it was answered by |
| `vllm_jd.clusters` | whose bases it shares, while that generation is served |
| `vllm_jd.parts`, `vllm_jd.weights` | of a blend |
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.blend_requests import parse_blend_path
from vllm_jd.plugin.api.metrics import kind_of
from vllm_jd.plugin.api.requests import generation_of
from vllm_jd.plugin.on_objects import replace_tracing

_SPAN = "llm_request"  # as vLLM calls it

Clusters = Callable[[str, int], Sequence[int] | None]
"""(name of an adapter of the store, generation) → the clusters whose bases it shares, if that is
known."""


def trace_adapters(engine_client: EngineClient, clusters: Clusters) -> None:
    """Have the spans of requests tell of their adapters, if there are any spans. Harmless when
    repeated."""
    processor = getattr(engine_client, "output_processor", None)
    if not getattr(processor, "tracing_enabled", False):
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

    class Adapters(SpanProcessor):
        """Puts `now` into the span that is started while it is set."""

        now: Mapping[str, Any] | None = None

        def on_start(self, span: Span, parent_context: Any = None) -> None:
            if self.now is not None and span.name == _SPAN:
                span.set_attributes(self.now)

    adapters, provider = Adapters(), trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        return

    def before(request: LoRARequest | None) -> None:
        adapters.now = attributes_of(request, clusters)

    def after() -> None:
        adapters.now = None

    if replace_tracing(processor, before, after):
        provider.add_span_processor(adapters)


def attributes_of(request: LoRARequest | None, clusters: Clusters) -> dict[str, Any]:
    """What a span says of a request's adapter."""
    found: dict[str, Any] = {"vllm_jd.kind": kind_of(request)}
    if request is None:
        return found
    found["vllm_jd.adapter"] = request.lora_name
    blended = parse_blend_path(request.lora_path)
    if blended is not None:
        found["vllm_jd.parts"] = [part.name for part in blended.parts]
        found["vllm_jd.weights"] = [part.weight for part in blended.parts]
        return found
    generation = generation_of(request)
    if generation is not None:
        found["vllm_jd.generation"] = generation
        its = clusters(request.lora_name, generation)
        if its is not None:
            found["vllm_jd.clusters"] = list(its)
    return found
