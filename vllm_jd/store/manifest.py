"""The manifest of one generation: what `generations/<n>/manifest.json` says, as pydantic models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2

DTYPES = ("float32", "bfloat16", "float16")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelInfo(_Strict):
    """The model that the adapters belong to.

    `name` is what the adapters call it (PEFT's `base_model_name_or_path`). `config` holds the
    shape-giving fields of its `config.json` (see `vllm_jd.store.base_model`), or nothing when
    the compressor did not see that file; `fingerprint` is their sha256.
    """

    name: str
    fingerprint: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class ModuleInfo(_Strict):
    """One linear layer: its pools of basis vectors and the clusters that use them.

    U is `[u_rows, d_out]`, V `[v_rows, d_in]` and `scales` `[scale_rows, d_out]` (rows are
    vectors; each the concatenation of what the basis shards have). `clusters` counts the entries
    of the module's cluster table (see `vllm_jd.store.bases`); the first `shared` of them are
    shared by adapters, of rank `rank` (0 if there are none) but for the mean, which is the last
    of them where there is one; the others belong to one adapter each. An adapter's core is at
    `core_offset` (elements) of its core row, `core_size` long.
    """

    name: str
    d_in: int = Field(gt=0)
    d_out: int = Field(gt=0)
    rank: int = Field(ge=0)
    clusters: int = Field(ge=0)
    shared: int = Field(ge=0)
    u_rows: int = Field(ge=0)
    v_rows: int = Field(ge=0)
    scale_rows: int = Field(ge=0)
    core_offset: int = Field(ge=0)
    core_size: int = Field(ge=0)


class CoreShard(_Strict):
    """Core rows of adapters `first … first + rows - 1`: tensor `cores [rows, core_row]`."""

    file: str
    first: int = Field(ge=0)
    rows: int = Field(gt=0)


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
    core_row: int = Field(ge=0, description="elements of one adapter's core row")
    core_shards: list[CoreShard]
    basis_shards: list[str]
    files: dict[str, FileInfo]
