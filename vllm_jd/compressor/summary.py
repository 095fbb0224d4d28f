"""What a store holds, as numbers: the content of `vllm-jd inspect`."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_jd.store import Store


@dataclass(frozen=True)
class Sizes:
    """Bytes before and after. `adapter_bytes` is the size of the sources' weight files;
    `parameter_saved_ratio` compares numbers, not bytes: 1 − stored / source parameters."""

    adapter_bytes: int
    store_bytes: int
    adapter_parameters: int
    store_parameters: int
    parameter_saved_ratio: float


def sizes(store: Store) -> Sizes:
    """Sizes of a store and of the adapters that went into it."""
    shapes = torch.tensor([[m.d_in + m.d_out] for m in store.manifest.modules], dtype=torch.int64)
    source = int((store.rank.long() @ shapes).sum())
    stored = len(store) * store.manifest.core_row + sum(
        m.clusters * m.rank * (m.d_in + m.d_out) for m in store.manifest.modules
    )
    return Sizes(
        adapter_bytes=int(store.source_bytes.sum()),
        store_bytes=store.stored_bytes,
        adapter_parameters=source,
        store_parameters=stored,
        parameter_saved_ratio=1 - stored / max(source, 1),
    )


def store_summary(store: Store) -> dict[str, Any]:
    """Everything about a store that a program may want, JSON-ready.

    Errors are relative squared reconstruction errors ‖BA − UΣVᵀ‖²_F / ‖BA‖²_F; means are over the
    modules, or adapters, that have factors.
    """
    manifest = store.manifest
    present = store.cluster >= 0
    return {
        "path": str(store.path),
        "generation": store.generation,
        "created_by": manifest.created_by,
        "created_at": manifest.created_at,
        "base_model": manifest.base_model.model_dump(),
        "method": manifest.method,
        "settings": manifest.settings,
        "dtype": manifest.dtype,
        "sizes": asdict(sizes(store)),
        "error": _mean(store.error, present),
        "clusters": _cluster_sizes(store),
        "adapters": _adapter_lines(store),
        "modules": [
            {
                "name": module.name,
                "d_in": module.d_in,
                "d_out": module.d_out,
                "rank": module.rank,
                "clusters": module.clusters,
                "adapters": int(present[:, i].sum()),
                "error": _mean(store.error[:, i], present[:, i]),
            }
            for i, module in enumerate(manifest.modules)
        ],
    }


def adapter_summary(store: Store, name: str) -> dict[str, Any]:
    """One adapter, module by module.

    Raises:
        KeyError: the store has no such adapter.
    """
    row = store.index(name)
    (line,) = _adapter_lines(store, slice(row, row + 1))
    line["source_sha256"] = bytes(store.source_sha256[row].tolist()).hex()
    line["source_bytes"] = int(store.source_bytes[row])
    line["modules"] = [
        {
            "name": module.name,
            "cluster": int(store.cluster[row, i]),
            "source_rank": int(store.rank[row, i]),
            "norm": float(store.norm[row, i]),
            "error": float(store.error[row, i]),
        }
        for i, module in enumerate(store.manifest.modules)
        if store.cluster[row, i] >= 0
    ]
    return line


def _adapter_lines(store: Store, rows: slice = slice(None)) -> list[dict[str, Any]]:
    """One line an adapter. NumPy: a torch operation an adapter would take seconds at 20,000."""
    cluster, rank = store.cluster[rows].numpy(), store.rank[rows].numpy()
    error = store.error[rows].double().numpy()
    lines = []
    for name, c, r, e in zip(store.names[rows], cluster, rank, error, strict=True):
        present = c >= 0
        lines.append(
            {
                "name": name,
                "clusters": sorted(set(c[present].tolist())),
                "source_ranks": sorted(set(r[present].tolist())),
                "error": float(e[present].mean()) if present.any() else 0.0,
                "worst_module_error": float(e[present].max()) if present.any() else 0.0,
            }
        )
    return lines


def _cluster_sizes(store: Store) -> list[int] | None:
    """Adapters in each cluster, or None where modules have assignments of their own."""
    if store.manifest.settings.get("cluster_scope") == "module":
        return None
    cluster = store.cluster.amax(dim=1)
    return torch.bincount(cluster[cluster >= 0].long()).tolist()


def _mean(values: torch.Tensor, present: torch.Tensor) -> float:
    return float(values[present].double().mean()) if bool(present.any()) else 0.0
