"""How much of its limits each key has used."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_jd.serve.tenants.keys import Key, Limits

_MINUTE = 60.0


@dataclass
class _Used:
    requests: int = 0
    """That are being answered."""
    tokens: float = 0.0
    """Charged, and not yet made up for by the time that has passed."""
    since: float = 0.0
    """When that was so."""


class Meter:
    """What each key asks for now, and has been given in the last minute.

    A key may have a minute's tokens at once; they come back evenly. Tokens are charged when they
    are computed: what runs is never cut off, and the next request waits until they have come back.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._used: dict[str, _Used] = {}

    def _now(self, key: Key) -> _Used:
        used = self._used.setdefault(key.sha256, _Used(since=self._clock()))
        now, rate = self._clock(), key.limits.tokens_per_minute
        back = (now - used.since) * rate / _MINUTE if rate else math.inf
        used.tokens, used.since = max(0.0, used.tokens - back), now
        return used

    @contextmanager
    def request(self, key: Key) -> Iterator[None]:
        """Count a request of a key as one that is being answered."""
        used = self._now(key)
        used.requests += 1
        try:
            yield
        finally:
            used.requests -= 1

    def charge(self, key: Key, tokens: int) -> None:
        """Charge a key for tokens."""
        if key.limits.tokens_per_minute:
            self._now(key).tokens += tokens

    def requests_left(self, key: Key) -> int | None:
        """How many requests more it may have answered now; None: no limit."""
        most = key.limits.requests
        return None if most is None else max(0, most - self._now(key).requests)

    def tokens_left(self, key: Key) -> int | None:
        """How many tokens more it may have now; None: no limit."""
        most = key.limits.tokens_per_minute
        return None if most is None else max(0, math.floor(most - self._now(key).tokens))

    def seconds_to_tokens(self, key: Key, *, all_of_them: bool = False) -> float:
        """Until it has a token again, or all of them."""
        most = key.limits.tokens_per_minute
        if most is None:
            return 0.0
        more = self._now(key).tokens - (0 if all_of_them else most - 1)
        return max(0.0, more * _MINUTE / most)

    def forget(self, known: set[str]) -> None:
        """Know no more of keys that are gone and ask for nothing; `known`: the digests of those
        that are there."""
        for digest in self._used.keys() - known:
            if not self._used[digest].requests:
                del self._used[digest]


def ratelimit_headers(meter: Meter, key: Key) -> dict[str, str]:
    """OpenAI's `x-ratelimit-…` of a key, as far as it has limits."""
    limits: Limits = key.limits
    found = {}
    if limits.requests is not None:
        found["x-ratelimit-limit-requests"] = str(limits.requests)
        found["x-ratelimit-remaining-requests"] = str(meter.requests_left(key))
    if limits.tokens_per_minute is not None:
        found["x-ratelimit-limit-tokens"] = str(limits.tokens_per_minute)
        found["x-ratelimit-remaining-tokens"] = str(meter.tokens_left(key))
        seconds = meter.seconds_to_tokens(key, all_of_them=True)
        found["x-ratelimit-reset-tokens"] = f"{seconds:.3f}s"
    return found
