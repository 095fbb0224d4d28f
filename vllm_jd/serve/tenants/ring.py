"""The keys of a running server, which follow their file."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from vllm_jd.plugin.api.callers import Caller
from vllm_jd.serve.tenants.keys import Key, KeyFileError, digest_of, glob_pattern, read_keys

logger = logging.getLogger("vllm.vllm_jd")

_LOOK_SECONDS = 1.0


class KeyRing:
    """The keys of a file, read anew when it changes. A file that is broken changes nothing.

    Args:
        file: of keys.
        changed: called with the keys' digests when they have changed.

    Raises:
        KeyFileError: the file is broken from the beginning.
    """

    def __init__(self, file: Path, changed: Callable[[set[str]], None] = lambda digests: None):
        self.file = file
        self.fault: str | None = None
        """What is wrong with the file that is there now, of which nothing is used."""
        self._changed = changed
        self._stamp = _stamp(file)
        self._looked = time.monotonic()
        self._take(read_keys(file).keys)

    def _take(self, keys: tuple[Key, ...]) -> None:
        self._keys = {key.sha256: (key, caller_of(key)) for key in keys}
        self.groups = len({who.group for _, who in self._keys.values()})
        """Of how many groups there are keys."""

    def find(self, text: str) -> tuple[Key, Caller] | None:
        """The key that is spelled so, and who comes with it; None: there is none."""
        self._follow()
        return self._keys.get(digest_of(text))

    def _follow(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self.file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read_keys(self.file).keys
        except KeyFileError as error:
            self.fault = str(error)
            logger.error("vllm-jd: the API keys stay as they were: %s", error)
            return
        self.fault = None
        self._take(keys)
        self._changed(set(self._keys))
        logger.info("vllm-jd: %d API keys, read anew from %s", len(keys), self.file)


def caller_of(key: Key) -> Caller:
    """Who comes with a key."""
    admin = key.may("admin")
    # One pattern of all: a listing asks of every name.
    allowed = re.compile("|".join(map(glob_pattern, key.adapters)), re.DOTALL).fullmatch
    own = f"{key.tenant}/"

    def sees(name: str) -> bool:
        if admin or (key.tenant is not None and name.startswith(own)):
            return True
        return allowed(name) is not None

    group = f"key {key.name}" if key.tenant is None else f"tenant {key.tenant}"
    return Caller(group, key.tenant, sees, admin, key.limits.adapters, key.limits.bytes)


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
