"""The offline compressor: PEFT adapters in, a store out."""

from vllm_jd.compressor.adapters import Collection, PeftCollection, read_adapters
from vllm_jd.compressor.compress import Settings, compress
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.export import export_adapter

__all__ = [
    "AdapterError",
    "Collection",
    "PeftCollection",
    "Settings",
    "compress",
    "export_adapter",
    "read_adapters",
]
