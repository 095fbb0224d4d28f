"""Which adapter a request means, and that it is there when its tokens are computed.

One object in the engine's process, between the scheduler, which counts requests, and the workers,
which hold the numbers. An adapter in flight is one *reference*: a source (a generation of a store,
an uploaded folder with the digest of its files, or a blend of such) and a number in it. vLLM's
names and ids only point to one, and may point to another for the next request; a request keeps the
one that it came with. To vLLM's prefix cache, to its batches and to the workers a reference is
known by its `identity`, which no other has.
"""

import hashlib
import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

from vllm_jd.plugin.api.blend_requests import Part, parse_blend_path
from vllm_jd.plugin.api.requests import parse_store_path, split_upload_path
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.blends import Layout, Term
from vllm_jd.plugin.engine.capacity import capacity_of, misfits
from vllm_jd.plugin.engine.orders import (
    AlsoAt,
    CloseSource,
    LoadUpload,
    MakeBlend,
    OpenStore,
    Order,
    Sent,
    carry_out,
    own_faults,
)
from vllm_jd.plugin.engine.residency import (
    NOTHING,
    Adapter,
    Basis,
    CannotFit,
    Fill,
    Residency,
    SlotCounts,
)
from vllm_jd.plugin.engine.sources import (
    AdapterUnavailable,
    Made,
    Source,
    blend_identity,
    number_in,
    read_digest,
    store_key,
)
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.on_objects import replace_block_hasher
from vllm_jd.plugin.placed import BAD_BLEND, known_by
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.store import Store, StoreError
from vllm_jd.store.blend import Blend, BlendError
from vllm_jd.store.generations import open_number

_LARGE = 1e6  # ‖BA‖_F of a module; trained adapters have less than a thousandth of it
_VISITED_SECONDS = 60.0
"""So long a generation stays open for the next request that names it, though it is not served."""
_BLENDS = 1 << 14  # blends that nobody asks for now, but whose slots may be of use once more
_NAMES_REMEMBERED = 1 << 18  # that were asked for
_PAGE_INS = 4096  # whose seconds nobody has asked for yet


class Reference(NamedTuple):
    """An adapter in flight, and by what it is known outside."""

    adapter: Adapter
    identity: str


class EngineAdapters:
    """The references of one engine.

    Args:
        vllm_config: vLLM's.
        config: the plugin's.

    Raises:
        StoreError: the store cannot be opened.
        ValueError: there is too little room, see `capacity_of`.
    """

    def __init__(self, vllm_config: Any, config: PluginConfig):
        self._config = config
        store = config.open_store(verify=False)
        tables = Tables(store)
        self._dtype = vllm_config.model_config.dtype
        self.capacity = capacity_of(
            store,
            tables,
            config,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_lora_rank=vllm_config.lora_config.max_lora_rank,
            in_codes=keeps_codes(store, self._dtype),
            fully_sharded=vllm_config.lora_config.fully_sharded_loras,
        )
        self._own_rows = store.manifest.rows
        self._blends: OrderedDict[str, Source] = OrderedDict()  # by identity, the latest last
        self._blends_of: dict[int, dict[str, None]] = {}  # source → its blends' identities
        self.residency = Residency(self.capacity)
        self._rpc: Callable[..., Any] | None = None
        self._connecting = Lock()  # requests and calls come in by different threads
        self._numbers = itertools.count(1)  # never one twice: some orders may still be under way
        self._sources: dict[int, Source] = {}
        self._by_key: dict[str, Source] = {}
        self._uploads: dict[tuple[int, str], str] = {}  # (id, path) of loaded ones → digest
        self._loaded: dict[int, Reference] = {}  # by vLLM's ids, until they are removed
        self._pinned: dict[int, Reference] = {}
        self._visited: dict[int, float] = {}
        """Generations that were never served, only named by requests: when the last of these ended.
        """
        self._requests: Counter[Adapter] = Counter()  # waiting or running
        self._used: OrderedDict[str, float] = OrderedDict()  # by name, latest last
        self._broken: Counter[str] = Counter()  # by what they are known as at first
        self._fills: list[Fill] = []
        self._orders: list[Order] = []
        self._sent: deque[Sent] = deque()
        self._lost: list[Fill] = []
        self._page_ins: deque[float] = deque(maxlen=_PAGE_INS)
        self._swaps = 0
        self._measured: dict[str, SlotCounts] = {}
        self.first = self._served = self._add_store(store, tables)
        self._begin(self.first)

    def _begin(self, source: Source) -> None:
        """What the workers do by themselves at their start (`Slots.begin`)."""
        store, tables = source.store, source.tables
        if not self.capacity.whole:
            return
        # In the order in which the workers take their slots, before any adapter names them.
        for side, ranks in tables.ranks.items():
            self.residency.begin_bases(
                source.basis(side, b) for b in np.flatnonzero(ranks).tolist()
            )
        if self._holds_all(len(store)):
            for i in range(len(store)):
                self.residency.begin(Adapter(source.number, i), source.parts(i)[0])

    def connect(self, core: Any) -> None:
        """Take an EngineCore: its executor carries out what is decided here. Harmless when
        repeated."""
        with self._connecting:
            if self._rpc is None:
                replace_block_hasher(core, self.name_for_cache)
                self._rpc = core.model_executor.collective_rpc

    def name_for_cache(self, request: Any) -> None:
        """Put the adapter's identity into a request, by which its blocks are keyed, where it is
        known without reading anything; `Scheduler.add_request` sees to the others."""
        lora = request.lora_request
        if lora is not None and not hasattr(request, "vllm_jd_asked"):
            request.vllm_jd_asked = lora
            identity = self._known_identity(lora)
            if identity is not None:
                request.lora_request = known_by(identity)

    # --- who a request means ---

    def resolve(self, lora: LoRARequest) -> Reference:
        """The reference of a request's LoRARequest; an upload that is new is loaded.

        Raises:
            AdapterUnavailable: there is none.
        """
        source = self._source_of(lora)
        number = number_in(source, lora.lora_name) if source.store else 0
        adapter = Adapter(source.number, number)
        bases, ranks = source.parts(number)
        try:
            self.residency.check(bases, ranks, **source.needs)
        except CannotFit as error:
            raise AdapterUnavailable(f"adapter {lora.lora_name!r}: {error}") from None
        return Reference(adapter, self._identity(source, adapter))

    def renewed(self, reference: Reference) -> Reference:
        """The same adapter by what it is known now, after its numbers could not be had (`failed`):
        what was computed meanwhile is not its."""
        source = self._sources[reference.adapter.source]
        return Reference(reference.adapter, self._identity(source, reference.adapter))

    def _identity(self, source: Source, adapter: Adapter) -> str:
        whose = source.whose(adapter.number)
        tries = self._broken[whose]
        return f"{whose}#{tries}" if tries else whose

    def _known_identity(self, lora: LoRARequest) -> str | None:
        """The identity of what is here already, without reading a file."""
        source = self._known_source(lora)
        if source is None or (source.store and lora.lora_name not in source.store):
            return None
        number = source.store.index(lora.lora_name) if source.store else 0
        return self._identity(source, Adapter(source.number, number))

    def _known_source(self, lora: LoRARequest) -> Source | None:
        try:
            blended = parse_blend_path(lora.lora_path)
            store = parse_store_path(lora.lora_path)
        except (ValueError, OSError):
            return None
        if blended is not None:
            found = [self._known_part(part) for part in blended.parts]
            known = None if None in found else blend_identity(blended.blend, found)
            return self._blends.get(known or "")
        if store is not None:
            return self._by_key.get(store_key(*store))
        digest, path = split_upload_path(lora.lora_path)
        known = digest or self._uploads.get((lora.lora_int_id, path))
        return None if lora.load_inplace else self._by_key.get(known or "")

    def _source_of(self, lora: LoRARequest) -> Source:
        try:
            blended = parse_blend_path(lora.lora_path)
            store = parse_store_path(lora.lora_path)
        except ValueError as error:
            raise AdapterUnavailable(str(error)) from None
        if blended is not None:
            return self._blend(blended.parts, blended.blend)
        if store is not None:
            source = self._by_key.get(store_key(*store))
            if source is None:
                source = self._open_visited(*store)
            return source
        digest, path = split_upload_path(lora.lora_path)
        if digest is None and not lora.load_inplace:
            digest = self._uploads.get((lora.lora_int_id, path))
        digest = digest or read_digest(lora.lora_name, path)
        source = self._by_key.get(digest)
        if source is None:
            source = self._load(lora.lora_name, digest, path)
        elif path not in source.paths:
            source.paths.add(path)
            self._orders.append(AlsoAt(source.number, path))
        self._uploads[lora.lora_int_id, path] = digest
        return source

    def _load(self, name: str, digest: str, path: str) -> Source:
        number = next(self._numbers)
        fault = self._ask(LoadUpload(number, name, digest, path))
        if fault:
            self._orders.append(CloseSource(number))  # other workers may have loaded it
            raise AdapterUnavailable(f"adapter {name!r} cannot be served: {fault}")
        source = Source(number, digest, digest, paths={path})
        self._sources[number] = self._by_key[digest] = source
        return source

    # --- blends ---

    def _blend(self, parts: Sequence[Part], blend: Blend) -> Source:
        """The source of a blend; parts that are not there yet are opened or loaded."""
        try:
            blend.check_size(self._config.max_blend)
            found = [self._part(part) for part in parts]
            identity = blend_identity(blend, found)
            source = self._blends.get(identity)
            if source is None:
                source = self._make_blend(identity, found, blend)
        except BlendError as error:
            self._drop_unnamed()
            raise AdapterUnavailable(BAD_BLEND + str(error)) from None
        except AdapterUnavailable:
            self._drop_unnamed()
            raise
        self._blends.move_to_end(identity)
        return source

    def _known_part(self, part: Part) -> tuple[Source, int, float] | None:
        """A part that is here already: its source, its number there, and its weight."""
        store = parse_store_path(part.path)
        if store is not None:
            source = self._by_key.get(store_key(*store))
            if source is None or part.name not in source.store:
                return None
            return source, source.store.index(part.name), part.weight
        digest, path = split_upload_path(part.path)
        if digest is None:  # of --lora-modules, which are loaded under their paths
            loaded = list(self._uploads.items())  # another thread may change it meanwhile
            digest = next((d for (_, p), d in loaded if p == path), "")
        source = self._by_key.get(digest)
        return None if source is None else (source, 0, part.weight)

    def _part(self, part: Part) -> tuple[Source, int, float]:
        found = self._known_part(part)
        if found is not None:
            return found
        store = parse_store_path(part.path)
        if store is not None:
            source = self._open_visited(*store)
            return source, number_in(source, part.name), part.weight
        digest, path = split_upload_path(part.path)
        digest = digest or read_digest(part.name, path)
        source = self._by_key.get(digest)
        if source is None:
            source = self._load(part.name, digest, path)
            source.retired = True  # no name stands for it: it goes with the blends that need it
        return source, 0, part.weight

    def _make_blend(
        self, identity: str, found: Sequence[tuple[Source, int, float]], blend: Blend
    ) -> Source:
        # In one order, whichever the request has: floating-point sums depend on it.
        found = sorted(found, key=lambda part: (part[0].whose(part[1]), part[2]))
        terms = tuple(Term(source.number, number, weight) for source, number, weight in found)
        tables = {source.number: source.tables for source, _, _ in found if source.tables}
        layout = Layout.of(terms, tables)
        if blend.way != "linear":
            own = tables.get(terms[0].source) if len(tables) == 1 and not layout.uploads else None
            if own is None or not layout.chosen[terms[0].source].in_one_cluster(own):
                raise BlendError(
                    f"found the way `{blend.way}` and parts that do not share all of their bases, "
                    "expected parts of one cluster; others are blended by `linear`"
                )
        if self.capacity.blends and not self.capacity.long and layout.factors:
            raise BlendError(
                "found parts without cores (an upload, or one that is kept as it was), which are "
                "not blended with --fully-sharded-loras"
            )
        made = Made(terms, layout, self._own_rows)
        source = Source(next(self._numbers), identity, identity, made=made)
        bases: dict[Basis, tuple[int, bool]] = {}
        for its, number, _ in found:
            for basis, rank in zip(*its.parts(number), strict=True):
                bases[basis] = rank, its.store is None
        source.bases[0] = tuple(bases), tuple(rank for rank, _ in bases.values())
        source.uploads = tuple(upload for _, upload in bases.values())
        try:
            self.residency.check(*source.bases[0], **source.needs)
        except CannotFit as error:
            raise BlendError(str(error)) from None
        for _ in range(len(self._blends) + 1 - _BLENDS):
            oldest = next((each for each in self._blends.values() if not each.held), None)
            if oldest is not None:
                self._drop_blend(oldest)
        self._sources[source.number] = self._blends[identity] = source
        for part in self._parts_of(source):
            self._blends_of.setdefault(part.number, {})[identity] = None
        names = tuple(part.whose(number) for part, number, _ in found)
        self._orders.append(MakeBlend(source.number, terms, blend, names))
        return source

    def _parts_of(self, source: Source) -> list[Source]:
        """The sources that a blend's parts are of, once each."""
        terms = () if source.made is None else source.made.terms
        return [self._sources[number] for number in {term.source: None for term in terms}]

    def _drop_blend(self, source: Source) -> None:
        self.residency.forget_blend(source.number, source.made.cores)
        for part in self._parts_of(source):
            del self._blends_of[part.number][source.identity]
        del self._sources[source.number], self._blends[source.identity]
        self._orders.append(CloseSource(source.number))

    def _drop_unnamed(self) -> None:
        """Let uploads go that were loaded for a blend that came to nothing."""
        for source in list(self._sources.values()):
            if source.retired and not source.held and source.made is None:
                self._drop(source)

    def _open_visited(self, path: Path, generation: int) -> Source:
        """Open a generation that a request names and nobody serves."""
        source = self._open_generation(path, generation)
        self._visited[source.number] = time.monotonic()
        return source

    def _open_generation(self, path: Path, generation: int) -> Source:
        """Open a generation of a store here and on all workers.

        Raises:
            AdapterUnavailable: it cannot be opened, or does not fit what this server has made
                room for.
        """
        try:
            store = open_number(path, generation, verify=False)
            tables = Tables(store)
        except (StoreError, OSError) as error:
            raise AdapterUnavailable(f"generation {generation} of {path}: {error}") from None
        first = self.first.store
        in_codes = keeps_codes(first, self._dtype)
        faults = misfits(first, store, tables, self.capacity, in_codes=in_codes)
        if faults:
            raise AdapterUnavailable(
                f"generation {generation} of {store.path} does not fit beside generation "
                f"{first.generation}, with which the server started: "
                + "; ".join(faults)
                + ". Start the server anew to serve it"
            )
        source = self._add_store(store, tables)
        fault = self._ask(OpenStore(source.number, str(path), generation))
        if fault:
            self._drop(source)
            raise AdapterUnavailable(f"generation {generation} of {path}: {fault}")
        return source

    def _add_store(self, store: Store, tables: Tables) -> Source:
        path = Path(store.path).resolve()
        key = store_key(path, store.generation)
        numbers = bytes(store.source_sha256.numpy()) + repr(store.manifest.files).encode()
        identity = f"{key}:{hashlib.sha256(numbers).hexdigest()[:16]}"
        source = Source(next(self._numbers), key, identity, store, tables, str(path))
        self._sources[source.number] = self._by_key[key] = source
        return source

    # --- its life ---

    def keep(self, reference: Reference, name: str) -> None:
        """Count a request that has an adapter's reference, until `let_go`: its source stays. `name`
        is what it asked for."""
        self._hold(reference)
        self._requests[reference.adapter] += 1
        self._used[name] = time.time()
        self._used.move_to_end(name)
        if len(self._used) > _NAMES_REMEMBERED:
            self._used.popitem(last=False)

    def _hold(self, reference: Reference) -> None:
        source = self._sources[reference.adapter.source]
        for each in (source, *self._parts_of(source)):
            each.held += 1

    def let_go(self, reference: Reference) -> None:
        """Count one less."""
        self._requests[reference.adapter] -= 1
        if not self._requests[reference.adapter]:
            del self._requests[reference.adapter]
        self._let_go(reference)

    def _let_go(self, reference: Reference) -> None:
        source = self._sources[reference.adapter.source]
        held = [source, *self._parts_of(source)]
        for each in held:
            each.held -= 1
            if each.number in self._visited:
                self._visited[each.number] = time.monotonic()
        for each in held:
            if each.retired and not each.held:
                self._drop(each)

    def tell(self, adapters: list[tuple[str, str]]) -> list[tuple[bool, bool, int, float | None]]:
        """What is known of adapters, named as a LoRARequest names them: (name, path).

        Returns:
            Of each: whether this engine has its source open; whether it is resident; how many
            requests that wait or run mean it; when its name was last asked for, in seconds since
            1970, None: not since the start.
        """
        told = []
        sources: dict[str, Source | None] = {}  # most have one path
        for name, path in adapters:
            if path not in sources:
                sources[path] = self._known_source(LoRARequest(name, 1, path))
            source, used = sources[path], self._used.get(name)
            if source is None or (source.store and name not in source.store):
                told.append((False, False, 0, used))
                continue
            number = source.store.index(name) if source.store else 0
            adapter = Adapter(source.number, number)
            resident = self.resident(Reference(adapter, ""))
            told.append((True, resident, self._requests[adapter], used))
        return told

    def measure(self, names: int) -> dict[str, Any]:
        """What there is to tell of slots and sources: as it is now, and what has happened since the
        last call; so that who adds that up counts nothing twice, whoever else asks too.

        Args:
            names: how many names to tell.

        Returns:
            `slots`: kind → (held, idle, free) now; `hits`, `misses`, `evictions` since: kind →
            number; `bases` and `cores` of the generation that is served: (resident, all);
            `whole`, whether all of that is, whatever is asked for; `page_in_seconds` of each step
            since that had slots filled; `swaps` since; `draining`: (number of the generation, or
            None: an upload; requests that have it still) of what is served no more; `recent`:
            the names that were asked for last, the latest first.
        """
        slots = self.residency.counts()
        before, self._measured = self._measured, slots
        since = {
            what: {
                kind: getattr(now, what) - getattr(before.get(kind, NOTHING), what)
                for kind, now in slots.items()
            }
            for what in ("hits", "misses", "evictions")
        }
        served = self._served
        bases, cores = self.residency.resident_of(served.number)
        all_bases = sum(int((ranks > 0).sum()) for ranks in served.tables.ranks.values())
        page_ins, self._page_ins = list(self._page_ins), deque(maxlen=_PAGE_INS)
        swaps, self._swaps = self._swaps, 0
        return since | {
            "slots": {kind: now[:3] for kind, now in slots.items()},
            "bases": (bases, all_bases),
            "cores": (cores, len(served.store)),
            "whole": self._holds_all(len(served.store)) and all_bases <= sum(slots["basis"][:3]),
            "page_in_seconds": page_ins,
            "swaps": swaps,
            "draining": self._draining(),
            "recent": list(itertools.islice(reversed(self._used), names)),
        }

    def _holds_all(self, adapters: int) -> bool:
        """Whether a store of so many adapters has room as a whole, beside all uploads."""
        return self.capacity.whole and adapters + self._config.max_loras <= self.capacity.cores

    def _draining(self) -> list[tuple[int | None, int]]:
        found = []
        for source in self._sources.values():
            if source.retired and source.held and source.made is None:
                requests = sum(
                    count
                    for adapter, count in self._requests.items()
                    if source.number in self._numbers_of(adapter.source)
                )
                generation = None if source.store is None else source.store.generation
                found.append((generation, requests))
        return found

    def _numbers_of(self, number: int) -> set[int]:
        """A source and, of a blend, those of its parts."""
        source = self._sources[number]
        return {number, *(each.number for each in self._parts_of(source))}

    def acquire(self, reference: Reference) -> int | None:
        """Count one request more of an adapter. Returns its core slot, or None: there is none now.

        What the workers have to do first is sent by `flush`.
        """
        source = self._sources[reference.adapter.source]
        bases, ranks = source.parts(reference.adapter.number)
        found = self.residency.acquire(reference.adapter, bases, ranks, **source.needs)
        if found is None:
            return None
        slot, fills = found
        self._hold(reference)
        self._fills += fills
        return slot

    def shut_out(self, reference: Reference) -> str | None:
        """Why an adapter that found no slots waits in vain, or None: its turn will come."""
        if not self._pinned:
            return None
        kept = {pinned.adapter for pinned in self._pinned.values()}
        source = self._sources[reference.adapter.source]
        bases, ranks = source.parts(reference.adapter.number)
        short = self.residency.short_of(kept, reference.adapter, bases, ranks, **source.needs)
        if not short:
            return None
        ids = ", ".join(map(str, sorted(self._pinned)))
        return (
            f"its adapter cannot be had: with the pinned adapters (of ids {ids}) found "
            + "; and ".join(map(str, short))
            + "; or unload one of those"
        )

    def release(self, reference: Reference) -> None:
        """Count one request less."""
        self.residency.release(reference.adapter)
        self._let_go(reference)

    def resident(self, reference: Reference) -> bool:
        """Whether all that an adapter needs lies in slots."""
        if not self.residency.resident(reference.adapter):
            return False
        bases, _ = self._sources[reference.adapter.source].parts(reference.adapter.number)
        return all(self.residency.has_basis(basis) for basis in bases)

    def may_overflow(self, reference: Reference) -> bool:
        """Whether a step with this adapter may give what is no number: any upload, any adapter of
        a float16 model, and those of a store whose weights are absurdly large."""
        source = self._sources[reference.adapter.source]
        if self._dtype == torch.float16:
            return True
        terms = source.made.terms if source.made else (Term(*reference.adapter, 1.0),)
        norm = 0.0
        for source, number, weight in ((self._sources[t.source], *t[1:]) for t in terms):
            if source.store is None:
                return True
            norm += abs(weight) * float(source.store.norm[number].max())
        return norm > _LARGE

    def prefetch(self, reference: Reference) -> None:
        """Have the operating system fetch the core and the bases that a step will need."""
        source, number = self._sources[reference.adapter.source], reference.adapter.number
        if not self.residency.resident(reference.adapter):
            terms = source.made.terms if source.made else (Term(*reference.adapter, 1.0),)
            for term in terms:
                if (store := self._sources[term.source].store) is not None:
                    store.prefetch(term.number)
        for basis in source.parts(number)[0]:
            tables = self._sources[basis.source].tables
            if tables is not None and not self.residency.has_basis(basis):
                tables.prefetch(basis.side, basis.number)

    def retire(self, source: Source) -> None:
        """Let a source go when its last request ends."""
        source.retired = True
        if not source.held:
            self._drop(source)

    def _close_visited(self) -> None:
        """Let generations go that only requests have named, once these have ended for a while."""
        before = time.monotonic() - _VISITED_SECONDS
        for number, since in list(self._visited.items()):
            if since <= before and not self._sources[number].held:
                self._drop(self._sources[number])

    def _drop(self, source: Source) -> None:
        # Nobody holds them, or the source would be.
        for identity in list(self._blends_of.get(source.number, ())):
            self._drop_blend(self._blends[identity])
        self._blends_of.pop(source.number, None)
        self.residency.forget(source.number)
        del self._sources[source.number]
        self._by_key.pop(source.key, None)
        self._visited.pop(source.number, None)
        self._loaded = {
            lora_id: reference
            for lora_id, reference in self._loaded.items()
            if reference.adapter.source != source.number
        }
        self._uploads = {k: v for k, v in self._uploads.items() if v != source.key}
        self._orders.append(CloseSource(source.number))
        if source.store is not None:
            source.store.close()

    # --- the workers ---

    def flush(self, step: Any) -> None:
        """Send the workers what they have to do before `step`."""
        if self._visited:
            self._close_visited()
        if not self._orders and not self._fills:
            return
        # Of a source that has gone meanwhile nobody waits.
        fills = [fill for fill in self._fills if fill.what.source in self._sources]
        answer = self._rpc(carry_out, args=([*self._orders, *fills],), non_block=True)
        self._sent.append(Sent(step, self._orders, fills, answer))
        self._orders, self._fills = [], []

    def failed(self, step: Any) -> dict[Adapter, str]:
        """Adapters whose numbers some worker could not get for `step` or before: they have no
        slot that can be trusted. With what was wrong."""
        faults: dict[Adapter, str] = {}
        if not any(sent.step is step for sent in self._sent):
            return faults
        while self._sent:
            sent = self._sent.popleft()
            answers = sent.answer.result()
            if sent.fills:  # the step has waited for the slowest worker
                self._page_ins.append(max(carried.seconds for carried in answers))
            for i, message in own_faults(sent.orders, answers).items():
                fill = sent.fills[i]
                for adapter in self._users(fill):
                    faults[adapter] = message
                    source = self._sources.get(adapter.source)
                    if source is not None:
                        self._broken[source.whose(adapter.number)] += 1
                self._lost.append(fill)
            if sent.step is step:
                break
        for lora_id, reference in list(self._pinned.items()):
            if reference.adapter in faults:  # held, it would keep a slot that was never filled
                self.release(self._pinned.pop(lora_id))
        return faults

    def _users(self, fill: Fill) -> list[Adapter]:
        return self.residency.users(fill.what)

    def give_up_lost(self) -> None:
        """Forget what could not be filled, once its requests have ended."""
        for fill in self._lost:
            self.residency.lost(fill)
        self._lost.clear()

    def _ask(self, order: Order) -> str | None:
        """Have the workers do something now, after what they were to do before. Returns what was
        wrong with it."""
        before, self._orders = self._orders, []
        answers = self._rpc(carry_out, args=([*before, order],))
        return own_faults(before, answers).get(0)

    # --- vLLM's own calls about LoRAs ---

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an upload, or open a generation of a store (`lora_name` may be empty then).

        Raises:
            LoRAAdapterNotFoundError: there is no such folder.
            ValueError: it cannot be served; the message says why.
        """
        try:
            if not lora_request.lora_name and parse_store_path(lora_request.lora_path):
                self._source_of(lora_request)
                return True
            reference = self.resolve(lora_request)
        except AdapterUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise LoRAAdapterNotFoundError(
                    lora_request.lora_name, split_upload_path(lora_request.lora_path)[1]
                ) from None
            raise ValueError(str(error)) from None
        before = self._loaded.get(lora_request.lora_int_id)
        self._loaded[lora_request.lora_int_id] = reference
        self._sources[reference.adapter.source].retired = False
        if before is not None and before.adapter != reference.adapter:  # another version, in place
            self._unpin(lora_request.lora_int_id)
            self._retire_unnamed(before.adapter.source)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Let an upload go when its last request ends. A store's adapter stays."""
        reference = self._loaded.pop(lora_id, None)
        known = [key for key in self._uploads if key[0] == lora_id]
        numbers = {self._by_key[self._uploads.pop(key)].number for key in known}
        if reference is not None:
            numbers.add(reference.adapter.source)
        self._unpin(lora_id)
        for number in numbers:
            self._retire_unnamed(number)
        return bool(numbers)

    def _unpin(self, lora_id: int) -> None:
        if lora_id in self._pinned:
            self.release(self._pinned.pop(lora_id))

    def _retire_unnamed(self, number: int) -> None:
        """Let an upload go that no id stands for any more."""
        source = self._sources.get(number)
        if source is None or source.store is not None or source.made is not None:
            return
        if source.key in self._uploads.values():
            return
        if number not in {other.adapter.source for other in self._loaded.values()}:
            self.retire(source)

    def pin_lora(self, lora_id: int) -> bool:
        """Hold an adapter until it is removed.

        Raises:
            ValueError: no such adapter was loaded, or others hold all the slots.
        """
        if lora_id not in self._loaded:
            raise ValueError(f"found no loaded adapter of id {lora_id} to pin")
        if self._loaded[lora_id].adapter.source not in self._sources:  # a blend that was forgotten
            raise ValueError(f"found that adapter {lora_id} is gone; load it again to pin it")
        if lora_id not in self._pinned:
            if self.acquire(self._loaded[lora_id]) is None:
                raise ValueError(f"adapter {lora_id} cannot be pinned: all slots are held")
            self._pinned[lora_id] = self._loaded[lora_id]
        return True

    def list_loras(self) -> set[int]:
        """Ids of the adapters that were loaded."""
        return set(self._loaded)

    def serve_generation(self, path: str, generation: int) -> None:
        """Open a generation of a store, and let the others of it go when their last requests end.

        Raises:
            AdapterUnavailable: it cannot be served.
        """
        folder = Path(path).resolve()
        new = self._by_key.get(store_key(folder, generation))
        if new is None:
            new = self._open_generation(folder, generation)
        new.retired = False
        self._visited.pop(new.number, None)
        if new is not self._served:  # each API process says so
            self._served = new
            self._swaps += 1
        for source in list(self._sources.values()):
            if source.store is not None and source.path == new.path and source is not new:
                self.retire(source)
