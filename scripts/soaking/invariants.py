"""The database that the soak writes, and what holds in each of its states."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

START_BALANCE = 1000
ACCOUNTS = 2000
KINDS = 12
EXTRA = "extra_"
"""Columns that ALTER TABLE adds are called ``extra_N``, and hold N in every row."""

SCHEMA = """
CREATE TABLE accounts(id INTEGER PRIMARY KEY, owner TEXT NOT NULL, balance INTEGER NOT NULL);
CREATE TABLE chain(n INTEGER PRIMARY KEY, payload TEXT NOT NULL, hash BLOB NOT NULL);
CREATE TABLE events(id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, weight INTEGER NOT NULL, note TEXT NOT NULL);
CREATE INDEX events_by_kind ON events(kind, weight);
CREATE TABLE counters(kind INTEGER PRIMARY KEY, n INTEGER NOT NULL, total INTEGER NOT NULL);
CREATE TABLE blobs(id INTEGER PRIMARY KEY, size INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE pulse(id INTEGER PRIMARY KEY CHECK (id = 1), n INTEGER NOT NULL, at REAL NOT NULL, head BLOB NOT NULL);
"""
_LINKS = 150
"""Links of the hash chain that one check follows."""


class Connection(Protocol):
    """What sqlite3.Connection and apsw.Connection have in common."""

    def execute(self, sql: str, bindings: Any = (), /) -> Iterable[Any]: ...


class Anomaly(Exception):
    """A state that the primary never had."""


@dataclass(frozen=True)
class Moment:
    """What one look at the database saw."""

    n: int
    """The primary's transaction; it counts them itself."""
    at: float
    """When that was, by the primary's clock."""
    digest: str
    """Of the sums and counters: equal for equal `n`, whoever looks."""


def link(before: bytes, n: int, payload: str) -> bytes:
    """The hash of a link of the chain."""
    return hashlib.sha256(before + f"{n}:{payload}".encode()).digest()


def look(con: Connection) -> Moment:
    """The sums and counters, each checked. Run it in a read transaction. Raises `Anomaly`."""
    ((n, at, head),) = con.execute("SELECT n, at, head FROM pulse")
    ((count, total),) = con.execute("SELECT count(*), sum(balance) FROM accounts")
    _same("the sum of all balances", (count, total), (ACCOUNTS, ACCOUNTS * START_BALANCE), n)
    ((last, newest),) = con.execute("SELECT n, hash FROM chain ORDER BY n DESC LIMIT 1")
    _same("the end of the hash chain", (last, newest), (n, head), n)
    counters = [tuple(row) for row in con.execute("SELECT kind, n, total FROM counters WHERE n > 0 ORDER BY kind")]
    grouped = "SELECT kind, count(*), sum(weight) FROM events {} GROUP BY kind ORDER BY kind"
    indexed = [tuple(row) for row in con.execute(grouped.format("INDEXED BY events_by_kind"))]
    _same("counters and the index", indexed, counters, n)
    return Moment(n, at, hashlib.sha256(repr((n, at, head, total, counters)).encode()).hexdigest()[:16])


def look_closely(con: Connection, rng: random.Random, *, integrity: bool) -> None:
    """What takes longer: a piece of the chain, tables against indexes, blobs. Raises `Anomaly`."""
    ((n,),) = con.execute("SELECT n FROM pulse")
    first = rng.randrange(max(1, n - _LINKS + 1)) if n else 0
    before = b""
    expected = first
    for number, payload, found in con.execute(
        "SELECT n, payload, hash FROM chain WHERE n >= ? ORDER BY n LIMIT ?", (first, _LINKS)
    ):
        _same("the hash chain's numbers", number, expected, n)
        if before or number == 0:
            _same(f"link {number} of the hash chain", bytes(found), link(before, number, payload), n)
        before = bytes(found)
        expected += 1
    indexed = [tuple(row) for row in con.execute("SELECT count(*), sum(weight) FROM events INDEXED BY events_by_kind")]
    table = [tuple(row) for row in con.execute("SELECT count(*), sum(weight) FROM events NOT INDEXED")]
    _same("the table and its index", indexed, table, n)
    for row in list(con.execute("PRAGMA table_info(events)")):
        name = row[1]
        if name.startswith(EXTRA):
            ((wrong,),) = con.execute(f"SELECT count(*) FROM events WHERE {name} IS NOT {int(name[len(EXTRA) :])}")
            _same(f"rows in which {name} is wrong", wrong, 0, n)
    ids = [row[0] for row in con.execute("SELECT id FROM blobs")]
    for chosen in rng.sample(ids, min(2, len(ids))):
        ((size, crc, data),) = con.execute("SELECT size, crc, data FROM blobs WHERE id = ?", (chosen,))
        _same(f"blob {chosen}", (len(data), zlib.crc32(data)), (size, crc), n)
    if integrity:
        _same("integrity_check", [row[0] for row in con.execute("PRAGMA integrity_check")], ["ok"], n)


def _same(what: str, found: object, expected: object, n: int) -> None:
    if found != expected:
        raise Anomaly(f"{what} at transaction {n}: {str(found)[:300]}, expected {str(expected)[:300]}")
