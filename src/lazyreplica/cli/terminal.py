"""How results and progress are shown: tables and bars for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def progress_bar(err: Console) -> Progress:
    """A progress bar on standard error; silent where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def print_json(value: object) -> None:
    """One JSON document, with letters as they are where the output can show them."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False))


def print_rows(out: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], right: str = "") -> None:
    """A table for people; a line of tab-separated values a row where nobody looks.

    `right` has an ``r`` at the place of each column that is aligned to the right.
    """
    if not out.is_terminal:
        print("\t".join(columns))
        for row in rows:
            print("\t".join(map(str, row)))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        numeric = right[number : number + 1] == "r"
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    out.print(table)


def print_facts(out: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Lines of a name and what there is to say about it."""
    from rich.table import Table
    from rich.text import Text

    facts = list(facts)
    if not out.is_terminal:  # nothing is wrapped
        width = max((len(name) for name, _ in facts), default=0)
        for name, value in facts:
            print(f"{name:<{width}}  {value}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    out.print(table)


def format_count(number: int, what: str) -> str:
    """1 file, 2,000 files."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_size(size: float) -> str:
    """Bytes for people: 1.4 MiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def format_time(seconds: float) -> str:
    """Seconds since the Unix epoch as UTC, to the second."""
    return iso_time(seconds)[:19].replace("T", " ") + " UTC"


def iso_time(seconds: float) -> str:
    """Seconds since the Unix epoch for programs: RFC 3339, to the millisecond."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # a header may hold any number
        return f"{seconds:.3f}"


def format_duration(seconds: float) -> str:
    """A span for people, in one unit: 45 s, 12 min, 3.5 h, 2.0 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} d"
