"""Locks between processes, those of several machines too where they share a store's folder.

They are `flock`s: the system gives one up when its process ends, however it ends. On NFS the file
server keeps them.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

_POLL = 0.01  # seconds


class Held(Exception):
    """Another process has a lock; the message says which."""


class Lock:
    """A lock that this process alone has, from now on until `close`, or until it ends.

    Args:
        file: made if it is not there; it says who has it.
        wait: for how many seconds, where another process has it.

    Attributes:
        who: has it: this process, in words.

    Raises:
        Held: that one has it still.
        OSError: the file cannot be written, or has no locks.
    """

    def __init__(self, file: Path, wait: float = 0.0):
        # NFS gives a lock to one alone only where the file could be written.
        self._file = file.open("a+", encoding="utf-8", errors="replace")
        try:
            until = time.monotonic() + wait
            while not _taken(self._file.fileno()):
                if time.monotonic() >= until:
                    self._file.seek(0)
                    raise Held(self._file.read(200).strip() or "a process")
                time.sleep(_POLL)
            self.who = f"process {os.getpid()} on {socket.gethostname()}"
            self._file.truncate(0)
            self._file.write(self.who)
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Give it up. Harmless when done twice."""
        self._file.close()


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
