"""Comparing databases, whatever library opened them."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

# Litestream keeps its own books in the primary; they change without any commit of the application's.
LITESTREAM_TABLES = ("_litestream_lock", "_litestream_seq")


class Connection(Protocol):
    """What sqlite3.Connection and apsw.Connection have in common."""

    def execute(self, sql: str, /) -> Iterable[Any]: ...


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quote_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def schema(con: Connection, *, ignore: Sequence[str] = LITESTREAM_TABLES) -> list[tuple[Any, ...]]:
    rows = con.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name")
    return [tuple(row) for row in rows if row[2] not in ignore]


def tables(con: Connection, *, ignore: Sequence[str] = LITESTREAM_TABLES) -> list[str]:
    return [row[1] for row in schema(con, ignore=ignore) if row[0] == "table"]


def _typed(row: Sequence[Any]) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in row]


def assert_same_rows(a: Connection, b: Connection, *, ignore: Sequence[str] = LITESTREAM_TABLES) -> int:
    """Both hold the same schema and, table by table, the same rows in the same order. Returns how many rows.

    NOT INDEXED makes both read the table itself, in the order of its key, so nothing has to be sorted.
    """
    assert schema(a, ignore=ignore) == schema(b, ignore=ignore)
    count = 0
    for table in tables(a, ignore=ignore):
        query = f"SELECT * FROM {quote_name(table)} NOT INDEXED"
        for number, (row_a, row_b) in enumerate(zip_longest(a.execute(query), b.execute(query))):
            assert row_a is not None and row_b is not None, f"{table}: one side ends after {number} rows"
            # 1 == 1.0 in Python, not in a file
            assert row_a == row_b and _typed(row_a) == _typed(row_b), f"{table}: row {number} differs"
            count += 1
    return count


def assert_intact(con: Connection) -> None:
    """SQLite itself finds nothing wrong: every page is reachable once, every index matches its table."""
    assert [row[0] for row in con.execute("PRAGMA integrity_check")] == ["ok"]


def assert_same_files(a: Path, b: Path) -> int:
    """:func:`assert_same_rows` for two plain databases, each also intact."""
    with closing(sqlite3.connect(a)) as con_a, closing(sqlite3.connect(b)) as con_b:
        assert_intact(con_a)
        assert_intact(con_b)
        return assert_same_rows(con_a, con_b)
