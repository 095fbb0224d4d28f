"""The manifest of one generation: what `generations/<n>/manifest.json` says, as pydantic models.

Where the file has an older word than the code, a field has the file's name as its alias.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_jd.row import STORED_FIELDS

SCHEMA_VERSION = 2

CURRENT = "CURRENT"
GENERATIONS = "generations"
MANIFEST = "manifest.json"
ADAPTERS = "adapters.safetensors"

DTYPES = ("float32", "bfloat16", "float16")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BaseModelInfo(_Strict):
    """The model that the adapters belong to.

    `name` is what the adapters call it (PEFT's `base_model_name_or_path`), `other_names` what some
    of them call it instead, of which the user said that it is the same. `config` holds the
    shape-giving fields of its `config.json` (see `vllm_jd.store.base_model`), or nothing when
    the compressor did not see that file; `fingerprint` is their sha256.
    """

    name: str
    fingerprint: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    other_names: list[str] = Field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All that adapters call it."""
        return [self.name, *self.other_names]

    def called(self, names: Iterable[str]) -> "BaseModelInfo":
        """The same model, with more names."""
        more = {*names} - {self.name}
        return self.model_copy(update={"other_names": sorted({*self.other_names, *more})})


class ModuleInfo(_Strict):
    """One linear layer, or one projection of all experts of a layer, or a table of embeddings: its
    pools of vectors, and the rows that pick from them.

    U is `[u_vectors, d_out]`, V `[v_vectors, d_in]` and the scales `[scale_rows, d_out]`, each the
    concatenation of what the basis shards have. `rows` counts the rows of the module's table
    (`vllm_jd.row`); the first `shared` of them are shared by adapters, one a cluster, of rank
    `rank` (0 if there are none) but for the mean, which is the last of them where there is one;
    the others belong to one adapter each. An adapter's core is at `core_offset` of the numbers
    that the store has of its cores, `core_size` long.

    Of `experts` experts (0: a plain linear layer) each has a linear layer d_in → d_out. They choose
    from the same pools: a row of the table is one for each expert, and the core of an adapter is
    the cores of all experts, one after the other.

    To an `embedding` token number t is the input that is 1 at t and 0 elsewhere: d_in is the size
    of the vocabulary, and V · x column t of V.
    """

    name: str
    experts: int = Field(default=0, ge=0)
    embedding: bool = False
    d_in: int = Field(gt=0)
    d_out: int = Field(gt=0)
    rank: int = Field(ge=0)
    rows: int = Field(ge=0, alias="clusters")
    shared: int = Field(ge=0)
    u_vectors: int = Field(ge=0, alias="u_rows")
    v_vectors: int = Field(ge=0, alias="v_rows")
    scale_rows: int = Field(ge=0)
    core_offset: int = Field(ge=0)
    core_size: int = Field(ge=0)

    @property
    def each(self) -> int:
        """How many linear layers it stands for: its experts, or one."""
        return max(1, self.experts)

    @property
    def expert_core(self) -> int:
        """Numbers of one expert's core, or of the one core."""
        return self.core_size // self.each

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row in its table."""
        fields = len(STORED_FIELDS)
        return (self.experts, fields) if self.experts else (fields,)

    def layer(self, expert: int) -> str:
        """The name of one of its linear layers, as PEFT has it: `….experts.5.gate_proj`."""
        if not self.experts:
            return self.name
        before, _, projection = self.name.rpartition(".")
        return f"{before}.{expert}.{projection}"


class CoreShard(_Strict):
    """Cores of adapters `first … first + adapters - 1`: tensor `cores [adapters, core_row]`."""

    file: str
    first: int = Field(ge=0)
    adapters: int = Field(gt=0, alias="rows")


class FileInfo(_Strict):
    """Size in bytes and sha256 (hex) of one file of the generation."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Strict):
    """Everything about a generation that is not an array."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created_by: str
    created_at: str
    base_model: BaseModelInfo
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        description="type of the numbers that are not quantised"
    )
    quantised: Literal["int8", "int4"] | None = None
    method: str
    settings: dict[str, Any]
    adapters: int = Field(ge=0)
    modules: list[ModuleInfo]
    rows: int = Field(gt=0, description="most rows that an adapter has in one module")
    core_row: int = Field(ge=0, description="numbers of one adapter's cores")
    core_shards: list[CoreShard]
    basis_shards: list[str]
    files: dict[str, FileInfo]
