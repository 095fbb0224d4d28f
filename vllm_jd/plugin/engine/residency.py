"""Which adapters and bases are resident, and in which slots.

There are two kinds of slots. A *basis slot* holds V, U or the output scale of what one cluster, or
one uploaded adapter, is made of ("uncompressed is a cluster of one"); a *core slot* holds an
adapter's cores of all modules and its rows. Slots are filled when an adapter needs them, held while
requests count it, and given up least recently used.

The engine decides and its workers carry out (`vllm_jd.plugin.worker.slots`), so that all workers
have the same in the same slots. Nothing here knows vLLM, tensors or files.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class SlotClass(NamedTuple):
    """Basis slots `first … first + count - 1` of one side, each of room for `rank` vectors."""

    rank: int
    first: int
    count: int


@dataclass(frozen=True)
class Capacity:
    """What there is room for.

    Args:
        cores: how many core slots.
        bases: side → the basis slots for stores, by rank, smallest first.
        uploads: side → the basis slots for uploaded adapters.
        whole: whether all bases of the store that the server started with have slots.
    """

    cores: int
    bases: Mapping[str, tuple[SlotClass, ...]]
    uploads: Mapping[str, SlotClass]
    whole: bool = True


class Basis(NamedTuple):
    """One basis: of which source, on which side (`tables.SIDES`), and its number there."""

    source: int
    side: str
    number: int


class Adapter(NamedTuple):
    """One adapter: of which source, and its number there (0 for an upload)."""

    source: int
    number: int


class Fill(NamedTuple):
    """An order to the workers: put `what` into `slot`.

    Of an adapter with `rows_only` the cores lie there already.
    """

    what: Basis | Adapter
    slot: int
    rows_only: bool = False


class CannotFit(Exception):
    """An adapter needs more slots than there are, however empty they were."""


class _Slots:
    """Slots that are alike: free, held by somebody, or idle (full, and to be had)."""

    def __init__(self, slots: Iterable[int]):
        self._free = list(reversed(list(slots)))
        self._count: dict[Hashable, int] = {}
        self._held: dict[Hashable, int] = {}
        self._idle: OrderedDict[Hashable, int] = OrderedDict()
        self.size = len(self._free)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or key in self._idle

    def slot(self, key: Hashable) -> int:
        """Where `key` lies."""
        return self._held[key] if key in self._held else self._idle[key]

    def room(self, keys: Iterable[Hashable]) -> int:
        """How many more would find a slot beside these, if they were held; negative: not all of
        them do."""
        keys = set(keys)
        fresh = sum(key not in self for key in keys)
        idle = sum(key in self._idle for key in keys)
        return len(self._free) + len(self._idle) - idle - fresh

    def hold(self, key: Hashable) -> tuple[int, Hashable | None, bool]:
        """Count one more holder: (the slot, who was put out of it, whether it is to be filled)."""
        if key in self._held:
            self._count[key] += 1
            return self._held[key], None, False
        gone, fresh = None, key not in self._idle
        if not fresh:
            slot = self._idle.pop(key)
        elif self._free:
            slot = self._free.pop()
        else:
            gone, slot = self._idle.popitem(last=False)
        self._held[key], self._count[key] = slot, 1
        return slot, gone, fresh

    def release(self, key: Hashable) -> None:
        """Count one holder less."""
        self._count[key] -= 1
        if not self._count[key]:
            del self._count[key]
            self._idle[key] = self._held.pop(key)

    def lies(self, key: Hashable) -> None:
        """Say that a free slot has been filled with `key`, which nobody holds."""
        self._idle[key] = self._free.pop()

    def forget(self, key: Hashable) -> None:
        """Give up what nobody holds."""
        if key in self._idle:
            self._free.append(self._idle.pop(key))

    def idle(self) -> list[Hashable]:
        """What nobody holds, least recently used first."""
        return list(self._idle)

    def keys(self) -> list[Hashable]:
        """All that lies in slots."""
        return [*self._held, *self._idle]


class Residency:
    """The slots of one engine.

    Args:
        capacity: how many there are.
    """

    def __init__(self, capacity: Capacity):
        self.capacity = capacity
        self._cores = _Slots(range(capacity.cores))
        self._stores = {
            side: [(c.rank, _Slots(range(c.first, c.first + c.count))) for c in classes]
            for side, classes in capacity.bases.items()
        }
        self._uploads = {
            side: _Slots(range(c.first, c.first + c.count)) for side, c in capacity.uploads.items()
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
        self._bases[adapter] = tuple(bases)
        self._written[adapter] = tuple(self._place[basis].slot(basis) for basis in bases)

    def begin_bases(self, bases: Iterable[tuple[Basis, int]]) -> None:
        """Say that the workers have put bases, of these ranks, into the next free slots at their
        start, in this order."""
        for basis, rank in bases:
            self._place[basis] = self._class(basis, rank)
            self._place[basis].lies(basis)

    def _class(self, basis: Basis, rank: int, upload: bool = False) -> _Slots:
        if basis in self._place:
            return self._place[basis]
        if upload:
            slots = self._uploads[basis.side]
            most = self.capacity.uploads[basis.side].rank
            found = slots if rank <= most else None
        else:
            classes = self._stores[basis.side]
            found = next((slots for most, slots in classes if rank <= most), None)
            most = max((each for each, _ in classes), default=0)
        if found is None:
            raise CannotFit(f"found a basis of rank {rank}, expected {most} at most")
        return found

    def check(self, bases: Sequence[Basis], ranks: Sequence[int], *, upload: bool = False) -> None:
        """Raises CannotFit where an adapter of these bases could not be held by empty slots."""
        counts: Counter[int] = Counter()
        sizes: dict[int, int] = {}
        for basis, rank in zip(bases, ranks, strict=True):
            slots = self._class(basis, rank, upload)
            counts[id(slots)] += 1
            sizes[id(slots)] = slots.size
        for key, count in counts.items():
            if count > sizes[key]:
                raise CannotFit(
                    f"found an adapter of {count} bases, expected {sizes[key]} at most: so many "
                    "have room at once; give them more with --adapter-memory"
                )

    def fits_beside(
        self,
        kept: Iterable[Adapter],
        adapter: Adapter,
        bases: Sequence[Basis],
        ranks: Sequence[int],
        *,
        upload: bool = False,
    ) -> bool:
        """Whether an adapter would find its slots if of those that are held only `kept` were."""
        cores = {adapter, *kept}
        if len(cores) > self._cores.size:
            return False
        taken = {basis for other in cores for basis in self._bases.get(other, ())}
        classes = [
            self._class(basis, rank, upload) for basis, rank in zip(bases, ranks, strict=True)
        ]
        for slots in classes:
            wanted = {basis for basis, its in zip(bases, classes, strict=True) if its is slots}
            held = {basis for basis in taken if self._place.get(basis) is slots}
            if len(wanted | held) > slots.size:
                return False
        return True

    def acquire(
        self,
        adapter: Adapter,
        bases: Sequence[Basis],
        ranks: Sequence[int],
        *,
        upload: bool = False,
    ) -> tuple[int, list[Fill]] | None:
        """Hold an adapter and its bases for one request more.

        Args:
            adapter: who.
            bases: what its rows are made of.
            ranks: of each of these.
            upload: whether they go to the slots for uploads.

        Returns:
            The core slot, and what the workers have to do first, in this order; None where others
            hold all the slots.

        Raises:
            CannotFit: it would not find enough slots if nobody held any.
        """
        self.check(bases, ranks, upload=upload)
        classes = [
            self._class(basis, rank, upload) for basis, rank in zip(bases, ranks, strict=True)
        ]
        by_class: dict[int, list[Basis]] = {}
        for basis, slots in zip(bases, classes, strict=True):
            by_class.setdefault(id(slots), []).append(basis)
        full = self._cores.room([adapter]) < 0 or any(
            slots.room(by_class[id(slots)]) < 0 for slots in classes
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
        slot, gone, fresh = self._cores.hold(adapter)
        fresh |= adapter in self._unfilled
        self._unfilled.difference_update(bases, [adapter])
        if gone is not None:
            del self._bases[gone], self._written[gone]
            self._unfilled.discard(gone)
        written = tuple(where[basis] for basis in bases)
        if fresh or self._written[adapter] != written:
            fills.append(Fill(adapter, slot, rows_only=not fresh))
        self._bases[adapter], self._written[adapter] = tuple(bases), written
        for fill in fills:
            kind = type(fill.what).__name__.lower()
            self.fills["rows" if fill.rows_only else kind] += 1
        return slot, fills

    def release(self, adapter: Adapter) -> None:
        """One request less holds it."""
        for basis in self._bases[adapter]:
            self._place[basis].release(basis)
        self._cores.release(adapter)

    def lost(self, fill: Fill) -> None:
        """Give up what the workers could not put into its slot. Who holds it all the same (a
        pinned adapter) has it filled again when it is acquired next."""
        if isinstance(fill.what, Adapter):
            self._forget_adapter(fill.what)
        else:
            for adapter in self.users(fill.what):
                # Rows that were written meanwhile do not say where it lies, whichever slot it gets.
                self._written[adapter] = ()
            self._forget_basis(fill.what)
        if fill.what in self._cores or self._place.get(fill.what):
            self._unfilled.add(fill.what)

    def forget(self, source: int) -> None:
        """Give up everything of a source. Nobody may hold any of it."""
        for adapter in [key for key in self._cores.idle() if key.source == source]:
            self._forget_adapter(adapter)
        for basis in [key for key in self._place if key.source == source]:
            self._forget_basis(basis)

    def _forget_adapter(self, adapter: Adapter) -> None:
        self._cores.forget(adapter)
        if adapter not in self._cores:
            self._bases.pop(adapter, None)
            self._written.pop(adapter, None)
            self._unfilled.discard(adapter)

    def _forget_basis(self, basis: Basis) -> None:
        slots = self._place.get(basis)
        if slots is not None:
            slots.forget(basis)
            if basis not in slots:  # nobody held it
                del self._place[basis]
                self._unfilled.discard(basis)

    def resident(self, adapter: Adapter) -> bool:
        """Whether a core slot holds an adapter."""
        return adapter in self._cores

    def adapters(self) -> list[Adapter]:
        """All that lie in core slots."""
        return self._cores.keys()

    def core_slot(self, adapter: Adapter) -> int:
        """Where a resident adapter lies."""
        return self._cores.slot(adapter)

    def has_basis(self, basis: Basis) -> bool:
        """Whether a basis slot holds a basis."""
        return basis in self._place

    def users(self, basis: Basis) -> list[Adapter]:
        """The adapters in core slots that a basis is part of."""
        return [adapter for adapter, bases in self._bases.items() if basis in bases]
