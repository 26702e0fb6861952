"""Replicas made by hand, file by file, so that any one of them can be made wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

import lazyreplica
from lazyreplica.errors import LazyReplicaError
from lazyreplica.ltx import FLAG_NO_CHECKSUM, FileName, Header, encode_file
from support.servers import S3Server

SECONDS = 10.0
"""What the tests call "within seconds": generous, for a busy machine."""

STILL = {"poll_interval": 0, "hydrate": False}
"""Options of a replica that does nothing by itself."""

AT_OPEN: tuple[type[apsw.Error], ...] = (apsw.CantOpenError,)
AT_OPEN_OR_QUERY: tuple[type[apsw.Error], ...] = (apsw.CantOpenError, apsw.IOError)
"""Damage in what is read only when it is needed: SQLite reads some of it to open the database, or a query does."""


def pages_of(database: Path, page_size: int = 4096) -> dict[int, bytes]:
    """All pages of a database file by number."""
    data = database.read_bytes()
    assert len(data) % page_size == 0
    return {at // page_size + 1: data[at : at + page_size] for at in range(0, len(data), page_size)}


def ltx(pages: Mapping[int, bytes], commit: int, low: int, high: int, **fields: Any) -> bytes:
    """An LTX file of those pages, as Litestream 0.5.16 would write it."""
    page_size = fields.pop("page_size", None) or len(next(iter(pages.values()), bytes(4096)))
    header = Header(FLAG_NO_CHECKSUM, page_size, commit, low, high, fields.pop("timestamp_ms", 1_700_000_000_000))
    return encode_file(header, sorted(pages.items()), **fields)


def put(replica: Path, level: int, low: int, high: int, data: bytes) -> Path:
    """Store a file of a ``file://`` replica under the name that those TXIDs make."""
    path = replica / "ltx" / str(level) / str(FileName(low, high))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@dataclass(frozen=True)
class History:
    """Three states of one database, each as an LTX file, and the rows of each."""

    page_size: int
    files: tuple[bytes, bytes, bytes]
    """1-1 (a snapshot), 2-2 and 3-3, which change some pages."""
    rows: tuple[list[tuple[Any, ...]], ...]

    def write(self, replica: Path, *numbers: int) -> str:
        """Put the files (all, or those of the TXIDs given) into level 0, and return the replica's URL."""
        for number in numbers or (1, 2, 3):
            put(replica, 0, number, number, self.files[number - 1])
        return f"file://{replica}"


def make_history(directory: Path, page_size: int = 4096, rows: int = 400) -> History:
    path = directory / f"history-{page_size}-{rows}.db"
    files, seen = [], []
    before: dict[int, bytes] = {}
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as con:
        con.execute(f"PRAGMA page_size = {page_size}")
        con.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, word TEXT, number INT)")
        for txid in (1, 2, 3):
            con.execute("BEGIN")
            if txid == 1:
                # words that differ, so that an exchanged page shows
                con.executemany(
                    "INSERT INTO t VALUES (?, ?, 1)", ((i, f"{i * 7919 % 10007:05d} " * 8) for i in range(rows))
                )
                con.execute("CREATE INDEX t_by_word ON t(word)")
            elif txid == 2:
                con.execute("UPDATE t SET number = 2")
            else:
                con.execute("UPDATE t SET number = 3 WHERE id % 50 = 0")
            con.execute("COMMIT")
            pages = pages_of(path, page_size)
            changed = {number: page for number, page in pages.items() if before.get(number) != page}
            files.append(ltx(changed, len(pages), txid, txid))
            seen.append(con.execute("SELECT * FROM t ORDER BY id").fetchall())
            before = pages
    return History(page_size, (files[0], files[1], files[2]), tuple(seen))


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@contextlib.contextmanager
def opened(url: str, **options: Any) -> Iterator[apsw.Connection]:
    connection = lazyreplica.connect(url, **options)
    try:
        yield connection
    finally:
        connection.close()


def read(url: str, **options: Any) -> list[tuple[Any, ...]]:
    """Every row of the history's table, in a connection of its own."""
    with opened(url, **{**STILL, **options}) as connection:
        return connection.execute("SELECT * FROM t ORDER BY id").fetchall()


def failure(
    url: str, ours: type[LazyReplicaError], theirs: tuple[type[apsw.Error], ...] = AT_OPEN, **options: Any
) -> str:
    """The message of the exception that reading `url` ends with, within seconds; both families catch it."""
    started = time.monotonic()
    try:
        rows = read(url, **options)
    except apsw.Error as exc:
        assert isinstance(exc, theirs), f"{type(exc).__mro__}: {exc}"
        assert isinstance(exc, ours), f"{type(exc).__mro__}: {exc}"
        assert type(exc).__name__ == ours.__name__, type(exc)
        assert exc.result == theirs_code(exc), exc.result
        assert exc.extendedresult & 0xFF == exc.result
        assert time.monotonic() - started < SECONDS
        return str(exc)
    raise AssertionError(f"read {len(rows)} rows, expected {ours.__name__}")


def theirs_code(exc: apsw.Error) -> int:
    return apsw.SQLITE_CANTOPEN if isinstance(exc, apsw.CantOpenError) else apsw.SQLITE_IOERR


def right_or_failure(url: str, right: list[tuple[Any, ...]], ours: type[LazyReplicaError]) -> str:
    """The message of the exception; empty when all rows came, and were right."""
    try:
        rows = read(url)
    except apsw.Error as exc:
        assert isinstance(exc, AT_OPEN_OR_QUERY) and isinstance(exc, ours), f"{type(exc).__mro__}: {exc}"
        return str(exc)
    assert rows == right, "other rows came out"
    return ""


def upload(server: S3Server, bucket: str, history: History, path: str = "app") -> str:
    """Put the history's files into level 0 of a replica in a bucket, and return its URL."""
    for txid, data in enumerate(history.files, 1):
        key = f"{path}/0000/{FileName(txid, txid)}"
        if server.root is None:
            server.client().put_object(Bucket=bucket, Key=key, Body=data)
        else:
            target = server.root / bucket / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return server.url(bucket, path)
