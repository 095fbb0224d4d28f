"""Serve very large LoRA collections: an offline compressor, a store, and a vLLM plugin."""

__version__ = "0.1.0"
