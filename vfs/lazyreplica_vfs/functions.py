"""The SQL functions ``litestream_txid()``, ``litestream_time()`` and ``litestream_lag()``.

Each takes an optional schema name (``litestream_txid('yesterday')``). On connections without a replica they are errors
that say so, so registering them everywhere is harmless.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import apsw

from lazyreplica.errors import ConfigError
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
