"""The replacements on one object (see `vllm_jd.plugin.patches`), once vLLM has made it."""

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any


def replace_generate(
    engine_client: Any,
    count: Callable[[Any], None],
    check: Callable[[Any], None] = lambda output: None,
) -> None:
    """Have `count(lora_request)` called before every request to the engine, and `check(output)` of
    each of its outputs. Harmless when repeated.

    All routes that generate end in `EngineClient.generate`, vLLM's own protocol, with the adapter
    already looked up: it is wrapped on this one object.
    """
    stock = engine_client.generate
    if ours(stock):
        return

    @functools.wraps(stock)
    def generate(*args: Any, lora_request: Any = None, **kwargs: Any) -> AsyncGenerator[Any, None]:
        count(lora_request)
        outputs = stock(*args, lora_request=lora_request, **kwargs)
        return outputs if lora_request is None else checked(outputs)

    async def checked(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        async for output in outputs:
            check(output)
            yield output

    engine_client.generate = mark(generate)


def replace_generating(
    engine_client: Any,
    generate: Callable[[Callable[[Any], AsyncGenerator[Any, None]], Any, Any, str], Any],
) -> None:
    """Have `generate(stock, prompt, params, request_id)` called for every request to the engine,
    where `stock(prompt)` is what was called until now. Harmless when repeated."""
    stock = engine_client.generate
    if ours(stock) == generate.__module__:
        return

    @functools.wraps(stock)
    def called(
        prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        def before(changed: Any) -> AsyncGenerator[Any, None]:
            return stock(changed, sampling_params, request_id, *args, **kwargs)

        return generate(before, prompt, sampling_params, request_id)

    engine_client.generate = mark(called, generate.__module__)


def tell_first_outputs(engine_client: Any, heard: Callable[[str], None]) -> None:
    """Have `heard(request_id)` called when the engine has a first token of a request, whether or
    not its client is told of it before the end. Harmless when repeated."""
    processor = engine_client.output_processor
    stock = processor.process_outputs
    if ours(stock) == heard.__module__:
        return

    @functools.wraps(stock)
    def process_outputs(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = (processor.request_states.get(output.request_id) for output in outputs)
        first = [state.external_req_id for state in found if state and state.is_prefilling]
        try:
            return stock(outputs, *args, **kwargs)
        finally:
            for request_id in first:
                heard(request_id)

    processor.process_outputs = mark(process_outputs, heard.__module__)


def replace_shutdown(
    engine_client: Any,
    *,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Have `before()` and `after()` called when an engine is to be stopped and when it has been, in
    the thread that stops it. Harmless when repeated."""
    stock = engine_client.shutdown
    whose = f"{before.__module__} {after.__module__}"
    if ours(stock) == whose:
        return

    @functools.wraps(stock)
    def shutdown(*args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return stock(*args, **kwargs)
        finally:
            after()

    engine_client.shutdown = mark(shutdown, whose)


def replace_names(models: Any, names: Any) -> None:
    """Put a mapping in the place of the table of names of a server's adapters."""
    models.lora_requests = names


def replace_block_hasher(core: Any, before: Callable[[Any], None]) -> None:
    """Have `before(request)` called before an EngineCore hashes a request's blocks."""
    stock = core.request_block_hasher
    if stock is not None:

        def hasher(request: Any) -> Any:
            before(request)
            return stock(request)

        core.request_block_hasher = hasher


def replace_loading(
    models: Any,
    load: Callable[[Any, Any, str | None], Any],
    unload: Callable[[Any, Any], Any],
) -> None:
    """Have `load(before, request, base_model_name)` and `unload(before, request)` called where an
    adapter is loaded or unloaded at run time; `before` is what was called until now. Harmless when
    repeated by the same module."""
    if ours(models.load_lora_adapter) == load.__module__:
        return
    stock_load, stock_unload = models.load_lora_adapter, models.unload_lora_adapter

    async def load_lora_adapter(request: Any, base_model_name: str | None = None) -> Any:
        return await load(stock_load, request, base_model_name)

    async def unload_lora_adapter(request: Any) -> Any:
        return await unload(stock_unload, request)

    models.load_lora_adapter = mark(load_lora_adapter, load.__module__)
    models.unload_lora_adapter = mark(unload_lora_adapter, load.__module__)


def replace_logits(
    model: Any, processor: Any, before: Callable[[Any], None], add: Callable[[Any, Any], None]
) -> None:
    """Have `before(hidden_states)` called before a model computes logits, and `add(logits,
    hidden_states)` once its LogitsProcessor has the logits of all workers, not yet scaled."""
    compute, get = model.compute_logits, processor._get_logits

    def compute_logits(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        before(hidden_states)
        return compute(hidden_states, *args, **kwargs)

    def get_logits(
        hidden_states: Any, lm_head: Any, embedding_bias: Any = None, skip_gather: bool = False
    ) -> Any:
        logits = get(hidden_states, lm_head, embedding_bias, skip_gather)
        if logits is not None and not skip_gather:
            add(logits, hidden_states)
        return logits

    model.compute_logits, processor._get_logits = compute_logits, get_logits


def replace_adapter_lookup(
    serving: Any, refused: Callable[[Any], Awaitable[Any]], adapter: Callable[[Any], Any]
) -> None:
    """Have `refused(request)` asked before an object that takes requests checks the model of one,
    and `adapter(request)` before it looks up the adapter. Harmless when repeated.

    The first answers an ErrorResponse, or None; the second a LoRARequest, or None: as vLLM finds.
    """
    stock_check, stock_get = serving._check_model, serving._maybe_get_adapters
    if ours(stock_check):
        return

    @functools.wraps(stock_check)
    async def check_model(request: Any) -> Any:
        found = await refused(request)
        return await stock_check(request) if found is None else found

    @functools.wraps(stock_get)
    def maybe_get_adapters(request: Any, *args: Any, **kwargs: Any) -> Any:
        found = adapter(request)
        return stock_get(request, *args, **kwargs) if found is None else found

    serving._check_model = mark(check_model)
    serving._maybe_get_adapters = mark(maybe_get_adapters)


def replace_tracing(
    processor: Any, before: Callable[[Any], None], after: Callable[[], None]
) -> bool:
    """Have `before(lora_request)` and `after()` called around the making of a request's span.
    Harmless when repeated.

    Returns:
        Whether it was replaced just now.
    """
    stock = processor.do_tracing
    if ours(stock):
        return False

    @functools.wraps(stock)
    def do_tracing(engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        before(req_state.lora_request)
        try:
            stock(engine_core_output, req_state, iteration_stats)
        finally:
            after()

    processor.do_tracing = mark(do_tracing)
    return True


def replace_lora_gauge(stat_logger: Any, bounded: Callable[[Any], Any]) -> None:
    """Put `bounded(gauge)` in the place of a PrometheusStatLogger's `gauge_lora_info`."""
    stat_logger.gauge_lora_info = bounded(stat_logger.gauge_lora_info)


def replace_load_check(models: Any, refused: Callable[[str], Any]) -> None:
    """Have `refused(lora_path)` asked too when an adapter is to be loaded. Harmless when repeated.

    Its answer is an ErrorResponse, or None: it may be loaded. vLLM's own check comes first.
    `--lora-modules` have been loaded by then, so that what they name is not asked about.
    """
    stock = models._check_load_lora_adapter_request
    if ours(stock):
        return

    @functools.wraps(stock)
    async def check(request: Any) -> Any:
        found = await stock(request)
        return refused(request.lora_path) if found is None else found

    models._check_load_lora_adapter_request = mark(check)


def mark(replacement: Any, by: str | bool = True) -> Any:
    """A replacement, by which `ours` knows it; `by` says whose it is."""
    replacement.vllm_jd = by
    return replacement


def ours(found: Any) -> str | bool:
    """Whether something is a replacement of ours, and whose."""
    return getattr(found, "vllm_jd", False)
