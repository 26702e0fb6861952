"""Whether a connection's user has called `Connection.interrupt`: what a wait for storage asks."""

from __future__ import annotations

import weakref

import apsw


class Interrupts:
    """The interrupts of one connection. Asked by one thread at a time: SQLite holds the connection's mutex."""

    def __init__(self, pointer: int) -> None:
        """`pointer` is its sqlite3*. APSW's object is looked for later: while it opens a database, it has none."""
        self._pointer = pointer
        self._connection: weakref.ref[apsw.Connection] | None = None
        self._told = False

    def __call__(self) -> bool:
        """Whether to give up, now. True once an interrupt.

        SQLite's flag stays set until another statement begins, and by then it has ended every one that ran. What
        reads without a statement (a backup) would never get anywhere while it is set.
        """
        connection = self._connection() if self._connection is not None else self._find()
        if connection is None or not connection.is_interrupted:
            self._told = False
            return False
        told, self._told = self._told, True
        return not told

    def _find(self) -> apsw.Connection | None:
        for connection in apsw.connections():
            try:
                if connection.sqlite3_pointer() == self._pointer:
                    self._connection = weakref.ref(connection)
                    return connection
            except apsw.Error:  # closed, or not open yet
                continue
        return None
