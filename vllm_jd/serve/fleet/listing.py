"""What is told of the fleet: one adapter, a page of them, the store."""

import asyncio
from http import HTTPStatus
from typing import Any

from vllm_jd.compressor.report.summary import adapter_entries
from vllm_jd.plugin.api.callers import caller, full_name, may_know
from vllm_jd.plugin.api.residents import Resident, ask_residents
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import weights_bytes
from vllm_jd.serve.fleet.live import LiveFleet
from vllm_jd.store import Store
from vllm_jd.store.fleet import (
    UPLOAD_FILES,
    Blended,
    Compressed,
    Entry,
    Fleet,
    Uploaded,
    source_of,
)

WEIGHTS = UPLOAD_FILES[1]
_NOWHERE = Resident(False, False, 0, None)


async def page(
    live: LiveFleet, limit: int, after: str | None, search: str | None
) -> dict[str, Any]:
    """Up to `limit` adapters, those after the one called `after`; as OpenAI's listings are. With
    `search` only those whose names contain it, upper or lower case; `total` says how many.

    Raises:
        FleetFault: there is no adapter of the name `after` (among those).
    """
    names, first = [name for name in live.names if may_know(name)], 0
    if search:
        folded = search.casefold()
        names = [name for name in names if folded in name.casefold()]
    if after is not None:
        full = full_name(after, live.known.__contains__)
        if full is None or full not in names:
            raise FleetFault(
                f"The adapter `{after}` does not exist.", HTTPStatus.NOT_FOUND, "after"
            )
        first = names.index(full) + 1
    last = min(first + limit, len(names))
    return {
        "object": "list",
        "data": await described(live, names[first:last]),
        "first_id": names[first] if first < last else None,
        "last_id": names[last - 1] if first < last else None,
        "has_more": last < len(names),
        "total": len(names),
    }


async def described(live: LiveFleet, names: list[str]) -> list[dict[str, Any]]:
    """What is told of each of some adapters that are there, with one call to the engine.

    | field | |
    |---|---|
    | `id` | its name |
    | `state` | `compressed`, `uncompressed` (kept so by its generation), `uploaded` (as it came), |
    | | `blend`; `broken`: a blend that cannot be served now |
    | `blend` | of a blend, its parts' weights, and how they are put together |
    | `fault` | of a broken one: why |
    | `source` | where it was fetched from, if that is known |
    | `sha256` | of the files that it was made from |
    | `uploaded_at` | seconds since 1970; null: it came with the store |
    | `clusters` | whose bases it shares |
    | `error` | mean relative squared error of its modules; 0: it is as it came |
    | `bytes` | size of the weights that it was made from |
    | `pinned`, `resident` | whether it stays in memory, and whether it is there now |
    | `references` | requests that wait or run with it; null: others may, and this key is not told |
    | `last_used` | seconds since 1970 of the last request; null: none since the start, or so |
    """
    store, fleet = live.store, live.fleet
    requests = {name: live.request_of(name) for name in names}
    asked = {name: request for name, request in requests.items() if request is not None}
    told = await ask_residents(live.engine, list(asked.values()))
    residents = dict(zip(asked, told, strict=True))
    entries = await asyncio.to_thread(_entries, store, fleet, names)
    who = caller.get()
    for name, entry in zip(names, entries, strict=True):
        resident = residents.get(name, _NOWHERE)
        if name not in asked:
            entry |= {"state": "broken", "fault": live.blends.faults.get(name)}
        entry["resident"] = resident.resident
        # What others ask for is not everybody's to know.
        whose = who is None or who.admin or (who.space is not None and who.own(name) == name)
        entry["references"] = resident.references if whose else None
        entry["last_used"] = resident.last_used if whose else None
    return entries


def _entries(store: Store, fleet: Fleet, names: list[str]) -> list[dict[str, Any]]:
    meanings = [fleet.meaning(name, store) for name in names]
    compressed = [each.index for each in meanings if isinstance(each, Compressed)]
    of_store = iter(adapter_entries(store, compressed))
    found = []
    for name, meaning in zip(names, meanings, strict=True):
        entry = fleet.entries.get(name, Entry())
        told: dict[str, Any] = {"id": name, "object": "adapter"}
        if isinstance(meaning, Compressed):
            index, its = meaning.index, next(of_store)
            told |= {
                "state": "uncompressed" if its["uncompressed"] else "compressed",
                "source": entry.source or store.sources[index],
                "sha256": source_of(store, index),
                "clusters": its["clusters"],
                "error": its["error"],
                "bytes": int(store.source_bytes[index]),
            }
        elif isinstance(meaning, Blended):
            told |= {
                "state": "blend",
                "source": None,
                "sha256": None,
                "clusters": [],
                "error": None,
                "bytes": 0,
                "blend": meaning.blend.model_dump(exclude_defaults=True),
            }
        else:
            digest = entry.digest or ""
            told |= {
                "state": "uploaded",
                "source": entry.source,
                "sha256": digest,
                "clusters": [],
                "error": 0.0,
                "bytes": weights_bytes(store.path, digest),
            }
        found.append(told | {"uploaded_at": entry.uploaded_at, "pinned": entry.pinned})
    return found


def store_entry(live: LiveFleet) -> dict[str, Any]:
    """What is told of the store: its generation, and how many adapters it has of which kind."""
    store, fleet = live.store, live.fleet
    uploads = [
        name
        for name in fleet.entries
        if name in live.known and isinstance(fleet.meaning(name, store), Uploaded)
    ]
    manifest = store.manifest
    return {
        "object": "store",
        "path": str(store.path),
        "generation": store.generation,
        "created_at": manifest.created_at,
        "base_model": manifest.base_model.name,
        "method": manifest.method,
        "dtype": manifest.quantised or manifest.dtype,
        "bytes": store.stored_bytes,
        "adapters": len(live.names),
        "uploads": len(uploads),
        "blends": sum(entry.blend is not None for entry in fleet.entries.values()),
        "pinned": sum(entry.pinned for entry in fleet.entries.values()),
        "changes": fleet.counter,
        "writable": live.updating,
        "keeper": live.keeper,
    }
