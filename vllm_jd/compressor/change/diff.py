"""What differs between two stores, or two generations of one."""

from typing import Any

import torch

from vllm_jd.store import Store


def diff(old: Store, new: Store) -> dict[str, Any]:
    """What changed from `old` to `new`, JSON-ready.

    Returns:
        - `old`, `new`: `path`, `generation`, `created_at`, `adapters`
        - `added`, `removed`: names, in the order of the store that has them
        - `replaced`: names in both whose sources differ (by their sha256)
        - `error`: of the adapters that both have, `before` and `after`: the mean over them of the
          mean relative squared error over an adapter's modules, None if there are none; and
          `adapters`: `name`, `before` and `after` of those whose error is another, largest change
          first
        - `settings`: name → [before, after] of those that differ, None where one has none;
          `method`, `dtype` and `base_model` are among them
        - `store_bytes`, `adapter_bytes`: [before, after], of the store's files and of the sources'
          weights
    """
    common = [name for name in old.names if name in new]
    at_old = torch.tensor([old.index(name) for name in common], dtype=torch.int64)
    at_new = torch.tensor([new.index(name) for name in common], dtype=torch.int64)
    changed = (old.source_sha256[at_old] != new.source_sha256[at_new]).any(dim=1)
    before, after = _errors(old)[at_old], _errors(new)[at_new]
    change = (after - before).abs()
    order = change.argsort(descending=True, stable=True)
    order = order[change[order] > 0].tolist()
    old_settings, new_settings = _settings(old), _settings(new)
    return {
        "old": _identity(old),
        "new": _identity(new),
        "added": [name for name in new.names if name not in old],
        "removed": [name for name in old.names if name not in new],
        "replaced": [common[i] for i in changed.nonzero()[:, 0].tolist()],
        "error": {
            "before": float(before.mean()) if common else None,
            "after": float(after.mean()) if common else None,
            "adapters": [
                {"name": common[i], "before": float(before[i]), "after": float(after[i])}
                for i in order
            ],
        },
        "settings": {
            key: [old_settings.get(key), new_settings.get(key)]
            for key in sorted(old_settings.keys() | new_settings.keys())
            if old_settings.get(key) != new_settings.get(key)
        },
        "store_bytes": [old.stored_bytes, new.stored_bytes],
        "adapter_bytes": [int(store.source_bytes.sum()) for store in (old, new)],
    }


def _identity(store: Store) -> dict[str, Any]:
    return {
        "path": str(store.path),
        "generation": store.generation,
        "created_at": store.manifest.created_at,
        "adapters": len(store),
    }


def _errors(store: Store) -> torch.Tensor:
    """Each adapter's mean error over the modules that it has: float64 `[n]`."""
    count = store.present.sum(dim=1)
    return store.error.double().sum(dim=1) / count.clamp_min(1)


def _settings(store: Store) -> dict[str, Any]:
    manifest = store.manifest
    return manifest.settings | {
        "method": manifest.method,
        "dtype": manifest.quantised or manifest.dtype,
        "base_model": manifest.base_model.name,
    }
