"""Which adapters and bases are resident, and in which slots.

There are two kinds of slots. A *basis slot* holds V, U or the output scale of what one cluster, or
one uploaded adapter, is made of ("uncompressed is a cluster of one"); a *core slot* holds an
adapter's cores of all modules and its rows. Slots are filled when an adapter needs them, held while
requests count it, and given up least recently used.

A blend takes a core slot too, of those that are for blends; one of more rows or cores than an
adapter has takes a *long slot* for its rows, and as many core slots as it has cores (see
`vllm_jd.plugin.engine.blends`).

The engine decides and its workers carry out (`vllm_jd.plugin.worker.slots`), so that all workers
have the same in the same slots. Nothing here knows vLLM, tensors or files.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class SlotClass(NamedTuple):
    """Basis slots `first … first + count - 1` of one side, each of room for `rank` vectors; in
    layers of experts, where it is `wide`, for as many of each expert."""

    rank: int
    first: int
    count: int
    wide: bool = False


@dataclass(frozen=True)
class Capacity:
    """What there is room for.

    Args:
        cores: how many core slots.
        bases: side → the basis slots for stores: by rank, smallest first, the wide ones last.
        uploads: side → the basis slots for uploaded adapters.
        whole: whether all bases of the store that the server started with have slots.
        blends: how many core slots for blends, behind the others.
        long: how many long slots, behind these.
        depth: how many rows for a module a long slot has room for.
        tail: how many numbers a core slot has room for behind its cores.
    """

    cores: int
    bases: Mapping[str, tuple[SlotClass, ...]]
    uploads: Mapping[str, SlotClass]
    whole: bool = True
    blends: int = 0
    long: int = 0
    depth: int = 0
    tail: int = 0


class Basis(NamedTuple):
    """One basis: of which source, on which side (`tables.SIDES`), its number there, and whether
    experts of a layer have vectors of their own in it."""

    source: int
    side: str
    number: int
    wide: bool = False


class Adapter(NamedTuple):
    """One adapter: of which source, and its number there (0 for an upload, or for a blend, whose
    further cores have the numbers from 1 on)."""

    source: int
    number: int


class Fill(NamedTuple):
    """An order to the workers: put `what` into `slot`.

    Of an adapter with `rows_only` the cores lie there already.
    """

    what: Basis | Adapter
    slot: int
    rows_only: bool = False


class SlotCounts(NamedTuple):
    """Of slots of one kind: how many are held by requests, full but idle, and free now; and since
    the start, how often what was wanted lay in one, did not, and what somebody else had lain there
    before was given up for it."""

    held: int
    idle: int
    free: int
    hits: int
    misses: int
    evictions: int


NOTHING = SlotCounts(0, 0, 0, 0, 0, 0)


class CannotFit(Exception):
    """An adapter needs more slots than there are, however empty they were."""


_Key = Basis | Adapter


class Shortage(NamedTuple):
    """Slots of one kind, of which more are needed than there are.

    `what` lies in them, `needed` of those are, there is room for `size`, and `remedy` says what
    gives it more.
    """

    what: str
    needed: int
    size: int
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.needed} {self.what}, expected {self.size} at most: so many have room at once; "
            f"{self.remedy}"
        )


class _Slots:
    """Slots that are alike: free, held by somebody, or idle (full, and to be had).

    `what` lies in them, and `remedy` says how there come to be more of them.
    """

    def __init__(self, slots: Iterable[int], what: str, remedy: str):
        self.what, self.remedy = what, remedy
        self._free = list(reversed(list(slots)))
        self._count: dict[_Key, int] = {}
        self._held: dict[_Key, int] = {}
        self._idle: OrderedDict[_Key, int] = OrderedDict()
        self.size = len(self._free)
        self.of_source: Counter[int] = Counter()
        """How many of each source lie here."""
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: _Key) -> bool:
        return key in self._held or key in self._idle

    def slot(self, key: _Key) -> int:
        """Where `key` lies."""
        return self._held[key] if key in self._held else self._idle[key]

    def room(self, keys: Iterable[_Key]) -> int:
        """How many more would find a slot beside these, if they were held; negative: not all of
        them do."""
        keys = set(keys)
        fresh = sum(key not in self for key in keys)
        idle = sum(key in self._idle for key in keys)
        return len(self._free) + len(self._idle) - idle - fresh

    def hold(self, key: _Key) -> tuple[int, _Key | None, bool]:
        """Count one more holder: (the slot, who was put out of it, whether it is to be filled)."""
        if key in self._held:
            self._count[key] += 1
            self._hits += 1
            return self._held[key], None, False
        gone, fresh = None, key not in self._idle
        if not fresh:
            slot = self._idle.pop(key)
            self._hits += 1
        else:
            self._misses += 1
            self.of_source[key.source] += 1
            if self._free:
                slot = self._free.pop()
            else:
                gone, slot = self._idle.popitem(last=False)
                self._evictions += 1
                self._gone(gone)
        self._held[key], self._count[key] = slot, 1
        return slot, gone, fresh

    def release(self, key: _Key) -> None:
        """Count one holder less."""
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
            self._idle[key] = self._held.pop(key)

    def lies(self, key: _Key) -> None:
        """Say that a free slot has been filled with `key`, which nobody holds."""
        self._idle[key] = self._free.pop()
        self.of_source[key.source] += 1

    def forget(self, key: _Key) -> None:
        """Give up what nobody holds."""
        if key in self._idle:
            self._free.append(self._idle.pop(key))
            self._gone(key)

    def _gone(self, key: _Key) -> None:
        self.of_source[key.source] -= 1
        if not self.of_source[key.source]:  # sources come and go all day
            del self.of_source[key.source]

    def counts(self) -> SlotCounts:
        """See `SlotCounts`."""
        now = len(self._held), len(self._idle), len(self._free)
        return SlotCounts(*now, self._hits, self._misses, self._evictions)

    def idle(self) -> list[_Key]:
        """What nobody holds, least recently used first."""
        return list(self._idle)

    def keys(self) -> list[_Key]:
        """All that lies in slots."""
        return [*self._held, *self._idle]


class Residency:
    """The slots of one engine.

    Args:
        capacity: how many there are.
    """

    def __init__(self, capacity: Capacity):
        self.capacity = capacity
        self._cores = _Slots(
            range(capacity.cores),
            "adapters",
            "give them more with --core-slots, --adapter-memory or --max-loras",
        )
        last = capacity.cores + capacity.blends
        self._blends = _Slots(
            range(capacity.cores, last),
            "cores of blends",
            "give them more with --max-num-seqs or --max-blend",
        )
        self._long = _Slots(
            range(last, last + capacity.long),
            "blends of several rows",
            "give them more with --max-num-seqs",
        )
        self._home: dict[Adapter, _Slots] = {}  # of those that have a core slot or a long one
        self._more: dict[Adapter, tuple[Adapter, ...]] = {}  # further cores of blends
        self._stores = {
            side: [(c, _store_slots(c, whole=capacity.whole)) for c in classes]
            for side, classes in capacity.bases.items()
        }
        self._uploads = {
            side: _Slots(
                range(c.first, c.first + c.count), "uploads", "give them more with --max-loras"
            )
            for side, c in capacity.uploads.items()
        }
        self._place: dict[Basis, _Slots] = {}  # of those that have a slot
        self._bases: dict[Adapter, tuple[Basis, ...]] = {}  # of those in core slots
        self._written: dict[Adapter, tuple[int, ...]] = {}  # basis slots that its rows name
        self._unfilled: set[Basis | Adapter] = set()  # in slots which the workers could not fill
        self.fills: Counter[str] = Counter()
        """How often a slot was filled since the start, by kind."""

    def begin(self, adapter: Adapter, bases: Sequence[Basis]) -> None:
        """Say that the workers have put an adapter into the next free core slot at their start,
        whose bases lie in theirs (`begin_bases`)."""
        self._cores.lies(adapter)
        self._home[adapter] = self._cores
        self._bases[adapter] = tuple(bases)
        self._written[adapter] = tuple(self._place[basis].slot(basis) for basis in bases)

    def begin_bases(self, bases: Iterable[tuple[Basis, int]]) -> None:
        """Say that the workers have put bases, of these ranks, into the next free slots at their
        start, in this order."""
        for basis, rank in bases:
            self._place[basis] = self._class(basis, rank)
            self._place[basis].lies(basis)

    def _slots_of(self, cores: int | None) -> _Slots:
        if cores is None:
            return self._cores
        return self._long if cores else self._blends

    def _class(self, basis: Basis, rank: int, upload: bool = False) -> _Slots:
        if basis in self._place:
            return self._place[basis]
        if upload:
            slots = self._uploads[basis.side]
            most = self.capacity.uploads[basis.side].rank
            found = slots if rank <= most else None
        else:
            # A basis that experts share fits into a slot where each has its own, too.
            classes = [(c, slots) for c, slots in self._stores[basis.side] if c.wide >= basis.wide]
            found = next((slots for c, slots in classes if rank <= c.rank), None)
            most = max((c.rank for c, _ in classes), default=0)
        if found is None:
            what = "basis that experts do not share" if basis.wide else "basis"
            raise CannotFit(f"found a {what} of rank {rank}, expected {most} at most")
        return found

    def check(
        self,
        bases: Sequence[Basis],
        ranks: Sequence[int],
        *,
        upload: bool | Sequence[bool] = False,
        cores: int | None = None,
    ) -> None:
        """Raises CannotFit where an adapter of these bases could not be held by empty slots; the
        arguments are those of `acquire`."""
        if cores is not None and self._blends.size == 0:
            raise CannotFit("found a blend, expected none: this server has no slots for them")
        if cores and self._long.size == 0:
            raise CannotFit(
                "found a blend of several rows, expected one of adapters of one cluster: this "
                "server has no slots for others (--fully-sharded-loras)"
            )
        short = self.short_of((), Adapter(-1, 0), bases, ranks, upload=upload, cores=cores)
        if short:
            raise CannotFit("found an adapter that needs " + "; and ".join(map(str, short)))

    def short_of(
        self,
        kept: Iterable[Adapter],
        adapter: Adapter,
        bases: Sequence[Basis],
        ranks: Sequence[int],
        *,
        upload: bool | Sequence[bool] = False,
        cores: int | None = None,
    ) -> list[Shortage]:
        """Of which slots there are too few for an adapter if of those that are held only `kept`
        were; the other arguments are those of `acquire`."""
        kinds: dict[int, _Slots] = {}
        wanted: dict[int, set[Hashable]] = {}

        def want(slots: _Slots | None, key: Hashable) -> None:
            if slots is not None:
                kinds[id(slots)] = slots
                wanted.setdefault(id(slots), set()).add(key)

        for other in set(kept) - {adapter}:
            want(self._home.get(other), other)
            for core in self._more.get(other, ()):
                want(self._blends, core)
            for basis in self._bases.get(other, ()):
                want(self._place.get(basis), basis)
        want(self._slots_of(cores), adapter)
        for core in _further(adapter, cores):
            want(self._blends, core)
        for basis, rank, is_upload in zip(bases, ranks, _each(upload, bases), strict=True):
            want(self._class(basis, rank, is_upload), basis)
        found = {  # once, where V and U are short of the same
            Shortage(slots.what, len(wanted[key]), slots.size, slots.remedy): None
            for key, slots in kinds.items()
            if len(wanted[key]) > slots.size
        }
        return list(found)

    def acquire(
        self,
        adapter: Adapter,
        bases: Sequence[Basis],
        ranks: Sequence[int],
        *,
        upload: bool | Sequence[bool] = False,
        cores: int | None = None,
    ) -> tuple[int, list[Fill]] | None:
        """Hold an adapter and its bases for one request more.

        Args:
            adapter: who.
            bases: what its rows are made of.
            ranks: of each of these.
            upload: whether they, or which of them, go to the slots for uploads.
            cores: of a blend, how many core slots it takes beside a long slot; 0: a core slot
                alone. None: it is no blend.

        Returns:
            The core slot (or long slot), and what the workers have to do first, in this order; None
            where others hold all the slots.

        Raises:
            CannotFit: it would not find enough slots if nobody held any.
        """
        if cores is None and (slot := self._hold_again(adapter, tuple(bases))) is not None:
            return slot, []
        self.check(bases, ranks, upload=upload, cores=cores)
        classes = [
            self._class(basis, rank, is_upload)
            for basis, rank, is_upload in zip(bases, ranks, _each(upload, bases), strict=True)
        ]
        home = self._slots_of(cores)
        more = _further(adapter, cores)
        by_class: dict[int, list[Basis]] = {}
        for basis, slots in zip(bases, classes, strict=True):
            by_class.setdefault(id(slots), []).append(basis)
        full = (
            home.room([adapter]) < 0
            or self._blends.room(more) < 0
            or any(slots.room(by_class[id(slots)]) < 0 for slots in classes)
        )
        if full:
            return None
        fills = []
        # Those that are here first, so that none of them makes way for another.
        order = sorted(range(len(bases)), key=lambda i: bases[i] not in classes[i])
        where: dict[Basis, int] = {}
        for i in order:
            slot, gone, fresh = classes[i].hold(bases[i])
            where[bases[i]], self._place[bases[i]] = slot, classes[i]
            if gone is not None:
                del self._place[gone]
                self._unfilled.discard(gone)
            if fresh or bases[i] in self._unfilled:
                fills.append(Fill(bases[i], slot))
        written = [where[basis] for basis in bases]
        for core in sorted(more, key=lambda core: core not in self._blends):
            slot, fresh = self._hold(self._blends, core)
            if fresh:
                fills.append(Fill(core, slot))
        written += [self._blends.slot(core) for core in more]
        slot, fresh = self._hold(home, adapter)
        self._unfilled.difference_update(bases)
        if fresh or self._written[adapter] != tuple(written):
            fills.append(Fill(adapter, slot, rows_only=not fresh))
        self._bases[adapter], self._written[adapter] = tuple(bases), tuple(written)
        if more:
            self._more[adapter] = more
        for fill in fills:
            kind = type(fill.what).__name__.lower()
            self.fills["rows" if fill.rows_only else kind] += 1
        return slot, fills

    def _hold_again(self, adapter: Adapter, bases: tuple[Basis, ...]) -> int | None:
        """Hold what lies in slots as it is to be: the core slot; None where there is more to do.
        Most requests come this way."""
        written = self._written.get(adapter)
        if not written or self._unfilled or self._bases[adapter] != bases:
            return None
        places = [self._place.get(basis) for basis in bases]
        for basis, slots, slot in zip(bases, places, written, strict=True):
            if slots is None or slots.slot(basis) != slot:
                return None
        for basis, slots in zip(bases, places, strict=True):
            slots.hold(basis)
        return self._home[adapter].hold(adapter)[0]

    def _hold(self, slots: _Slots, adapter: Adapter) -> tuple[int, bool]:
        """Hold a core slot, or a long one: (the slot, whether it is to be filled)."""
        slot, gone, fresh = slots.hold(adapter)
        self._home[adapter] = slots
        fresh |= adapter in self._unfilled
        self._unfilled.discard(adapter)
        if gone is not None:
            self._no_longer(gone)
        return slot, fresh

    def _no_longer(self, adapter: Adapter) -> None:
        del self._home[adapter]
        for known in (self._bases, self._written, self._more):
            known.pop(adapter, None)
        self._unfilled.discard(adapter)

    def release(self, adapter: Adapter) -> None:
        """One request less holds it."""
        for basis in self._bases[adapter]:
            self._place[basis].release(basis)
        for core in self._more.get(adapter, ()):
            self._blends.release(core)
        self._home[adapter].release(adapter)

    def lost(self, fill: Fill) -> None:
        """Give up what the workers could not put into its slot. Who holds it all the same (a
        pinned adapter) has it filled again when it is acquired next."""
        for adapter in self.users(fill.what):
            # Rows that were written meanwhile do not say where it lies, whichever slot it gets.
            if adapter in self._written:
                self._written[adapter] = ()
        if isinstance(fill.what, Adapter):
            self._forget_adapter(fill.what)
        else:
            self._forget_basis(fill.what)
        if fill.what in self._home or self._place.get(fill.what):
            self._unfilled.add(fill.what)

    def forget(self, source: int) -> None:
        """Give up everything of a source. Nobody may hold any of it."""
        for adapter in [key for key in self._home if key.source == source]:
            self._forget_adapter(adapter)
        for basis in [key for key in self._place if key.source == source]:
            self._forget_basis(basis)

    def forget_blend(self, source: int, cores: int) -> None:
        """The same of a blend that takes so many core slots beside its own."""
        for number in range(1 + cores):
            self._forget_adapter(Adapter(source, number))

    def _forget_adapter(self, adapter: Adapter) -> None:
        home = self._home.get(adapter)
        if home is not None:
            home.forget(adapter)
            if adapter not in home:  # nobody held it
                self._no_longer(adapter)

    def _forget_basis(self, basis: Basis) -> None:
        slots = self._place.get(basis)
        if slots is not None:
            slots.forget(basis)
            if basis not in slots:  # nobody held it
                del self._place[basis]
                self._unfilled.discard(basis)

    def counts(self) -> dict[str, SlotCounts]:
        """Of each kind of slots: `basis` (for stores), `upload` (bases of uploads), `core`, `blend`
        (cores and rows of blends)."""
        kinds = {
            "basis": [slots for classes in self._stores.values() for _, slots in classes],
            "upload": list(self._uploads.values()),
            "core": [self._cores],
            "blend": [self._blends, self._long],
        }
        return {
            kind: SlotCounts(
                *map(sum, zip(NOTHING, *(each.counts() for each in some), strict=True))
            )
            for kind, some in kinds.items()
        }

    def resident_of(self, source: int) -> tuple[int, int]:
        """How many bases and how many cores of a source lie in slots."""
        bases = (slots for classes in self._stores.values() for _, slots in classes)
        return sum(slots.of_source[source] for slots in bases), self._cores.of_source[source]

    def resident(self, adapter: Adapter) -> bool:
        """Whether a core slot or a long one holds an adapter, and its further cores lie in some."""
        return all(each in self._home for each in (adapter, *self._more.get(adapter, ())))

    def adapters(self) -> list[Adapter]:
        """All that lie in core slots or in long ones."""
        return list(self._bases)

    def core_slot(self, adapter: Adapter) -> int:
        """Where a resident adapter lies."""
        return self._home[adapter].slot(adapter)

    def has_basis(self, basis: Basis) -> bool:
        """Whether a basis slot holds a basis."""
        return basis in self._place

    def users(self, what: Basis | Adapter) -> list[Adapter]:
        """The adapters in core slots that a basis, or a blend's further core, is part of; of an
        adapter itself, that one."""
        if isinstance(what, Basis):
            return [adapter for adapter, bases in self._bases.items() if what in bases]
        whole = Adapter(what.source, 0)
        return [whole] if what in self._more.get(whole, ()) else [what]


def _store_slots(slots: SlotClass, *, whole: bool) -> _Slots:
    remedy = "give them more with --adapter-memory"
    if whole:  # no option gives more
        remedy = "start the server anew on a generation that has more"
    which = range(slots.first, slots.first + slots.count)
    return _Slots(which, f"bases of rank {slots.rank}", remedy)


def _further(adapter: Adapter, cores: int | None) -> tuple[Adapter, ...]:
    """As what a blend's cores beside its long slot are known."""
    return tuple(Adapter(adapter.source, 1 + i) for i in range(cores or 0))


def _each(upload: bool | Sequence[bool], bases: Sequence[Basis]) -> Sequence[bool]:
    return [upload] * len(bases) if isinstance(upload, bool) else upload
