"""How to compress: the settings of one run."""

from dataclasses import dataclass, fields
from typing import Any

QUANTISED = ("int8", "int4")


@dataclass(frozen=True)
class Settings:
    """Method and parameters. Field names are those of the command line.

    A method looks only at the fields that its entry in `vllm_jd.compressor.methods` names.

    Args:
        method: a name of the registry.
        rank: of the shared bases, or of each adapter alone (`svd`).
        clusters: groups of adapters with bases of their own.
        cluster_scope: `adapter` (one assignment for all modules) or `module`.
        iterations: most updates of the bases.
        solver: of JD-Full, `alternating` or `eigen`.
        rank_allocation: `uniform`, or `spectrum`: ranks that differ between modules, of as many
            bytes in total as `rank` everywhere.
        residual_rank: rank of each adapter's private correction beside its core.
        mean_rank: rank of the mean adapter that all share, without a core.
        merge_weight: PEFT's weight of each adapter in a merge; None: that with which merging equal
            adapters gives that one back.
        density: part of the numbers that TIES and DARE keep.
        majority_sign: how TIES elects signs, by `total` or `frequency`.
        matrices: HydraOpt's M, between 1 and the number of adapters.
        temperature: of HydraOpt's softmax.
        distance: of HydraOpt, `mae` or `frobenius`.
        steps: of HydraOpt's optimiser.
        seed: of every random choice.
        store_dtype: type of the stored numbers: a float type, `int8` or `int4`.
        max_adapter_error: an adapter whose mean relative squared error over its modules would be
            higher is stored uncompressed.
    """

    method: str = "jd-full"
    rank: int = 16
    clusters: int = 1
    cluster_scope: str = "adapter"
    iterations: int = 10
    solver: str = "alternating"
    rank_allocation: str = "uniform"
    residual_rank: int = 0
    mean_rank: int = 0
    merge_weight: float | None = None
    density: float = 0.5
    majority_sign: str = "total"
    matrices: int = 1
    temperature: float = 0.1
    distance: str = "mae"
    steps: int = 200
    seed: int = 0
    store_dtype: str = "bfloat16"
    max_adapter_error: float | None = None

    @property
    def float_dtype(self) -> str:
        """Type of the stored numbers that are not quantised."""
        return "bfloat16" if self.store_dtype in QUANTISED else self.store_dtype

    @property
    def quantised(self) -> str | None:
        """`int8`, `int4`, or None."""
        return self.store_dtype if self.store_dtype in QUANTISED else None

    @classmethod
    def from_recorded(cls, method: str, recorded: dict[str, Any]) -> "Settings":
        """The settings of a store's manifest; fields that it lacks take their defaults."""
        known = {field.name for field in fields(cls)}
        return cls(method=method, **{k: v for k, v in recorded.items() if k in known})
