"""The fleet of one running server: what names stand for, and every change of that.

The disk says what names stand for (`vllm_jd.store.fleet`); here it is carried over to vLLM's own
table of names and to the engine, where each version of an adapter is a source of its own that goes
with its last request. A change is acknowledged once it is on disk and the engine has it. Any server
of a store may change it, one at a time, and the others follow; one of them keeps house.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Set
from contextlib import asynccontextmanager, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from vllm_jd.compressor.report.summary import adapter_entries
from vllm_jd.plugin.api.adapter_paths import AdapterPaths
from vllm_jd.plugin.api.blend_requests import is_blend_request
from vllm_jd.plugin.api.blends import Blends
from vllm_jd.plugin.api.callers import caller, full_name, may_know
from vllm_jd.plugin.api.names import LoRARequest, Names, NotLoaded
from vllm_jd.plugin.api.requests import is_store_request, store_path, upload_path
from vllm_jd.plugin.config import PluginConfig
from vllm_jd.serve.fleet.check import check_upload
from vllm_jd.serve.fleet.fault import FleetFault
from vllm_jd.serve.fleet.files import disk_fault
from vllm_jd.serve.fleet.leaving import Leaving, Sweeper
from vllm_jd.serve.fleet.pins import Pins
from vllm_jd.serve.fleet.room import check_bytes, check_room
from vllm_jd.store import Store, StoreError
from vllm_jd.store.blend import Blend, BlendError, UnknownPart
from vllm_jd.store.fleet import (
    DELETED,
    Blended,
    Compressed,
    Entry,
    Fleet,
    Uploaded,
    blended,
    change_fleet,
    check_name,
    fleet_stamp,
    read_fleet,
    source_of,
    sources_of,
    upload_folder,
    uploaded,
)
from vllm_jd.store.uploads import Incoming, Keeper, NotTheKeeper, Writer, clear_abandoned, flushed

logger = logging.getLogger("vllm.vllm_jd")

T = TypeVar("T")

_CHECKED_AT_ONCE = 2  # uploads: each is in memory as a whole meanwhile
_TICK = 2.0  # seconds
_WAIT = 30.0  # seconds for changes of other servers
_BREATH = 0.02  # seconds between two changes of this one, in which others have a chance


class LiveFleet:
    """What a server's names stand for.

    Args:
        names: the server's.
        config: the plugin's.
        updating: whether clients may change it.
        blends: the server's, among which this puts those that have names.

    Attributes:
        engine: vLLM's client of the engine.
        store: the generation that is served.
        fleet: the overlay over it.
        changing: held by whoever changes what names stand for.
        keeper: who keeps house for the store's servers, in words; None: nobody, as far as is known.
        watched: names of adapters that can only be changed in the folder of `--adapter-dir`.

    Raises:
        StoreError: the store or its fleet is damaged.
        ValueError: a name of the fleet is that of another model.
    """

    def __init__(
        self,
        names: Names,
        config: PluginConfig,
        *,
        updating: bool,
        blends: Blends,
    ):
        self.path = Path(config.store)
        self.config, self.updating = config, updating
        self.allowed = AdapterPaths(
            config.adapter_roots, config.allow_remote_adapters, config.adapter_addresses
        )
        self.store = config.open_store(verify=False)
        self.fleet = read_fleet(self.path)
        self.changing = asyncio.Lock()
        self.watched: Set[str] = set()
        self.blends, self.engine = blends, names.engine
        blends.look = self._look
        self._names = names
        self.keeper: str | None = None
        self._keeper: Keeper | None = None
        self._keeping, self._told = asyncio.Lock(), ""
        self._incoming: Incoming | None = None
        self._turn, self._changed = asyncio.Lock(), 0.0
        self._checks = asyncio.Semaphore(_CHECKED_AT_ONCE)
        self._pins, self._leaving, self._sweeper = Pins(names), Leaving(names), Sweeper(names)
        self._made_from: tuple[Store | None, Set[str]] = (None, set())
        self._ours: set[str] = set()  # names in vLLM's table that are the fleet's
        self._order: list[str] | None = None
        self._stamp: tuple[int, ...] | None = None  # of the file that `fleet` was read from
        self._missed = False  # whether `fleet` has changes of another process that are not served
        for name, meaning in self.fleet.meanings(self.store):
            request = names.get(name)
            # The plugin has named the generation's.
            if isinstance(meaning, Compressed) and request and is_store_request(request):
                self._ours.add(name)
        taken = [name for name, _ in self.fleet.meanings(self.store) if self._is_anothers(name)]
        if taken:
            raise ValueError(
                f"{len(taken)} names are used twice: by adapters of the fleet of {self.path} and "
                f"by --lora-modules or the base model (such as {taken[0]!r}); rename those"
            )

    def _is_anothers(self, name: str) -> bool:
        named = name in self._names and name not in self._ours
        return named or self._names.is_base_model(name)

    # --- its life ---

    async def start(self) -> None:
        """Take over what the disk says. What takes longer goes on in the background."""
        async with self.changing:
            await self.serve(self.store, self.fleet)
        self._upkeep = asyncio.create_task(self._keep_up())

    def close(self) -> None:
        """Give up what other servers wait for, and the generation. Nothing is lost without it."""
        self._upkeep.cancel()
        for right in (self._keeper, self._incoming):
            if right is not None:
                right.close()
        self.store.close()

    async def _keep_up(self) -> None:
        """Let go of what nobody names any more, pin what is to be pinned, and keep house if no
        other server does: until the server ends."""
        while True:
            try:
                await self._tick()
            except Exception:
                logger.exception("vllm-jd: upkeep of the fleet failed; it is tried again")
            await asyncio.sleep(_TICK)

    async def _tick(self) -> None:
        async with self.changing:
            pinned = {name for name, entry in self.fleet.entries.items() if entry.pinned}
            await self._pins.hold(pinned, self._ours)
            await self._leaving.let_go()
        if self.updating or self.config.adapter_dir:
            try:
                await self.keep_house()
                self._told = ""
            except FleetFault as fault:
                if fault.status != HTTPStatus.CONFLICT and str(fault) != self._told:
                    self._told = str(fault)
                    logger.warning("vllm-jd: this server changes no adapters: %s", fault)
            else:
                await self._sweep()

    async def _sweep(self) -> None:
        """Remove files that nobody needs."""
        due = await self._sweeper.due(self.path, self.fleet, self._sources())
        if due:
            async with self._writing() as writer:
                remove = self._sweeper.remove
                await asyncio.to_thread(remove, writer, self.fleet, self._sources(), due)
        with suppress(OSError):  # it is tried again
            await asyncio.to_thread(clear_abandoned, self.path)

    async def follow(self) -> None:
        """Take over what another process has changed since the last look."""
        stamp = await asyncio.to_thread(fleet_stamp, self.path)
        if stamp != self._stamp or self._missed:
            async with self.changing:
                await self._read_again()

    async def _look(self) -> None:
        """Somebody asks for a name that is not known: another server may have been given it."""
        with suppress(StoreError):  # `follow` is tried again, and tells
            await self.follow()

    async def _read_again(self) -> None:
        stamp = await asyncio.to_thread(fleet_stamp, self.path)
        if stamp == self._stamp and not self._missed:
            return
        fleet = await asyncio.to_thread(read_fleet, self.path)
        if fleet.counter != self.fleet.counter or self._missed:
            await self.serve(self.store, fleet)
        self._stamp, self._missed = stamp, False

    def _sources(self) -> Set[str]:
        """Digests of what the generation was made from."""
        if self._made_from[0] is not self.store:
            self._made_from = self.store, sources_of(self.store)
        return self._made_from[1]

    async def serve(self, store: Store, fleet: Fleet) -> None:
        """Have all names stand for what they do in `fleet` over `store`, at once: requests that
        come from now on. Call it with `changing` held; the engine must have opened the generation.
        """
        before = {name: self._names.get(name) for name in self._ours}
        after = await asyncio.to_thread(self._requests, store, fleet, before)
        blends = {
            name: meaning.blend
            for name, meaning in fleet.meanings(store)
            if isinstance(meaning, Blended) and not self._is_anothers(name)
        }
        for name in self._ours - after.keys():
            if name not in blends or not _is_blend(self._names.get(name)):
                self._names.drop(name)
        self._names.point(after)
        self.blends.set_named(blends)
        after |= {name: self._names.get(name) for name in blends}
        if store is not self.store:
            self.store.close()
        self.store, self.fleet, self._ours, self._order = store, fleet, set(after), None
        for name, request in before.items():
            if request is not None and after.get(name) is not request:
                self._leave(name, request)

    def _requests(
        self, store: Store, fleet: Fleet, before: dict[str, LoRARequest | None]
    ) -> dict[str, LoRARequest]:
        after = {}
        for name, meaning in fleet.meanings(store):
            if isinstance(meaning, Blended):
                continue
            if self._is_anothers(name):
                continue  # another process gave it; here the name stands for what it was given for
            path = self._path_of(store, meaning)
            known = before.get(name)
            same = known is not None and known.lora_path == path
            after[name] = known if same else self._names.new(name, path)
        return after

    def _path_of(self, store: Store, meaning: Compressed | Uploaded) -> str:
        if isinstance(meaning, Compressed):
            return store_path(self.path, store.generation)
        return upload_path(meaning.digest, str(upload_folder(self.path, meaning.digest)))

    def _leave(self, name: str, request: LoRARequest) -> None:
        self._leaving.add(request, pinned=self._pins.forget(name, request))

    # --- who may change it ---

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[Writer]:
        """The right to change the fleet, of all servers, and what they have changed before.

        Raises:
            FleetFault: others change it all the time, or the folder cannot be written.
        """
        async with self._turn:
            await asyncio.sleep(self._changed + _BREATH - time.monotonic())
            with _told_as_fault():
                writer = await asyncio.to_thread(Writer, self.path, _WAIT)
            try:
                async with self.changing:
                    with _told_as_fault():
                        await self._read_again()
                    yield writer
            finally:
                writer.close()
                self._changed = time.monotonic()

    async def may_change(self) -> None:
        """Ask before anything is read for a change: names stand for what other servers have
        acknowledged until now.

        Raises:
            FleetFault: clients may not change the fleet, or it cannot be read.
        """
        if not self.updating:
            raise FleetFault(
                "adapters of this server cannot be changed while it runs; it would have to be "
                "started with --adapter-root",
                HTTPStatus.FORBIDDEN,
            )
        with _told_as_fault():
            await self.follow()

    @property
    def keeps_house(self) -> bool:
        """Whether this is the server that clears away, recompresses by itself and follows a folder
        for all servers of the store."""
        return self._keeper is not None

    async def keep_house(self) -> None:
        """Be that server: from now on until it ends, where no other is.

        Raises:
            FleetFault: another is, or the folder cannot be written.
        """
        async with self._keeping:
            if self._keeper is not None:
                return
            try:
                self._keeper = await asyncio.to_thread(Keeper, self.path)
            except NotTheKeeper as error:
                self.keeper = error.who
                raise FleetFault(str(error), HTTPStatus.CONFLICT) from None
            except StoreError as error:
                self.keeper = None
                raise FleetFault(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None
            self.keeper = self._keeper.who

    @contextmanager
    def coming(self) -> Iterator[Path]:
        """A folder for an upload that comes in; it is gone afterwards.

        Raises:
            FleetFault: it cannot be made.
        """
        try:
            if self._incoming is None:
                self._incoming = Incoming(self.path)
            folder = self._incoming.folder()
        except OSError as error:
            raise disk_fault(error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- changes ---

    async def check(self, folder: Path) -> None:
        """See `check_upload`."""
        async with self._checks:
            await asyncio.to_thread(check_upload, folder, self.store)

    def check_free(self, name: str) -> None:
        """Whether a new adapter may have a name.

        Raises:
            FleetFault: it is no name, or has been given.
        """
        self.check_giveable(name)
        if name in self._ours:
            raise FleetFault(
                f"found an adapter {name!r} already; PUT /v1/adapters/{{name}} replaces it",
                HTTPStatus.CONFLICT,
                "name",
            )

    def check_giveable(self, name: str) -> None:
        """Whether a client may give a name an adapter, new or not.

        Raises:
            FleetFault: it is no name, another model's, or that of a watched folder.
        """
        self._check_unwatched(name)
        self._check_ours(name)
        if name not in self._ours:
            check_room(self._ours, name)

    # --- names, as whoever asks calls them ---

    def seen_by_caller(self, name: str) -> str:
        """The full name of the adapter that is called so.

        Raises:
            FleetFault: they know of none, or it is not the fleet's.
        """
        full = full_name(name, self._ours.__contains__)
        if full is not None:
            return full
        if not may_know(name) and not self._names.is_base_model(name):
            raise not_there(name)
        self.check_here(name)
        return name

    def callers_own(self, name: str) -> str:
        """The same of one that they may change.

        Raises:
            FleetFault: the same, or they may only use it.
        """
        full, who = self.seen_by_caller(name), caller.get()
        if who is not None and who.space is not None and who.own(full) != full:
            raise FleetFault(
                f"{full!r} is none of the adapters of {who.space!r}, which are the ones that this "
                "key may change",
                HTTPStatus.FORBIDDEN,
                "name",
            )
        return full

    def named_by_caller(self, name: str) -> str:
        """The full name of an adapter that they want to give, new or not.

        Raises:
            FleetFault: they would take it for another, which is not theirs.
        """
        who = caller.get()
        full = name if who is None else who.own(name)
        if full == name or full in self._ours:
            return full
        shared = may_know(name) and (name in self._ours or self._is_anothers(name))
        if shared or self._names.is_base_model(name):
            raise FleetFault(
                f"{name!r} is there, and not yours to change; choose another name, or {full!r} to "
                "have yours meant by both",
                HTTPStatus.CONFLICT,
                "name",
            )
        return full

    def _check_unwatched(self, name: str) -> None:
        if name in self.watched:
            raise FleetFault(
                f"{name!r} comes from {self.config.adapter_dir} (--adapter-dir); change it there",
                HTTPStatus.CONFLICT,
                "name",
            )

    def _check_ours(self, name: str) -> None:
        try:
            check_name(name)
        except ValueError as error:
            raise FleetFault(str(error), param="name") from None
        if self._is_anothers(name):
            raise FleetFault(
                f"{name!r} is the name of the base model or of one of --lora-modules; choose "
                "another",
                HTTPStatus.CONFLICT,
                "name",
            )

    async def give(
        self,
        name: str,
        folder: Path,
        *,
        source: str | None = None,
        replace: bool,
        watched: bool = False,
    ) -> bool:
        """Give a name the adapter whose files are in a folder of `coming`, checked.

        Requests that come after this has returned are answered by it, and so they are after the
        server was started anew. Those that run keep the version that they began with.

        Args:
            name: a new one, or with `replace` also one that is there.
            folder: taken.
            source: where the files were fetched from.
            replace: whether the name may be there.
            watched: whether it comes from the watched folder.

        Returns:
            Whether the name is new.

        Raises:
            FleetFault: it was refused, or could not be written; everything is as it was.
        """
        return await _whole(self._give(name, folder, source, replace, watched))

    async def _give(
        self, name: str, folder: Path, source: str | None, replace: bool, watched: bool
    ) -> bool:
        try:
            digest = await asyncio.to_thread(flushed, folder)
        except OSError as error:
            raise disk_fault(error) from error
        async with self._writing() as writer:
            if watched:
                self._check_ours(name)
            elif replace:
                self.check_giveable(name)
            else:
                self.check_free(name)
            await asyncio.to_thread(
                check_bytes, list(self._ours), name, folder, self.store, self.fleet
            )
            try:
                await asyncio.to_thread(writer.accept, folder, digest)
            except OSError as error:
                raise disk_fault(error) from error
            before = self.fleet.entries.get(name, Entry())
            entry = uploaded(digest, pinned=before.pinned, source=source)
            entries = self.fleet.entries | {name: entry}
            meaning = self.fleet.model_copy(update={"entries": entries}).meaning(name, self.store)
            path = self._path_of(self.store, meaning)
            old = self._names.get(name)
            request = old if old and old.lora_path == path else self._names.new(name, path)
            fresh = request is not old and not is_store_request(request)
            if fresh:
                await self._load(request)
            try:
                fleet = await self._write({name: entry})
            except FleetFault:
                if fresh:
                    await self._names.unload(request)
                raise
            new = name not in self._ours
            self.blends.forget(name)
            self._names.point({name: request})
            self.fleet, self._order = fleet, None
            self._ours.add(name)
            if old is not None and old is not request:
                self._leave(name, old)
            self._follow([name])
            if entry.pinned:
                await self._pins.pin(name, request)
            return new

    async def blend(self, name: str, blend: Blend, *, replace: bool) -> bool:
        """Give a name a blend, which follows its parts. As `give`.

        Raises:
            FleetFault: it was refused, or could not be written; everything is as it was.
        """
        return await _whole(self._blend(name, blend, replace))

    async def _blend(self, name: str, blend: Blend, replace: bool) -> bool:
        async with self._writing():
            if replace:
                self.check_giveable(name)
            else:
                self.check_free(name)
            try:
                blend = self.blends.as_seen(blend)
                self.blends.check_named(name, blend)
            except UnknownPart as error:
                raise FleetFault(str(error), HTTPStatus.NOT_FOUND, "blend") from None
            except BlendError as error:
                raise FleetFault(str(error), param="blend") from None
            pinned = self.fleet.entries.get(name, Entry()).pinned
            old, new = self._names.get(name), name not in self._ours
            self.fleet = await self._write({name: blended(blend, pinned=pinned)})
            self._order = None
            self._ours.add(name)
            request = self.blends.give(name, blend)
            if old is not None and old is not request:
                self._leave(name, old)
            self._follow([name])
            if pinned and request is not None:
                await self._pins.pin(name, request)
            return new

    def _follow(self, changed: list[str]) -> None:
        """Have blends follow these names; what is pinned of them is pinned anew."""
        before = {name: self._names.get(name) for name in self._pins.held}
        self.blends.follow(changed)
        for name, request in before.items():
            if request is not None and self._names.get(name) is not request:
                self._leave(name, request)

    async def _load(self, request: LoRARequest) -> None:
        try:
            await self._names.load(request)
        except NotLoaded as error:
            raise FleetFault(str(error)) from None

    async def _write(self, changed: dict[str, Entry]) -> Fleet:
        def change(entries: dict[str, Entry]) -> None:
            entries.update(changed)

        known = all(self.fleet.entries.get(name) == entry for name, entry in changed.items())
        with _told_as_fault():
            fleet = await asyncio.to_thread(change_fleet, self.path, change)
        self._missed |= fleet.counter != self.fleet.counter + (not known)
        return fleet

    async def delete(self, name: str) -> None:
        """Have a name stand for nothing. Requests that run with it end as they would have.

        Raises:
            FleetFault: there is no such adapter, or it could not be written.
        """
        await _whole(self._delete(name))

    async def _delete(self, name: str) -> None:
        async with self._writing():
            self._check_unwatched(name)
            self.check_here(name)
            before = self._names.get(name)
            # The name stays marked: a generation that is being made may contain it.
            self.fleet = await self._write({name: DELETED})
            self._order = None
            self._ours.discard(name)
            self.blends.forget(name)
            request = self._names.drop(name) or before  # a blend has been dropped by now
            if request is not None:
                self._leave(name, request)
            self._follow([name])

    def check_here(self, name: str) -> None:
        """Whether there is an adapter of that name.

        Raises:
            FleetFault: there is none, or it is not the fleet's.
        """
        if name in self._ours:
            return
        if self._is_anothers(name):
            raise FleetFault(
                f"{name!r} is the base model or one of --lora-modules, which stay as the server "
                "was started",
                HTTPStatus.CONFLICT,
                "name",
            )
        raise not_there(name)

    async def pin(self, name: str, pinned: bool) -> None:
        """Have an adapter stay resident, from now on and after a start; or undo that.

        Raises:
            FleetFault: there is no such adapter, the others leave no room, or it could not be
                written.
        """
        await _whole(self._set_pin(name, pinned))

    async def _set_pin(self, name: str, pinned: bool) -> None:
        async with self._writing():
            self.check_here(name)
            request = self._names.get(name)
            if request is None and pinned:
                raise FleetFault(
                    f"{name!r} cannot be pinned: {self.blends.faults.get(name)}",
                    HTTPStatus.CONFLICT,
                )
            if pinned and not await self._pins.pin(name, request):
                raise FleetFault(
                    f"{name!r} cannot be pinned: all slots are held by requests and other pinned "
                    "adapters; undo a pin, or give adapters more room (--max-loras, "
                    "--adapter-memory)",
                    HTTPStatus.CONFLICT,
                )
            entry = self.fleet.entries.get(name, Entry())
            try:
                self.fleet = await self._write({name: entry.model_copy(update={"pinned": pinned})})
            except FleetFault:
                if pinned and not entry.pinned:
                    await self._pins.unpin(name)
                raise
            if not pinned:
                await self._pins.unpin(name)

    # --- what is told of it ---

    @property
    def known(self) -> Set[str]:
        """The names of all adapters."""
        return self._ours

    @property
    def names(self) -> list[str]:
        """Of all adapters: the generation's in its order, then the others in theirs."""
        if self._order is None:
            others = sorted(name for name in self._ours if name not in self.store)
            self._order = [name for name in self.store.names if name in self._ours] + others
        return self._order

    def digest_of(self, name: str) -> str | None:
        """sha256 of the files that an adapter was made from; None: there is none."""
        meaning = self.fleet.meaning(name, self.store)
        if isinstance(meaning, Compressed):
            return source_of(self.store, meaning.index)
        return meaning.digest if isinstance(meaning, Uploaded) else None

    def clusters_of(self, name: str, generation: int) -> list[int] | None:
        """Whose bases an adapter of a generation shares; None: another generation is served."""
        store = self.store
        if generation != store.generation or name not in store:
            return None
        return adapter_entries(store, [store.index(name)])[0]["clusters"]

    def request_of(self, name: str) -> LoRARequest | None:
        """By what the engine knows one of `names`; None: a blend that cannot be served now."""
        return self._names.get(name)


def not_there(name: str) -> FleetFault:
    """What whoever asks for an adapter is told that there is not."""
    return FleetFault(f"The adapter `{name}` does not exist.", HTTPStatus.NOT_FOUND, "name")


@contextmanager
def _told_as_fault() -> Iterator[None]:
    """Tell what is wrong with the store's files as a FleetFault."""
    try:
        yield
    except StoreError as error:
        if isinstance(error.__cause__, OSError):
            raise disk_fault(error.__cause__) from error
        raise FleetFault(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None


def _is_blend(request: LoRARequest | None) -> bool:
    return request is not None and is_blend_request(request)


async def _whole(change: Awaitable[T]) -> T:
    """Carry out a change as a whole, even where the client that asked for it goes meanwhile."""
    return await asyncio.shield(asyncio.ensure_future(change))
