"""The manifest of one generation: what `generations/<n>/manifest.json` says, as pydantic models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

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
    """One linear layer: `Δy = U[c] · Σ · V[c]ᵀ · x`.

    U is `[clusters, rank, d_out]` and V is `[clusters, rank, d_in]` in `bases.safetensors` (rows
    are basis vectors); Σ of an adapter is `rank × rank`, row-major, at `core_offset` (elements)
    of the adapter's core row.
    """

    name: str
    d_in: int = Field(gt=0)
    d_out: int = Field(gt=0)
    rank: int = Field(gt=0)
    clusters: int = Field(gt=0)
    core_offset: int = Field(ge=0)


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

    schema_version: Literal[1] = SCHEMA_VERSION
    created_by: str
    created_at: str
    base_model: BaseModelInfo
    dtype: Literal["float32", "bfloat16", "float16"]
    method: str
    settings: dict[str, Any]
    adapters: int = Field(gt=0)
    modules: list[ModuleInfo]
    core_row: int = Field(gt=0, description="elements of one adapter's core row")
    core_shards: list[CoreShard]
    files: dict[str, FileInfo]
