"""Connections that nobody uses at the moment: few, and not for long, because a process may have many replicas.

An open makes dozens, all of which are used within a moment. Then each origin keeps a handful, and the process as a
whole keeps no more than some number, however many origins it has opened at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable

from lazyreplica.storage.connection import Connection

IDLE_SECONDS = 15.0
"""Idle connections are dropped then, before servers and NAT gateways silently do."""
KEPT = 8
"""Of one origin, once it has been quiet for a moment."""
KEPT_IN_ALL = 128
"""In the process, at any moment; but one of each origin in any case."""
_QUIET_SECONDS = 1.0


class IdleConnections:
    """Those of one origin. Thread-safe."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        """`is_busy` tells whether requests to that origin are under way: then those to come may need many."""
        self._is_busy = is_busy
        self._idle: list[Connection] = []
        """Most recently used last. A list's append, insert and pop need no lock."""
        _keeper.watch(self)

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> Connection | None:
        """The one that was used last, if there is any."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    def put(self, connection: Connection, *, used: bool) -> None:
        """Keep a connection that rests; those that were not used yet are taken after the others."""
        if used:
            self._idle.append(connection)
        else:
            self._idle.insert(0, connection)
        if len(self._idle) > 1:
            _keeper.look()

    def clear(self) -> None:
        """Close all."""
        while (connection := self.take()) is not None:
            connection.close()
        _keeper.wake()

    # -- for the keeper --

    def longest(self) -> float:
        """Seconds since the one that rests longest was used; -1 if there are not two."""
        resting = [each.idle for each in list(self._idle)]
        return max(resting) if len(resting) > 1 else -1.0

    def drop_longest(self) -> bool:
        """Close the one that rests longest, unless somebody was faster."""
        resting = list(self._idle)
        if len(resting) < 2:
            return False
        oldest = max(resting, key=lambda each: each.idle)
        try:
            self._idle.remove(oldest)
        except ValueError:  # taken
            return False
        oldest.close()
        return True

    def tidy(self) -> bool:
        """Close those that are too many or too old by now. False when there is nothing to come back for."""
        while len(self._idle) > KEPT and not self._is_busy() and self.longest() > _QUIET_SECONDS:
            if not self.drop_longest():
                break
        while self.longest() > IDLE_SECONDS and self.drop_longest():
            pass
        return len(self._idle) > 1


class _Keeper:
    """Sees to the bounds for the process: at once to the number, in a thread of its own to the time.

    The thread lives only while some origin has more than one idle connection.
    """

    def __init__(self) -> None:
        self._origins: weakref.WeakSet[IdleConnections] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, origin: IdleConnections) -> None:
        with self._lock:
            self._origins.add(origin)

    def wake(self) -> None:
        self._wake.set()

    def look(self) -> None:
        """Somebody has one more."""
        with self._lock:
            origins = list(self._origins)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="lazyreplica-idle", daemon=True)
                with contextlib.suppress(RuntimeError):  # no new threads at interpreter exit
                    thread.start()
                    self._thread = thread
        excess = sum(map(len, origins)) - KEPT_IN_ALL
        while excess > 0:
            origin = max(origins, key=IdleConnections.longest)
            if origin.longest() < 0:
                return
            origin.drop_longest()
            excess -= 1

    def _run(self) -> None:
        while True:
            self._wake.wait(_QUIET_SECONDS)
            self._wake.clear()
            with self._lock:
                origins = list(self._origins)
            left = [origin.tidy() for origin in origins]
            del origins
            if not any(left):
                with self._lock:
                    # Who puts one in from now on finds no thread, or is seen here.
                    if not any(len(origin) > 1 for origin in self._origins):
                        self._thread = None
                        return


_keeper = _Keeper()


def _begin_anew() -> None:
    """In a forked child there is no thread, and the lock may be held for ever."""
    global _keeper  # noqa: PLW0603
    _keeper = _Keeper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
