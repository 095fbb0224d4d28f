"""The door before the engine: who is let in, in which order, and what is left when clients go."""

import asyncio
import random
from collections import Counter

import pytest

from vllm_jd.serve.tenants.door import Door


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Visitors:
    """Sequences that come to a door and stay until they are told to leave."""

    def __init__(self, door):
        self.door, self.inside, self.order, self.tasks = door, [], [], []
        self.unread = []  # of those inside: group, tokens, what tells that there is output

    def come(self, group, sequences=1, tokens=0):
        leave = asyncio.Event()

        async def visit():
            async with self.door.place(group, sequences, tokens) as has_output:
                self.order.append(group)
                self.inside.append((group, leave))
                self.unread.append(unread := (group, tokens, has_output))
                try:
                    await leave.wait()
                finally:
                    self.inside.remove((group, leave))
                    if unread in self.unread:
                        self.unread.remove(unread)

        self.tasks.append(asyncio.create_task(visit()))
        return self.tasks[-1]

    async def leave(self):
        """The one that has been inside for longest leaves."""
        self.inside[0][1].set()
        await settle()

    async def read(self, group):
        """The engine has a first token of the group's oldest prompt."""
        found = next(each for each in self.unread if each[0] == group)
        self.unread.remove(found)
        found[2]()
        found[2]()  # harmless
        await settle()

    async def end(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert (self.door.inside, self.door.waiting(), self.door._groups) == (0, 0, {})


def test_a_quiet_group_is_next_however_many_of_another_wait():
    async def run():
        visitors = Visitors(Door(4))
        for _ in range(100):
            visitors.come("loud")
        await settle()
        assert visitors.order == ["loud"] * 3, "one place is left to others"
        visitors.come("quiet")
        await settle()
        assert visitors.order[-1] == "quiet" and visitors.door.inside == 4
        visitors.come("quiet")
        await settle()
        assert visitors.door.waiting("quiet") == 1 and visitors.door.waiting("loud") == 97
        await visitors.leave()
        assert visitors.order[-1] == "quiet"
        await visitors.leave()
        assert visitors.order[-1] == "loud", "two each"
        await visitors.end()

    asyncio.run(run())


def test_groups_that_all_want_more_have_the_same_number_of_places():
    async def run():
        visitors = Visitors(Door(12))
        for group, count in (("a", 200), ("b", 50), ("c", 50)):
            for _ in range(count):
                visitors.come(group)
        await settle()
        for _ in range(30):
            await visitors.leave()
            inside = Counter(group for group, _ in visitors.inside)
            assert sum(inside.values()) == 12
        assert set(inside.values()) == {4}
        await visitors.end()

    asyncio.run(run())


def test_a_group_alone_has_all_places():
    async def run():
        visitors = Visitors(Door(4, shared=lambda: False))
        for _ in range(9):
            visitors.come("a")
        await settle()
        assert (visitors.door.inside, visitors.door.waiting("a")) == (4, 5)
        await visitors.end()

    asyncio.run(run())


def test_prompts_of_one_group_leave_room_for_others():
    async def run():
        visitors = Visitors(Door(16, 100))
        for _ in range(5):
            visitors.come("loud", tokens=40)
        visitors.come("loud", tokens=1000)
        visitors.come("loud", tokens=1)
        await settle()
        assert visitors.order == ["loud"] * 2, "three would be 120 tokens"
        assert visitors.door.free_for("loud") == 0 < visitors.door.free_for("quiet")
        visitors.come("quiet", tokens=400)
        await settle()
        assert visitors.order[-1] == "quiet", "a prompt that is longer, if it is alone"
        visitors.come("quiet", tokens=1)
        await settle()
        assert visitors.door.waiting("quiet") == 1
        await visitors.read("loud")
        assert visitors.order.count("loud") == 3
        await visitors.leave()  # its prompt was read
        assert visitors.order.count("loud") == 3
        await visitors.leave()  # without an output
        assert visitors.order.count("loud") == 4
        for count in (5, 5, 6, 7):  # 80, 40, then the long one alone, then the last
            await visitors.read("loud")
            assert visitors.order.count("loud") == count
        await visitors.end()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["alone", "open"])
def test_where_nobody_is_to_be_let_through_prompts_are_not_bounded(how):
    async def run():
        door = Door(4, 100, shared=lambda: how == "open")
        visitors = Visitors(door)
        for _ in range(4):
            visitors.come("a", tokens=80)
        await settle()
        if how == "open":
            assert len(visitors.inside) == 1
            door.open()
            await settle()
        assert len(visitors.inside) == 4
        await visitors.end()

    asyncio.run(run())


@pytest.mark.parametrize("places", [1, 2, 4])
def test_several_sequences_take_several_places_and_none_waits_for_ever(places):
    async def run():
        visitors = Visitors(Door(places))
        visitors.come("a", 1000)  # more than there are
        visitors.come("b", 3)
        visitors.come("a", 2)
        await settle()
        while visitors.inside:
            assert visitors.door.inside <= places
            await visitors.leave()
        assert sorted(visitors.order) == ["a", "a", "b"]
        await visitors.end()

    asyncio.run(run())


def test_whoever_goes_away_is_forgotten():
    async def run():
        visitors = Visitors(Door(2, shared=lambda: False))
        tasks = [visitors.come("a") for _ in range(6)]
        await settle()
        tasks[3].cancel()  # waits
        tasks[0].cancel()  # is inside
        await settle()
        assert (visitors.door.inside, visitors.door.waiting()) == (2, 2)
        # One leaves, and who is next goes away at the same moment.
        visitors.inside[0][1].set()
        await asyncio.sleep(0)
        for task in tasks[4:]:
            task.cancel()
        await settle()
        assert visitors.door.inside == len(visitors.inside) <= 2
        await visitors.end()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_no_place_is_lost(seed):
    """Places taken are those of who is inside, and none is empty while somebody might have it; so
    with the tokens of prompts."""

    async def run():
        draw = random.Random(seed)
        shared = [True]
        door = Door(draw.randint(1, 9), 10, shared=lambda: shared[0])
        visitors = Visitors(door)
        for _ in range(300):
            what = draw.random()
            if what < 0.5:
                group = draw.choice("aaab" if seed % 2 else "abcd")
                visitors.come(group, draw.choice([1, 1, 1, 5]), draw.choice([0, 2, 5, 20]))
            elif what < 0.6 and visitors.unread:
                visitors.unread.pop(draw.randrange(len(visitors.unread)))[2]()
            elif what < 0.7 and visitors.inside:
                draw.choice(visitors.inside)[1].set()
            elif what < 0.9 and visitors.tasks:
                draw.choice(visitors.tasks).cancel()
            else:
                shared[0] = draw.random() < 0.8
            for _ in range(draw.randint(0, 4)):
                await asyncio.sleep(0)
            assert 0 <= door.inside <= door.places
        await settle()
        found = Counter()
        for group, tokens, _ in visitors.unread:
            found[group] += tokens
        for group, its in door._groups.items():
            assert its.unread == found[group]
        assert (door.inside > 0) >= (door.waiting() > 0)
        while visitors.inside:
            await visitors.leave()
        await visitors.end()

    asyncio.run(run())


def test_once_it_is_open_nobody_waits():
    async def run():
        visitors = Visitors(Door(2))
        for group in "aaaab":
            visitors.come(group, 3)
        await settle()
        visitors.door.open()
        await settle()
        assert len(visitors.inside) == 5 and visitors.door.waiting() == 0
        visitors.come("c")
        await settle()
        assert len(visitors.inside) == 6
        await visitors.end()

    asyncio.run(run())


def test_seconds_are_by_how_fast_the_last_ones_left():
    async def run():
        door = Door(1)
        assert door.seconds_for("a", 1000) == 1, "nothing is known"

        async def visit():
            async with door.place("a"):
                await asyncio.sleep(0.02)

        waiting = [asyncio.create_task(visit()) for _ in range(12)]
        await asyncio.sleep(0.15)
        assert 2 <= door.seconds_for("a", 200) <= 20
        assert door.seconds_for("a", 10**9) == 60
        await asyncio.gather(*waiting)

    asyncio.run(run())
