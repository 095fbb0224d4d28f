"""What a store holds, as numbers: the content of `vllm-jd inspect`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_jd.row import RANK
from vllm_jd.store import Store
from vllm_jd.store.manifest import ModuleInfo


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
    """Sizes of a store and of the adapters that went into it.

    The projections that VeRA adapters share count once as parameters, but in the bytes of each
    adapter's file.
    """
    vera = store.manifest.settings.get("peft_type") == "VERA"
    source = _vera_parameters(store) if vera else _lora_parameters(store)
    stored = len(store) * store.manifest.core_row + sum(
        m.u_vectors * m.d_out + m.v_vectors * m.d_in + m.scale_rows * m.d_out
        for m in store.manifest.modules
    )
    return Sizes(
        adapter_bytes=int(store.source_bytes.sum()),
        store_bytes=store.stored_bytes,
        adapter_parameters=source,
        store_parameters=stored,
        parameter_saved_ratio=1 - stored / max(source, 1),
    )


def _lora_parameters(store: Store) -> int:
    shapes = torch.tensor([[m.d_in + m.d_out] for m in store.manifest.modules], dtype=torch.int64)
    return int((store.rank.long() @ shapes).sum())


def _vera_parameters(store: Store) -> int:
    modules = store.manifest.modules
    rank = store.rank.long()
    vectors = rank + torch.where(rank > 0, torch.tensor([m.d_out for m in modules]), 0)
    widest = max(m.d_in for m in modules) + max(m.d_out for m in modules)
    return int(vectors.sum() + rank.max() * widest)


def store_summary(store: Store) -> dict[str, Any]:
    """Everything about a store that a program may want, JSON-ready.

    Errors are relative squared reconstruction errors ‖BA − B̂Â‖²_F / ‖BA‖²_F, B̂Â being what is
    stored; means are over the modules, or adapters, that have factors. `exact_error` is the error
    before quantising, None where nothing is quantised.
    `experts` of a module is 0 where it is a plain linear layer; d_in and d_out are one expert's.
    `clusters` of a module counts the shared ones, `uncompressed` the adapters kept as they were.
    `rank` of a module is that of its shared bases, or the highest of the adapters' own where they
    share none; `own_ranks` are those of bases that one adapter has alone.
    """
    manifest = store.manifest
    present = store.present
    uncompressed = uncompressed_adapters(store)
    own = [_own_ranks(store, module) for module in manifest.modules]
    return {
        "path": str(store.path),
        "generation": store.generation,
        "created_by": manifest.created_by,
        "created_at": manifest.created_at,
        "base_model": manifest.base_model.model_dump(),
        "method": manifest.method,
        "settings": manifest.settings,
        "dtype": manifest.quantised or manifest.dtype,
        "sizes": asdict(sizes(store)),
        "error": _mean(store.error, present),
        "exact_error": _optional_mean(store.exact_error, present),
        "uncompressed": int(uncompressed.sum()),
        "clusters": cluster_sizes(store),
        "adapters": _adapter_entries(store, uncompressed, torch.arange(len(store))),
        "modules": [
            {
                "name": module.name,
                "experts": module.experts,
                "embedding": module.embedding,
                "d_in": module.d_in,
                "d_out": module.d_out,
                "rank": module.rank if module.shared else max(own[i], default=0),
                "own_ranks": own[i],
                "clusters": module.shared,
                "adapters": int(present[:, i].sum()),
                "error": _mean(store.error[:, i], present[:, i]),
            }
            for i, module in enumerate(manifest.modules)
        ],
    }


def source_ranks(store: Store) -> torch.Tensor:
    """Ranks of the sources' factors, int32 `[n, m]`; of experts their mean, rounded up."""
    each = torch.tensor([module.each for module in store.manifest.modules], dtype=torch.int32)
    return -(-store.rank // each)


def _own_ranks(store: Store, module: ModuleInfo) -> list[int]:
    """Ranks of the rows that one adapter has alone, ascending."""
    if module.rows == module.shared:
        return []
    ranks = store.rows(module.name)[module.shared :, ..., RANK]
    return torch.unique(ranks[ranks > 0]).tolist()


def rank_text(modules: list[dict[str, Any]]) -> str:
    """Ranks of modules of a summary for people: `16`, `own 1–4` without shared bases, or both."""
    shared = {module["rank"] for module in modules if module["clusters"]}
    own = {rank for module in modules for rank in module["own_ranks"]}
    texts = [
        f"{before}{min(ranks)}" + (f"–{max(ranks)}" if len(ranks) > 1 else "")
        for before, ranks in (("", shared), ("own ", own))
        if ranks
    ]
    return ", ".join(texts)


def adapter_summary(store: Store, name: str) -> dict[str, Any]:
    """One adapter, module by module. `source` says where it was fetched from, or is None.

    Raises:
        KeyError: the store has no such adapter.
    """
    index, ranks = store.index(name), source_ranks(store)
    (found,) = adapter_entries(store, [index])
    found["source_sha256"] = bytes(store.source_sha256[index].tolist()).hex()
    found["source_bytes"] = int(store.source_bytes[index])
    found["source"] = store.sources[index]
    found["modules"] = [
        {
            "name": module.name,
            "cluster": _shared_index(store, index, i),
            "source_rank": int(ranks[index, i]),
            "norm": float(store.norm[index, i]),
            "error": float(store.error[index, i]),
        }
        for i, module in enumerate(store.manifest.modules)
        if store.present[index, i]
    ]
    return found


def uncompressed_adapters(store: Store, some: torch.Tensor | None = None) -> torch.Tensor:
    """Which adapters are kept as they were, each module having a row of the adapter's own, of
    the source's rank: bool `[n]`, or of `some` of them (int64, their indices)."""
    chosen, rank = store.chosen, store.rank
    if some is not None:
        chosen, rank = chosen[some], rank[some]
    present = (chosen >= 0).any(dim=2)
    result = present.any(dim=1)
    for i, module in enumerate(store.manifest.modules):
        first = chosen[:, i, 0]
        if module.rows == module.shared:
            result &= first < 0
            continue
        ranks = store.rows(module.name)[first.long().clamp_min(0), ..., RANK]
        own = ranks.view(len(first), -1).sum(dim=1)
        whole = (first >= module.shared) & (own == rank[:, i])
        result &= whole | ~present[:, i]
    return result


def _shared_index(store: Store, index: int, column: int) -> int | None:
    """The cluster whose bases the adapter shares in one module; None: it has its own."""
    first = int(store.chosen[index, column, 0])
    return first if first < store.manifest.modules[column].shared else None


def adapter_entries(store: Store, indices: Sequence[int]) -> list[dict[str, Any]]:
    """What `summary` says of some adapters: one entry each."""
    some = torch.tensor(indices, dtype=torch.int64)
    return _adapter_entries(store, uncompressed_adapters(store, some), some)


def _adapter_entries(
    store: Store, uncompressed: torch.Tensor, some: torch.Tensor
) -> list[dict[str, Any]]:
    # NumPy: a torch operation an adapter would take seconds at 20,000.
    shared = torch.tensor([module.shared for module in store.manifest.modules])
    chosen = store.chosen[some]
    first = chosen[:, :, 0]
    shares = ((first >= 0) & (first < shared)).numpy()
    present = (chosen >= 0).any(dim=2).numpy()
    rank, error = source_ranks(store)[some].numpy(), store.error[some].double().numpy()
    entries = []
    for i, c, s, p, r, e, u in zip(
        some.tolist(),
        first.numpy(),
        shares,
        present,
        rank,
        error,
        uncompressed.tolist(),
        strict=True,
    ):
        entries.append(
            {
                "name": store.names[i],
                "clusters": sorted(set(c[s].tolist())),
                "uncompressed": u,
                "source_ranks": sorted(set(r[p].tolist())),
                "error": float(e[p].mean()) if p.any() else 0.0,
                "worst_module_error": float(e[p].max()) if p.any() else 0.0,
            }
        )
    return entries


def cluster_sizes(store: Store) -> list[int] | None:
    """Adapters in each shared cluster, or None where an adapter's modules differ in that."""
    shared = torch.tensor([module.shared for module in store.manifest.modules])
    first = store.chosen[:, :, 0]
    first = torch.where(first < shared, first, -1)
    cluster = first.amax(dim=1)
    if bool(((first >= 0) & (first != cluster[:, None])).any()):
        return None  # HydraOpt chooses module by module
    return torch.bincount(cluster[cluster >= 0].long()).tolist()


def _optional_mean(values: torch.Tensor | None, present: torch.Tensor) -> float | None:
    return None if values is None else _mean(values, present)


def _mean(values: torch.Tensor, present: torch.Tensor) -> float:
    return float(values[present].double().mean()) if bool(present.any()) else 0.0
