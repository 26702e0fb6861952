"""``lazyreplica timeline``: the hierarchy of a replica's files, drawn."""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil, isfinite
from operator import itemgetter
from typing import TYPE_CHECKING

from lazyreplica.cli.arguments import add_command, add_json, add_url, open_replica, txid
from lazyreplica.cli.listing import list_files, read_headers
from lazyreplica.cli.terminal import format_count, format_size, format_time, iso_time, print_json
from lazyreplica.ltx.name import format_txid
from lazyreplica.plan import Chain, plan
from lazyreplica.storage import LEVELS, SNAPSHOT_LEVEL, StoredFile
from lazyreplica.verify import Hole, find_holes, newest_chain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_MARGIN = 4
_COUNTS = 24
_NARROW = 42
"""Columns: level at the left, files and bytes at the right, the least that the drawing takes (two dates)."""
_MIDDLE, _DATES = 48, 66
"""From so many columns on there is a TXID in the middle, and a date with it."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "timeline",
        run,
        summary="draw the levels of a replica, and the files that make a state",
        description="Draw a replica's files: a row for each level, snapshots (9) on top, TXIDs from left to right. "
        "Heavy lines are the files that make the newest state, or that of --txid: what a reader opens, and what "
        "`litestream restore` fetches.",
        examples=[
            "lazyreplica timeline s3://bucket/app",
            "lazyreplica timeline --by time s3://bucket/app",
            "lazyreplica timeline --txid 1 s3://bucket/app",
            "lazyreplica timeline --json s3://bucket/app",
        ],
    )
    add_url(parser)
    parser.add_argument("--by", choices=("txid", "time"), default="txid", help="what the columns are (default: txid)")
    parser.add_argument("--txid", type=txid, metavar="N", help="show the files that make the state at this TXID")
    parser.add_argument(
        "--headers", action="store_true", help="take times from the files' headers, a request each, not from the store"
    )
    add_json(parser, "a JSON object")


def run(args: argparse.Namespace, out: Console, err: Console) -> int:
    with closing(open_replica(args.url)) as store:
        files = list_files(store, err).files
        headers = read_headers(store, files, err) if args.headers else {}
    dates = {file: headers[file].timestamp_ms / 1000 if file in headers else file.modified for file in files}
    chain = newest_chain(files) if args.txid is None else plan(files, args.txid)
    holes = find_holes(files)
    if args.json:
        print_json(_as_object(files, chain, holes, dates))
        return 0
    clock = Clock(dates)
    width = max(out.width, _MARGIN + _NARROW + _COUNTS)
    for drawn in _draw(files, chain, holes, clock, args.by, width, _signs(out)):
        out.print(drawn, highlight=False, no_wrap=True, crop=False, overflow="ignore")
    for line in _explain(chain, holes, args.txid):
        out.print(line, highlight=False, soft_wrap=True)
    return 0


class Clock:
    """When the primary reached a TXID, as far as the files that are there tell."""

    def __init__(self, dates: dict[StoredFile, float]) -> None:
        earliest: dict[int, float] = {}
        for file, date in dates.items():  # of files that end alike the compacted ones are newer objects
            end = file.name.max_txid
            earliest[end] = min(date, earliest.get(end, date))
        self._txids = sorted(earliest)
        self._times = [earliest[end] for end in self._txids]
        for at in range(len(self._times) - 2, -1, -1):  # a transaction is no younger than the ones after it
            self._times[at] = min(self._times[at], self._times[at + 1])

    def at(self, txid: int) -> float:
        """Seconds since the Unix epoch: of the newest known TXID that is not above, else of the first known."""
        return self._times[max(0, bisect_right(self._txids, txid) - 1)]


@dataclass(frozen=True, slots=True)
class Signs:
    """What is drawn: for files of the chain, and for others."""

    line: str
    end: str
    many: str
    snapshot: str
    tick: str


HEAVY, LIGHT = Signs("━", "╸", "█", "◆", "╷"), Signs("─", "╴", "▒", "◇", "╷")
PLAIN_HEAVY, PLAIN_LIGHT = Signs("=", ">", "#", "@", "|"), Signs("-", ")", ":", "o", "|")
"""Where the output cannot show the others."""


def _signs(out: Console) -> tuple[Signs, Signs]:
    return (HEAVY, LIGHT) if out.encoding.lower().startswith("utf") else (PLAIN_HEAVY, PLAIN_LIGHT)


@dataclass(frozen=True, slots=True)
class Axis:
    """Columns, and where on them a TXID lies."""

    place: Callable[[int], float]
    low: int
    """The TXID before the first column."""
    high: int
    width: int
    scale: float
    """Columns for each unit of `place`."""

    def column(self, txid: int) -> int:
        """The column in which the state `txid` is reached."""
        if not self.scale:
            return self.width - 1
        share = (self.place(txid) - self.place(self.low)) * self.scale
        return min(self.width - 1, max(0, ceil(share) - 1))

    def columns(self, first: int, last: int) -> range:
        """The columns of transactions `first` to `last`, one at least."""
        stop = self.column(last)
        start = (self.place(max(first - 1, self.low)) - self.place(self.low)) * self.scale
        return range(min(stop, int(start)), stop + 1)


def make_axis(files: Sequence[StoredFile], clock: Clock, by: str, width: int) -> Axis:
    """From the oldest state that a file begins from, or makes, to the newest."""
    snapshots = [file.name.max_txid for file in files if file.level == SNAPSHOT_LEVEL]
    others = [file.name.min_txid for file in files if file.level != SNAPSHOT_LEVEL]
    low = min([*snapshots, *others]) - 1
    high = max(file.name.max_txid for file in files)
    place = clock.at if by == "time" else float
    span = place(high) - place(low)
    scale = width / span if span > 0 else 0.0
    return Axis(place, low, high, width, scale if isfinite(scale) else 0.0)


def draw_level(
    files: Sequence[StoredFile], chain: frozenset[StoredFile], axis: Axis, heavy: Signs, light: Signs
) -> list[tuple[str, bool]]:
    """A sign for each column of a level's row, and whether it belongs to the chain.

    A file is a line that ends in a half one, so that neighbours can be told apart; a column in which several files end
    is a block; a snapshot is the point at which it was made.
    """
    cells: list[tuple[str, bool]] = [(" ", False)] * axis.width
    ends = [0] * axis.width
    # The chain is drawn last: of a column that both need, the chain is what matters. And ends over lines: a file begins
    # in the column in which the one before it ends.
    ordered = sorted(((file.name, file in chain) for file in files), key=itemgetter(1))
    if files and files[0].level != SNAPSHOT_LEVEL:
        for name, used in ordered:
            cell = (heavy.line if used else light.line, used)
            for column in axis.columns(name.min_txid, name.max_txid):
                cells[column] = cell
    for name, used in ordered:
        signs = heavy if used else light
        last = axis.column(name.max_txid)
        ends[last] += 1
        end = signs.snapshot if name.is_snapshot else signs.many if ends[last] > 1 else signs.end
        cells[last] = (end, used)
    return cells


def _draw(
    files: Sequence[StoredFile],
    chain: Chain,
    holes: Sequence[Hole],
    clock: Clock,
    by: str,
    width: int,
    signs: tuple[Signs, Signs],
) -> list[Text]:
    from rich.text import Text

    axis = make_axis(files, clock, by, width - _MARGIN - _COUNTS)
    used = frozenset(chain)
    lines = [Text(" " * _MARGIN + label, style="dim") for label in _labels(axis, clock, signs[0].tick)]
    for level in reversed(LEVELS):
        row = [file for file in files if file.level == level]
        if not row and level not in (0, SNAPSHOT_LEVEL):
            continue
        line = Text(f"{level:>2}  ", style="bold")
        for sign, chained in draw_level(row, used, axis, *signs):
            line.append(sign, style="not bold green" if chained else "not bold dim")
        size = format_size(sum(file.size for file in row)) if row else ""
        line.append(f"{len(row) or '':>11,}" if row else " " * 11, style="not bold")
        line.append(f"{size:>{_COUNTS - 11}}", style="not bold dim")
        lines.append(line)
    if holes:
        line = Text(" !  ", style="bold red")
        missing = {column for hole in holes for column in axis.columns(hole.first, hole.last)}
        line.append("".join("x" if column in missing else " " for column in range(axis.width)), style="red")
        line.append(f"{'missing':>11}", style="red")
        lines.append(line)
    lines.append(_legend(*signs))
    return lines


def _labels(axis: Axis, clock: Clock, tick: str) -> list[str]:
    """The first, a middle and the last TXID, and when they were reached."""
    first, last = min(axis.low + 1, axis.high), axis.high
    marks = [(0, first), (axis.width - 1, last)]
    middle = axis.width // 2
    between = _txid_at(axis, middle)
    if axis.width >= _MIDDLE and first < between < last:
        marks.insert(1, (middle, between))
    txids = _spread([(column, f"{txid:x}") for column, txid in marks], axis.width)
    dated = marks if axis.width >= _DATES else [marks[0], marks[-1]]
    times = _spread([(column, format_time(clock.at(txid))[:19]) for column, txid in dated], axis.width)
    ticks = _spread([(column, tick) for column, _ in marks], axis.width)
    return [f"{txids}   TXID (hexadecimal)", f"{times}   UTC", ticks]


def _txid_at(axis: Axis, column: int) -> int:
    """The first TXID that is reached in `column`, or behind it."""
    low, high = axis.low + 1, axis.high
    while low < high:
        middle = (low + high) // 2
        if axis.column(middle) < column:
            low = middle + 1
        else:
            high = middle
    return low


def _spread(marks: Sequence[tuple[int, str]], width: int) -> str:
    """Words at their columns: the first begins there, the last ends there, others are centred."""
    line = [" "] * width
    for number, (column, word) in enumerate(marks):
        start = column if number == 0 else column - (len(word) - 1 if number == len(marks) - 1 else len(word) // 2)
        start = max(0, min(start, width - len(word)))
        line[start : start + len(word)] = word
    return "".join(line)


def _legend(heavy: Signs, light: Signs) -> Text:
    from rich.text import Text

    line = Text(" " * _MARGIN)
    for sign, meaning in (
        (heavy.line + heavy.end, "used"),
        (light.line + light.end, "not used"),
        (heavy.many + light.many, "several files"),
        (heavy.snapshot + light.snapshot, "snapshot"),
    ):
        line.append(sign, style="green" if sign.startswith(heavy.line) else "")
        line.append(f" {meaning}   ", style="dim")
    return line


def _explain(chain: Chain, holes: Sequence[Hole], wanted: int | None) -> list[str]:
    lines = [f"{hole}" for hole in holes]
    if not chain:
        return [*lines, "No state can be made of these files; see `lazyreplica verify`."]
    reached = chain[-1].name.max_txid
    parts = []
    for level in dict.fromkeys(file.level for file in chain):
        count = sum(file.level == level for file in chain)
        parts.append(f"{count} of level {level}")
    size = format_size(sum(file.size for file in chain))
    which = "The newest state" if wanted is None else "The state"
    lines.append(
        f"{which}, TXID {format_txid(reached)}: {format_count(len(chain), 'file')}, {size} ({', '.join(parts)})"
    )
    if wanted is not None and wanted != reached:
        lines.append(
            f"TXID {format_txid(wanted)} cannot be had: no file ends there. This is the newest one below that can."
        )
    return lines


def _as_object(
    files: Sequence[StoredFile], chain: Chain, holes: Sequence[Hole], dates: dict[StoredFile, float]
) -> dict[str, object]:
    def span(file: StoredFile) -> dict[str, object]:
        low, high = format_txid(file.name.min_txid), format_txid(file.name.max_txid)
        return {"level": file.level, "min_txid": low, "max_txid": high, "created": iso_time(dates[file])}

    return {
        "txid": format_txid(chain[-1].name.max_txid) if chain else None,
        "chain": [span(file) for file in chain],
        "holes": [{"first": format_txid(hole.first), "last": format_txid(hole.last)} for hole in holes],
        "levels": [
            {"level": level, "bytes": sum(file.size for file in row), "files": [span(file) for file in row]}
            for level in reversed(LEVELS)
            if (row := [file for file in files if file.level == level])
        ],
    }
