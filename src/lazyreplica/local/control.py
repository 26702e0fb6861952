"""A few words of memory that all processes on one local copy share: how far its log is, and when it was last fresh."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from lazyreplica.local.base import pwrite_all

_SIZE = 4096
_MILLION = 1_000_000


class Control:
    """Each word is eight bytes, written by one process (the owner) in one store, and read by any."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._words = memoryview(mmap.mmap(fd, _SIZE)).cast("Q")
        finally:
            os.close(fd)

    @staticmethod
    def make(path: Path) -> None:
        """A file of zeros, where nobody uses the one that is there: what it says may be of another boot.

        Raises `OSError`.
        """
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            pwrite_all(fd, bytes(_SIZE), 0)  # written, not a hole: see `Base`
        finally:
            os.close(fd)

    @property
    def generation(self) -> int:
        """Number of the log in use (`CopyState.log`): another one, another copy. 0: none."""
        return self._words[0]

    @generation.setter
    def generation(self, value: int) -> None:
        self._words[0] = value

    @property
    def log_end(self) -> int:
        """Bytes of the log that hold whole records. Read at the start of each transaction: 0.1 us."""
        return self._words[1]

    @log_end.setter
    def log_end(self, value: int) -> None:
        self._words[1] = value

    @property
    def polled_at(self) -> float:
        """When (`clock.now`) the owner last learned that it has the newest state; 0.0: never in this boot."""
        return self._words[2] / _MILLION

    @polled_at.setter
    def polled_at(self, value: float) -> None:
        self._words[2] = int(value * _MILLION)
