"""The door before the engine: so many sequences are inside, and who is next is fair.

vLLM's engine answers first come, first served: whoever sends most is answered most. So only as
many sequences are let in as the engine runs at a time, and of those that wait the next is one of
the group (a tenant, say) that has fewest inside. Its own requests come in their order. The engine
reads prompts first come, first served, too: so of one group's, no more go in at a time than leave
room for others' in a step.
"""

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_REMEMBERED = 32  # of the last that left, for the rate


@dataclass(eq=False)
class _Ticket:
    sequences: int
    tokens: int
    """Of its prompt."""
    let_in: asyncio.Future[int]
    """How many places it has been given."""


@dataclass(eq=False)
class _Group:
    inside: int = 0
    """Sequences in the engine."""
    unread: int = 0
    """Tokens of their prompts, of those that have no output yet."""
    waiting: deque[_Ticket] = field(default_factory=deque)
    turn: int = 0
    """When it was last let in; less: longer ago."""
    left: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """When its last sequences left (`time.monotonic`)."""


class Door:
    """Lets sequences into the engine.

    Args:
        places: how many may be inside.
        tokens: how many of one group's prompts' tokens may be inside and without output; a longer
            prompt is alone.
        shared: whether more than one group may come: then none has all of the places, but leaves
            an eighth (one at least) to those that come next. `tokens` holds only then, too.
        changed: called whenever somebody came, went in, or left.
    """

    def __init__(
        self,
        places: int,
        tokens: int = sys.maxsize,
        *,
        shared: Callable[[], bool] = lambda: True,
        changed: Callable[[], None] = lambda: None,
    ):
        self.places, self._tokens = places, tokens
        self._shared, self._changed = shared, changed
        self._inside = 0
        self._turn = 0
        self._open = False
        self._groups: dict[str, _Group] = {}

    @property
    def inside(self) -> int:
        """Sequences in the engine."""
        return self._inside

    @property
    def _bounded(self) -> bool:
        return not self._open and self._shared()

    @property
    def most(self) -> int:
        """How many sequences of one group may be inside."""
        if not self._bounded:
            return self.places
        return max(1, self.places - max(1, self.places // 8))

    def waiting(self, group: str | None = None) -> int:
        """Sequences that wait: of a group, or of all."""
        if group is None:
            return sum(self.waiting(each) for each in self._groups)
        found = self._groups.get(group)
        return sum(ticket.sequences for ticket in found.waiting) if found else 0

    def inside_of(self, group: str) -> int:
        """Sequences of a group in the engine."""
        found = self._groups.get(group)
        return found.inside if found else 0

    def busiest(self, count: int) -> list[dict[str, str | int]]:
        """Of the groups that have most here, `group`, and how many sequences are `inside` and
        `waiting`."""
        found: list[tuple[int, int, str]] = [
            (self.waiting(group), its.inside, group) for group, its in self._groups.items()
        ]
        return [
            {"group": group, "inside": inside, "waiting": waiting}
            for waiting, inside, group in sorted(found, reverse=True)[:count]
        ]

    def open(self) -> None:
        """Let everybody in from now on, as an engine that stops answers only who is inside."""
        self._open, self.places = True, sys.maxsize
        self._let_in()

    def free_for(self, group: str) -> int:
        """Places that a group could have now; none, where one of its own waits already."""
        if self.waiting(group):
            return 0
        return max(0, min(self.places - self._inside, self.most - self.inside_of(group)))

    def seconds_for(self, group: str, sequences: int) -> int:
        """About how long so many of a group take, by how fast its last ones left: 1 to 60."""
        left = self._groups[group].left if group in self._groups else ()
        if len(left) < 2:
            return 1
        each = (time.monotonic() - left[0]) / len(left)
        return min(60, max(1, math.ceil(each * sequences)))

    @asynccontextmanager
    async def place(
        self, group: str, sequences: int = 1, tokens: int = 0
    ) -> AsyncIterator[Callable[[], None]]:
        """Wait for places of a group's in the engine, and hold them inside of the block.

        Args:
            group: whose they are.
            sequences: how many; more than there may be count as that many.
            tokens: of their prompt.

        Yields:
            What to call when the first output comes; harmless when repeated.
        """
        its = self._groups.setdefault(group, _Group())
        let_in = asyncio.get_running_loop().create_future()
        ticket = _Ticket(max(1, sequences), tokens, let_in)
        its.waiting.append(ticket)
        self._let_in()
        try:
            await ticket.let_in
        except asyncio.CancelledError:
            if ticket in its.waiting:
                its.waiting.remove(ticket)
            elif not ticket.let_in.cancelled():  # let in at the same moment
                self._leave(its, ticket)
            self._let_in()
            self._forget(group, its)
            raise

        def has_output() -> None:
            if ticket.tokens:
                self._read(its, ticket)
                self._let_in()

        try:
            yield has_output
        finally:
            its.left.append(time.monotonic())
            self._leave(its, ticket)
            self._let_in()
            self._forget(group, its)

    def _leave(self, its: _Group, ticket: _Ticket) -> None:
        size = ticket.let_in.result()
        its.inside -= size
        self._inside -= size
        self._read(its, ticket)

    def _read(self, its: _Group, ticket: _Ticket) -> None:
        its.unread -= ticket.tokens
        ticket.tokens = 0

    def _forget(self, group: str, its: _Group) -> None:
        """Groups come and go; the rate of one that has nothing here says nothing."""
        if not its.inside and not its.waiting and self._groups.get(group) is its:
            del self._groups[group]

    def _let_in(self) -> None:
        self._let_in_all()
        self._changed()

    def _let_in_all(self) -> None:
        while True:
            most = self.most
            may = [its for its in self._groups.values() if its.waiting and self._may(its, most)]
            if not may:
                return
            # The fewest inside; of those, who was not let in for longest.
            its = min(may, key=lambda each: (each.inside, each.turn))
            size = min(its.waiting[0].sequences, most)
            if self._inside + size > self.places:
                return  # not another that is smaller: this one would wait for ever
            ticket = its.waiting.popleft()
            if ticket.let_in.cancelled():  # its client has gone
                continue
            its.inside += size
            its.unread += ticket.tokens
            self._inside += size
            self._turn += 1
            its.turn = self._turn
            ticket.let_in.set_result(size)

    def _may(self, its: _Group, most: int) -> bool:
        """Whether a group's next request keeps its bounds."""
        first = its.waiting[0]
        if its.unread and self._bounded and its.unread + first.tokens > self._tokens:
            return False
        return its.inside + min(first.sequences, most) <= most
