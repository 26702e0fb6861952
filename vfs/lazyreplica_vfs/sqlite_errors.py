"""lazyreplica's errors as SQLite's: one exception that is both, with SQLite's extended result code.

APSW hands an exception raised inside a VFS method to SQLite as a result code and then to the caller as it is. A class
derived from both families lets the caller write ``except apsw.BusyError`` or
``except lazyreplica.errors.SnapshotGone``.
"""

from __future__ import annotations

from typing import Any, cast

import apsw

from lazyreplica.errors import Interrupted, LazyReplicaError, LTXError, ReplicaDamaged, SnapshotGone

OPEN = (apsw.CantOpenError, apsw.SQLITE_CANTOPEN)
LOCK = (apsw.CantOpenError, apsw.SQLITE_CANTOPEN)
"""For xLock. Not BUSY: SQLite would drop the message and say "database is locked". Not IOERR: SQLite would roll back by
itself, and leaving ``with connection:`` would hide the error behind "no transaction is active"."""
READ = (apsw.IOError, apsw.SQLITE_IOERR_READ)
PRAGMA = (apsw.SQLError, apsw.SQLITE_ERROR)

_READ_SPECIAL: list[tuple[type[LazyReplicaError], tuple[type[apsw.Error], int]]] = [
    (Interrupted, (apsw.InterruptError, apsw.SQLITE_INTERRUPT)),
    (SnapshotGone, (apsw.BusyError, apsw.SQLITE_BUSY_SNAPSHOT)),
    (LTXError, (apsw.IOError, apsw.SQLITE_IOERR_CORRUPTFS)),
    (ReplicaDamaged, (apsw.IOError, apsw.SQLITE_IOERR_CORRUPTFS)),
]


def as_sqlite(exc: LazyReplicaError, kind: tuple[type[apsw.Error], int]) -> apsw.Error:
    """The same error for SQLite. Raise it ``from`` the original."""
    if kind is READ:
        kind = next((special for cls, special in _READ_SPECIAL if isinstance(exc, cls)), kind)
    base, code = kind
    error: Any = _married(type(exc), base)(str(exc))  # APSW's stubs do not know the two attributes
    error.result = code & 0xFF
    error.extendedresult = code
    return cast("apsw.Error", error)


_marriages: dict[tuple[type[LazyReplicaError], type[apsw.Error]], type[apsw.Error]] = {}


def _married(ours: type[LazyReplicaError], theirs: type[apsw.Error]) -> type[apsw.Error]:
    married = _marriages.get((ours, theirs))
    if married is None:
        married = type(ours.__name__, (theirs, ours), {"__module__": ours.__module__, "__doc__": ours.__doc__})
        _marriages[ours, theirs] = married
    return married
