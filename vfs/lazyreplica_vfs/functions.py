"""The SQL functions ``litestream_txid()``, ``_time()``, ``_lag()`` and ``litestream_set_time(moment)``.

Each takes an optional schema name as its last argument (``litestream_txid('yesterday')``). On connections without a
replica they are errors that say so, so registering them everywhere is harmless.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import apsw

from lazyreplica.errors import ConfigError, LazyReplicaError
from lazyreplica_vfs.sqlite_errors import PRAGMA, as_sqlite

# The engine is imported where a function is called: every connection gets the functions, few have a replica.
_READING = ("litestream_txid", "litestream_time", "litestream_lag")


def add_functions(connection: apsw.Connection) -> None:
    """Define the functions on a new connection (an `apsw.connection_hooks` entry)."""
    # A strong reference from the function to its connection would be a cycle that keeps both alive.
    reference = weakref.ref(connection)
    for name in _READING:
        connection.create_scalar_function(name, _function(reference, name))
    connection.create_scalar_function("litestream_set_time", _set_time(reference))


def _function(reference: weakref.ref[apsw.Connection], name: str) -> Callable[..., str | float]:
    def call(schema: object = "main", *extra: object) -> str | float:
        from lazyreplica_vfs.file import file_of
        from lazyreplica_vfs.pragmas import FUNCTIONS

        connection = reference()
        if extra or connection is None or not isinstance(schema, str):
            raise as_sqlite(ConfigError("expected at most one argument, a schema name"), PRAGMA)
        try:
            file = file_of(connection, schema)
            return FUNCTIONS[name](file.replica, file.snapshot)
        except ConfigError as exc:
            raise as_sqlite(exc, PRAGMA) from exc

    return call


def _set_time(reference: weakref.ref[apsw.Connection]) -> Callable[..., str]:
    def call(moment: object = None, schema: object = "main", *extra: object) -> str:
        """Show that moment from the next transaction on; gives the time of the state that is shown."""
        from lazyreplica_vfs.file import file_of
        from lazyreplica_vfs.pragmas import format_time

        connection = reference()
        if extra or connection is None or not isinstance(moment, str) or not isinstance(schema, str):
            raise as_sqlite(
                ConfigError("expected a time such as '5 minutes ago' or 'latest', and perhaps a schema name"), PRAGMA
            )
        try:
            file = file_of(connection, schema)
            file.show(file.find("time", moment))
        except LazyReplicaError as exc:
            raise as_sqlite(exc, PRAGMA) from exc
        return format_time(file.snapshot)

    return call
