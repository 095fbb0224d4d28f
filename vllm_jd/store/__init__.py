"""The model store: shared bases and tiny cores of a LoRA collection, on disk.

A store is a folder (`docs/store-format.md` says all of it):

    CURRENT                          "<n> <sha256 of generation n's manifest>"
    generations/<n>/manifest.json    what is in the generation, and the sha256 of each file
    generations/<n>/adapters.safetensors   names, rows, norms, errors, source hashes
    generations/<n>/bases-*.safetensors    vectors of each module, and the table of its rows
    generations/<n>/cores-*.safetensors    numbers of one size an adapter: the Σ of all its modules

A generation never changes once CURRENT has named it.

The files keep the words that they were first written with: there `clusters` is a module's table of
rows, `cluster` what each adapter chose of it, `u_rows` and `v_rows` count vectors.
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
