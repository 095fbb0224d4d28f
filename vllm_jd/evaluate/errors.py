"""What `evaluate` says of input that it cannot use."""

from vllm_jd.compressor.errors import CompressorError


class EvaluateError(CompressorError):
    """Adapters, items or an engine that cannot be used; the message says what to do."""


class UsageError(EvaluateError):
    """An option that contradicts another, or that vLLM does not know: wrong usage, exit code 2."""
