"""The SQL functions ``litestream_txid()``, ``_time()``, ``_lag()`` and ``litestream_set_time(moment)``.

Each takes an optional schema name as its last argument (``litestream_txid('yesterday')``). On connections without a
replica they are errors that say so, so registering them everywhere is harmless.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import apsw

from lazyreplica.errors import ConfigError, LazyReplicaError
from lazyreplica.ltx.name import format_txid
from lazyreplica_vfs.file import ReplicaFile, file_of
from lazyreplica_vfs.pragmas import format_time
from lazyreplica_vfs.sqlite_errors import PRAGMA, as_sqlite

_FUNCTIONS: dict[str, Callable[[ReplicaFile], str | float]] = {
    "litestream_txid": lambda file: format_txid(file.snapshot.txid),
    "litestream_time": lambda file: format_time(file.snapshot),
    "litestream_lag": lambda file: file.replica.lag,
}


def add_functions(connection: apsw.Connection) -> None:
    """Define the functions on a new connection (an `apsw.connection_hooks` entry)."""
    # A strong reference from the function to its connection would be a cycle that keeps both alive.
    reference = weakref.ref(connection)
    for name, value in _FUNCTIONS.items():
        connection.create_scalar_function(name, _function(reference, value))
    connection.create_scalar_function("litestream_set_time", _set_time(reference))


def _function(
    reference: weakref.ref[apsw.Connection], value: Callable[[ReplicaFile], str | float]
) -> Callable[..., str | float]:
    def call(schema: object = "main", *extra: object) -> str | float:
        connection = reference()
        if extra or connection is None or not isinstance(schema, str):
            raise as_sqlite(ConfigError("expected at most one argument, a schema name"), PRAGMA)
        try:
            return value(file_of(connection, schema))
        except ConfigError as exc:
            raise as_sqlite(exc, PRAGMA) from exc

    return call


def _set_time(reference: weakref.ref[apsw.Connection]) -> Callable[..., str]:
    def call(moment: object = None, schema: object = "main", *extra: object) -> str:
        """Show that moment from the next transaction on; gives the time of the state that is shown."""
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
