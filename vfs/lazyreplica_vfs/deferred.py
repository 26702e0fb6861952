"""A pragma takes effect when its statement is run.

SQLite hands a pragma to the VFS when the statement is prepared, whether it is to be run, or is only explained, or never
stepped; nothing in that call tells them apart. But a statement that runs is traced as its first instruction, and one
under EXPLAIN is not. So the effect waits for that: a trace for one statement, beside any that the user has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import apsw

from lazyreplica.errors import ConfigError

_connections: WeakValueDictionary[int, apsw.Connection] = WeakValueDictionary()
"""sqlite3* -> its connection."""

_ID = "lazyreplica"
_PRAGMA = re.compile(r"(?:\s|;|--[^\n]*\n|/\*.*?\*/)*pragma\b", re.IGNORECASE | re.DOTALL)


def remember(connection: apsw.Connection) -> None:
    """Make a new connection known (an `apsw.connection_hooks` entry)."""
    _connections[connection.sqlite3_pointer()] = connection


def when_run(pointer: int, pragma: str, effect: Callable[[], None]) -> None:
    """Call `effect` when the statement that sets `pragma`, and is being prepared now, is run.

    Replaces what still waits. `pointer`: the sqlite3* of the connection.
    """
    connection = _connections.get(pointer)
    if connection is None:
        raise ConfigError(
            f"PRAGMA {pragma} cannot be set: lazyreplica's entry in apsw.connection_hooks was removed before this "
            "connection was opened"
        )

    def on_statement(event: dict[str, Any]) -> None:
        # SQLite marks a trigger's text by a leading "-- ", so APSW takes a statement with such a comment for one.
        sql = ("-- " if event["trigger"] else "") + event["sql"]
        # Other statements come in between only from within a tracer of the user's.
        if _PRAGMA.match(sql) and pragma in sql.lower():
            event["connection"].trace_v2(0, None, id=_ID)
            effect()

    connection.trace_v2(apsw.SQLITE_TRACE_STMT, on_statement, id=_ID)
