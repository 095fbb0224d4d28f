"""The offline compressor: PEFT adapters in, a store out."""

from vllm_jd.compressor.change.export import export_adapter
from vllm_jd.compressor.errors import AdapterError
from vllm_jd.compressor.read.adapters import Collection, PeftCollection, read_adapters
from vllm_jd.compressor.run.compress import Settings, compress

__all__ = [
    "AdapterError",
    "Collection",
    "PeftCollection",
    "Settings",
    "compress",
    "export_adapter",
    "read_adapters",
]
