"""Functions that give or take a connection: `connect`, `refresh`, `wait_for`, `export`, `stats`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import apsw

from lazyreplica.config import Options
from lazyreplica.export import export_snapshot
from lazyreplica.ltx.name import format_txid, parse_txid
from lazyreplica_vfs.file import file_of

if TYPE_CHECKING:
    from lazyreplica.stats import Stats


def connect(url: str, *, time: object = None, txid: object = None, **options: object) -> apsw.Connection:
    """A read-only connection to the replica at `url`. Options are those of `Options`.

    `time` or `txid` opens it at that moment of the past: what ``PRAGMA litestream_time`` and ``litestream_txid`` take,
    a `datetime` (UTC if it names no zone), or a TXID as a number.

    Raises an `apsw.CantOpenError` that is also the specific error of `lazyreplica.errors`; `ConfigError` for an option
    that does not exist.
    """
    Options().updated(options, "connect()")
    name = url.partition("?")[0].rstrip("/").rpartition("/")[2] or "replica"
    moment = {"time": time, "txid": format_txid(txid) if isinstance(txid, int) else txid}
    given = {key: _text(value) for key, value in {**options, **moment}.items() if value is not None}
    query = urlencode({"vfs": "litestream", "replica_url": url, **given}, quote_via=quote)
    return apsw.Connection(f"file:{quote(name)}?{query}", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)


def _text(value: object) -> str:
    """An option's value as a URI parameter."""
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(sorted(map(str, value))) or "none"
    return str(value)


def refresh(connection: apsw.Connection, schema: str = "main") -> str:
    """Poll the replica now and return its newest TXID (16 hex digits).

    The connection sees it in its next read transaction. Raises `StoreError` and its kin when the store cannot be asked.
    """
    replica = file_of(connection, schema).replica
    replica.refresh()
    return format_txid(replica.head.txid)


def export(connection: apsw.Connection, path: str | os.PathLike[str], schema: str = "main") -> str:
    """Write what the connection sees to a plain SQLite database file at `path`, and return its TXID (16 hex digits).

    In a read transaction that is what it has pinned, else the newest state. The file appears whole, in place of one
    that is there. Raises `OSError`, `StoreError` and its kin.
    """
    file = file_of(connection, schema)
    with file.pinned() as snapshot:
        export_snapshot(file.replica, snapshot, Path(path))
        return format_txid(snapshot.txid)


def stats(connection: apsw.Connection, schema: str = "main") -> Stats:
    """What the replica behind a connection has done since it was opened, and where it stands.

    It is shared by all connections of this process that have the same URL. Raises `ConfigError`.
    """
    return file_of(connection, schema).replica.stats()


def wait_for(connection: apsw.Connection, txid: int | str, timeout: float = 10.0, schema: str = "main") -> None:
    """Wait until the replica has reached `txid` (a number, or 16 hex digits): read your writes.

    The connection sees it in its next read transaction. Raises `WaitTimeout` after `timeout` seconds.
    """
    file_of(connection, schema).replica.wait_for(parse_txid(txid) if isinstance(txid, str) else txid, timeout)
