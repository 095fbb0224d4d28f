"""Who has which slot, against dicts: what the workers would hold is played beside it."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_jd.plugin.engine.residency import (
    Adapter,
    Basis,
    CannotFit,
    Capacity,
    Fill,
    Residency,
    SlotClass,
)

CORES, BLENDS, LONG = 4, 4, 2
BASES = {
    "v": (SlotClass(2, 0, 2), SlotClass(4, 2, 3)),
    "u": (SlotClass(4, 0, 4),),
    "scales": (SlotClass(1, 0, 1),),
}
UPLOADS = {"v": SlotClass(8, 0, 2), "u": SlotClass(8, 0, 2)}

# What adapters are made of: (side, number, rank). Two generations of a store, three uploads, and
# blends: of one cluster, and of several with uploads.
MADE_OF = {
    Adapter(source, number): [(Basis(source, side, basis), rank) for side, basis, rank in parts]
    for source in (1, 2)
    for number, parts in enumerate(
        [
            [("v", 0, 2), ("u", 0, 2)],
            [("v", 0, 2), ("u", 0, 2)],
            [("v", 1, 1), ("u", 1, 1)],
            [("v", 2, 4), ("u", 2, 4), ("scales", 0, 1)],
            [("v", 1, 1), ("v", 3, 3), ("u", 1, 1), ("u", 3, 3)],
            [("v", 4, 2), ("v", 5, 4), ("v", 2, 4), ("u", 4, 4), ("scales", 1, 1)],
            [],
        ]
    )
} | {
    Adapter(source, 0): [(Basis(source, "v", 0), 1), (Basis(source, "u", 0), 1)]
    for source in (11, 12, 13)
}
MADE_OF |= {
    Adapter(21, 0): MADE_OF[Adapter(1, 0)],
    Adapter(22, 0): MADE_OF[Adapter(1, 1)],
    Adapter(23, 0): MADE_OF[Adapter(1, 0)] + MADE_OF[Adapter(1, 2)],
    Adapter(24, 0): MADE_OF[Adapter(1, 2)] + MADE_OF[Adapter(11, 0)],
    Adapter(25, 0): MADE_OF[Adapter(11, 0)] + MADE_OF[Adapter(12, 0)],
}
MORE = {Adapter(21, 0): 0, Adapter(22, 0): 0, Adapter(23, 0): 2, Adapter(24, 0): 1} | {
    Adapter(25, 0): 3
}
"""How many cores blends have beside their own slots."""
POOLS = {
    "cores": range(CORES),
    "blends": range(CORES, CORES + BLENDS),
    "long": range(CORES + BLENDS, CORES + BLENDS + LONG),
    ("v", 2): range(2),
    ("v", 4): range(2, 5),
    ("u", 4): range(4),
    ("scales", 1): range(1),
    ("v", "uploads"): range(2),
    ("u", "uploads"): range(2),
}
KINDS = {
    "basis": [("v", 2), ("v", 4), ("u", 4), ("scales", 1)],
    "upload": [("v", "uploads"), ("u", "uploads")],
    "core": ["cores"],
    "blend": ["blends", "long"],
}


def pool_of(basis, rank):
    if 10 < basis.source < 20:
        return basis.side, "uploads"
    return basis.side, next(c.rank for c in BASES[basis.side] if rank <= c.rank)


def acquire(residency, adapter):
    parts = MADE_OF[adapter]
    return residency.acquire(
        adapter,
        tuple(basis for basis, _ in parts),
        tuple(rank for _, rank in parts),
        upload=[10 < basis.source < 20 for basis, _ in parts],
        cores=MORE.get(adapter),
    )


def home_of(adapter):
    if adapter not in MORE:
        return "cores"
    return "long" if MORE[adapter] else "blends"


class Machine(RuleBasedStateMachine):
    """`lies`: pool → key → slot; `idle`: pool → keys that nobody holds, the oldest first."""

    def __init__(self):
        super().__init__()
        self.residency = Residency(Capacity(CORES, BASES, UPLOADS, blends=BLENDS, long=LONG))
        self.lies = {pool: {} for pool in POOLS}
        self.idle = {pool: [] for pool in POOLS}
        self.count = Counter()
        self.holders = []  # adapters, one for each request
        self.slot_of = {}
        self.rows = {}  # core slot → the slots that its rows name, as the workers have it
        self.at = {}  # (pool, slot) → basis or further core, as the workers have it
        self.cores_at = {}
        self.counted = {kind: Counter() for kind in KINDS}

    def keys(self, adapter):
        cores = [("blends", Adapter(adapter.source, 1 + i)) for i in range(MORE.get(adapter, 0))]
        bases = [(pool_of(b, rank), b) for b, rank in MADE_OF[adapter]]
        return [*bases, *cores, (home_of(adapter), adapter)]

    def take(self, adapter):
        """Acquire, and check everything about the answer. Returns the fills, or None."""
        needed = {pool: [] for pool in POOLS}
        for pool, key in self.keys(adapter):
            needed[pool].append(key)
        fits = all(
            len({k for k in self.lies[pool] if self.count[k]} | set(needed[pool])) <= len(slots)
            for pool, slots in POOLS.items()
        )
        found = acquire(self.residency, adapter)
        assert (found is not None) == fits
        if found is None:
            return None
        slot, fills = found
        fresh = {key for pool, key in self.keys(adapter) if key not in self.lies[pool]}
        filled = [fill.what for fill in fills if not fill.rows_only]
        assert len(set(filled)) == len(filled) and set(filled) == fresh, "what is not there"
        for pool, keys in needed.items():
            new = [key for key in keys if key in fresh]
            evicted = max(0, len(self.lies[pool]) + len(new) - len(POOLS[pool]))
            victims = [key for key in self.idle[pool] if key not in keys][:evicted]
            before = {at: key for key, at in self.lies[pool].items()}
            slots = [fill.slot for fill in fills if fill.what in new and not fill.rows_only]
            assert {before[at] for at in slots if at in before} == set(victims), "the oldest go"
            assert set(slots) <= set(POOLS[pool])
            counted = next(self.counted[kind] for kind, pools in KINDS.items() if pool in pools)
            found = {"hits": len(keys) - len(new), "misses": len(new), "evictions": len(victims)}
            counted.update(found)
            for key in victims:
                del self.lies[pool][key]
                self.idle[pool].remove(key)
            for key in keys:
                if not self.count[key] and key in self.idle[pool]:
                    self.idle[pool].remove(key)
                self.count[key] += 1
        for fill in fills:
            if not fill.rows_only:
                pool = next(pool for pool, key in self.keys(adapter) if key == fill.what)
                self.lies[pool][fill.what] = fill.slot
        assert slot == self.lies[home_of(adapter)][adapter]
        assert all(fill.slot == slot for fill in fills if fill.what == adapter)
        assert not any(fill.what == adapter for fill in fills[:-1]), "its rows come last"
        self.holders.append(adapter)
        self.slot_of[adapter] = slot
        return fills

    def carry_out(self, adapter, fills, failing=()):
        for fill in fills:
            if fill.what != adapter:
                pool = next(pool for pool, key in self.keys(adapter) if key == fill.what)
                self.at[pool, fill.slot] = None if fill in failing else fill.what
            elif fill in failing:
                self.cores_at[fill.slot] = self.rows[fill.slot] = None
            else:
                if not fill.rows_only:
                    self.cores_at[fill.slot] = adapter
                # A basis that failed has no slot: the workers' rows name some other.
                self.rows[fill.slot] = {
                    key: None if any(f.what == key for f in failing) else self.lies[pool][key]
                    for pool, key in self.keys(adapter)[:-1]
                }

    def let_go(self, adapter):
        self.residency.release(adapter)
        self.holders.remove(adapter)
        for pool, key in self.keys(adapter):
            self.count[key] -= 1
            if not self.count[key]:
                self.idle[pool].append(key)

    def gone(self, key):
        for pool in POOLS:
            if self.lies[pool].pop(key, None) is not None:
                self.idle[pool].remove(key)

    @rule(adapter=st.sampled_from(sorted(MADE_OF)))
    def begins(self, adapter):
        fills = self.take(adapter)
        if fills is not None:
            self.carry_out(adapter, fills)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def ends(self, data):
        self.let_go(data.draw(st.sampled_from(self.holders)))

    @rule(adapter=st.sampled_from(sorted(MADE_OF)), data=st.data())
    def begins_and_some_fills_fail(self, adapter, data):
        fills = self.take(adapter)
        if not fills:
            return
        failing = data.draw(st.lists(st.sampled_from(fills), min_size=1, unique=True))
        self.carry_out(adapter, fills, failing)
        for fill in failing:
            users = self.residency.users(fill.what)
            assert adapter in users
            for user in users:
                while user in self.holders:
                    self.let_go(user)
        for fill in failing:
            self.residency.lost(fill)
            self.gone(fill.what)

    @rule(adapter=st.sampled_from(sorted(MADE_OF)), data=st.data())
    def some_of_those_that_are_held_would_leave_room(self, adapter, data):
        kept = set(self.holders) and data.draw(st.sets(st.sampled_from(self.holders)))
        wanted = {pool: set() for pool in POOLS}
        for other in {*kept, adapter}:
            for pool, key in self.keys(other):
                wanted[pool].add(key)
        short = {(len(wanted[p]), len(POOLS[p])) for p in POOLS if len(wanted[p]) > len(POOLS[p])}
        bases, ranks = zip(*MADE_OF[adapter], strict=True) if MADE_OF[adapter] else ((), ())
        upload = [10 < basis.source < 20 for basis in bases]
        found = self.residency.short_of(
            kept, adapter, bases, ranks, upload=upload, cores=MORE.get(adapter)
        )
        assert {(each.needed, each.size) for each in found} == short

    @rule(source=st.sampled_from([1, 2, 11, 12, 13, 23, 25]))
    def a_source_goes(self, source):
        for adapter in list(self.holders):
            if source in {adapter.source, *(basis.source for basis, _ in MADE_OF[adapter])}:
                self.let_go(adapter)
        if source > 20:
            self.residency.forget_blend(source, MORE[Adapter(source, 0)])
        else:
            self.residency.forget(source)
        for pool in POOLS:
            for key in [key for key in self.lies[pool] if key.source == source]:
                self.gone(key)

    @invariant()
    def nobody_has_anothers_slot(self):
        for lies in self.lies.values():
            assert len(set(lies.values())) == len(lies)

    @invariant()
    def who_is_held_has_all_its_numbers(self):
        for adapter in self.holders:
            slot = self.slot_of[adapter]
            lies = self.lies[home_of(adapter)]
            assert self.residency.core_slot(adapter) == slot == lies[adapter]
            assert self.cores_at[slot] == adapter
            for pool, key in self.keys(adapter)[:-1]:
                assert isinstance(key, Adapter) or self.residency.has_basis(key)
                assert self.at[pool, self.rows[slot][key]] == key

    @invariant()
    def what_it_counts_is_so(self):
        for kind, found in self.residency.counts().items():
            lies = [key for pool in KINDS[kind] for key in self.lies[pool]]
            idle = sum(len(self.idle[pool]) for pool in KINDS[kind])
            room = sum(len(POOLS[pool]) for pool in KINDS[kind])
            assert found[:3] == (len(lies) - idle, idle, room - len(lies))
            counted = self.counted[kind]
            assert found[3:] == tuple(counted[what] for what in ("hits", "misses", "evictions"))
        for source in (1, 2):
            its = [
                sum(key.source == source for pool in KINDS[kind] for key in self.lies[pool])
                for kind in ("basis", "core")
            ]
            assert self.residency.resident_of(source) == tuple(its)

    @invariant()
    def what_it_says_of_itself_is_so(self):
        whole = {adapter for adapter in MADE_OF if adapter in self.lies[home_of(adapter)]}
        assert set(self.residency.adapters()) == whole
        for adapter, parts in MADE_OF.items():
            cores = [key for pool, key in self.keys(adapter) if pool == "blends"]
            there = adapter in whole and all(key in self.lies["blends"] for key in cores)
            assert self.residency.resident(adapter) == there
            for basis, rank in parts:
                lies = basis in self.lies[pool_of(basis, rank)]
                assert self.residency.has_basis(basis) == lies


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[*HealthCheck]
)
TestAgainstDicts = Machine.TestCase


def made(cores=2, bases=None, uploads=1, **more):
    each = {side: SlotClass(8, 0, uploads) for side in ("v", "u")}
    return Residency(Capacity(cores, bases or BASES, each, **more))


V = [Basis(1, "v", i) for i in range(8)]


def test_a_basis_that_came_back_elsewhere_costs_rows_only():
    residency = made(cores=8, bases={"v": (SlotClass(2, 0, 2),)})
    a, b, c = (Adapter(1, i) for i in range(3))
    _, first = residency.acquire(a, [V[0]], [2])
    assert first == [Fill(V[0], 0), Fill(a, 0)]
    residency.release(a)
    for other, basis in ((b, V[1]), (c, V[2])):
        residency.acquire(other, [basis], [2])
    residency.release(b)  # V[2] lies where V[0] lay; V[0] gets the place of V[1]
    assert residency.acquire(a, [V[0]], [2]) == (0, [Fill(V[0], 1), Fill(a, 0, rows_only=True)])
    assert residency.acquire(a, [V[0]], [2]) == (0, [])
    assert residency.fills == {"basis": 4, "adapter": 3, "rows": 1}


def test_rows_that_were_written_while_a_basis_failed_are_written_again():
    """The basis comes back into the slot that it was to have: that is no reason to leave them."""
    residency = made(bases={"v": (SlotClass(2, 0, 2),)})
    slot, (of_basis, _) = residency.acquire(Adapter(1, 0), [V[0]], [2])
    residency.release(Adapter(1, 0))
    residency.lost(of_basis)
    assert residency.acquire(Adapter(1, 0), [V[0]], [2]) == (
        slot,
        [of_basis, Fill(Adapter(1, 0), slot, rows_only=True)],
    )


def test_what_never_fits_is_told_from_what_waits():
    residency = made(bases={"v": (SlotClass(2, 0, 1), SlotClass(4, 1, 2))}, whole=False)
    with pytest.raises(CannotFit, match="found a basis of rank 5, expected 4 at most"):
        residency.acquire(Adapter(1, 0), [V[0], V[1]], [2, 5])
    with pytest.raises(CannotFit, match="found a basis of rank 9, expected 8 at most"):
        residency.acquire(Adapter(2, 0), [Basis(2, "v", 0)], [9], upload=True)
    with pytest.raises(CannotFit, match=r"3 bases of rank 4, expected 2 .*--adapter-memory"):
        residency.acquire(Adapter(1, 0), V[:3], [3, 4, 4])
    assert residency.acquire(Adapter(1, 1), V[:2], [4, 3]) is not None, "nothing was taken"
    assert residency.acquire(Adapter(1, 2), [V[2]], [3]) is None, "it waits"
    assert residency.acquire(Adapter(1, 2), [V[2]], [2]) is not None, "another class has room"
    residency.check([V[4]], [4])
    assert not residency.has_basis(V[4])


def test_a_try_that_found_no_room_puts_nobody_out():
    residency = made(bases={"v": (SlotClass(2, 0, 3),)})
    held, idle = Adapter(1, 0), Adapter(1, 1)
    residency.acquire(held, [V[0]], [2])
    residency.acquire(idle, [V[1]], [2])
    residency.release(idle)
    assert residency.acquire(Adapter(1, 2), [V[0], V[2]], [2, 2]) is not None
    assert residency.acquire(Adapter(1, 3), [V[3]], [2]) is None, "no core slot"
    assert residency.has_basis(V[1]) and not residency.has_basis(V[3])
    assert residency.acquire(held, [V[0]], [2]) == (0, [])


def test_uploads_have_slots_of_their_own():
    residency = made(cores=4, bases={"v": (SlotClass(8, 0, 1),)})
    store, upload, late = Adapter(1, 0), Adapter(2, 0), Adapter(3, 0)
    assert residency.acquire(store, [V[0]], [1])[1][0] == Fill(V[0], 0)
    basis = Basis(2, "v", 0)
    assert residency.acquire(upload, [basis], [1], upload=True)[1][0] == Fill(basis, 0)
    assert residency.acquire(late, [Basis(3, "v", 0)], [1], upload=True) is None
    residency.release(upload)
    assert residency.acquire(late, [Basis(3, "v", 0)], [1], upload=True) is not None
    assert residency.has_basis(V[0]) and not residency.has_basis(basis)


def test_what_the_workers_begin_with_is_there():
    residency = made(cores=3, bases={"v": (SlotClass(2, 0, 2), SlotClass(4, 2, 1))})
    residency.begin_bases([(V[0], 2), (V[1], 4), (V[2], 1)])
    for number, basis in enumerate((V[2], V[0])):
        residency.begin(Adapter(1, number), [basis])
    assert residency.acquire(Adapter(1, 0), [V[2]], [1]) == (0, [])
    assert residency.acquire(Adapter(1, 1), [V[0]], [2]) == (1, [])
    assert residency.acquire(Adapter(1, 2), [V[1]], [4]) == (2, [Fill(Adapter(1, 2), 2)])
    assert residency.fills == {"adapter": 1}


def test_blends_have_slots_of_their_own():
    """However many there are, nobody else's slot is taken; without any, they are refused."""
    residency = Residency(Capacity(2, BASES, UPLOADS, blends=2, long=1))
    plain = [acquire(residency, adapter)[0] for adapter in (Adapter(1, 0), Adapter(1, 2))]
    assert sorted(plain) == [0, 1]
    for _ in range(3):
        for source in (21, 22, 23):
            slot, _ = acquire(residency, Adapter(source, 0))
            assert slot in ((4,) if source == 23 else (2, 3))
            residency.release(Adapter(source, 0))
    assert residency.resident(Adapter(1, 0)) and residency.resident(Adapter(1, 2))
    bare = Residency(Capacity(2, BASES, UPLOADS))
    with pytest.raises(CannotFit, match="no slots for them"):
        acquire(bare, Adapter(21, 0))
    sharded = Residency(Capacity(2, BASES, UPLOADS, blends=2))
    assert acquire(sharded, Adapter(21, 0)) is not None
    with pytest.raises(CannotFit, match=r"a blend of several rows.*--fully-sharded-loras"):
        acquire(sharded, Adapter(23, 0))


def test_what_there_is_too_little_of_is_told_with_what_gives_more():
    cores = "3 cores of blends, expected 2 at most.*more with --max-num-seqs or --max-blend"
    uploads = "2 uploads, expected 1 at most.*more with --max-loras"
    two = Residency(Capacity(2, BASES, UPLOADS, blends=2, long=1))
    with pytest.raises(CannotFit, match=f"needs {cores}$"):
        acquire(two, Adapter(25, 0))
    one = Residency(Capacity(2, BASES, {s: SlotClass(8, 0, 1) for s in "vu"}, blends=2, long=1))
    with pytest.raises(CannotFit, match=f"needs {cores}; and {uploads}$"):
        acquire(one, Adapter(25, 0))
    needed = [V[0], V[1]], [2, 2]
    for whole, remedy in ((False, "give them more with --adapter-memory"), (True, "anew")):
        few = made(bases={"v": (SlotClass(2, 0, 1),)}, whole=whole)
        with pytest.raises(CannotFit, match=f"2 bases of rank 2, expected 1 at most.*{remedy}"):
            few.check(*needed)
    held = [Adapter(1, 0), Adapter(1, 2)]
    assert all(acquire(two, adapter) is not None for adapter in held)
    ((what, needed, size, remedy),) = two.short_of(held, Adapter(1, 6), [], [])
    assert (what, needed, size) == ("adapters", 3, 2) and "--core-slots" in remedy
    assert acquire(two, Adapter(24, 0)) is not None
    (short,) = two.short_of([Adapter(24, 0)], Adapter(25, 0), [], [], cores=1)
    assert short == ("blends of several rows", 2, 1, "give them more with --max-num-seqs")


def test_one_that_waits_for_cores_takes_nothing():
    residency = Residency(Capacity(2, BASES, UPLOADS, blends=2, long=2))
    assert acquire(residency, Adapter(23, 0)) is not None
    assert acquire(residency, Adapter(24, 0)) is None
    residency.release(Adapter(23, 0))
    assert acquire(residency, Adapter(24, 0)) is not None
