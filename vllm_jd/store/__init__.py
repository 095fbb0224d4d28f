"""The model store: shared bases and tiny cores of a LoRA collection, on disk.

A store is a folder:

    CURRENT                          "<n> <sha256 of generation n's manifest>"
    generations/<n>/manifest.json    what is in the generation, and the sha256 of each file
    generations/<n>/adapters.safetensors   names, clusters, norms, errors, source hashes
    generations/<n>/bases-*.safetensors    basis vectors and clusters of each module
    generations/<n>/cores-*.safetensors    one fixed-size row an adapter: the Σ of all its modules

A generation never changes once CURRENT has named it.
"""

from vllm_jd.store.base_model import check_base_model, read_base_model, short_name
from vllm_jd.store.bases import Bases, Codes
from vllm_jd.store.errors import StoreError
from vllm_jd.store.manifest import BaseModelInfo, CoreShard, Manifest, ModuleInfo
from vllm_jd.store.reader import Store, read_current
from vllm_jd.store.writer import GenerationWriter, writing

__all__ = [
    "BaseModelInfo",
    "Bases",
    "Codes",
    "CoreShard",
    "GenerationWriter",
    "Manifest",
    "ModuleInfo",
    "Store",
    "StoreError",
    "check_base_model",
    "read_base_model",
    "read_current",
    "short_name",
    "writing",
]
