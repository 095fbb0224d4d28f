"""Which adapter a request means, and that it is there when its tokens are computed.

One object in the engine's process, between the scheduler, which counts requests, and the workers,
which hold the numbers. An adapter in flight is one *reference*: a source (a generation of a store,
or an uploaded folder with the digest of its files) and a number in it. vLLM's names and ids only
point to one, and may point to another for the next request; a request keeps the one that it came
with. To vLLM's prefix cache, to its batches and to the workers a reference is known by its
`identity`, which no other has.
"""

import hashlib
import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from vllm_jd.plugin.api.requests import parse_store_path, split_upload_path, upload_digest
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.plugin.engine.capacity import capacity_of
from vllm_jd.plugin.engine.orders import CloseSource, LoadUpload, OpenStore, Order, carry_out
from vllm_jd.plugin.engine.residency import Adapter, Basis, CannotFit, Fill, Residency
from vllm_jd.plugin.engine.tables import Tables
from vllm_jd.plugin.patches import replace_block_hasher
from vllm_jd.plugin.placed import known_by
from vllm_jd.plugin.worker.slots import keeps_codes
from vllm_jd.store import Store, StoreError

logger = init_logger("vllm.vllm_jd")

_LARGE = 1e6  # ‖BA‖_F of a module; trained adapters have less than a thousandth of it
_REMEMBERED = 1 << 16  # adapters of a source whose bases are kept in mind
_NAMES_REMEMBERED = 1 << 18  # that were asked for


class AdapterUnavailable(Exception):
    """A request's adapter cannot be had; the message says why. Its request fails, nobody else."""


class Reference(NamedTuple):
    """An adapter in flight, and by what it is known outside."""

    adapter: Adapter
    identity: str


@dataclass
class _Source:
    """What references name: a generation of a store, or an upload (without store)."""

    number: int
    key: str
    """By which it is found: folder and generation, or an upload's digest."""
    identity: str
    """Of its numbers."""
    store: Store | None = None
    tables: Tables | None = None
    path: str = ""
    held: int = 0
    """How many requests, waiting or running, have references to it, and how often it has slots."""
    retired: bool = False
    """Whether a later generation is served instead, or an upload was unloaded."""
    bases: OrderedDict[int, tuple[tuple[Basis, ...], tuple[int, ...]]] = field(
        default_factory=OrderedDict
    )

    def whose(self, number: int) -> str:
        """By what the numbers of one of its adapters are known, for ever."""
        return (
            self.identity if self.store is None else f"{self.identity}/{self.store.names[number]}"
        )

    def parts(self, number: int) -> tuple[tuple[Basis, ...], tuple[int, ...]]:
        """The bases of one of its adapters, and the rank of each."""
        found = self.bases.get(number)
        if found is None:
            if self.tables is None:
                bases = [Basis(self.number, side, 0) for side in ("v", "u")]
                found = tuple(bases), (1, 1)
            else:
                pairs = [
                    (Basis(self.number, side, b), int(self.tables.ranks[side][b]))
                    for side, numbers in self.tables.bases_of(number).items()
                    for b in numbers
                ]
                found = tuple(b for b, _ in pairs), tuple(rank for _, rank in pairs)
            self.bases[number] = found
            if len(self.bases) > _REMEMBERED:
                self.bases.popitem(last=False)
        return found


class _Sent(NamedTuple):
    """Orders of one step, and what the workers say of them."""

    step: Any
    fills: list[Fill]
    answer: Future
    """Of what each worker says (see `carry_out`)."""
    before: int
    """How many other orders came before the fills."""

    def faults(self) -> dict[int, str]:
        """What was wrong, by the place in `fills`."""
        found = {}
        for faults in self.answer.result():
            for place, message in faults.items():
                if place >= self.before:
                    found[place - self.before] = message
                else:
                    logger.error("vllm-jd: a worker could not close a source: %s", message)
        return found


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
        )
        self.residency = Residency(self.capacity)
        self._rpc: Callable[..., Any] | None = None
        self._connecting = Lock()  # requests and calls come in by different threads
        self._numbers = itertools.count(1)  # never one twice: some orders may still be under way
        self._sources: dict[int, _Source] = {}
        self._by_key: dict[str, _Source] = {}
        self._served: dict[str, int] = {}  # store's folder → the generation that is served of it
        self._uploads: dict[tuple[int, str], str] = {}  # (id, path) of loaded ones → digest
        self._loaded: dict[int, Reference] = {}  # by vLLM's ids, until they are removed
        self._pinned: dict[int, Reference] = {}
        self._requests: Counter[Adapter] = Counter()  # waiting or running
        self._used: OrderedDict[str, float] = OrderedDict()  # by name, latest last
        self._broken: Counter[str] = Counter()  # by what they are known as at first
        self._fills: list[Fill] = []
        self._orders: list[Order] = []
        self._sent: deque[_Sent] = deque()
        self._lost: list[Fill] = []
        self.first = self._add_store(store, tables)
        self._begin(self.first)

    def _begin(self, source: _Source) -> None:
        """What the workers do by themselves at their start (`Slots.begin`)."""
        store, tables = source.store, source.tables
        if not self.capacity.whole:
            return
        # In the order in which the workers take their slots, before any adapter names them.
        for side, ranks in tables.ranks.items():
            self.residency.begin_bases(
                (Basis(source.number, side, int(b)), int(ranks[b])) for b in np.flatnonzero(ranks)
            )
        if len(store) + self._config.max_loras <= self.capacity.cores:
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
        number = 0
        if source.store is not None:
            if lora.lora_name not in source.store:
                raise AdapterUnavailable(
                    f"the store {source.path} has {source.store.unknown(lora.lora_name)}"
                )
            number = source.store.index(lora.lora_name)
        adapter = Adapter(source.number, number)
        bases, ranks = source.parts(number)
        try:
            self.residency.check(bases, ranks, upload=source.store is None)
        except CannotFit as error:
            raise AdapterUnavailable(f"adapter {lora.lora_name!r}: {error}") from None
        return Reference(adapter, self._identity(source, adapter))

    def renewed(self, reference: Reference) -> Reference:
        """The same adapter by what it is known now, after its numbers could not be had (`failed`):
        what was computed meanwhile is not its."""
        source = self._sources[reference.adapter.source]
        return Reference(reference.adapter, self._identity(source, reference.adapter))

    def _identity(self, source: _Source, adapter: Adapter) -> str:
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

    def _known_source(self, lora: LoRARequest) -> _Source | None:
        try:
            store = parse_store_path(lora.lora_path)
        except (ValueError, OSError):
            return None
        if store is not None:
            return self._by_key.get(_store_key(*store))
        digest, path = split_upload_path(lora.lora_path)
        known = digest or self._uploads.get((lora.lora_int_id, path))
        return None if lora.load_inplace else self._by_key.get(known or "")

    def _source_of(self, lora: LoRARequest) -> _Source:
        try:
            store = parse_store_path(lora.lora_path)
        except ValueError as error:
            raise AdapterUnavailable(str(error)) from None
        if store is not None:
            return self.open_generation(*store)
        digest, path = split_upload_path(lora.lora_path)
        if digest is None and not lora.load_inplace:
            digest = self._uploads.get((lora.lora_int_id, path))
        if digest is None:
            try:
                digest = upload_digest(Path(get_adapter_absolute_path(path)))
            except OSError as error:
                raise AdapterUnavailable(
                    f"adapter {lora.lora_name!r} cannot be read from {path}: {error}"
                ) from error
        source = self._by_key.get(digest)
        if source is None:
            source = self._load(lora.lora_name, digest, path)
        self._uploads[lora.lora_int_id, path] = digest
        return source

    def _load(self, name: str, digest: str, path: str) -> _Source:
        number = next(self._numbers)
        fault = self._ask([LoadUpload(number, name, digest, path)])
        if fault:
            raise AdapterUnavailable(f"adapter {name!r} cannot be served: {fault}")
        source = _Source(number, digest, digest, path=path)
        self._sources[number] = self._by_key[digest] = source
        return source

    def open_generation(self, path: Path, generation: int) -> _Source:
        """The source of one generation of a store, opened on all workers if it is not yet.

        Raises:
            AdapterUnavailable: it cannot be opened, or does not fit what this server has made
                room for.
        """
        key = _store_key(path, generation)
        if key in self._by_key:
            return self._by_key[key]
        try:
            store = Store.open_number(path, generation, verify=False)
            tables = Tables(store)
        except (StoreError, OSError) as error:
            raise AdapterUnavailable(f"generation {generation} of {path}: {error}") from None
        self._check_like_first(store, tables)
        source = self._add_store(store, tables)
        # A request on its way while a later one came to be served: nobody retires it any more.
        source.retired = generation < self._served.get(source.path, 0)
        fault = self._ask([OpenStore(source.number, str(path), generation)])
        if fault:
            self._drop(source)
            raise AdapterUnavailable(f"generation {generation} of {path}: {fault}")
        return source

    def _check_like_first(self, store: Store, tables: Tables) -> None:
        """Refuse a generation for which the workers' tensors, which cannot grow, have no place."""
        first = self.first.store.manifest
        new = store.manifest
        known = {module.name: (module.d_in, module.d_out) for module in first.modules}
        other = [m.name for m in new.modules if known.get(m.name) != (m.d_in, m.d_out)]
        faults = []
        if other:
            faults.append(f"it adapts {len(other)} modules more (such as {other[0]})")
        if new.rows > first.rows:
            faults.append(f"found {new.rows} rows an adapter, expected {first.rows} at most")
        if new.core_row > first.core_row:
            faults.append(f"found cores of {new.core_row} numbers, expected {first.core_row}")
        if keeps_codes(self.first.store, self._dtype) and new.quantised != first.quantised:
            faults.append(f"found {new.quantised or new.dtype}, expected {first.quantised}")
        for side, ranks in tables.ranks.items():
            most = max((c.rank for c in self.capacity.bases[side]), default=0)
            if ranks.max(initial=0) > most:
                faults.append(f"found bases of rank {ranks.max()}, expected {most} at most")
                break
        if faults:
            raise AdapterUnavailable(
                f"generation {store.generation} of {store.path} does not fit beside generation "
                f"{self.first.store.generation}, with which the server started: "
                + "; ".join(faults)
                + ". Start the server anew to serve it"
            )

    def _add_store(self, store: Store, tables: Tables) -> _Source:
        path = Path(store.path).resolve()
        key = _store_key(path, store.generation)
        numbers = bytes(store.source_sha256.numpy()) + repr(store.manifest.files).encode()
        identity = f"{key}:{hashlib.sha256(numbers).hexdigest()[:16]}"
        source = _Source(next(self._numbers), key, identity, store, tables, str(path))
        self._sources[source.number] = self._by_key[key] = source
        return source

    # --- its life ---

    def keep(self, reference: Reference, name: str) -> None:
        """Count a request that has an adapter's reference, until `let_go`: its source stays. `name`
        is what it asked for."""
        self._sources[reference.adapter.source].held += 1
        self._requests[reference.adapter] += 1
        self._used[name] = time.time()
        self._used.move_to_end(name)
        if len(self._used) > _NAMES_REMEMBERED:
            self._used.popitem(last=False)

    def let_go(self, reference: Reference) -> None:
        """Count one less."""
        self._requests[reference.adapter] -= 1
        if not self._requests[reference.adapter]:
            del self._requests[reference.adapter]
        self._let_go(reference)

    def _let_go(self, reference: Reference) -> None:
        source = self._sources[reference.adapter.source]
        source.held -= 1
        if source.retired and not source.held:
            self._drop(source)

    def tell(self, adapters: list[tuple[str, str]]) -> list[tuple[bool, bool, int, float | None]]:
        """What is known of adapters, named as a LoRARequest names them: (name, path).

        Returns:
            Of each: whether this engine has its source open; whether it is resident; how many
            requests that wait or run mean it; when its name was last asked for, in seconds since
            1970, None: not since the start.
        """
        told = []
        sources: dict[str, _Source | None] = {}  # most have one path
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

    def acquire(self, reference: Reference) -> int | None:
        """Count one request more of an adapter. Returns its core slot, or None: there is none now.

        What the workers have to do first is sent by `flush`.
        """
        source = self._sources[reference.adapter.source]
        bases, ranks = source.parts(reference.adapter.number)
        found = self.residency.acquire(reference.adapter, bases, ranks, upload=source.store is None)
        if found is None:
            return None
        slot, fills = found
        source.held += 1
        self._fills += fills
        return slot

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
        store = self._sources[reference.adapter.source].store
        if store is None or self._dtype == torch.float16:
            return True
        return bool((store.norm[reference.adapter.number] > _LARGE).any())

    def prefetch(self, reference: Reference) -> None:
        """Have the operating system fetch the core and the bases that a step will need."""
        source, number = self._sources[reference.adapter.source], reference.adapter.number
        if source.store is None:
            return
        if not self.residency.resident(reference.adapter):
            source.store.prefetch(number)
        for basis in source.parts(number)[0]:
            if not self.residency.has_basis(basis):
                source.tables.prefetch(basis.side, basis.number)

    def retire(self, source: _Source) -> None:
        """Let a source go when its last request ends."""
        source.retired = True
        if not source.held:
            self._drop(source)

    def _drop(self, source: _Source) -> None:
        self.residency.forget(source.number)
        del self._sources[source.number]
        self._by_key.pop(source.key, None)
        self._uploads = {k: v for k, v in self._uploads.items() if v != source.key}
        self._orders.append(CloseSource(source.number))
        if source.store is not None:
            source.store.close()

    # --- the workers ---

    def flush(self, step: Any) -> None:
        """Send the workers what they have to do before `step`."""
        if not self._orders and not self._fills:
            return
        # Of a source that has gone meanwhile nobody waits.
        fills = [fill for fill in self._fills if fill.what.source in self._sources]
        answer = self._rpc(carry_out, args=([*self._orders, *fills],), non_block=True)
        self._sent.append(_Sent(step, fills, answer, len(self._orders)))
        self._orders, self._fills = [], []

    def failed(self, step: Any) -> dict[Adapter, str]:
        """Adapters whose numbers some worker could not get for `step` or before: they have no
        slot that can be trusted. With what was wrong."""
        faults: dict[Adapter, str] = {}
        if not any(sent.step is step for sent in self._sent):
            return faults
        while self._sent:
            sent = self._sent.popleft()
            for i, message in sent.faults().items():
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
        if isinstance(fill.what, Adapter):
            return [fill.what]
        return self.residency.users(fill.what)

    def give_up_lost(self) -> None:
        """Forget what could not be filled, once its requests have ended."""
        for fill in self._lost:
            self.residency.lost(fill)
        self._lost.clear()

    def _ask(self, orders: list[Order]) -> str | None:
        """Have the workers do something now. Returns what was wrong."""
        orders = [*self._orders, *orders]
        self._orders = []
        answers = self._rpc(carry_out, args=(orders,))
        faults = [message for answer in answers for message in answer.values()]
        return faults[0] if faults else None

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
        if source is None or source.store is not None or source.key in self._uploads.values():
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
        new = self.open_generation(Path(path).resolve(), generation)
        new.retired = False
        self._served[new.path] = generation
        for source in list(self._sources.values()):
            if source.store is not None and source.path == new.path and source is not new:
                self.retire(source)


def _store_key(path: Path, generation: int) -> str:
    return f"{path}@{generation}"
