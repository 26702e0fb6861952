"""The rows of a query, printed: as tables in a terminal, as tab-separated lines, or as objects for JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import apsw

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Result:
    """What one statement gave."""

    names: tuple[str, ...]
    rows: list[tuple[apsw.SQLiteValue, ...]] = field(default_factory=list)


def run(connection: apsw.Connection, sql: str) -> list[Result]:
    """Run one or more statements; a result for each run of rows with the same columns."""
    cursor = connection.cursor()
    results: list[Result] = []

    def begin(cursor: apsw.Cursor, *_: object) -> bool:
        """Called for each statement before its first row, also for one that gives none."""
        results.append(Result(_names(cursor)))
        return True

    cursor.exec_trace = begin
    for row in cursor.execute(sql):
        results[-1].rows.append(row)
    return [result for result in results if result.names]


def _names(cursor: apsw.Cursor) -> tuple[str, ...]:
    return tuple(column[0] for column in cursor.get_description())


def as_objects(results: list[Result]) -> list[dict[str, object]]:
    """Rows as JSON objects; columns of equal names get a number."""
    return [
        dict(zip(_distinct(result.names), map(_json_value, row), strict=True))
        for result in results
        for row in result.rows
    ]


def print_tabs(results: list[Result]) -> None:
    """A line of names, and a line a row."""
    for result in results:
        print("\t".join(result.names))
        for row in result.rows:
            print("\t".join(map(_text, row)))


def print_tables(results: list[Result], out: Console) -> None:
    """Drawn, for people."""
    from rich.table import Table
    from rich.text import Text

    for result in results:
        table = Table()
        for name in result.names:
            table.add_column(Text(name))
        for row in result.rows:
            table.add_row(*(Text(_text(value)) for value in row))
        out.print(table)


def _distinct(names: tuple[str, ...]) -> list[str]:
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}:{seen[name] - 1}")
    return distinct


def _json_value(value: apsw.SQLiteValue) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it
    return value


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    return "" if value is None else str(value)
